"""Chapter 00's exercises, solved; and wrong answers that look right."""


def gqa_kv_bytes(layers, kv_heads, head_dim, tokens):
    return layers * kv_heads * head_dim * 2 * 2 * tokens  # a key and a value, two bytes a number


def lighter_from(dense_token_bytes, hybrid_token_bytes, hybrid_fixed_bytes):
    return hybrid_fixed_bytes // (dense_token_bytes - hybrid_token_bytes) + 1


def instances_that_fit(link_gbps, kvcache_bytes, prefill_s):
    return int(link_gbps / (kvcache_bytes * 8 / prefill_s / 1e9))


WRONG = {
    "gqa_kv_bytes": lambda layers, kv_heads, head_dim, tokens: layers * kv_heads * head_dim * 2 * tokens,  # no values
    "lighter_from": lambda dense, hybrid, fixed: -(-fixed // (dense - hybrid)),  # as heavy is not lighter
    "instances_that_fit": lambda gbps, size, prefill_s: int(gbps / (size / prefill_s / 1e9)),  # bytes are not bits
}
