"""When requests arrive and how long they are: Poisson, bursty, diurnal, or from a trace. All seeded. Chapter 12."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from minprfaas.errors import require_number
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.trace import TraceRequest

BURST_FACTOR = 2.0  # how much faster a burst arrives than the mean
BURST_SHARE = 0.2  # of the time
BURST_MEAN_S = 20.0
DAY_SWING = 0.5  # how far the rate of a day swings above and below its mean
DAY_STRETCH = 0.6  # and the logarithm of its lengths, the other way


def poisson(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Arrival times without memory, `rate_rps` a second."""
    require_number("arrival rate", rate_rps, above=0)
    time_s = 0.0
    while True:
        time_s += rng.expovariate(rate_rps)
        yield time_s


def bursty(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """A Markov-modulated Poisson process: calm and burst alternate at random; the mean is `rate_rps`."""
    require_number("arrival rate", rate_rps, above=0)
    calm_rps = rate_rps * (1 - BURST_FACTOR * BURST_SHARE) / (1 - BURST_SHARE)
    calm_mean_s = BURST_MEAN_S * (1 - BURST_SHARE) / BURST_SHARE
    start_s, burst = 0.0, False
    while True:
        end_s = start_s + rng.expovariate(1 / (BURST_MEAN_S if burst else calm_mean_s))
        phase_rps = BURST_FACTOR * rate_rps if burst else calm_rps
        time_s = start_s + rng.expovariate(phase_rps)
        while time_s < end_s:
            yield time_s
            time_s += rng.expovariate(phase_rps)
        start_s, burst = end_s, not burst


def diurnal(rate_rps: float, rng: random.Random, period_s: float) -> Iterator[float]:
    """A day of `period_s`: the rate begins at its mean, rises, and falls below it."""
    for time_s in poisson(rate_rps * (1 + DAY_SWING), rng):
        if rng.random() * (1 + DAY_SWING) < 1 + DAY_SWING * math.sin(2 * math.pi * time_s / period_s):
            yield time_s


def day_lengths(period_s: float) -> Callable[[float], float]:
    """What lengths are multiplied by as the day goes: 0.55 in the busiest hour, 1.8 in the quietest."""
    return lambda time_s: math.exp(-DAY_STRETCH * math.sin(2 * math.pi * time_s / period_s))


def drawn(times: Iterable[float], count: int, lengths: LengthDistribution, output_tokens: int, rng: random.Random,
          scale: Callable[[float], float] | None = None) -> Iterator[SimRequest]:
    """`count` requests at `times`, with lengths drawn from the planner's own distribution; `scale(time_s)` stretches
    them as the day goes."""
    values = lengths.values
    for time_s in islice(times, count):
        length = values[int(rng.random() * len(values))]
        yield SimRequest(time_s, max(1, round(length * scale(time_s) if scale else length)), output_tokens)


def from_trace(trace: Iterable[TraceRequest], speed: float = 1.0) -> Iterator[SimRequest]:
    """A trace's requests, `speed` times as fast as they were recorded."""
    require_number("trace speed", speed, above=0)
    for request in trace:
        yield SimRequest(request.timestamp_s / speed, request.input_tokens, request.output_tokens, request.hash_ids)
