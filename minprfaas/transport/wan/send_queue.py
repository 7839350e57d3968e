"""What waits to leave one side of a link, and what has left and is not acknowledged. Chapter 07, paper 3.3.

Order: acknowledgements, control, what leaves again, messages, chunks of the streams in turns. A frame that must arrive
gets its number when it leaves and keeps its memory until it is acknowledged, so that it can be sent again. Pure: no
locks, time is an argument; the outbox holds its lock while it calls.
"""

from collections import OrderedDict, deque
from collections.abc import Callable

from minprfaas.transport.wan.frames import ACKS_PER_FRAME, Frame, Kind, StreamRecord, control_frame, encode_acks
from minprfaas.transport.wan.monitor import Monitor
from minprfaas.transport.wan.parts import PartsOut

RELIABLE = (Kind.CHUNK, Kind.MESSAGE, Kind.ABORT)
# Messages overtake chunks, but one that is longer than this shares the line with them, byte for byte: an inventory of
# many megabytes must not hold up the KV for which a request waits.
MESSAGE_LEAD_BYTES = 256 * 1024
MOST_TIMES_DAMAGED = 16  # of a chunk: a line that does that brings nothing, so it is the bytes or the digest


class SendQueue:
    """The books of one sending side. Chunks that are queued or in flight hold at most `max_inflight_bytes`."""

    def __init__(self, max_inflight_bytes: int, now_s: float):
        self.monitor = Monitor(now_s)
        self._max_inflight_bytes = max_inflight_bytes
        self._acks: list[tuple[int, float]] = []  # (sequence number, since when)
        self._control: deque[Frame] = deque()
        self._again: dict[int, Frame] = {}  # left before, under the number that they have
        self._messages = PartsOut()
        self._streams: OrderedDict[StreamRecord, deque[Frame]] = OrderedDict()  # chunks; the first stream is next
        self._lead_bytes = 0  # by how much messages are ahead of the chunks that waited for them
        self._unacked: dict[int, Frame] = {}  # by sequence number
        self._next_seq = 1

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk of `nbytes` fits. One always does, or a chunk above the limit would wait for ever."""
        held = self.monitor.queued_bytes + self.monitor.inflight_bytes
        return held == 0 or held + nbytes <= min(self._max_inflight_bytes, self.monitor.first_bytes)

    def push_ack(self, seq: int, now_s: float) -> bool:
        """Acknowledge `seq` to the peer; True if no other acknowledgement waits."""
        self._acks.append((seq, now_s))
        return len(self._acks) == 1

    def push_control(self, frame: Frame, now_s: float) -> None:
        """Queue a control frame that is no message."""
        frame.queued_at_s = now_s
        self._control.append(frame)

    def push_message(self, data: bytes, now_s: float) -> None:
        """Queue an encoded message."""
        self._messages.push(data, now_s)

    def push_chunk(self, frame: Frame, now_s: float) -> None:
        """Queue a chunk behind the others of its stream. The monitor knows it as queued since it has room."""
        frame.queued_at_s = now_s
        frame.stream.chunks += 1
        frame.stream.outstanding += 1
        self._streams.setdefault(frame.stream, deque()).append(frame)

    def queued_at_s(self) -> float | None:
        """Since when the frame that `pop` would take has waited; None when nothing may leave."""
        next_one = self._next()
        return None if next_one is None else next_one[0]

    def pop(self, now_s: float) -> Frame | None:
        """Let the next frame leave; None when nothing may."""
        next_one = self._next()
        if next_one is None:
            return None
        _, take = next_one
        frame = take()
        frame.sent_at_s = now_s
        if frame.header.kind in RELIABLE:
            if not frame.header.seq:  # else it leaves again, under the number that it has
                frame.header.seq = self._next_seq
                self._next_seq += 1
            self._unacked[frame.header.seq] = frame
        if frame.header.kind == Kind.CHUNK:
            self.monitor.sent(frame.nbytes, now_s)
        return frame

    def _next(self) -> tuple[float, Callable[[], Frame]] | None:
        """The order: since when the frame whose turn it is has waited, and how it is taken out."""
        if self._acks:
            return self._acks[0][1], self._take_acks
        if self._control:
            return self._control[0].queued_at_s, self._control.popleft
        if self._again:
            seq, frame = next(iter(self._again.items()))
            return frame.queued_at_s, lambda: self._again.pop(seq)
        waits_since_s = self._messages.queued_at_s
        if waits_since_s is not None and (not self._streams or self._lead_bytes < MESSAGE_LEAD_BYTES):
            return waits_since_s, self._take_message
        if self._streams:
            return next(iter(self._streams.values()))[0].queued_at_s, self._take_chunk
        return None

    def _take_acks(self) -> Frame:
        taken, self._acks = self._acks[:ACKS_PER_FRAME], self._acks[ACKS_PER_FRAME:]
        return control_frame(Kind.ACK, encode_acks([seq for seq, _ in taken]))

    def _take_message(self) -> Frame:
        frame = self._messages.pop()
        self._lead_bytes = self._lead_bytes + frame.nbytes if self._streams else 0
        return frame

    def _take_chunk(self) -> Frame:
        stream, waiting = next(iter(self._streams.items()))
        frame = waiting.popleft()
        self._streams.move_to_end(stream)  # the next chunk is another stream's
        if not waiting:
            del self._streams[stream]
        self._lead_bytes = max(0, self._lead_bytes - frame.nbytes)
        return frame

    def settle(self, seq: int, written: bool, now_s: float) -> Frame | None:
        """`seq` needs no more: acknowledged, or (not `written`) refused or given up. None if it was settled before."""
        frame = self._unacked.pop(seq, None)
        if frame is None:
            return None
        waits_again = self._again.pop(seq, None) is not None
        if frame.header.kind == Kind.MESSAGE:
            self._messages.settled(frame.header.stream)
        if frame.header.kind == Kind.CHUNK:
            if waits_again:
                self.monitor.sent(frame.nbytes, now_s)
            self.monitor.settled(frame.nbytes, now_s - frame.sent_at_s if written else None, now_s)
            frame.stream.outstanding -= 1
            frame.stream.acked_at_s = now_s
            if not written:
                self.fail(frame.stream, "refused by the receiver")
        return frame

    def send_again(self, seq: int, now_s: float) -> None:
        """Queue an unacknowledged frame once more, under the number that it has."""
        frame = self._unacked.get(seq)
        if frame is None or seq in self._again:
            return
        if frame.header.kind == Kind.CHUNK:
            self.monitor.settled(frame.nbytes, None, now_s)
            self.monitor.queued(frame.nbytes, now_s)
            frame.stream.resent_chunks += 1
        self._again[seq] = frame

    def damaged(self, seq: int, now_s: float) -> StreamRecord | None:
        """The peer received `seq` damaged: it leaves again. The stream is returned if this ends it, because a chunk's
        digest does not fit however often it crosses."""
        frame = self._unacked.get(seq)
        if frame is None:
            return None
        frame.times_damaged += 1
        if frame.times_damaged < MOST_TIMES_DAMAGED or frame.stream is None:
            self.send_again(seq, now_s)
            return None
        self.fail(frame.stream, f"a chunk was damaged {MOST_TIMES_DAMAGED} times")
        self.settle(seq, False, now_s)
        return frame.stream

    def fail(self, stream: StreamRecord, reason: str) -> None:
        """End a stream: what waits of it never leaves (again). Chunks that have left settle when the peer answers."""
        if stream.failure is not None:
            return
        stream.failure = reason
        again = [frame for frame in self._again.values() if frame.stream is stream]
        for frame in [*self._streams.pop(stream, ()), *again]:
            self.monitor.queued_bytes -= frame.nbytes
            self._again.pop(frame.header.seq, None)
            self._unacked.pop(frame.header.seq, None)

    @property
    def owes_messages(self) -> bool:
        """Whether control frames wait to leave, or messages to leave or to be acknowledged."""
        return bool(self._control) or not self._messages.is_settled

    def begin_epoch(self, now_s: float) -> None:
        """Old lanes are gone: only what must arrive is kept, and what left before leaves first, in its old order."""
        self.monitor.begin_epoch()
        for seq, frame in list(self._unacked.items()):
            if frame.stream is not None and frame.stream.failure is not None:
                self.settle(seq, False, now_s)
            else:
                self.send_again(seq, now_s)
        self._acks.clear()  # the peer sends again what it has no acknowledgement for
        self._control = deque(frame for frame in self._control if frame.header.kind == Kind.ABORT)
        self._again = dict(sorted(self._again.items()))

    def forget_peer(self, reason: str, now_s: float) -> None:
        """The peer is a new process: nothing that the old one has, or was meant to get, is of use."""
        unacked = list(self._unacked.values())
        for stream in {*self._streams, *(frame.stream for frame in unacked if frame.stream is not None)}:
            self.fail(stream, reason)
        for frame in unacked:
            self.settle(frame.header.seq, False, now_s)
        self._control.clear()
        self._messages = PartsOut()
