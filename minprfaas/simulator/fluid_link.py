"""A link as a fluid: KV streams flow in while prefill runs, and flow out at the link's rate, in order. Chapter 12.

Exact for a first-in-first-out link whose chunks are small against a request: a request's last byte leaves when all that
was put in before it has left. Bandwidth may change at any moment (weather); 0 is a stall, after which it resumes.
"""

from collections import deque
from collections.abc import Callable

from minprfaas.config import LinkSample
from minprfaas.simulator.clock import Clock

_WHOLE_BYTE = 0.5  # rounding of sums of bytes must not hold a request back


class FluidLink:
    """One direction of a link of `gbps`; what has left arrives `rtt_s / 2` later."""

    def __init__(self, clock: Clock, gbps: float, rtt_s: float):
        self.gbps, self.bytes_sent, self.queued_bytes = gbps, 0.0, 0.0
        self._clock, self._half_rtt_s = clock, rtt_s / 2
        self._inflow = 0.0  # bytes per second that prefill puts in
        self._updated_at_s = self._sampled_at_s = 0.0
        self._busy_s = self._sampled_bytes = 0.0
        self._waiting: deque[tuple[float, Callable, tuple]] = deque()  # (`bytes_sent` when it is across, …)
        self._plan = 0

    def open_stream(self, bytes_per_s: float) -> None:
        """A prefill begins to put its KVCache in at a steady rate."""
        self._advance()
        self._inflow += bytes_per_s

    def close_stream(self, bytes_per_s: float) -> None:
        """That prefill ends (or dies)."""
        self._advance()
        self._inflow = max(self._inflow - bytes_per_s, 0.0)

    def send(self, count_bytes: float, arrived: Callable, *args) -> None:
        """Put `count_bytes` in at once, and call `arrived(*args)` when they and all before them have crossed: with 0
        bytes, when all that is in has."""
        self._advance()
        self.queued_bytes += count_bytes
        if self.queued_bytes <= _WHOLE_BYTE:
            self._clock.after(self._half_rtt_s, arrived, *args)
            return
        self._waiting.append((self.bytes_sent + self.queued_bytes, arrived, args))
        if len(self._waiting) == 1:
            self._plan_next()

    def set_gbps(self, gbps: float) -> None:
        """The weather changes."""
        self._advance()
        self.gbps = gbps
        self._plan_next()

    def sample(self) -> LinkSample:
        """What happened since the last sample."""
        self._advance()
        now_s, sent = self._clock.now_s, self.bytes_sent - self._sampled_bytes
        elapsed_s = max(now_s - self._sampled_at_s, 1e-9)  # a first sample at once: nothing was sent
        gbps, utilization = sent * 8e-9 / elapsed_s, self._busy_s / elapsed_s
        self._sampled_at_s, self._sampled_bytes, self._busy_s = now_s, self.bytes_sent, 0.0
        return LinkSample(now_s, gbps, utilization, self.queued_bytes)

    def _advance(self) -> None:
        elapsed_s = self._clock.now_s - self._updated_at_s
        if elapsed_s <= 0:
            return
        self._updated_at_s = self._clock.now_s
        rate, available = self.gbps * 1.25e8, self.queued_bytes + self._inflow * elapsed_s
        shrink = rate - self._inflow  # bytes per second by which a backlog becomes less
        full_s = 0.0  # of the time that has passed, how long the link was full
        if self.queued_bytes or shrink <= 0:
            full_s = elapsed_s if shrink <= 0 else min(elapsed_s, self.queued_bytes / shrink)
        # After that the backlog is gone, and what flows in leaves at once.
        left = min(rate * elapsed_s, available) if full_s == elapsed_s else available
        if available > 0:
            share = self._inflow / rate if rate else 1.0
            self._busy_s += full_s + (elapsed_s - full_s) * share
        self.queued_bytes = available - left
        self.bytes_sent += left

    def _plan_next(self) -> None:
        self._plan += 1
        if self._waiting and self.gbps > 0:
            missing = max(self._waiting[0][0] - self.bytes_sent, 0.0)
            self._clock.after(missing / (self.gbps * 1.25e8), self._deliver, self._plan)

    def _deliver(self, plan: int) -> None:
        if plan != self._plan:  # the weather changed meanwhile
            return
        self._advance()
        while self._waiting and self._waiting[0][0] <= self.bytes_sent + _WHOLE_BYTE:
            _, arrived, args = self._waiting.popleft()
            self._clock.after(self._half_rtt_s, arrived, *args)
        self._plan_next()
