"""Frames: a fixed header and raw bytes, no pickle; parsed as if an enemy had written them. Chapter 07, paper 3.3.

The header's tag covers every other field, so a header that parses is one that the peer wrote; `payload_digest` covers
the bytes behind it, so damaged bytes can be named by sequence number and asked for again (`digest.py`).
"""

import ctypes
import hmac
import struct
import weakref
from copy import copy
from dataclasses import dataclass
from enum import IntEnum

import torch

from minprfaas.transport.streams import Piece
from minprfaas.transport.wan.digest import DIGEST_BYTES, ROW_BYTES, Digest, RowSums, row_sums

MAGIC = b"PFKV"
VERSION = 3
CONTROL_LIMIT_BYTES = 16 * 2**10  # payload of one control frame; a longer message travels in parts
ACKS_PER_FRAME = CONTROL_LIMIT_BYTES // 8

# magic, version, kind, layer, group, start, end, offset, nbytes, seq, stream, payload digest; then the header's tag
_FIELDS = struct.Struct("<4sBBHHxxIIIIQQ4x16s")
HEADER_BYTES = _FIELDS.size + DIGEST_BYTES


class FrameError(Exception):
    """Bytes that are no frame of this link: what follows them cannot be trusted either, so the lane is cut."""


class Kind(IntEnum):
    """What a frame is."""

    CHUNK = 1  # bytes of a KV stream
    MESSAGE = 2  # (part of) a JSON control message; `stream` is the part's number, `start` how many parts follow
    ACK = 3  # payload: sequence numbers that were written
    DAMAGED = 4  # `seq` arrived with a wrong payload digest: send it again
    REFUSE = 5  # `seq` belongs to a stream that this receiver does not want
    ABORT = 6  # the sender gives `stream` up
    HEARTBEAT = 7  # the lane is alive
    BYE = 8  # the peer closes the link on purpose


@dataclass
class Header:
    """One frame's fields. `start`, `end` are tokens; `offset` is a byte offset into request-level state."""

    kind: Kind
    seq: int = 0
    stream: int = 0
    layer: int = 0
    group: int = 0
    start: int = 0
    end: int = 0
    offset: int = 0
    nbytes: int = 0
    payload_digest: bytes = b""

    @property
    def piece(self) -> Piece:
        """Of a chunk: where its bytes belong."""
        return Piece(self.layer, self.group, self.start, self.end, self.nbytes, self.offset)

    @property
    def label(self) -> str:
        """Of a chunk, for the timeline."""
        return f"stream {self.stream} layer {self.layer} tokens {self.start}-{self.end}"


class Slot:
    """Memory for one frame: `tensor` [HEADER_BYTES + capacity] uint8 for Gloo, `view` the same bytes for `struct`."""

    def __init__(self, capacity: int, pinned: bool = False):
        nbytes = HEADER_BYTES + capacity
        if pinned:  # by ctypes, because torch works without numpy and then has no other way to lend its memory
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            array = (ctypes.c_ubyte * nbytes).from_address(self.tensor.data_ptr())
            array.owner = self.tensor  # the view keeps the memory
            self.view = memoryview(array).cast("B")
        else:
            self.view = memoryview(bytearray(nbytes))
            self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)
        self.payload = self.tensor[HEADER_BYTES:]
        rows = capacity // ROW_BYTES  # made once: each view of a tensor gives the interpreter lock up, and waits for it
        self._rows = self.payload[:rows * ROW_BYTES].view(torch.int8).view(rows, ROW_BYTES) if rows else None

    def sums(self, nbytes: int, row_sums: RowSums) -> torch.Tensor | None:
        """Those of a payload of `nbytes`, by a core; None where there are none, or they are not by bytes."""
        rows = row_sums.rows_of(nbytes)
        return row_sums.of_matrix(self._rows[:rows]) if rows and row_sums.by_bytes else None


class SlotPool:
    """Slots for chunks, used again and again: new memory costs a page fault every 4 KiB, more than the copy into it.
    A slot's memory comes back when nothing refers to it: it is acknowledged, and Gloo has let go of it."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._free: dict[bool, list[Slot]] = {True: [], False: []}  # pinned, and not

    def take(self, nbytes: int, pinned: bool) -> Slot:
        """A slot of at least `nbytes`; its view and payload may be longer."""
        if not self._capacity / 2 < nbytes <= self._capacity:  # what waits is counted in bytes: no slot half empty
            return Slot(nbytes, pinned)
        try:
            memory = self._free[pinned].pop()
        except IndexError:
            memory = Slot(self._capacity, pinned)
        taken = copy(memory)
        weakref.finalize(taken, self._free[pinned].append, memory).atexit = False
        return taken


@dataclass(eq=False)
class StreamRecord:
    """The books of one stream that is being sent. Only the send queue writes them, under the outbox's lock."""

    stream_id: int
    chunks: int = 0
    outstanding: int = 0  # chunks that are queued or not yet acknowledged
    resent_chunks: int = 0
    acked_at_s: float = 0.0
    failure: str | None = None


class Frame:
    """One frame on its way out. `ready` is a CUDA event to wait for before the bytes are there, and the `sums` of their
    rows where the GPU has made them."""

    def __init__(self, header: Header, slot: Slot, stream: StreamRecord | None = None):
        self.header, self.slot, self.stream = header, slot, stream
        self.ready: torch.cuda.Event | None = None
        self.sums: torch.Tensor | None = None
        self.queued_at_s = self.sent_at_s = 0.0
        self.times_damaged = 0

    @property
    def nbytes(self) -> int:
        """What crosses, header included."""
        return HEADER_BYTES + self.header.nbytes


def control_frame(kind: Kind, payload: bytes | memoryview = b"", **fields: int) -> Frame:
    """A frame that is no chunk, with its payload in place."""
    slot = Slot(len(payload))
    slot.view[HEADER_BYTES:] = payload
    return Frame(Header(kind, nbytes=len(payload), **fields), slot)


class Codec:
    """Seals and opens the frames of one lane in one epoch. Keys are per direction, `sums` the link's; None: no secret.

    >>> codec, frame = Codec(1024), control_frame(Kind.MESSAGE, b"hello", seq=7)
    >>> codec.seal(frame.header, frame.slot.view)
    >>> header = codec.open(frame.slot.view)
    >>> header.seq, header.nbytes, codec.payload_is_intact(header, frame.slot.view)
    (7, 5, True)
    >>> frame.slot.view[HEADER_BYTES] ^= 1          # one bit, on its way
    >>> codec.payload_is_intact(header, frame.slot.view)
    False
    """

    def __init__(self, payload_limit: int, send_key: bytes | None = None, receive_key: bytes | None = None,
                 sums: RowSums = row_sums(None, False)):
        self.payload_limit, self.row_sums = payload_limit, sums
        self._sent, self._received = Digest(send_key, sums), Digest(receive_key, sums)

    def seal(self, header: Header, view: memoryview, sums: torch.Tensor | None = None) -> None:
        """Write `header` in front of the payload that `view` already holds, with both digests. `sums`: the payload's,
        if they are known; see `Digest.of`."""
        payload = view[HEADER_BYTES:HEADER_BYTES + header.nbytes]
        fields = _FIELDS.pack(MAGIC, VERSION, header.kind, header.layer, header.group, header.start, header.end,
                              header.offset, header.nbytes, header.seq, header.stream, self._sent.of(payload, sums))
        view[:HEADER_BYTES] = fields + self._sent.of(fields)

    def open(self, view: memoryview) -> Header:
        """The header of a received frame. Raises FrameError unless every field is one that a peer may send."""
        if len(view) < HEADER_BYTES:
            raise FrameError(f"{len(view)} bytes are shorter than a header of {HEADER_BYTES}")
        fields, tag = bytes(view[:_FIELDS.size]), bytes(view[_FIELDS.size:HEADER_BYTES])
        if not hmac.compare_digest(tag, self._received.of(fields)):
            raise FrameError("the header's tag is wrong")
        magic, version, kind, layer, group, start, end, offset, nbytes, seq, stream, digest = _FIELDS.unpack(fields)
        if magic != MAGIC or version != VERSION:
            raise FrameError(f"magic {magic!r} version {version}; this side speaks {MAGIC!r} version {VERSION}")
        if not Kind.CHUNK <= kind <= Kind.BYE:
            raise FrameError(f"frame kind {kind} is unknown")
        kind = Kind(kind)
        limit = self.payload_limit if kind == Kind.CHUNK else CONTROL_LIMIT_BYTES
        if nbytes > min(limit, len(view) - HEADER_BYTES):
            raise FrameError(f"{kind.name} of {nbytes} bytes is above the limit of {limit}")
        if kind == Kind.CHUNK and start > end:
            raise FrameError(f"token range [{start}, {end}) is reversed")
        return Header(kind, seq, stream, layer, group, start, end, offset, nbytes, digest)

    def payload_is_intact(self, header: Header, view: memoryview, sums: torch.Tensor | None = None) -> bool:
        """Whether the bytes behind `header` are the ones that it was sealed with. `sums`: theirs, if they are known."""
        payload = view[HEADER_BYTES:HEADER_BYTES + header.nbytes]
        return hmac.compare_digest(header.payload_digest, self._received.of(payload, sums))


def encode_acks(seqs: list[int]) -> bytes:
    """Sequence numbers as the payload of an ACK, 8 bytes each."""
    return struct.pack(f"<{len(seqs)}Q", *seqs)


def decode_acks(data: memoryview) -> list[int]:
    """The sequence numbers of an ACK. Raises FrameError when it is no list of them."""
    if len(data) % 8:
        raise FrameError(f"an acknowledgement of {len(data)} bytes is no list of 8-byte numbers")
    return list(struct.unpack(f"<{len(data) // 8}Q", data))
