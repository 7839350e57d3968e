"""Transport as everybody else sees it: stream plans, events, errors, and the two protocols. Chapters 07, 08; paper 3.3.

KV moves in *streams*. Both ends hold a plan before a byte moves: who receives calls `expect(plan, sink)`, who sends
`open(plan)` and then `put` for each layer as prefill finishes it. What happens meanwhile is told in a queue of events.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from minprfaas.config import StateKind
from minprfaas.transport.events import StreamReport


class LinkDown(Exception):
    """The link is gone and did not come back in time, or it was closed."""


class LinkRefused(LinkDown):
    """The handshake failed. The reason is known on the refusing side only; its peer learns that it was refused."""


class StreamAborted(Exception):
    """A KV stream ended before its last byte; the link itself may be well."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer's state on the wire. `row_bytes`: of each token, or of the whole state where it is request state;
    `encoding` is the name of an `Encoding`."""

    layer: int
    group: int
    kind: StateKind
    row_bytes: int
    encoding: str = "exact"


@dataclass(frozen=True)
class StreamPlan:
    """Tokens `[start, end)` of the layers in `entries` cross; request-level layers cross once, as of `end`."""

    stream_id: int  # unique among all that a receiving process expects, whichever transport brings them
    entries: tuple[LayerPlan, ...]
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.stream_id < 2**64:
            raise ValueError(f"stream_id {self.stream_id} is not a 64-bit number")
        if not 0 <= self.start < self.end < 2**32:
            raise ValueError(f"stream {self.stream_id}: tokens [{self.start}, {self.end}) are none or out of range")
        if not self.entries or len({entry.layer for entry in self.entries}) < len(self.entries):
            raise ValueError(f"stream {self.stream_id}: it needs at least one layer, and each layer once")
        for entry in self.entries:
            if not (0 <= entry.layer < 2**16 and 0 <= entry.group < 2**16 and 1 <= entry.row_bytes < 2**32):
                raise ValueError(f"stream {self.stream_id}: {entry} is out of range")

    @cached_property
    def layers(self) -> dict[int, LayerPlan]:
        """The entries by layer."""
        return {entry.layer: entry for entry in self.entries}

    @property
    def total_bytes(self) -> int:
        """What crosses in all, headers aside."""
        tokens = self.end - self.start
        return sum(entry.row_bytes * (tokens if entry.kind is StateKind.TOKEN else 1) for entry in self.entries)


# Called with (layer, start, end, data) for what has arrived: data is uint8 [bytes], valid during the call only. For
# request-level state it is called once, with all of it and the plan's start and end. Rows that cross exactly may come
# several layers at a time, as data's size says: those of `layer`, and behind them those of the next of its group.
Sink = Callable[[int, int, int, torch.Tensor], None]
Source = Callable[[int, int, int, torch.Tensor | None], torch.Tensor]  # such data, put into a tensor if one is given


class SendStream(Protocol):
    """The sending end of one KV stream."""

    plan: StreamPlan

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """Send tokens `[start, end)` of a layer; for request-level state, `end` is the plan's and `start` is ignored.

        `data` is contiguous uint8 of the plan's size and may be reused when this returns. May block for room: never
        call it from the model's thread. Raises ValueError (not in the plan, or put before), StreamAborted, LinkDown."""

    def put_ready(self, pieces: Iterable[tuple[int, int, int]], source: Source) -> None:
        """`put` each (layer, start, end), read from `source`. A transport may let several cross at once."""
        for layer, start, end in pieces:
            self.put(layer, start, end, source(layer, start, end, None))

    def finish(self, deadline_s: float) -> StreamReport:
        """Wait until the receiver has written everything. Raises TimeoutError, StreamAborted, LinkDown, or ValueError
        when something of the plan was never put."""

    def abort(self, reason: str = "aborted by the sender") -> None:
        """Give the stream up, from any thread; the receiver's ends in StreamFailed. Harmless when it has ended."""


class KVTransport(Protocol):
    """Moves KV from one node to another."""

    def expect(self, plan: StreamPlan, sink: Sink, device: torch.device | None = None) -> None:
        """Accept `plan` from now on; ends in StreamDone or StreamFailed. `sink` runs on threads of the transport, one
        call at a time for one stream. Where it writes to a GPU and says so by `device`, a transport may bring the bytes
        there itself, to check them there; `sink` then works on its thread's current CUDA stream, and need not wait.
        Raises LinkDown, or ValueError when the stream is expected already, or done."""

    def open(self, plan: StreamPlan) -> SendStream:
        """Begin to send what the receiver expects. Raises LinkDown, or ValueError for a plan that cannot cross."""

    def forget(self, stream_id: int) -> int | None:
        """Drop what still arrives of a stream: after this returns, its sink is not called again and no event names it.
        Returns the token up to which all token state is written, None if the stream had ended before."""


class MessageChannel(Protocol):
    """Carries control messages, once and in order."""

    def send_message(self, message: dict) -> None:
        """Queue a JSON object; never blocks. Raises LinkDown, or ValueError for what is no JSON object or too long."""
