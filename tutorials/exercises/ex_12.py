"""The exercises of chapter 12. Fill in the functions, then: python tutorials/12_two_timescales.py --check 1"""

from collections.abc import Sequence
from unittest.mock import patch

from exercises.checking import first_wrong

from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling import threshold
from minprfaas.scheduling.threshold import DEADBAND, MAX_STEP, Observation, ThresholdLoop
from minprfaas.simulator.clock import Clock
from minprfaas.simulator.fluid_link import FluidLink


def waits(arrivals_s: Sequence[float], services_s: Sequence[float]) -> list[float]:
    """How long each request waits at a node that serves one at a time, first come, first served. Request i arrives at
    `arrivals_s[i]` (in rising order) and is in work for `services_s[i]`."""
    raise NotImplementedError


def next_threshold(current: float, wanted: float, max_step: float, deadband: float) -> float:
    """The threshold after one move from `current` towards `wanted`: at most by a factor of `max_step`, up or down; and
    none while `wanted` is within the share `deadband` of `current` (|wanted / current - 1| <= deadband)."""
    raise NotImplementedError


def last_byte_s(count_bytes: float, weather: Sequence[tuple[float, float]]) -> float:
    """When the last byte has left, of `count_bytes` put into an empty line at 0 s. `weather` is a list of (second,
    Gbps from then on) in rising order, the first at 0 s. A rate may be 0; the last one is not."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's event clock."""

    def expected(arrivals_s: list[float], services_s: list[float]) -> list[float]:
        clock, queue, waited = Clock(), [], {}

        def arrive(number: int) -> None:
            queue.append(number)
            if len(queue) == 1:
                begin()

        def begin() -> None:
            waited[queue[0]] = clock.now_s - arrivals_s[queue[0]]
            clock.after(services_s[queue[0]], end)

        def end() -> None:
            queue.pop(0)
            if queue:
                begin()

        for number, arrived_s in enumerate(arrivals_s):
            clock.at(arrived_s, arrive, number)
        clock.run()
        return [waited[number] for number in range(len(arrivals_s))]

    cases = [([0.0, 1.0, 2.0], [0.5, 0.5, 0.5]), ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), ([0.0, 1.0, 9.0], [4.0, 1.0, 1.0]),
             ([2.0, 3.0, 3.5, 10.0], [2.0, 0.25, 4.0, 1.0])]
    return first_wrong(waits, [(case, expected(*case)) for case in cases])


def check_2() -> str | None:
    """Against the package's short-term loop, which is told of a line and of the paper's lengths."""
    fleet, lengths = paper.paper_fleet(), [round(length) for length in paper.paper_lengths().values[::16]]

    def moved(current: float, gbps: float, max_step: float, deadband: float) -> float:
        loop = ThresholdLoop(fleet, current)
        for length in lengths:
            loop.record(length)
        with patch.multiple(threshold, MAX_STEP=max_step, DEADBAND=deadband):
            return loop.update(Observation(0.0, prfaas_instances=4, n_p=3, n_d=5, egress_gbps=gbps))

    cases = []
    for gbps, damping in ((100.0, (MAX_STEP, DEADBAND)), (4.0, (MAX_STEP, DEADBAND)), (4.0, (3.0, 0.2))):
        wanted = moved(20_000.0, gbps, max_step=1e9, deadband=0.0)
        for current in (1000.0, 0.96 * wanted, 1.1 * wanted, 1.4 * wanted, 200_000.0):
            cases.append(((current, wanted, *damping), moved(current, gbps, *damping)))
    return first_wrong(next_threshold, cases)


def check_3() -> str | None:
    """Against the package's simulated line."""

    def expected(count_bytes: float, weather: list[tuple[float, float]]) -> float:
        clock, left = Clock(), []
        link = FluidLink(clock, weather[0][1], rtt_s=0.0)
        link.send(count_bytes, lambda: left.append(clock.now_s))
        for second, gbps in weather[1:]:
            clock.at(second, link.set_gbps, gbps)
        clock.run()
        return left[0]

    cases = [(1.25e9, [(0.0, 10.0)]),
             (1.25e9, [(0.0, 1.0), (5.0, 10.0)]),
             (1.25e9, [(0.0, 10.0), (0.5, 0.0), (3.0, 1.0)]),
             (1.25e9, [(0.0, 10.0), (2.0, 0.0), (3.0, 1.0)]),
             (5e9, [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (3.0, 8.0)])]
    return first_wrong(last_byte_s, [(case, expected(*case)) for case in cases])
