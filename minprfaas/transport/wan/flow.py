"""Flow control: what has left and is not acknowledged, and how much more may be held. Chapter 07, paper 3.3.

A frame that must arrive gets its number when it leaves and keeps its memory until it is acknowledged, so that it can be
sent again. Pure: no locks, time is an argument; the outbox holds its lock while it calls.
"""

from dataclasses import replace

from minprfaas.transport.wan.frames import Kind
from minprfaas.transport.wan.monitor import Monitor
from minprfaas.transport.wan.outgoing import Frame

RELIABLE = (Kind.CHUNK, Kind.MESSAGE, Kind.ABORT)


class Flow:
    """The window of one side of a link: chunks that are queued or in flight hold at most `max_inflight_bytes`."""

    def __init__(self, max_inflight_bytes: int, now: float):
        self.monitor = Monitor(now)
        self._max_inflight_bytes = max_inflight_bytes
        self._unacked: dict[int, Frame] = {}  # by sequence number
        self._next_seq = 1

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk of `nbytes` fits. One always does, or a chunk above the limit would wait for ever."""
        held = self.monitor.queued_bytes + self.monitor.inflight_bytes
        return held == 0 or held + nbytes <= self._max_inflight_bytes

    def depart(self, frame: Frame, now: float) -> None:
        """`frame` leaves. It is numbered here and not when it was queued: only dropped streams leave holes."""
        frame.sent_at = now
        if frame.header.kind in RELIABLE:
            if not frame.header.seq:
                frame.header = replace(frame.header, seq=self._next_seq)
                self._next_seq += 1
            self._unacked[frame.header.seq] = frame
        if frame.header.kind == Kind.CHUNK:
            self.monitor.sent(frame.nbytes, now)

    def settle(self, seq: int, written: bool, waited_again: bool, now: float) -> None:
        """`seq` needs no more: acknowledged, or (not `written`) given up; `waited_again`: while it was queued again."""
        frame = self._unacked.pop(seq)
        if frame.header.kind == Kind.CHUNK:
            if waited_again:
                self.monitor.sent(frame.nbytes, now)
            self.monitor.settled(frame.nbytes, now - frame.sent_at if written else None, now)

    def send_again(self, frame: Frame, now: float) -> None:
        """`frame` goes back into the queue, under the number that it has."""
        if frame.header.kind == Kind.CHUNK:
            self.monitor.settled(frame.nbytes, None, now)
            self.monitor.queued(frame.nbytes, now)
            frame.stream.resent_chunks += 1

    def drop(self, frame: Frame) -> None:
        """`frame` was queued and never leaves (again)."""
        self.monitor.queued_bytes -= frame.nbytes
        self._unacked.pop(frame.header.seq, None)

    def find(self, seq: int) -> Frame | None:
        """The unacknowledged frame of that number."""
        return self._unacked.get(seq)

    def unacked(self) -> list[Frame]:
        """Everything that has left and is not acknowledged."""
        return list(self._unacked.values())

    @property
    def settled_below(self) -> int:
        """Every sequence number below it needs nothing more from the peer."""
        return min(self._unacked, default=self._next_seq)
