"""Chapter 04's exercises, solved; and wrong answers that look right."""


def least_seconds(weights, tokens, weight_bytes, flops_per_s, bytes_per_s):
    return max(2 * weights * tokens / flops_per_s, weights * weight_bytes / bytes_per_s)


def requests_that_fit(memory_bytes, weights_bytes, token_bytes, state_bytes, tokens):
    return max(memory_bytes - weights_bytes, 0) // (token_bytes * tokens + state_bytes)


def prefill_chunks(tokens, cached_tokens, chunk):
    return [(start, min(start + chunk, tokens)) for start in range(cached_tokens, tokens, chunk)]


WRONG = {
    "least_seconds": lambda weights, tokens, size, flops_per_s, bytes_per_s:  # one after the other
        2 * weights * tokens / flops_per_s + weights * size / bytes_per_s,
    "requests_that_fit": lambda memory, weights, token, state, tokens: (memory - weights) // (token * tokens),
    "prefill_chunks": lambda tokens, cached, chunk: [(start, start + chunk) for start in range(cached, tokens, chunk)],
}
