"""In which order frames leave: acknowledgements, control, what leaves again, messages, chunks in turns. Chapter 07.

Pure: no locks and no clocks. The outbox holds its lock while it calls.
"""

from collections import OrderedDict, deque

from minprfaas.transport.wan.frames import ACKS_PER_FRAME, Kind, encode_acks
from minprfaas.transport.wan.outgoing import Frame, StreamRecord, control_frame
from minprfaas.transport.wan.parts import PartsOut

# Messages overtake chunks, but one that is longer than this shares the line with them, byte for byte: an inventory of
# many megabytes must not hold up the KV for which a request waits.
MESSAGE_LEAD_BYTES = 256 * 1024


class SendQueue:
    """Everything that waits to leave one side of a link."""

    def __init__(self) -> None:
        self._acks: list[tuple[int, float]] = []  # (sequence number, since when)
        self._control: deque[Frame] = deque()
        self._again: deque[Frame] = deque()  # left before, under the number that they have
        self._messages = PartsOut()
        self._streams: OrderedDict[StreamRecord, deque[Frame]] = OrderedDict()  # chunks; the first stream is next
        self._lead_bytes = 0  # by how much messages are ahead of the chunks that waited for them

    def push_ack(self, seq: int, now: float) -> None:
        """Acknowledge `seq` to the peer."""
        self._acks.append((seq, now))

    def push_control(self, frame: Frame, now: float) -> None:
        """Queue a control frame that is no message."""
        frame.queued_at = now
        self._control.append(frame)

    def push_message(self, data: bytes, now: float) -> None:
        """Queue an encoded message."""
        self._messages.push(data, now)

    def push_chunk(self, frame: Frame, now: float) -> None:
        """Queue a chunk behind the others of its stream."""
        frame.queued_at = now
        self._streams.setdefault(frame.stream, deque()).append(frame)

    def push_again(self, frame: Frame) -> None:
        """Queue a frame that left before."""
        self._again.append(frame)

    def queued_at(self) -> float | None:
        """Since when the frame that `pop` would take has waited; None when nothing may leave."""
        if self._acks:
            return self._acks[0][1]
        urgent = self._control or self._again
        if urgent:
            return urgent[0].queued_at
        if self._a_message_is_next():
            return self._messages.queued_at
        if self._streams:
            return next(iter(self._streams.values()))[0].queued_at
        return None

    def pop(self) -> Frame | None:
        """Take the next frame; None when nothing may leave."""
        if self._acks:
            taken, self._acks = self._acks[:ACKS_PER_FRAME], self._acks[ACKS_PER_FRAME:]
            return control_frame(Kind.ACK, encode_acks([seq for seq, _ in taken]))
        urgent = self._control or self._again
        if urgent:
            return urgent.popleft()
        if self._a_message_is_next():
            frame = self._messages.pop()
            self._lead_bytes = self._lead_bytes + frame.nbytes if self._streams else 0
            return frame
        if self._streams:
            stream, waiting = next(iter(self._streams.items()))
            frame = waiting.popleft()
            self._streams.move_to_end(stream)  # the next chunk is another stream's
            if not waiting:
                del self._streams[stream]
            self._lead_bytes = max(0, self._lead_bytes - frame.nbytes)
            return frame
        return None

    def _a_message_is_next(self) -> bool:
        if self._messages.queued_at is None:
            return False
        return not self._streams or self._lead_bytes < MESSAGE_LEAD_BYTES

    def settled(self, frame: Frame) -> bool:
        """The peer needs `frame` no more. True if it waited here to be sent again."""
        if frame.header.kind == Kind.MESSAGE:
            self._messages.settled(frame.header.stream)
        if frame not in self._again:
            return False
        self._again.remove(frame)
        return True

    def waits_again(self, frame: Frame) -> bool:
        """Whether `frame` waits to be sent again already."""
        return frame in self._again

    def drop_stream(self, stream: StreamRecord) -> list[Frame]:
        """Forget the chunks of `stream` that have not left, or wait to leave again; returns them."""
        dropped = [*self._streams.pop(stream, ()), *(frame for frame in self._again if frame.stream is stream)]
        self._again = deque(frame for frame in self._again if frame.stream is not stream)
        return dropped

    def streams(self) -> set[StreamRecord]:
        """Those that have chunks waiting to leave for the first time."""
        return set(self._streams)

    @property
    def has_messages(self) -> bool:
        """Whether control frames or messages wait to leave."""
        return bool(self._control) or not self._messages.is_empty

    def begin_epoch(self) -> None:
        """Old lanes are gone: only what must arrive is kept, and what left before leaves first, in its old order."""
        self._acks.clear()  # the peer sends again what it has no acknowledgement for
        self._control = deque(frame for frame in self._control if frame.header.kind == Kind.ABORT)
        self._again = deque(sorted(self._again, key=lambda frame: frame.header.seq))

    def forget_peer(self) -> None:
        """The peer is a new process: nothing that was meant for the old one is of use."""
        self._control.clear()
        self._again.clear()
        self._messages = PartsOut()
