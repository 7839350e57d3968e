"""Chapter 13's exercises, solved; and wrong answers that look right."""


def bytes_that_cross(prompt_tokens, held_tokens, token_bytes, state_bytes):
    return (prompt_tokens - held_tokens) * token_bytes + state_bytes


def largest_part(ttft_s, queue_s, prefill_s, exposed_s, admit_s):
    parts = {"queue": queue_s, "prefill": prefill_s, "exposed": exposed_s, "admit": admit_s}
    parts["route"] = ttft_s - sum(parts.values())
    name = max(parts, key=parts.get)
    return name, parts[name] / ttft_s


def state_by_share(prompt_tokens, held_tokens, token_bytes, state_bytes):  # as if the state came in rows, too
    return (prompt_tokens - held_tokens) * (token_bytes * prompt_tokens + state_bytes) // prompt_tokens


def without_route(ttft_s, queue_s, prefill_s, exposed_s, admit_s):
    parts = {"queue": queue_s, "prefill": prefill_s, "exposed": exposed_s, "admit": admit_s}
    name = max(parts, key=parts.get)
    return name, parts[name] / ttft_s


WRONG = {"bytes_that_cross": state_by_share, "largest_part": without_route}
