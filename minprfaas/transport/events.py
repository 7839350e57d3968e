"""What a link tells its owner: events, reports, and the ways in which it fails. Chapter 07."""

from dataclasses import dataclass


class LinkDown(Exception):
    """The link is gone and did not come back in time, or it was closed."""


class LinkRefused(LinkDown):
    """The handshake failed. The reason is known on the refusing side only; its peer learns that it was refused."""


class StreamAborted(Exception):
    """A KV stream ended before its last byte; the link itself may be well."""


class FrameError(Exception):
    """Bytes that are no frame of this link: what follows them cannot be trusted either, so the lane is cut."""


@dataclass(frozen=True)
class StreamReport:
    """What a sender saw of one stream. Times are `time.monotonic()`, so the overlap with prefill can be computed."""

    bytes: int
    chunks: int
    first_put_s: float
    last_put_s: float
    acked_s: float  # when the last byte was acknowledged: written into the receiver's blocks
    stalled_s: float  # how long `put` was held back because too many bytes were in flight
    resent_chunks: int


@dataclass(frozen=True)
class ArrivalReport:
    """What a receiver saw of one stream; times are the receiver's `time.monotonic()`."""

    bytes: int
    first_byte_s: float
    last_byte_s: float


@dataclass(frozen=True)
class MessageReceived:
    """A control message of the peer's, whole and in order."""

    message: dict


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


@dataclass(frozen=True)
class LinkRestored:
    """The link is back. If `peer_restarted`, the peer is a new process that knows nothing of what went before."""

    epoch: int
    peer_restarted: bool


Event = MessageReceived | StreamDone | StreamFailed | LinkLost | LinkRestored
