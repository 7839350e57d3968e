"""The exercises of chapter 07. Fill in the functions, then: python tutorials/07_a_link.py --check 1"""

from collections.abc import Sequence

from exercises.checking import first_wrong

from minprfaas.config import LineConfig
from minprfaas.transport.wan.line import EmulatedLine


def arrivals_s(frames: Sequence[tuple[float, int]], gbps: float, rtt_ms: float) -> list[float]:
    """When the last bit of each frame is at the far end of a line of `gbps` (10^9 bits/s). A frame is (second at which
    it is ready to leave, bytes), in the order in which they leave; the line carries one at a time."""
    raise NotImplementedError


def chunks_on_their_way(gbps: float, rtt_ms: float, chunk_bytes: int) -> int:
    """The least number of chunks that must be allowed on their way, so that a line on which somebody always has more to
    send is never idle. A chunk's acknowledgement comes a round trip after its last bit has left."""
    raise NotImplementedError


def uncovered(start: int, end: int, pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which tokens of [start, end) are still missing, as (start, end) pairs in rising order, none touching the next.
    `pieces` are the ranges [start, end) that have come, in any order; none overlaps another."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's emulated line."""

    def expected(frames: list[tuple[float, int]], gbps: float, rtt_ms: float) -> list[float]:
        line = EmulatedLine(LineConfig(gbps=gbps, rtt_ms=rtt_ms))
        line.begin(0.0)
        arrived = [line.carry(nbytes, queued_at_s=ready_s, now_s=ready_s) for ready_s, nbytes in frames]
        line.close()
        return arrived

    cases = [([(0.0, 125_000)], 0.1, 0.0), ([(0.0, 125_000), (0.0, 125_000)], 0.1, 80.0),
             ([(0.0, 125_000), (0.005, 1000), (0.5, 125_000)], 0.1, 20.0), ([(1.0, 10**6), (1.001, 80)], 1.0, 10.0)]
    return first_wrong(arrivals_s, [(case, expected(*case)) for case in cases])


def check_2() -> str | None:
    """Against a line that is watched, chunk by chunk, with one more in the window each time."""

    def is_idle(window: int, enters_s: float, rtt_s: float) -> bool:
        free_s, acked_s = 0.0, []
        for number in range(200):
            room_s = acked_s[number - window] if number >= window else 0.0
            if room_s > free_s + 1e-12:
                return True
            free_s = max(free_s, room_s) + enters_s
            acked_s.append(free_s + rtt_s)
        return False

    cases = []
    for gbps, rtt_ms, chunk in ((0.1, 81.0, 65_536), (0.1, 0.0, 65_536), (1.0, 20.0, 262_144), (0.01, 5.0, 262_144)):
        window = 1
        while is_idle(window, chunk * 8 / (gbps * 1e9), rtt_ms / 1e3):
            window += 1
        cases.append(((gbps, rtt_ms, chunk), window))
    return first_wrong(chunks_on_their_way, cases)


def check_3() -> str | None:
    """Against a count of single tokens."""

    def expected(start: int, end: int, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        there = {token for first, last in pieces for token in range(first, last)}
        missing: list[tuple[int, int]] = []
        for token in range(start, end):
            if token in there:
                continue
            if missing and missing[-1][1] == token:
                missing[-1] = (missing[-1][0], token + 1)
            else:
                missing.append((token, token + 1))
        return missing

    cases = [(0, 10, [(0, 4), (6, 10)]), (0, 10, [(6, 10), (0, 6)]), (5, 20, []), (5, 20, [(10, 12), (7, 9), (9, 10)]),
             (0, 4, [(1, 2), (3, 4)])]
    return first_wrong(uncovered, [(case, expected(*case)) for case in cases])
