"""What is on its way out: a frame, and what is known of the stream that it belongs to. Chapter 07, paper 3.3."""

from dataclasses import dataclass

import torch

from minprfaas.transport.wan.frames import HEADER_BYTES, Header, Kind, Slot


@dataclass(eq=False)
class StreamRecord:
    """The books of one stream that is being sent. Only the outbox writes them, under its lock."""

    stream_id: int
    chunks: int = 0
    outstanding: int = 0  # chunks that are queued or not yet acknowledged
    resent_chunks: int = 0
    acked_s: float = 0.0
    failure: str | None = None


class Frame:
    """One frame on its way out. `ready` is a CUDA event to wait for before the bytes are there."""

    def __init__(self, header: Header, slot: Slot, stream: StreamRecord | None = None,
                 ready: torch.cuda.Event | None = None):
        self.header, self.slot, self.stream, self.ready = header, slot, stream, ready
        self.queued_at = self.sent_at = 0.0

    @property
    def nbytes(self) -> int:
        """What crosses, header included."""
        return HEADER_BYTES + self.header.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """Exactly the bytes that cross."""
        return self.slot.tensor[:self.nbytes]


def control_frame(kind: Kind, payload: bytes | memoryview = b"", **fields: int) -> Frame:
    """A frame that is no chunk, with its payload in place."""
    slot = Slot(len(payload))
    slot.view[HEADER_BYTES:] = payload
    return Frame(Header(kind, nbytes=len(payload), **fields), slot)
