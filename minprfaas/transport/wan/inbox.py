"""What arrives: chunks into the stream that asked for them, messages in order, and each but once. Chapter 07."""

import threading

import torch

from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import EventQueue, MessageReceived
from minprfaas.transport.streams import ExpectedStreams
from minprfaas.transport.wan import gpu_sums
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, FrameError, Header, Kind, Slot, decode_acks
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import PartsIn


class Inbox:
    """The receiving side of a link. Called by every lane's receiving thread; it outlives epochs.

    What was taken may come again, because its acknowledgement was lost. No number is remembered for that: rows that are
    in their blocks, a part of a message that was taken and the end of a stream that has ended change nothing the second
    time, and are acknowledged anew."""

    def __init__(self, name: str, outbox: Outbox, events: EventQueue):
        self._name, self._outbox, self._events = name, outbox, events
        self.streams = ExpectedStreams(events)
        self._lock = threading.Lock()  # guards the parts
        self.forget_peer()

    def forget_peer(self) -> None:
        """The peer is a new process: its messages begin again."""
        with self._lock:
            self.parts = PartsIn()  # of its messages

    def handle(self, header: Header, slot: Slot, codec: Codec, parts: PartsIn) -> None:
        """Take one frame, of a peer whose `parts` were this inbox's when its lane began: a thread may be so late that
        they are not any more, and what the old peer has numbered is not to count as the new one's. Raises FrameError
        when it cannot come from a sound peer."""
        if parts is not self.parts:
            return
        if header.kind == Kind.CHUNK:
            return self._take_chunk(header, slot, codec)
        if not codec.payload_is_intact(header, slot.view):
            raise FrameError(f"{header.kind.name} arrived with a wrong payload digest")
        payload = slot.view[HEADER_BYTES:HEADER_BYTES + header.nbytes]
        if header.kind == Kind.ACK:
            self._outbox.settle(decode_acks(payload))
        elif header.kind == Kind.DAMAGED:
            self._outbox.send_again(header.seq)
        elif header.kind == Kind.REFUSE:
            self._outbox.settle([header.seq], written=False)
        elif header.kind == Kind.ABORT:
            self.streams.fail(header.stream, "aborted by the sender")
            self._outbox.acknowledge(header.seq)
        elif header.kind == Kind.MESSAGE:
            self._take_part(header, bytes(payload), parts)
            self._outbox.acknowledge(header.seq)

    def _take_chunk(self, header: Header, slot: Slot, codec: Codec) -> None:
        gpu = self.streams.gpu_of(header.stream)
        try:
            with gpu_sums.landing(gpu):
                is_written = self._write_if_intact(header, slot, codec, gpu)
        except StreamAborted as error:
            self.streams.fail(header.stream, str(error))  # unless it has ended before
            return self._outbox.send_control(Kind.REFUSE, header.seq)
        if is_written:
            self._outbox.acknowledge(header.seq)
        else:
            self._outbox.send_control(Kind.DAMAGED, header.seq)

    def _write_if_intact(self, header: Header, slot: Slot, codec: Codec, gpu: torch.device | None) -> bool:
        payload, sums = slot.payload[:header.nbytes], None
        if gpu is not None:
            payload, sums = gpu_sums.land(payload, gpu, codec.row_sums)
        if sums is None:
            sums = slot.sums(header.nbytes, codec.row_sums)
        if not codec.payload_is_intact(header, slot.view, sums):
            return False
        self.streams.take(header.stream, header.piece, payload)
        return True

    def _take_part(self, header: Header, payload: bytes, parts: PartsIn) -> None:
        with self._lock:  # also while events are put: two lanes must not swap two messages
            if parts is not self.parts:  # forgotten meanwhile
                return
            for message in parts.add(header.stream, header.start, payload):
                self._events.put(MessageReceived(message, self._name))
