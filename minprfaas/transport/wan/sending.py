"""The sending end of a stream on a link: layer by layer, while prefill computes the next.

Chapters 07 and 08, paper 3.3.
"""

import ctypes
import time
from functools import cache

import torch

from minprfaas.transport.base import SendStream, StreamPlan
from minprfaas.transport.events import StreamReport
from minprfaas.transport.streams import Piece, PutLog
from minprfaas.transport.wan import gpu_sums
from minprfaas.transport.wan.digest import multiplies_bytes, row_sums
from minprfaas.transport.wan.frames import HEADER_BYTES, Frame, Header, Kind, SlotPool, StreamRecord
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.outbox import Outbox

_copies = cache(torch.cuda.Stream)  # by device: one for all streams, because one engine copies to the host


class LinkStream(SendStream):
    """A SendStream, made by `Link.open`. One thread calls `put` and `finish`; any may call `abort`."""

    def __init__(self, plan: StreamPlan, outbox: Outbox, slots: SlotPool, chunk_bytes: int,
                 line: EmulatedLine | None, secret: bytes | None):
        self.plan, self._secret = plan, secret
        self._outbox, self._slots, self._chunk_bytes, self._line = outbox, slots, chunk_bytes, line
        self._put_log = PutLog(plan)
        self._record = StreamRecord(plan.stream_id)
        self._stalled_s = 0.0

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """See `SendStream.put`. Blocks while more than `max_inflight_bytes` are queued or unacknowledged."""
        whole, data = self._put_log.add(layer, start, end, data), data.view(-1)
        copies, sums = self._beside_prefill(data), None
        with torch.cuda.stream(copies):
            if copies is not None and multiplies_bytes():  # else the two ends digest by words
                sums = gpu_sums.SumsOfPieces(data, row_sums(self._secret, by_bytes=True))
            for piece, part in self._put_log.cut(whole, data, self._limit_bytes):
                self._stalled_s += self._outbox.wait_for_room(HEADER_BYTES + piece.nbytes, self._record)
                try:
                    self._outbox.send_chunk(self._frame(piece, part, copies, sums))
                except BaseException:  # no memory for it, bytes that cannot be read, or a stream that ended meanwhile
                    self._outbox.give_room_back(HEADER_BYTES + piece.nbytes)
                    raise

    def _frame(self, piece: Piece, part: torch.Tensor, copies: torch.cuda.Stream | None,
               sums: gpu_sums.SumsOfPieces | None) -> Frame:
        header = Header(Kind.CHUNK, 0, self.plan.stream_id, piece.layer, piece.group, piece.start, piece.end,
                        piece.offset, piece.nbytes)
        frame = Frame(header, self._slots.take(piece.nbytes, pinned=part.is_cuda), self._record)
        if part.device.type == "cpu":  # where `copy_` takes 1.4 times as long as memmove
            ctypes.memmove(frame.slot.payload.data_ptr(), part.data_ptr(), piece.nbytes)
        else:
            frame.slot.payload[:piece.nbytes].copy_(part, non_blocking=True)
        if sums is not None:
            frame.sums = sums.of(part)
        if copies is not None:
            frame.ready = copies.record_event(torch.cuda.Event(blocking=True))  # who waits does not spin
        return frame

    def _limit_bytes(self) -> int:
        """Of the next chunk: the weather may have changed since the last."""
        limit_bytes = min(self._chunk_bytes, self._outbox.chunk_bytes)
        line_limit = None if self._line is None else self._line.chunk_limit(time.monotonic())
        return limit_bytes if line_limit is None else min(limit_bytes, line_limit)

    def _beside_prefill(self, data: torch.Tensor) -> torch.cuda.Stream | None:
        """The CUDA stream that copies `data` to pinned memory, behind the work queued so far; prefill goes on."""
        if not data.is_cuda:
            return None
        copies = _copies(data.device)
        copies.wait_stream(torch.cuda.current_stream(data.device))
        data.record_stream(copies)  # the allocator must not hand the memory out before the copies are done
        return copies

    def finish(self, deadline_s: float) -> StreamReport:
        self._put_log.check_complete()
        self._outbox.wait_until_settled(self._record, deadline_s)
        log, record = self._put_log, self._record
        return StreamReport(self.plan.total_bytes, record.chunks, log.first_put_at_s, log.last_put_at_s,
                            record.acked_at_s, self._stalled_s, record.resent_chunks)

    def abort(self, reason: str = "aborted by the sender") -> None:
        self._outbox.abort(self._record, reason)
