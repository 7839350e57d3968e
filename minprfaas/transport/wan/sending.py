"""The sending side of a KV stream: layer by layer, while prefill still computes the next. Chapter 08, paper 3.3."""

import time

import torch

from minprfaas.config import StateKind
from minprfaas.transport.base import LinkDown, StreamAborted, StreamReport
from minprfaas.transport.wan.frames import HEADER_BYTES, Header, Kind, Slot
from minprfaas.transport.wan.outbox import Frame, Outbox, control_frame
from minprfaas.transport.streams import LayerPlan, StreamPlan, plan_coverage


class SendStream:
    """Made by `Link.open_stream`. One thread calls `put`, `finish` and `abort`."""

    def __init__(self, plan: StreamPlan, outbox: Outbox, chunk_bytes: int):
        self.plan = plan
        self.resent_chunks = 0
        self._outbox = outbox
        self._chunk_bytes = chunk_bytes
        self._coverage = plan_coverage(plan)
        self._outstanding = self._chunks = 0
        self._failure: str | None = None
        self._first_put_s = self._last_put_s = self._acked_s = self._stalled_s = 0.0
        self._copies: torch.cuda.Stream | None = None

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """Send tokens `[start, end)` of a layer; for request-level state, `end` is the plan's and `start` is ignored.

        `data` is contiguous uint8 of the plan's size; it is copied before this returns on a CPU. On a GPU the copy to
        pinned memory runs on a side stream behind the work queued so far, and prefill goes on. Blocks while more than
        `max_inflight_bytes` are queued or unacknowledged. Raises StreamAborted, LinkDown, or ValueError off the plan.
        """
        entry = self._check(layer, start, end, data)
        now = time.monotonic()
        self._first_put_s, self._last_put_s = self._first_put_s or now, now
        event = None
        for header, piece in self._cut(entry, start, end, data.view(-1)):
            self._stalled_s += self._outbox.wait_for_room(HEADER_BYTES + header.nbytes, self)
            slot = Slot(header.nbytes, pinned=data.is_cuda)
            if data.is_cuda:
                event = self._copy_beside_prefill(slot, piece)
            else:
                slot.payload.copy_(piece)
            self._outbox.send_chunk(Frame(header, slot, self, event))

    def _check(self, layer: int, start: int, end: int, data: torch.Tensor) -> LayerPlan:
        entry = self.plan.layers.get(layer)
        if entry is None:
            raise ValueError(f"stream {self.plan.stream_id}: layer {layer} is not in the plan")
        expected = entry.row_bytes * (end - start if entry.kind is StateKind.TOKEN else 1)
        if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != expected:
            raise ValueError(f"layer {layer}: expected {expected} contiguous uint8, got {data.numel()} of {data.dtype}")
        if entry.kind is not StateKind.TOKEN and end != self.plan.end:
            raise ValueError(f"layer {layer}: request-level state crosses as of token {self.plan.end}, not {end}")
        self._coverage[layer].add(*((start, end) if entry.kind is StateKind.TOKEN else (0, entry.row_bytes)))
        return entry

    def _cut(self, entry: LayerPlan, start: int, end: int, data: torch.Tensor):
        """Yield (header, bytes): whole rows of token state, any bytes of request-level state, at most a chunk each."""
        fields = dict(kind=Kind.CHUNK, stream=self.plan.stream_id, layer=entry.layer, group=entry.group)
        at = 0
        while at < data.numel():
            limit = min(self._chunk_bytes, self._outbox.chunk_limit() or self._chunk_bytes)
            if entry.kind is StateKind.TOKEN:
                limit = max(1, limit // entry.row_bytes) * entry.row_bytes
            piece = data[at:at + limit]
            if entry.kind is StateKind.TOKEN:
                first = start + at // entry.row_bytes
                where = dict(start=first, end=first + piece.numel() // entry.row_bytes)
            else:
                where = dict(start=self.plan.start, end=self.plan.end, offset=at)
            yield Header(**fields, **where, nbytes=piece.numel()), piece
            at += piece.numel()

    def _copy_beside_prefill(self, slot: Slot, piece: torch.Tensor) -> torch.cuda.Event:
        if self._copies is None:
            self._copies = torch.cuda.Stream(piece.device)
        self._copies.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(self._copies):
            slot.payload.copy_(piece, non_blocking=True)
            event = self._copies.record_event()
        piece.record_stream(self._copies)  # the allocator must not hand the memory out before the copy is done
        return event

    def finish(self, deadline_s: float) -> StreamReport:
        """Wait until the receiver has written everything. Raises TimeoutError, StreamAborted or LinkDown."""
        missing = [layer for layer, coverage in self._coverage.items() if not coverage.complete]
        if missing:
            raise ValueError(f"stream {self.plan.stream_id} cannot finish: layers {missing} were not put completely")
        until = time.monotonic() + deadline_s
        with self._outbox.progress:
            while self._outstanding:
                self.check()
                if time.monotonic() >= until:
                    raise TimeoutError(f"stream {self.plan.stream_id}: {self._outstanding} chunks are not acknowledged "
                                       f"after {deadline_s} s")
                self._outbox.progress.wait(until - time.monotonic())
            self.check()
        return StreamReport(self.plan.total_bytes, self._chunks, self._first_put_s, self._last_put_s, self._acked_s,
                            self._stalled_s, self.resent_chunks)

    def abort(self, reason: str = "aborted by the sender") -> None:
        """Give the stream up: what has not left never leaves, and the receiver is told."""
        if self.fail(reason):
            self._outbox.send_control(control_frame(Kind.ABORT, stream=self.plan.stream_id))

    # What the outbox calls, holding its lock

    def queued(self) -> None:
        self._outstanding += 1
        self._chunks += 1

    def fail(self, reason: str) -> bool:
        """End the stream; False if it had ended before."""
        with self._outbox.progress:
            if self._failure is not None:
                return False
            self._failure = reason
            self._outbox.drop_stream(self)
            return True

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def check(self) -> None:
        """Raises what makes waiting for this stream pointless."""
        if self._failure is not None:
            raise StreamAborted(f"stream {self.plan.stream_id}: {self._failure}")
        if self._outbox.closed is not None:
            raise LinkDown(self._outbox.closed)

    def settled(self, written: bool, now: float) -> None:
        """One chunk was acknowledged, or refused by the receiver."""
        self._outstanding -= 1
        self._acked_s = now
        if not written:
            self.fail("refused by the receiver")
