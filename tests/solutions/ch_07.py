"""Chapter 07's exercises, solved; and wrong answers that look right."""

import math


def arrivals_s(frames, gbps, rtt_ms):
    free_s, arrived = 0.0, []
    for ready_s, nbytes in frames:
        free_s = max(free_s, ready_s) + nbytes * 8 / (gbps * 1e9)
        arrived.append(free_s + rtt_ms / 2e3)
    return arrived


def chunks_on_their_way(gbps, rtt_ms, chunk_bytes):
    return 1 + math.ceil(gbps * 1e9 * rtt_ms / 1e3 / (8 * chunk_bytes))


def uncovered(start, end, pieces):
    missing, at = [], start
    for first, last in sorted(pieces):
        if first > at:
            missing.append((at, first))
        at = last
    return missing + ([(at, end)] if at < end else [])


def _one_after_the_other(frames, gbps, rtt_ms):
    """Each frame waits until the one before has arrived."""
    arrived, at_s = [], 0.0
    for ready_s, nbytes in frames:
        at_s = max(at_s, ready_s) + nbytes * 8 / (gbps * 1e9) + rtt_ms / 2e3
        arrived.append(at_s)
    return arrived


WRONG = {
    "arrivals_s": _one_after_the_other,
    "chunks_on_their_way": lambda gbps, rtt_ms, chunk: max(1, math.ceil(gbps * 1e6 * rtt_ms / (8 * chunk))),  # its own
    "uncovered": lambda start, end, pieces: [(max([start, *(last for _, last in pieces)]), end)],  # the tail only
}
