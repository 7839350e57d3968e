"""What arrives: each frame is taken once, messages in order, chunks into the stream that asked for them. Chapter 07."""

import threading

from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import EventQueue, MessageReceived
from minprfaas.transport.streams import ExpectedStreams
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, FrameError, Header, Kind, Slot, decode_acks
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import PartsIn


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
            self._taken_below = 1  # every sequence number below it is taken, and those in `_taken`
            self._taken: set[int] = set()
            self._busy: set[int] = set()  # some lane's thread is at it
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
                self._settle_below(header.seq)
        elif self._claim(header.seq):
            if header.kind == Kind.ABORT:
                self.streams.fail(header.stream, "aborted by the sender")
            else:
                self._take_part(header, bytes(payload))
            self._done(header.seq)

    def _take_chunk(self, header: Header, slot: Slot, intact: bool) -> None:
        if not self._claim(header.seq):
            return
        if not intact:
            return self._decline(header.seq, Kind.DAMAGED)
        try:
            self.streams.take(header.stream, header.piece, slot.payload[:header.nbytes])
        except StreamAborted:
            return self._decline(header.seq, Kind.REFUSE)
        self._done(header.seq)

    def _take_part(self, header: Header, payload: bytes) -> None:
        with self._lock:  # also while events are put: two lanes must not swap two messages
            for message in self._parts.add(header.stream, header.start, payload):
                self._events.put(MessageReceived(message, self._name))

    def _claim(self, seq: int) -> bool:
        """Whether this frame is new. One that was taken before is acknowledged again: that may have been lost."""
        with self._lock:
            is_taken = seq < self._taken_below or seq in self._taken
            is_new = not is_taken and seq not in self._busy
            if is_new:
                self._busy.add(seq)
        if is_taken:
            self._outbox.acknowledge(seq)
        return is_new

    def _done(self, seq: int) -> None:
        with self._lock:
            self._busy.discard(seq)
            self._taken.add(seq)
            self._settle_below(self._taken_below)
        self._outbox.acknowledge(seq)

    def _decline(self, seq: int, kind: Kind) -> None:
        """The chunk was not taken, and may come again: DAMAGED asks for it, REFUSE ends its stream."""
        with self._lock:
            self._busy.discard(seq)
        self._outbox.send_control(kind, seq)

    def _settle_below(self, seq: int) -> None:
        """The sender needs no answer to anything below `seq` (dropped streams leave holes)."""
        if seq > self._taken_below:
            self._taken_below = seq
            self._taken = {number for number in self._taken if number >= seq}
        while self._taken_below in self._taken:
            self._taken.remove(self._taken_below)
            self._taken_below += 1
