"""The short-term loop: search the threshold again from what is observed, damped. Chapter 12 (paper 3.4.3).

A step in bandwidth is followed in a few moves without overshoot, and bandwidth that swings faster than `HOLD_S` cannot
make the threshold swing with it. When more arrives than any threshold could carry, balance would make every request
late: then the PD-P nodes are kept at most `LOCAL_LOAD` busy, and the long prompts wait alone.
"""

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, replace

from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import Fleet, plan

WINDOW_REQUESTS = 2048
GRID_THRESHOLDS = 128  # quantiles of the recent lengths that one search tries
RATE_SMOOTH_S = 60.0  # time constant of the observed arrival rate
INTERVAL_S = 5.0  # between searches that have a cause
REFRESH_S = 60.0  # between searches at all, because lengths drift
MAX_STEP = 1.5  # factor by which one move may change the threshold
DEADBAND = 0.05  # nearer to the optimum than this share of it, the threshold does not move
HOLD_S = 30.0  # after a move, before one in the other direction
LOCAL_LOAD = 0.9
SURGE_S = 15.0  # seconds of waiting prefill per node that count as a surge
DRAIN_S = 300.0  # time that backlogs are given: what they take is not there for new requests


@dataclass(frozen=True)
class Observation:
    """The cluster as it is now. Instances take work; queues are seconds of prefill that wait, summed over a cluster's
    nodes; utilizations are the share of time (or of batch slots) in use."""

    at_s: float
    prfaas_instances: float
    n_p: int
    n_d: int
    egress_gbps: float  # what the link gives when asked to, not what it carries
    queued_bytes: float = 0.0
    scarce: bool = False  # the congestion monitor's regime
    prfaas_queue_s: float = 0.0
    pdp_queue_s: float = 0.0
    prefill_utilization: float = 0.0  # of the busier prefill cluster
    decode_utilization: float = 0.0


class ThresholdLoop:
    """Keeps the recent uncached lengths and the threshold t (tokens) that suits them."""

    def __init__(self, fleet: Fleet, threshold: float) -> None:
        self.fleet, self.threshold = fleet, threshold
        self._recent: deque[int] = deque(maxlen=WINDOW_REQUESTS)
        self._searched_at_s, self._moved_at_s, self._direction = -math.inf, -math.inf, 0
        self._seen: tuple | None = None  # capacity at the last search
        self._fell_short = False  # of what that search found
        self.reason = ""  # of the last search
        self._rate_rps, self._arrived, self._counted_at_s = 0.0, 0, None

    def record(self, uncached_tokens: int) -> None:
        """One more request, by the length that the router judged."""
        self._recent.append(uncached_tokens)
        self._arrived += 1

    def lengths(self) -> LengthDistribution | None:
        """The recent uncached lengths; None while there are too few to say anything."""
        return LengthDistribution(self._recent) if len(self._recent) >= 64 else None

    def update(self, now: Observation) -> float:
        """Search if there is reason to; returns the threshold to route by. Call about once a second."""
        self._count(now.at_s)
        cause = self._cause(now)
        lengths = self.lengths() if cause is not None else None  # sorting them at each look would cost the most
        if lengths is not None:
            self._searched_at_s, self._seen = now.at_s, _capacity(now)
            self._move(self._search(now, lengths), now.at_s)
            self.reason = (f"{cause}: {now.prfaas_instances:g} PrfaaS and {now.n_p} PD-P nodes, "
                           f"{now.egress_gbps:.3g} Gbps, {self._rate_rps:.2f} req/s")
        return self.threshold

    def _count(self, at_s: float) -> None:
        """The observed arrival rate, smoothed."""
        elapsed_s = at_s - self._counted_at_s if self._counted_at_s is not None else 0.0
        if elapsed_s > 0:
            self._rate_rps += (1 - math.exp(-elapsed_s / RATE_SMOOTH_S)) * (self._arrived / elapsed_s - self._rate_rps)
        self._counted_at_s, self._arrived = at_s, 0

    def _cause(self, now: Observation) -> str | None:
        """Why to search now, or None."""
        if not now.n_d:
            return None  # no threshold helps while nobody decodes
        waited_s = now.at_s - self._searched_at_s
        if waited_s >= REFRESH_S:
            return "lengths drift"
        if waited_s < INTERVAL_S:
            return None
        if now.scarce:
            return "bandwidth is scarce"
        waits_s = (now.prfaas_queue_s / max(now.prfaas_instances, 1), now.pdp_queue_s / max(now.n_p, 1))
        if max(waits_s) > SURGE_S:
            return "a prefill queue surges"
        if _capacity(now) != self._seen:
            return "capacity changed"
        return "the last move fell short" if self._fell_short else None

    def _search(self, now: Observation, lengths: LengthDistribution) -> float:
        """The planner's t for new requests: with N_p given, and with what remains beside draining the backlogs."""
        # A tenth at least: a stage that counted as gone would get no request, and could not show that it is well again.
        prfaas = max(now.prfaas_instances - now.prfaas_queue_s / DRAIN_S, 0.1 * now.prfaas_instances)
        n_p = max(now.n_p - now.pdp_queue_s / DRAIN_S, 0.1 * now.n_p)
        egress = max(now.egress_gbps - now.queued_bytes * 8e-9 / DRAIN_S, 0.1 * now.egress_gbps)
        fleet = replace(self.fleet, prfaas_instances=prfaas, pd_instances=now.n_p + now.n_d, link_gbps=egress)
        values = lengths.values
        grid = [0.0, *values[::max(1, len(values) // GRID_THRESHOLDS)], values[-1]]  # all away … all local
        best = plan(fleet, lengths, n_p=n_p, grid=grid)
        # Decode has all of its nodes: what a backlog takes of PD-P is none of theirs.
        if min(best.lambda_max, fleet.theta_pdd(now.n_p)) >= self._rate_rps:
            return best.threshold
        local_s = lengths.running_means(fleet.pd_profile.prefill_s)  # PD-P work a request, if the k shortest are local
        shortest = bisect_right(local_s, LOCAL_LOAD * n_p / self._rate_rps) - 1
        return min(best.threshold, values[max(shortest - 1, 0)])

    def _move(self, wanted: float, at_s: float) -> None:
        current, wanted = max(self.threshold, 1.0), max(wanted, 1.0)
        self._fell_short = False
        if abs(wanted / current - 1) <= DEADBAND:
            return
        direction = 1 if wanted > current else -1
        if direction == -self._direction and at_s - self._moved_at_s < HOLD_S:
            return
        self.threshold = min(max(wanted, current / MAX_STEP), current * MAX_STEP)
        self._moved_at_s, self._direction, self._fell_short = at_s, direction, self.threshold != wanted


def _capacity(now: Observation) -> tuple[float, int, int]:
    """Coarse enough that noise is no change: bandwidth in steps of a quarter."""
    return now.prfaas_instances, now.n_p, round(math.log(max(now.egress_gbps, 1e-6), 1.25))
