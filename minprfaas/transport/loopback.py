"""Both ends of a KV stream in one process: the transport to read first. Chapter 07, paper 3.3.

Nothing crosses a wire, so there is nothing to frame, acknowledge or recover. What remains is what a transport is: a
plan that both ends hold, pieces checked against it, a sink that writes them, and an event at the end.
"""

import time

import torch

from minprfaas.transport.base import KVTransport, SendStream, Sink, StreamAborted, StreamPlan
from minprfaas.transport.events import EventQueue, StreamReport
from minprfaas.transport.streams import ExpectedStreams, PutLog


class Loopback(KVTransport):
    """From this process to itself; reports to `events`. Any thread may call any method."""

    def __init__(self, events: EventQueue | None = None):
        self.events = EventQueue() if events is None else events
        self._expected = ExpectedStreams(self.events)

    def expect(self, plan: StreamPlan, sink: Sink, device: torch.device | None = None) -> None:
        """See `KVTransport.expect`. The sink runs in the thread that calls `put`."""
        self._expected.expect(plan, sink)

    def open(self, plan: StreamPlan) -> "LoopbackStream":
        return LoopbackStream(plan, self._expected)

    def forget(self, stream_id: int) -> int | None:
        return self._expected.forget(stream_id)


class LoopbackStream(SendStream):
    """A SendStream whose `put` calls the receiver's sink: what it has put is written when it returns."""

    def __init__(self, plan: StreamPlan, expected: ExpectedStreams):
        self.plan = plan
        self._expected = expected
        self._put_log = PutLog(plan)
        self._failure: str | None = None

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """See `SendStream.put`. Never waits for room: a sink that takes its time is all that holds the caller back."""
        self._check()
        piece = self._put_log.add(layer, start, end, data)
        try:
            self._expected.take(self.plan.stream_id, piece, data.view(-1))
        except StreamAborted:
            # The receiver's StreamFailed names the reason; a sender on another machine would not learn it either.
            self._failure = self._failure or "refused by the receiver"
        self._check()

    def finish(self, deadline_s: float) -> StreamReport:
        """See `SendStream.finish`. There is nothing to wait for."""
        self._check()
        self._put_log.check_complete()
        log = self._put_log
        return StreamReport(self.plan.total_bytes, log.puts, log.first_put_at_s, log.last_put_at_s,
                            acked_at_s=time.monotonic(), stalled_s=0.0, resent_chunks=0)

    def abort(self, reason: str = "aborted by the sender") -> None:
        if self._failure is None:
            self._failure = reason
            self._expected.fail(self.plan.stream_id, "aborted by the sender")

    def _check(self) -> None:
        if self._failure is not None:
            raise StreamAborted(f"stream {self.plan.stream_id}: {self._failure}")
