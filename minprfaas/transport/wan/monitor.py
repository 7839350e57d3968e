"""Congestion signals of one link: pure arithmetic, the caller has the lock and the clock. Chapter 07, paper 3.4.3."""

from collections import deque
from dataclasses import dataclass

from minprfaas.config import LinkSample

SAMPLE_EVERY_S = 0.25
RING_SAMPLES = 240  # a minute
# Heartbeats and messages, those of the other direction too, wait behind the chunks that a lane is carrying. So chunks
# begin small and grow with a line that brings them soon: eight lanes of 32 MiB at 100 Mbit/s would be silent for 20 s.
FIRST_CHUNK_BYTES, LEAST_CHUNK_BYTES = 2**18, 2**16
# A put cuts its chunks long before they leave, so few are on their way while they grow: a gigabyte of small ones took a
# fast line half a second. Before the first is acknowledged fewer still, because others make it late.
FIRST_CHUNKS, GROWING_CHUNKS = 4, 16
SOON_S, LATE_S = 0.1, 0.5  # acknowledged after the shortest time that was seen


def largest_chunk_bytes(lanes: int) -> int:
    """What a chunk should have at most between fast machines. What two threads of a lane hold should fit into a cache:
    one lane from CPU memory carried 3.3 GB/s in chunks of 4 MiB and 2.2 in chunks of 32. But many lanes share an
    interpreter, and each chunk takes some of its time."""
    return min(lanes, 8) * 2**22


@dataclass(frozen=True)
class LinkStats:
    """One link's egress: bytes of chunks so far and at this moment, and the samples of the last minute."""

    egress_bytes: int
    queued_bytes: int
    inflight_bytes: int
    samples: tuple[LinkSample, ...]


class Monitor:
    """Counts what leaves and what is acknowledged, and turns it into samples."""

    def __init__(self, now_s: float):
        self.egress_bytes = 0
        self.queued_bytes = self.inflight_bytes = 0  # waiting to leave; left and not yet acknowledged
        self.progress_at_s = now_s  # when the link last had nothing to do, or something was settled
        self.chunk_bytes = FIRST_CHUNK_BYTES  # that the next chunk should have at most
        self._shortest_delay_s = float("inf")
        self._acks_since_growth = 0
        self._samples: deque[LinkSample] = deque(maxlen=RING_SAMPLES)
        self._ack_delay_s = 0.0
        self._sampled_at_s, self._sampled_bytes = now_s, 0
        self._busy_since_s: float | None = None
        self._busy_s = 0.0

    def queued(self, nbytes: int, now_s: float) -> None:
        """`nbytes` wait to leave."""
        if not self.queued_bytes and not self.inflight_bytes:
            self.progress_at_s = now_s
        self.queued_bytes += nbytes

    def sent(self, nbytes: int, now_s: float) -> None:
        """`nbytes` of a chunk left for the line."""
        if self.inflight_bytes == 0:
            self._busy_since_s = now_s
        self.egress_bytes += nbytes
        self.queued_bytes -= nbytes
        self.inflight_bytes += nbytes

    def settled(self, nbytes: int, delay_s: float | None, now_s: float) -> None:
        """`nbytes` are in flight no more: acknowledged after `delay_s`, or given up (None)."""
        self.inflight_bytes -= nbytes
        self.progress_at_s = now_s
        if delay_s is not None:
            self._ack_delay_s += (delay_s - self._ack_delay_s) / 8 if self._ack_delay_s else delay_s
            self._fit_chunks(nbytes, delay_s)
        if self.inflight_bytes == 0 and self._busy_since_s is not None:
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = None

    @property
    def first_bytes(self) -> float:
        """That may wait or be in flight while chunks grow from what they were first; then there is no limit."""
        if self._acks_since_growth >= 2 * GROWING_CHUNKS:  # and so many were cut since: they grow no more
            return float("inf")
        return self.chunk_bytes * (FIRST_CHUNKS if self._shortest_delay_s == float("inf") else GROWING_CHUNKS)

    def _fit_chunks(self, nbytes: int, delay_s: float) -> None:
        self._shortest_delay_s = min(self._shortest_delay_s, delay_s)
        late_s = delay_s - self._shortest_delay_s
        if late_s > LATE_S and nbytes <= self.chunk_bytes:  # what was cut before says nothing about smaller ones
            self.chunk_bytes = max(LEAST_CHUNK_BYTES, self.chunk_bytes // 2)
        elif late_s < SOON_S and nbytes > self.chunk_bytes // 2:  # a smaller one says nothing about larger ones
            # One that is so many times larger comes soon as well, if all on their way are.
            self.chunk_bytes = int(self.chunk_bytes * max(2.0, SOON_S / max(delay_s, 1e-3)))
            if self._acks_since_growth < 2 * GROWING_CHUNKS:
                self._acks_since_growth = 0
            return
        self._acks_since_growth += 1

    def begin_epoch(self) -> None:
        """The line may be another: what was learned of its speed counts no more."""
        self.chunk_bytes = min(self.chunk_bytes, FIRST_CHUNK_BYTES)
        self._shortest_delay_s, self._acks_since_growth = float("inf"), 0

    def tick(self, now_s: float, rate_bytes_per_s: float | None) -> LinkSample | None:
        """Call often; returns the new sample when one was due. Utilization: of the emulated rate if there is one, else
        the share of the time in which bytes were in flight."""
        elapsed_s = now_s - self._sampled_at_s
        if elapsed_s < SAMPLE_EVERY_S:
            return None
        if self._busy_since_s is not None:
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = now_s
        sent = self.egress_bytes - self._sampled_bytes
        share = self._busy_s / elapsed_s if rate_bytes_per_s is None else sent / (rate_bytes_per_s * elapsed_s)
        sample = LinkSample(now_s, sent * 8 / elapsed_s / 1e9, min(share, 1.0), self.queued_bytes, self.inflight_bytes,
                            self._ack_delay_s)
        self._samples.append(sample)
        self._sampled_at_s, self._sampled_bytes, self._busy_s = now_s, self.egress_bytes, 0.0
        return sample

    def stats(self) -> LinkStats:
        """Everything that is known at this moment."""
        return LinkStats(self.egress_bytes, self.queued_bytes, self.inflight_bytes, tuple(self._samples))
