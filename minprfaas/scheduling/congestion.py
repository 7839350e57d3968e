"""Is bandwidth scarce or abundant? One link's samples, smoothed, with hysteresis. Chapter 11 (paper 3.4.3).

Bandwidth turns scarce at a high mark of utilization or of queueing delay, and abundant again only when both are below
their low marks and the regime has lasted `HOLD_S`: between the marks nothing changes.
Time is an argument: the simulator's clock and the live one are the same to it.
"""

import math
from dataclasses import replace

from minprfaas.config import LinkSample
from minprfaas.scheduling.router import LinkView


HIGH_UTILIZATION, LOW_UTILIZATION = 0.85, 0.6
HIGH_QUEUE_S, LOW_QUEUE_S = 0.5, 0.1  # of queueing delay
HOLD_S = 10.0
SMOOTH_S = 3.0  # time constant of the averages
FORGET_S = 60.0  # time constant with which an idle link's capacity returns to its nominal value
STALE_S = 15.0  # without a sample for this long, be careful: scarce


class CongestionMonitor(LinkView):
    """One direction of the line between the clusters, said to carry `nominal_gbps`. `gbps` is what it really gives when
    it is asked to, and like `utilization` smoothed."""

    def __init__(self, nominal_gbps: float):
        super().__init__(nominal_gbps, up=nominal_gbps > 0)
        self.nominal_gbps = nominal_gbps
        self._samples: dict[tuple[str, str], LinkSample] = {}  # the last of each sender's link, by when it was heard
        self._observed_at_s = -math.inf
        self._regime, self._since_s = "abundant", -math.inf

    def hear(self, sender: str, sample: LinkSample, now_s: float) -> None:
        """Take a sample of one sender's link. What all put on the line adds up; one that was silent counts no more.
        A sender's clock may be another machine's: it is not looked at."""
        self._samples[sender, sample.link] = replace(sample, at_s=now_s)
        recent = [one for one in self._samples.values() if now_s - one.at_s <= STALE_S]
        utilization = min(sum(one.utilization for one in recent), 1.0)
        queued_bytes = sum(one.queued_bytes for one in recent)
        self.observe(LinkSample(now_s, sum(one.gbps for one in recent), utilization, queued_bytes))

    def observe(self, sample: LinkSample) -> None:
        """Take a sample of the whole line; one that is not younger than the last is ignored."""
        elapsed_s = sample.at_s - self._observed_at_s  # infinite for the first one, which then counts alone
        if elapsed_s <= 0:
            return
        self._observed_at_s, self.queued_bytes = sample.at_s, sample.queued_bytes
        weight = 1 - math.exp(-elapsed_s / SMOOTH_S)
        self.utilization += weight * (sample.utilization - self.utilization)
        if sample.utilization > 0.02 or sample.queued_bytes:
            # Busy for less than a fiftieth of the time, rate over utilization is noise.
            capacity = sample.gbps / sample.utilization if sample.utilization > 0.02 else sample.gbps
            self.gbps += weight * (max(capacity, 1e-6) - self.gbps)
        else:  # an idle link says nothing about its capacity, but is more and more worth trying
            weight = 1 - math.exp(-elapsed_s / FORGET_S)
            self.gbps += weight * (self.nominal_gbps - self.gbps)
        self._settle(sample.at_s)

    def _settle(self, at_s: float) -> None:
        queue_s = self.queued_bytes * 8e-9 / self.gbps if self.queued_bytes else 0.0  # at the observed capacity
        if self.utilization >= HIGH_UTILIZATION or queue_s >= HIGH_QUEUE_S:
            if self._regime != "scarce":
                self._regime, self._since_s = "scarce", at_s
        elif self.utilization < LOW_UTILIZATION and queue_s <= LOW_QUEUE_S:
            if self._regime != "abundant" and at_s - self._since_s >= HOLD_S:
                self._regime, self._since_s = "abundant", at_s

    def regime(self, at_s: float) -> str:
        """"scarce" or "abundant" at `at_s`."""
        return self._regime if at_s - self._observed_at_s <= STALE_S else "scarce"
