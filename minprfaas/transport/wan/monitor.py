"""Congestion signals of one link, in a small ring for the scheduler and the timeline. Chapter 07, paper 3.4.3.

Pure arithmetic: time is an argument (`time.monotonic()` seconds), and the caller holds the lock.
"""

from collections import deque
from dataclasses import dataclass

SAMPLE_EVERY_S = 0.25
RING_SAMPLES = 240  # a minute
STALL_AFTER_S = 0.5  # bytes waiting and no acknowledgement for this long (plus the smallest delay seen) is a stall


@dataclass(frozen=True)
class Sample:
    """The link over one interval that ended at `time_s` (`time.monotonic()`)."""

    time_s: float
    egress_gbps: float
    utilization: float  # of the emulated rate; without one, the share of the time in which bytes were in flight
    queued_bytes: int
    inflight_bytes: int
    ack_delay_s: float


@dataclass(frozen=True)
class LinkStats:
    """One link's egress, now and lately. `ack_delay_trend` is the slope of the delay: seconds of delay per second."""

    egress_bytes: int
    utilization: float
    queued_bytes: int
    inflight_bytes: int
    ack_delay_s: float
    ack_delay_trend: float
    stalls: int
    resent_chunks: int
    damaged_chunks: int
    samples: tuple[Sample, ...]


class Monitor:
    """Counts what leaves and what is acknowledged, and turns it into samples."""

    def __init__(self, now: float):
        self.samples: deque[Sample] = deque(maxlen=RING_SAMPLES)
        self.egress_bytes = self.resent_chunks = self.damaged_chunks = self.stalls = 0
        self.queued_bytes = self.inflight_bytes = 0  # waiting to leave; left and not yet acknowledged
        self._ack_delay_s = 0.0
        self._smallest_delay_s = float("inf")
        self._sampled_at, self._sampled_bytes = now, 0
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._progress_at = now
        self._stalled = False

    @property
    def progress_at(self) -> float:
        """When the link last had nothing to do, or something was acknowledged."""
        return self._progress_at

    def queued(self, nbytes: int, now: float) -> None:
        """`nbytes` wait to leave."""
        if not self.queued_bytes and not self.inflight_bytes:
            self._progress_at = now
        self.queued_bytes += nbytes

    def sent(self, nbytes: int, now: float) -> None:
        """`nbytes` of a chunk left for the line."""
        if self.inflight_bytes == 0:
            self._busy_since = now
        self.egress_bytes += nbytes
        self.queued_bytes -= nbytes
        self.inflight_bytes += nbytes

    def settled(self, nbytes: int, delay_s: float | None, now: float) -> None:
        """`nbytes` are in flight no more: acknowledged after `delay_s`, or given up (None)."""
        self.inflight_bytes -= nbytes
        self._progress_at, self._stalled = now, False
        if delay_s is not None:
            self._smallest_delay_s = min(self._smallest_delay_s, delay_s)
            self._ack_delay_s += (delay_s - self._ack_delay_s) / 8 if self._ack_delay_s else delay_s
        if self.inflight_bytes == 0 and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def tick(self, now: float, rate_bytes_per_s: float | None) -> Sample | None:
        """Call often; returns the new sample when one was due."""
        slack = self._smallest_delay_s if self._smallest_delay_s < float("inf") else 1.0
        waiting = self.queued_bytes + self.inflight_bytes
        if waiting and not self._stalled and now - self._progress_at > STALL_AFTER_S + slack:
            self._stalled = True
            self.stalls += 1
        elapsed = now - self._sampled_at
        if elapsed < SAMPLE_EVERY_S:
            return None
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = now
        sent = self.egress_bytes - self._sampled_bytes
        share = self._busy_s / elapsed if rate_bytes_per_s is None else sent / (rate_bytes_per_s * elapsed)
        sample = Sample(now, sent * 8 / elapsed / 1e9, min(share, 1.0), self.queued_bytes, self.inflight_bytes,
                        self._ack_delay_s)
        self.samples.append(sample)
        self._sampled_at, self._sampled_bytes, self._busy_s = now, self.egress_bytes, 0.0
        return sample

    def stats(self) -> LinkStats:
        samples = tuple(self.samples)
        return LinkStats(self.egress_bytes, samples[-1].utilization if samples else 0.0, self.queued_bytes,
                         self.inflight_bytes, self._ack_delay_s, _slope(samples[-20:]), self.stalls,
                         self.resent_chunks, self.damaged_chunks, samples)


def _slope(samples: tuple[Sample, ...]) -> float:
    """Least-squares slope of the acknowledgement delay over time."""
    if len(samples) < 3:
        return 0.0
    mean_time = sum(sample.time_s for sample in samples) / len(samples)
    mean_delay = sum(sample.ack_delay_s for sample in samples) / len(samples)
    spread = sum((sample.time_s - mean_time) ** 2 for sample in samples)
    return sum((s.time_s - mean_time) * (s.ack_delay_s - mean_delay) for s in samples) / spread
