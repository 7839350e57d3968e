"""Chapter 08's exercises, solved; and wrong answers that look right."""


def final_pieces(kinds, tokens, chunk_tokens):
    pieces = []
    for start in range(0, tokens, chunk_tokens):
        end = min(start + chunk_tokens, tokens)
        for layer, kind in enumerate(kinds):
            if kind == "f":
                pieces.append((layer, start, end))
            elif end == tokens:
                pieces.append((layer, 0, tokens))
    return pieces


def done_s(pieces, gbps, rtt_s):
    free_s = 0.0
    for final_s, nbytes in pieces:
        free_s = max(free_s, final_s) + nbytes * 8 / (gbps * 1e9)
    return free_s + rtt_s


def hidden_share(prefill_s, transfer_s, acked_s, rtt_s):
    tail_s = max(0.0, acked_s - rtt_s - prefill_s)
    return max(0.0, 1 - tail_s / transfer_s)


def _a_state_with_each_chunk(kinds, tokens, chunk_tokens):
    return [(layer, start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)
            for layer in range(len(kinds))]


WRONG = {
    "final_pieces": _a_state_with_each_chunk,
    "done_s": lambda pieces, gbps, rtt_s: pieces[-1][0] + sum(n for _, n in pieces) * 8 / (gbps * 1e9) + rtt_s,  # after
    "hidden_share": lambda prefill_s, transfer_s, acked_s, rtt_s: 1 - (acked_s - prefill_s) / transfer_s,  # with R
}
