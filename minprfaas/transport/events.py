"""What a transport reports: how streams went, and the events that its owner hears. Chapters 07 and 08; paper 3.3."""

import queue
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamReport:
    """What a sender saw of one stream. Times are `time.monotonic()`, so the overlap with prefill can be computed."""

    bytes: int
    chunks: int
    first_put_at_s: float
    last_put_at_s: float
    acked_at_s: float  # when the last byte was acknowledged: written into the receiver's blocks
    stalled_s: float  # how long `put` was held back because too many bytes were in flight
    resent_chunks: int


@dataclass(frozen=True)
class ArrivalReport:
    """What a receiver saw of one stream; times are the receiver's `time.monotonic()`."""

    bytes: int
    first_byte_at_s: float
    last_byte_at_s: float


@dataclass(frozen=True)
class MessageReceived:
    """A control message of the peer's, whole and in order. `link` is the name of the link that brought it."""

    message: dict
    link: str


@dataclass(frozen=True)
class StreamDone:
    """Every byte of the plan has arrived and the sink has written it."""

    stream_id: int
    report: ArrivalReport


@dataclass(frozen=True)
class StreamFailed:
    """The stream will not complete. Tokens before `arrived_end` are written, in every layer of token state."""

    stream_id: int
    reason: str
    arrived_end: int


@dataclass(frozen=True)
class LinkLost:
    """The link is gone for good; its last event."""

    reason: str
    link: str


@dataclass(frozen=True)
class LinkRestored:
    """The link is back. If `peer_restarted`, the peer is a new process that knows nothing of what went before."""

    epoch: int
    peer_restarted: bool
    link: str


Event = MessageReceived | StreamDone | StreamFailed | LinkLost | LinkRestored
EventQueue = queue.SimpleQueue  # of Event; a process gives one queue to all its transports, so one wait hears them all
