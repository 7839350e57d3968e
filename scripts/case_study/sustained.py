"""Whether a cluster, simulated or live, sustains a rate, and the search for the highest one. Chapter 13; paper 4.

A rate is sustained when no route's backlog grows with it: over the last three quarters of the arrivals, the line
fitted through the number of requests without a first token rises by less than `MOST_GROWTH` of their arrival rate. A
first token counts once its request has a place in a decode batch, so that decode's backlog counts too.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import linear_regression

from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.simulator.nodes import SimRequest

MOST_GROWTH = 0.08  # requests that the backlog gains for each that arrives
WARM_UP = 0.25  # of the time of the arrivals, before anything is counted
POINTS = 64  # at which the backlog is looked at
STRATUM = 32  # in so many requests every part of the distribution comes once
RESOLUTION = 0.05  # of the search
STEP = 1.15  # between rates, until one is sustained and one is not


@dataclass(frozen=True)
class Reading:
    """What came of one rate, in the units in which it was taken; times in seconds."""

    rate_rps: float
    growth: float  # of the backlog of the route that is furthest behind, in requests for each of its own that arrives
    served_rps: float  # first tokens a second after the warm-up, if each route had kept the pace of the slowest
    ttft_mean_s: float
    ttft_p90_s: float
    offloaded_fraction: float
    egress_gbps: float

    @property
    def is_sustained(self) -> bool:
        """Whether the backlog stayed."""
        return self.growth <= MOST_GROWTH


def reading(rate_rps: float, arrivals_s: Sequence[float], first_tokens_s: Sequence[float | None],
            offloaded: Sequence[bool], egress_bytes: float, by_length: bool = True) -> Reading:
    """Of a probe whose requests came and had their first tokens (None: not yet) at these moments. TTFT is that of those
    which came after the warm-up and were answered. `by_length`: a request's route is its length's, and no other could
    have served it."""
    end_s = len(arrivals_s) / rate_rps
    begin_s = WARM_UP * end_s
    moments = [begin_s + (end_s - begin_s) * point / (POINTS - 1) for point in range(POINTS)]
    ttft_s = sorted(first_s - at_s for at_s, first_s in zip(arrivals_s, first_tokens_s)
                    if first_s is not None and at_s >= begin_s)
    growth, served_rps = -inf, inf  # of the route that is furthest behind: the other one keeps up with what it is asked
    routes = offloaded if by_length else [False] * len(offloaded)
    for route in {*routes}:
        asked_s = [at_s for at_s, one in zip(arrivals_s, routes) if one is route]
        served_s = [first_s for first_s, one in zip(first_tokens_s, routes) if one is route and first_s is not None]
        waiting = [sum(at_s <= moment for at_s in asked_s) - sum(first_s <= moment for first_s in served_s)
                   for moment in moments]
        served = sum(begin_s < first_s <= end_s for first_s in served_s)
        growth = max(growth, linear_regression(moments, waiting).slope * end_s / len(asked_s))
        served_rps = min(served_rps, served / (end_s - begin_s) * len(routes) / len(asked_s))
    last_s = max([end_s, *(first_s for first_s in first_tokens_s if first_s is not None)])
    return Reading(rate_rps, growth, served_rps, sum(ttft_s) / max(len(ttft_s), 1),
                   ttft_s[int(0.9 * len(ttft_s))] if ttft_s else 0.0, sum(offloaded) / max(len(offloaded), 1),
                   egress_bytes * 8e-9 / last_s)


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
        made += [SimRequest(at_s, max(1, round(lengths.quantile((part + rng.random()) / STRATUM))), output_tokens)
                 for at_s, part in zip(times_s, parts)]
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
