"""What arrives: each frame is taken once, messages in order, chunks into the stream that asked for them. Chapter 07."""

import threading

from minprfaas.transport.base import EventQueue, MessageReceived, StreamAborted
from minprfaas.transport.streams import ExpectedStreams
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, FrameError, Header, Kind, Slot, decode_acks
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import PartsIn


class Received:
    """Which sequence numbers were taken: all below a floor, and a few above it."""

    def __init__(self) -> None:
        self._floor = 1
        self._done: set[int] = set()
        self._busy: set[int] = set()

    def claim(self, seq: int) -> str:
        """'new' (the caller now handles it, then calls `done` or `release`), 'busy' or 'done'."""
        if seq < self._floor or seq in self._done:
            return "done"
        if seq in self._busy:
            return "busy"
        self._busy.add(seq)
        return "new"

    def release(self, seq: int) -> None:
        """It was not taken after all, and may come again."""
        self._busy.discard(seq)

    def done(self, seq: int) -> None:
        """It is taken."""
        self._busy.discard(seq)
        self._done.add(seq)
        self.settle_below(self._floor)

    def settle_below(self, seq: int) -> None:
        """The sender needs no answer to anything below `seq` (dropped streams leave holes)."""
        if seq > self._floor:
            self._floor = seq
            self._done = {number for number in self._done if number >= seq}
        while self._floor in self._done:
            self._done.remove(self._floor)
            self._floor += 1


class Inbox:
    """The receiving side of a link. Called by every lane's receiving thread; it outlives epochs."""

    def __init__(self, name: str, outbox: Outbox, events: EventQueue):
        self._name, self._outbox, self._events = name, outbox, events
        self.streams = ExpectedStreams(events)
        self._lock = threading.Lock()
        self.forget_peer()

    def forget_peer(self) -> None:
        """The peer is a new process: its numbers begin again."""
        with self._lock:
            self._received = Received()
            self._parts = PartsIn()

    def handle(self, header: Header, slot: Slot, codec: Codec) -> None:
        """Take one frame. Raises FrameError when it cannot come from a sound peer."""
        intact = codec.payload_is_intact(header, slot.view)
        payload = slot.view[HEADER_BYTES:HEADER_BYTES + header.nbytes]
        if header.kind == Kind.CHUNK:
            self._take_chunk(header, slot, intact)
        elif not intact:
            raise FrameError(f"{header.kind.name} arrived with a wrong payload digest")
        elif header.kind == Kind.ACK:
            self._outbox.settle(decode_acks(payload))
        elif header.kind == Kind.DAMAGED:
            self._outbox.send_again(header.seq)
        elif header.kind == Kind.REFUSE:
            self._outbox.settle([header.seq], written=False)
        elif header.kind == Kind.HEARTBEAT:
            with self._lock:
                self._received.settle_below(header.seq)
        elif self._claim(header):
            if header.kind == Kind.ABORT:
                self.streams.fail(header.stream, "aborted by the sender")
            else:
                self._take_part(header, bytes(payload))
            self._done(header)

    def _claim(self, header: Header) -> bool:
        """Is this frame new? One that was taken before is acknowledged again: its acknowledgement may be lost."""
        with self._lock:
            state = self._received.claim(header.seq)
        if state == "done":
            self._outbox.acknowledge(header.seq)
        return state == "new"

    def _done(self, header: Header) -> None:
        with self._lock:
            self._received.done(header.seq)
        self._outbox.acknowledge(header.seq)

    def _decline(self, header: Header, kind: Kind) -> None:
        """The chunk was not taken: DAMAGED asks for it again, REFUSE ends its stream."""
        with self._lock:
            self._received.release(header.seq)
        self._outbox.send_control(kind, header.seq)

    def _take_chunk(self, header: Header, slot: Slot, intact: bool) -> None:
        if not self._claim(header):
            return
        if not intact:
            return self._decline(header, Kind.DAMAGED)
        try:
            self.streams.take(header.stream, header.piece, slot.payload[:header.nbytes])
        except StreamAborted:
            return self._decline(header, Kind.REFUSE)
        self._done(header)

    def _take_part(self, header: Header, payload: bytes) -> None:
        with self._lock:  # also while events are put: two lanes must not swap two messages
            for message in self._parts.add(header.stream, header.start, payload):
                self._events.put(MessageReceived(message, self._name))
