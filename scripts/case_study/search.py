"""The search for the highest rate that a cluster sustains, and the arrivals of its probes. Chapter 13; paper 4."""

import random
from collections.abc import Callable, Sequence
from math import inf

from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.sustained import Reading

STRATUM = 32  # in so many requests every part of the distribution comes once
RESOLUTION = 0.05  # of the search
STEP = 1.15  # between rates, until one is sustained and one is not


def stratified(rate_rps: float, count: int, lengths: LengthDistribution, output_tokens: int,
               seed: int) -> list[SimRequest]:
    """`count` random arrivals, of which each `STRATUM` in a row keep to the mean: they come at random within their
    `STRATUM / rate_rps` seconds, and one of their lengths comes from every equally likely part of the distribution. A
    probe of a hundred requests would otherwise be off by ten percent because of what it happened to draw."""
    rng = random.Random(seed)
    made: list[SimRequest] = []
    while len(made) < count:
        parts = rng.sample(range(STRATUM), STRATUM)
        times_s = sorted((len(made) + STRATUM * rng.random()) / rate_rps for _ in parts)
        made += [SimRequest(time_s, max(1, round(lengths.quantile((part + rng.random()) / STRATUM))), output_tokens)
                 for time_s, part in zip(times_s, parts)]
    return made[:count]


def highest_sustained(probe: Callable[[float], Reading], start_rps: float, most_probes: int = 8) -> list[Reading]:
    """Probe from `start_rps` on, up or down until one rate is sustained and a higher one is not, then between them,
    until they are within `RESOLUTION`. Returns all readings."""
    readings: list[Reading] = []
    sustained_rps, grew_rps, rate_rps = 0.0, inf, start_rps
    while len(readings) < most_probes and grew_rps > sustained_rps * (1 + RESOLUTION):
        one = probe(rate_rps)
        readings.append(one)
        if one.is_sustained:
            sustained_rps = rate_rps
        else:
            grew_rps = rate_rps
        if grew_rps == inf:
            rate_rps = sustained_rps * STEP
        else:
            rate_rps = (sustained_rps + grew_rps) / 2 if sustained_rps else grew_rps / STEP
    return readings


def best_rate_rps(readings: Sequence[Reading]) -> float:
    """The highest rate that was sustained; where none was tried that is not, at least this; 0: none was."""
    return max((one.rate_rps for one in readings if one.is_sustained), default=0.0)
