"""What arrives: each frame is taken once, messages in order, chunks into the stream that asked for them. Chapter 07."""

import queue
import threading
import time

from minprfaas.transport.wan.frames import FrameError
from minprfaas.transport.base import Event, MessageReceived, StreamAborted, StreamDone, StreamFailed
from minprfaas.transport.wan.frames import (CONTROL_LIMIT_BYTES, HEADER_BYTES, MESSAGE_LIMIT_BYTES, Codec, Header, Kind,
                                        Slot, decode_acks, decode_message)
from minprfaas.transport.wan.outbox import Outbox, control_frame
from minprfaas.transport.streams import IncomingStream

MESSAGE_WINDOW = 2 * MESSAGE_LIMIT_BYTES // CONTROL_LIMIT_BYTES  # parts that may arrive ahead of a missing one


class Received:
    """Which sequence numbers were taken: all below a floor, and a few above it."""

    def __init__(self):
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
        self._busy.discard(seq)

    def done(self, seq: int) -> None:
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

    def __init__(self, outbox: Outbox):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._outbox = outbox
        self._lock = threading.Lock()
        self._streams: dict[int, IncomingStream] = {}
        self.forget_peer()

    def forget_peer(self) -> None:
        """The peer is a new process: its numbers begin again."""
        with self._lock:
            self._received = Received()
            self._next_part = 0
            self._early_parts: dict[int, tuple[int, bytes]] = {}  # number -> (how many follow, bytes)
            self._message = bytearray()

    def expect(self, stream: IncomingStream) -> None:
        with self._lock:
            if stream.plan.stream_id in self._streams:
                raise ValueError(f"stream {stream.plan.stream_id} is expected already")
            self._streams[stream.plan.stream_id] = stream

    def forget(self, stream_id: int) -> int | None:
        """Returns the token up to which the stream is written, None if it is unknown. No sink call follows."""
        with self._lock:
            stream = self._streams.pop(stream_id, None)
        return None if stream is None else stream.close()

    def fail(self, stream_id: int, reason: str) -> None:
        arrived_end = self.forget(stream_id)
        if arrived_end is not None:
            self.events.put(StreamFailed(stream_id, reason, arrived_end))

    def fail_all(self, reason: str) -> None:
        for stream_id in [*self._streams]:
            self.fail(stream_id, reason)

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
                self.fail(header.stream, "aborted by the sender")
            else:
                with self._lock:
                    self._take_message_part(header.stream, header.start, bytes(payload))
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
        self._outbox.send_control(control_frame(kind, seq=header.seq))

    def _take_chunk(self, header: Header, slot: Slot, intact: bool) -> None:
        if not self._claim(header):
            return
        stream = self._streams.get(header.stream)
        if stream is None:
            return self._decline(header, Kind.REFUSE)
        if not intact:
            return self._decline(header, Kind.DAMAGED)
        try:
            complete = stream.accept(header, slot.payload[:header.nbytes], time.monotonic())
        except StreamAborted as error:
            self.fail(header.stream, str(error))
            return self._decline(header, Kind.REFUSE)
        if complete:
            with self._lock:
                self._streams.pop(header.stream, None)
            self.events.put(StreamDone(header.stream, stream.report()))
        self._done(header)

    def _take_message_part(self, number: int, parts_left: int, payload: bytes) -> None:
        if not self._next_part <= number < self._next_part + MESSAGE_WINDOW:
            raise FrameError(f"message part {number} is outside the window that begins at {self._next_part}")
        self._early_parts[number] = (parts_left, payload)
        while self._next_part in self._early_parts:
            parts_left, payload = self._early_parts.pop(self._next_part)
            self._next_part += 1
            self._message += payload
            if len(self._message) > MESSAGE_LIMIT_BYTES:
                raise FrameError(f"a control message is longer than {MESSAGE_LIMIT_BYTES} bytes")
            if parts_left == 0:
                self.events.put(MessageReceived(decode_message(bytes(self._message))))
                self._message.clear()
