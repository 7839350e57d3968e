"""The exercises of chapter 08. Fill in the functions, then: python tutorials/08_layerwise_streaming.py --check 1"""

from collections.abc import Sequence

from exercises.checking import first_wrong

from minprfaas.config import LineConfig, StateKind
from minprfaas.transport.base import LayerPlan, StreamPlan
from minprfaas.transport.streams import Piece, PlanCoverage
from minprfaas.transport.wan.line import EmulatedLine


def final_pieces(kinds: str, tokens: int, chunk_tokens: int) -> list[tuple[int, int, int]]:
    """What becomes final in a prefill of `tokens` tokens, in chunks of `chunk_tokens` (the last may be shorter), as
    (layer, start, end) in the order in which it does: chunk by chunk, and in each layer by layer. `kinds` has a letter
    for each layer: "f" is full attention, "l" linear, whose state counts as (layer, 0, tokens) and comes once."""
    raise NotImplementedError


def done_s(pieces: Sequence[tuple[float, int]], gbps: float, rtt_s: float) -> float:
    """When the last byte is acknowledged. A piece is (second at which it is final, bytes), in rising order; the line of
    `gbps` (10^9 bits/s) carries one at a time; the acknowledgement comes a round trip after the last bit has left."""
    raise NotImplementedError


def hidden_share(prefill_s: float, transfer_s: float, acked_s: float, rtt_s: float) -> float:
    """The share of a transfer that prefill hid, from 0 to 1. `prefill_s` is when prefill ended and `acked_s` when the
    last byte was acknowledged, both from its start; `transfer_s` is what the whole transfer takes alone. The round trip
    `rtt_s` is nobody's fault, and is left out."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against what a plan takes, piece by piece, until it is complete."""
    cases = (("f", 100, 25), ("llf", 100, 50), ("lllflllf", 96, 32), ("fl", 70, 32), ("lf", 10, 64))
    for kinds, tokens, chunk in cases:
        entries = tuple(LayerPlan(layer, 0, StateKind.TOKEN if kind == "f" else StateKind.REQUEST, 8)
                        for layer, kind in enumerate(kinds))
        coverage, got = PlanCoverage(StreamPlan(1, entries, 0, tokens)), final_pieces(kinds, tokens, chunk)
        ends = [min(start + chunk, tokens) for start in range(0, tokens, chunk)]
        places = [(end, layer) for end in ends for layer, kind in enumerate(kinds) if kind == "f" or end == tokens]
        call = f"final_pieces({kinds!r}, {tokens}, {chunk})"
        if [(end, layer) for layer, _, end in got] != places:
            return f"{call}: expected (end, layer) in the order {places}, got {[(end, layer) for layer, _, end in got]}"
        for layer, start, end in got:
            try:
                coverage.add(Piece(layer, 0, start, end, 8 * (end - start) if kinds[layer] == "f" else 8))
            except ValueError as error:
                return f"{call}: expected each token once, got ({layer}, {start}, {end}): {error}"
    return None


def check_2() -> str | None:
    """Against the package's emulated line."""

    def expected(pieces: list[tuple[float, int]], gbps: float, rtt_s: float) -> float:
        line = EmulatedLine(LineConfig(gbps=gbps, rtt_ms=rtt_s * 1e3))
        line.begin(0.0)
        arrived_s = [line.carry(nbytes, queued_at_s=final_s, now_s=final_s) for final_s, nbytes in pieces]
        line.close()
        return arrived_s[-1] + rtt_s / 2

    cases = [([(0.1, 10**6), (0.2, 10**6)], 1.0, 0.02), ([(0.1, 10**6), (0.2, 10**6)], 0.05, 0.02),
             ([(0.1, 10**5), (0.9, 10**5), (0.91, 10**6)], 0.1, 0.0), ([(1.0, 10)], 10.0, 0.3)]
    return first_wrong(done_s, [(case, expected(*case)) for case in cases])


def check_3() -> str | None:
    """Against a count of the milliseconds in which the transfer ran alone."""

    def expected(prefill_s: float, transfer_s: float, acked_s: float, rtt_s: float) -> float:
        ends_ms = round((acked_s - rtt_s) * 1e3)
        alone_ms = sum(at >= round(prefill_s * 1e3) for at in range(ends_ms))
        return max(0, round(transfer_s * 1e3) - alone_ms) / round(transfer_s * 1e3)

    cases = [(1.28, 0.64, 1.34, 0.02), (1.28, 2.56, 2.66, 0.02), (1.28, 0.32, 1.62, 0.02), (1.0, 0.5, 0.9, 0.0),
             (1.0, 0.5, 1.9, 0.1)]
    return first_wrong(hidden_share, [(case, expected(*case)) for case in cases])
