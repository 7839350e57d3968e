"""KV streams: a plan of what will cross, cut into chunks by the sender and written into blocks by the receiver.

Chapter 08, paper 3.3 (layer-wise pipelining). A *plan* lists layers and a token range; both sides hold it before a byte
moves, so a receiver checks every frame against what it asked for. Token state crosses in rows of tokens
`[start, end)`, as prefill emits them. Request-level state has one size and crosses once, when the last token is in it.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from minprfaas.config import StateKind
from minprfaas.transport.events import ArrivalReport, StreamAborted
from minprfaas.transport.frames import Header

Sink = Callable[[int, int, int, torch.Tensor], None]  # layer, start, end, uint8 CPU tensor (valid during the call only)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's state on the wire: `row_bytes` a token of token state, else `row_bytes` in all."""

    layer: int
    group: int
    kind: StateKind
    row_bytes: int


@dataclass(frozen=True)
class StreamPlan:
    """Tokens `[start, end)` of the layers in `entries` cross; request-level layers cross once, as of `end`."""

    stream_id: int
    entries: tuple[LayerPlan, ...]
    start: int
    end: int

    def __post_init__(self):
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
        return {entry.layer: entry for entry in self.entries}

    @property
    def total_bytes(self) -> int:
        return sum(entry.row_bytes * (self.end - self.start if entry.kind is StateKind.TOKEN else 1) for entry in self.entries)


class Coverage:
    """Which parts of `[start, end)` are there: sorted, disjoint, merged intervals."""

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end
        self._intervals: list[list[int]] = []

    def add(self, start: int, end: int) -> None:
        """Raises ValueError unless `[start, end)` is non-empty, inside and new."""
        index = bisect_left(self._intervals, [start, start])
        before = self._intervals[index - 1] if index else None
        after = self._intervals[index] if index < len(self._intervals) else None
        overlaps = (before is not None and before[1] > start) or (after is not None and after[0] < end)
        if not self.start <= start < end <= self.end or overlaps:
            raise ValueError(f"[{start}, {end}) is empty, outside [{self.start}, {self.end}), or there already")
        joins_before = before is not None and before[1] == start
        if joins_before:
            before[1] = end
        if after is not None and after[0] == end:
            after[0] = before[0] if joins_before else start
            if joins_before:
                del self._intervals[index - 1]
        elif not joins_before:
            self._intervals.insert(index, [start, end])

    @property
    def prefix_end(self) -> int:
        """Everything before it is there."""
        first = self._intervals[0] if self._intervals else None
        return first[1] if first is not None and first[0] == self.start else self.start

    @property
    def complete(self) -> bool:
        return self.prefix_end == self.end


def plan_coverage(plan: StreamPlan) -> dict[int, Coverage]:
    """An empty coverage a layer: of tokens for token state, of bytes for request-level state."""
    return {entry.layer: Coverage(plan.start, plan.end) if entry.kind is StateKind.TOKEN else Coverage(0, entry.row_bytes)
            for entry in plan.entries}


class IncomingStream:
    """The receiving side: checks each chunk against the plan and hands it to the sink, one call at a time."""

    def __init__(self, plan: StreamPlan, sink: Sink):
        self.plan = plan
        self._sink = sink
        self._lock = threading.Lock()
        self._closed = False
        self._coverage = plan_coverage(plan)
        self._assembling: dict[int, torch.Tensor] = {}  # request-level state that is longer than a chunk
        self._first_byte_s = self._last_byte_s = 0.0

    def accept(self, header: Header, payload: torch.Tensor, now: float) -> bool:
        """Write one chunk; True if it was the last. Raises StreamAborted: it is not in the plan, or the sink failed."""
        with self._lock:
            if self._closed:
                raise StreamAborted("the receiver has given the stream up")
            entry = self.plan.layers.get(header.layer)
            if entry is None or entry.group != header.group:
                raise StreamAborted(f"layer {header.layer} of group {header.group} is not in the plan")
            try:
                self._check_and_cover(entry, header)
            except ValueError as error:
                raise StreamAborted(f"layer {header.layer}: {error}") from None
            try:
                self._write(entry, header, payload)
            except Exception as error:
                self._coverage = plan_coverage(self.plan)  # what the blocks hold now is anyone's guess
                raise StreamAborted(f"the sink failed on layer {header.layer}: {error!r}") from error
            self._first_byte_s = self._first_byte_s or now
            self._last_byte_s = now
            return all(coverage.complete for coverage in self._coverage.values())

    def _check_and_cover(self, entry: LayerPlan, header: Header) -> None:
        if entry.kind is StateKind.TOKEN:
            if header.offset or header.nbytes != (header.end - header.start) * entry.row_bytes:
                raise ValueError(f"{header.nbytes} bytes for [{header.start}, {header.end}) of {entry.row_bytes} each")
            self._coverage[entry.layer].add(header.start, header.end)
            return
        if (header.start, header.end) != (self.plan.start, self.plan.end):
            raise ValueError(f"request-level state as of {header.end}; the plan ends at {self.plan.end}")
        self._coverage[entry.layer].add(header.offset, header.offset + header.nbytes)

    def _write(self, entry: LayerPlan, header: Header, payload: torch.Tensor) -> None:
        if entry.kind is StateKind.TOKEN:
            self._sink(entry.layer, header.start, header.end, payload)
            return
        whole = payload
        if header.nbytes < entry.row_bytes:
            if entry.layer not in self._assembling:
                self._assembling[entry.layer] = torch.empty(entry.row_bytes, dtype=torch.uint8)
            whole = self._assembling[entry.layer]
            whole[header.offset:header.offset + header.nbytes] = payload
        if self._coverage[entry.layer].complete:
            self._sink(entry.layer, self.plan.start, self.plan.end, whole)
            self._assembling.pop(entry.layer, None)

    def close(self) -> int:
        """No sink call runs after this returns. Returns the token up to which all token state is written."""
        with self._lock:
            self._closed = True
            self._assembling.clear()
            return min((self._coverage[entry.layer].prefix_end for entry in self.plan.entries if entry.kind is StateKind.TOKEN),
                       default=self.plan.start)

    def report(self) -> ArrivalReport:
        return ArrivalReport(self.plan.total_bytes, self._first_byte_s, self._last_byte_s)
