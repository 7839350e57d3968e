"""Is bandwidth scarce or abundant? One link's samples, smoothed, with hysteresis. Chapter 11 (paper 3.4.3).

Time is an argument: the simulator's clock and the live one are the same to it.
"""

import math
from dataclasses import dataclass

from minprfaas.config import LinkSample
from minprfaas.errors import UserError


@dataclass(frozen=True)
class Marks:
    """Bandwidth turns scarce at a high mark of utilization or of queueing delay, and abundant again only when both are
    below their low marks and the regime has lasted `hold_s`: between the marks nothing changes."""

    high_utilization: float = 0.85
    low_utilization: float = 0.6
    high_queue_s: float = 0.5
    low_queue_s: float = 0.1
    hold_s: float = 10.0
    smooth_s: float = 3.0  # time constant of the averages
    forget_s: float = 60.0  # time constant with which an idle link's capacity returns to its nominal value
    stale_s: float = 15.0  # without a sample for this long, be careful: scarce

    def __post_init__(self) -> None:
        if not 0 < self.low_utilization < self.high_utilization <= 1:
            raise UserError(f"utilization marks {self.low_utilization} and {self.high_utilization} are out of order; "
                            f"they must be 0 < low < high <= 1")
        if not 0 <= self.low_queue_s < self.high_queue_s:
            raise UserError(f"queue marks {self.low_queue_s} s and {self.high_queue_s} s are out of order; "
                            f"they must be 0 <= low < high")


class CongestionMonitor:
    """Watches one link direction whose nominal capacity is `nominal_gbps`."""

    def __init__(self, nominal_gbps: float, marks: Marks = Marks()):
        self.nominal_gbps, self.marks = nominal_gbps, marks
        self.utilization = 0.0  # smoothed
        self.capacity_gbps = nominal_gbps  # smoothed; what the link really gives when it is asked to
        self.queued_bytes = 0.0
        self._sampled_at: float | None = None
        self._regime, self._since_s = "abundant", -math.inf

    @property
    def queue_s(self) -> float:
        """Seconds until what is queued has left, at the observed capacity."""
        return self.queued_bytes * 8e-9 / self.capacity_gbps if self.queued_bytes else 0.0

    def observe(self, sample: LinkSample) -> None:
        """Take one sample; samples older than the last one are ignored."""
        if self._sampled_at is not None and sample.time_s <= self._sampled_at:
            return
        elapsed = sample.time_s - self._sampled_at if self._sampled_at is not None else math.inf
        weight = 1 - math.exp(-elapsed / self.marks.smooth_s)
        self._sampled_at, self.queued_bytes = sample.time_s, sample.queued_bytes
        self.utilization += weight * (sample.utilization - self.utilization)
        if sample.utilization > 0.02 or sample.queued_bytes:
            capacity = sample.gbps / sample.utilization if sample.utilization > 0.02 else sample.gbps
            self.capacity_gbps += weight * (max(capacity, 1e-6) - self.capacity_gbps)
        else:  # an idle link says nothing about its capacity, but is more and more worth trying
            weight = 1 - math.exp(-elapsed / self.marks.forget_s)
            self.capacity_gbps += weight * (self.nominal_gbps - self.capacity_gbps)
        self._settle(sample.time_s)

    def _settle(self, time_s: float) -> None:
        marks = self.marks
        if self.utilization >= marks.high_utilization or self.queue_s >= marks.high_queue_s:
            if self._regime != "scarce":
                self._regime, self._since_s = "scarce", time_s
        elif self.utilization < marks.low_utilization and self.queue_s <= marks.low_queue_s:
            if self._regime != "abundant" and time_s - self._since_s >= marks.hold_s:
                self._regime, self._since_s = "abundant", time_s

    def regime(self, time_s: float) -> str:
        """"scarce" or "abundant" at `time_s`."""
        if self._sampled_at is None or time_s - self._sampled_at > self.marks.stale_s:
            return "scarce"
        return self._regime
