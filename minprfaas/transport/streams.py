"""What every transport shares: both ends hold one plan, and nothing but what it says crosses. Chapter 08, paper 3.3.

Token state crosses in rows of tokens `[start, end)`, as prefill emits them. Request-level state has one size and
crosses once, when the last token is in it.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minprfaas.config import StateKind
from minprfaas.transport.base import LayerPlan, Sink, StreamAborted, StreamPlan
from minprfaas.transport.events import ArrivalReport, EventQueue, StreamDone, StreamFailed

SINK_WITHIN_S = 60.0  # far more than any piece takes, in a process whose interpreter is held up as well
DONE_KNOWN = 1024  # streams that were done last: far more than can lack an acknowledgement at a time


@dataclass(frozen=True)
class Piece:
    """Where `nbytes` of a stream belong: rows of tokens `[start, end)` of `layer`, and of those behind it in its group
    up to `layers` in all; or a request-level state from `offset` on."""

    layer: int
    group: int
    start: int
    end: int
    nbytes: int
    offset: int = 0
    layers: int = 1


def wait_for_gpu(device: torch.device) -> None:
    """Until the current CUDA stream has come here. A wait that spins would take a core from whoever computes."""
    torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True)).synchronize()


class Coverage:
    """Which parts of `[start, end)` are there: sorted, disjoint, merged intervals.

    >>> arrived = Coverage(0, 100)
    >>> arrived.add(64, 100); arrived.add(0, 32); arrived.prefix_end
    32
    >>> arrived.add(32, 64); arrived.prefix_end
    100
    """

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
        if after is not None and after[0] == end:
            end = after[1]
            del self._intervals[index]
        if before is not None and before[1] == start:
            before[1] = end
        else:
            self._intervals.insert(index, [start, end])

    def has(self, start: int, end: int) -> bool:
        """Whether all of `[start, end)` is there."""
        index = bisect_left(self._intervals, [start + 1])
        return start < end and index > 0 and end <= self._intervals[index - 1][1]

    @property
    def prefix_end(self) -> int:
        """Everything before it is there."""
        first = self._intervals[0] if self._intervals else None
        return first[1] if first is not None and first[0] == self.start else self.start

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.prefix_end == self.end


def next_in_group(plan: StreamPlan) -> dict[int, int]:
    """By layer the next one of its group, where rows of both may cross as one piece: exactly as they are."""
    following, last_alike = {}, {}
    for entry in plan.entries:
        if entry.kind is StateKind.TOKEN and entry.encoding == "exact":
            alike = entry.group, entry.row_bytes
            if alike in last_alike:
                following[last_alike[alike]] = entry.layer
            last_alike[alike] = entry.layer
    return following


class PlanCoverage:
    """Which parts of a plan are there: `layers` has tokens of token state, bytes of request-level state."""

    def __init__(self, plan: StreamPlan):
        self._plan = plan
        self.layers: dict[int, Coverage] = {}
        for entry in plan.entries:
            is_rows = entry.kind is StateKind.TOKEN
            self.layers[entry.layer] = Coverage(plan.start, plan.end) if is_rows else Coverage(0, entry.row_bytes)
        self._missing = dict.fromkeys(self.layers)  # asked after each piece, so not counted anew
        self._next = next_in_group(plan)

    def add(self, piece: Piece) -> None:
        """Note a piece of one of the plan's layers. Raises ValueError unless it is in the plan, and new."""
        entry, plan = self._plan.layers[piece.layer], self._plan
        if entry.kind is not StateKind.TOKEN:
            if (piece.start, piece.end) != (plan.start, plan.end):
                raise ValueError(f"layer {entry.layer}: request-level state crosses as of token {plan.end}, "
                                 f"not {piece.end}")
            return self._add(piece.layer, piece.offset, piece.offset + piece.nbytes)
        nbytes = (piece.end - piece.start) * entry.row_bytes * piece.layers
        if piece.offset or piece.layers < 1 or piece.nbytes != nbytes:
            raise ValueError(f"{piece.nbytes} bytes for [{piece.start}, {piece.end}) of {entry.row_bytes} each")
        layer: int | None = piece.layer
        for _ in range(piece.layers):
            if layer is None:
                raise ValueError(f"{piece.layers} layers from {piece.layer} on cannot cross as one")
            self._add(layer, piece.start, piece.end)
            layer = self._next.get(layer)

    def _add(self, layer: int, start: int, end: int) -> None:
        self.layers[layer].add(start, end)
        if self.layers[layer].complete:
            del self._missing[layer]

    def has(self, piece: Piece) -> bool:
        """Whether a piece of one of the plan's layers is there already."""
        if self._plan.layers[piece.layer].kind is StateKind.TOKEN:
            return self.layers[piece.layer].has(piece.start, piece.end)
        return self.layers[piece.layer].has(piece.offset, piece.offset + piece.nbytes)

    @property
    def missing(self) -> list[int]:
        """Layers that are not complete."""
        return list(self._missing)

    @property
    def prefix_end(self) -> int:
        """The token up to which every layer of token state is there."""
        rows = [entry.layer for entry in self._plan.entries if entry.kind is StateKind.TOKEN]
        return min([self.layers[layer].prefix_end for layer in rows], default=self._plan.start)


class PutLog:
    """The sending side of a plan: what has been put, and that nothing else is."""

    def __init__(self, plan: StreamPlan):
        self.plan = plan
        self.puts = 0
        self.first_put_at_s = self.last_put_at_s = 0.0
        self._coverage = PlanCoverage(plan)

    def add(self, layer: int, start: int, end: int, data: torch.Tensor) -> Piece:
        """Note a `put`; returns where it belongs. Raises ValueError when it is not in the plan, or was put before."""
        expected = self.nbytes(layer, start, end)
        if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != expected:
            raise ValueError(f"layer {layer}: expected {expected} contiguous uint8, got {data.numel()} of {data.dtype}")
        return self.note(layer, start, end)

    def note(self, layer: int, start: int, end: int, layers: int = 1) -> Piece:
        """`add` for bytes that are still to be read, of one layer or of a run of `layers`."""
        nbytes, entry = layers * self.nbytes(layer, start, end), self.plan.layers[layer]
        if entry.kind is not StateKind.TOKEN:
            start = self.plan.start  # whatever the caller says: such state has no first token
        piece = Piece(layer, entry.group, start, end, nbytes, layers=layers)
        self._coverage.add(piece)
        self.last_put_at_s = time.monotonic()
        if not self.puts:
            self.first_put_at_s = self.last_put_at_s
        self.puts += 1
        return piece

    def nbytes(self, layer: int, start: int, end: int) -> int:
        """What crosses of a layer for these tokens; of request-level state all. Raises ValueError: not in the plan."""
        entry = self.plan.layers.get(layer)
        if entry is None:
            raise ValueError(f"stream {self.plan.stream_id}: layer {layer} is not in the plan")
        return entry.row_bytes * (end - start if entry.kind is StateKind.TOKEN else 1)

    def cut(self, whole: Piece, data: torch.Tensor, limit_bytes: Callable[[], int]) -> Iterator[
            tuple[Piece, torch.Tensor]]:
        """A put and its bytes in pieces of at most `limit_bytes()`, which is asked anew for each: whole rows of token
        state (at least one), any bytes of request-level state."""
        entry = self.plan.layers[whole.layer]
        at = 0
        while at < data.numel():
            limit = limit_bytes()
            if entry.kind is StateKind.TOKEN:
                limit = max(1, limit // entry.row_bytes) * entry.row_bytes
            part = data[at:at + limit]
            nbytes = part.numel()
            if entry.kind is StateKind.TOKEN:
                first = whole.start + at // entry.row_bytes
                yield Piece(whole.layer, whole.group, first, first + nbytes // entry.row_bytes, nbytes), part
            else:
                yield Piece(whole.layer, whole.group, whole.start, whole.end, nbytes, at), part
            at += nbytes

    def check_complete(self) -> None:
        """Raises ValueError unless all of the plan was put."""
        missing = self._coverage.missing
        if missing:
            raise ValueError(f"stream {self.plan.stream_id} cannot finish: layers {missing} were not put completely")


class IncomingStream:
    """The receiving side of a plan: checks each piece against it and hands it to the sink, one call at a time. `gpu`:
    where its transport brings the pieces, each by any CUDA stream."""

    def __init__(self, plan: StreamPlan, sink: Sink, gpu: torch.device | None = None):
        self.plan, self.gpu = plan, gpu
        self._sink = sink
        self._lock = threading.Lock()
        self._closed = False
        self._coverage = PlanCoverage(plan)
        self._assembling: dict[int, torch.Tensor] = {}  # request-level state that is longer than a piece
        self._first_byte_at_s = self._last_byte_at_s = 0.0

    def accept(self, piece: Piece, data: torch.Tensor, now_s: float) -> bool:
        """Write one piece, unless it is there already; True if it was the last. Raises StreamAborted: it is not in the
        plan, or the sink failed."""
        with self._lock:
            if self._closed:
                raise StreamAborted("the receiver has given the stream up")
            entry = self.plan.layers.get(piece.layer)
            if entry is None or entry.group != piece.group:
                raise StreamAborted(f"layer {piece.layer} of group {piece.group} is not in the plan")
            if piece.layers == 1 and self._coverage.has(piece):  # no run is sent twice
                return False
            try:
                self._coverage.add(piece)
            except ValueError as error:
                if piece.layers > 1:
                    self._coverage = PlanCoverage(self.plan)  # some layers of a run may count, and none is written
                raise StreamAborted(f"layer {piece.layer}: {error}") from None
            try:
                self._write(entry, piece, data)
                if self.gpu is not None:  # others come by other CUDA streams, and `close` says that no more is written
                    wait_for_gpu(self.gpu)
            except Exception as error:
                self._coverage = PlanCoverage(self.plan)  # what the blocks hold now is anyone's guess
                raise StreamAborted(f"the sink failed on layer {piece.layer}: {error!r}") from error
            self._first_byte_at_s = min(self._first_byte_at_s or now_s, now_s)  # lanes come in any order
            self._last_byte_at_s = max(self._last_byte_at_s, now_s)
            return not self._coverage.missing

    def _write(self, entry: LayerPlan, piece: Piece, data: torch.Tensor) -> None:
        if entry.kind is StateKind.TOKEN:
            return self._sink(entry.layer, piece.start, piece.end, data)
        whole = data
        if piece.nbytes < entry.row_bytes:
            if entry.layer not in self._assembling:
                self._assembling[entry.layer] = torch.empty(entry.row_bytes, dtype=torch.uint8, device=data.device)
            whole = self._assembling[entry.layer]
            whole[piece.offset:piece.offset + piece.nbytes] = data
        if self._coverage.layers[entry.layer].complete:  # half a state is worth nothing: the sink gets it whole
            self._sink(entry.layer, self.plan.start, self.plan.end, whole)
            self._assembling.pop(entry.layer, None)

    def close(self) -> int:
        """No sink call runs after this returns. Returns the token up to which all token state is written. RuntimeError
        when one does not end: its device stands still, and a node can only end that must not use these blocks again."""
        self._closed = True  # before the wait: pieces that wait for the lock as well are written no more
        if not self._lock.acquire(timeout=SINK_WITHIN_S):
            raise RuntimeError(f"stream {self.plan.stream_id}: its sink has stood still for {SINK_WITHIN_S:g} s")
        try:
            self._assembling.clear()
            return self._coverage.prefix_end
        finally:
            self._lock.release()

    def report(self) -> ArrivalReport:
        """Of a complete stream."""
        return ArrivalReport(self.plan.total_bytes, self._first_byte_at_s, self._last_byte_at_s)


class ExpectedStreams:
    """The streams that one receiver waits for, by id. Any thread may call any method."""

    def __init__(self, events: EventQueue):
        self._events = events
        self._lock = threading.Lock()
        self._streams: dict[int, IncomingStream] = {}
        self._ending: dict[int, IncomingStream] = {}  # given up, while their sinks are waited for
        self._done: deque[int] = deque(maxlen=DONE_KNOWN)

    def expect(self, plan: StreamPlan, sink: Sink, device: torch.device | None = None) -> None:
        """See `KVTransport.expect`; a transport that brings bytes to no GPU keeps `device` to itself."""
        gpu = device if device is not None and device.type == "cuda" else None
        with self._lock:
            if plan.stream_id in self._streams or plan.stream_id in self._done:  # it would be acknowledged, not written
                raise ValueError(f"stream {plan.stream_id} is expected already, or was received")
            self._streams[plan.stream_id] = IncomingStream(plan, sink, gpu)

    def gpu_of(self, stream_id: int) -> torch.device | None:
        """The GPU to which the bytes of a stream are to be brought; None when there is none, or nobody wants them."""
        stream = self._streams.get(stream_id)
        return None if stream is None else stream.gpu

    def forget(self, stream_id: int) -> int | None:
        """See `KVTransport.forget`. Who comes second waits for the sink as well: its blocks may be another's then."""
        with self._lock:
            stream = self._streams.pop(stream_id, None)
            if stream is not None:
                self._ending[stream_id] = stream
            ending = self._ending.get(stream_id)
        if ending is None:
            return None
        arrived_end = ending.close()
        with self._lock:
            if self._ending.get(stream_id) is ending:
                del self._ending[stream_id]
        return None if stream is None else arrived_end

    def fail(self, stream_id: int, reason: str) -> None:
        """End a stream with StreamFailed, unless it has ended before."""
        arrived_end = self.forget(stream_id)
        if arrived_end is not None:
            self._events.put(StreamFailed(stream_id, reason, arrived_end))

    def fail_all(self, reason: str) -> None:
        """End every stream with StreamFailed."""
        for stream_id in list(self._streams):
            self.fail(stream_id, reason)

    def take(self, stream_id: int, piece: Piece, data: torch.Tensor) -> None:
        """Write one piece of a stream. One that comes again, because its acknowledgement was lost, changes nothing,
        even if its stream is done. Raises StreamAborted when nobody wants it; then its stream has failed."""
        with self._lock:
            stream, is_done = self._streams.get(stream_id), stream_id in self._done
        if is_done:
            return
        if stream is None:
            raise StreamAborted(f"stream {stream_id} is not expected")
        try:
            complete = stream.accept(piece, data, time.monotonic())
        except StreamAborted as error:
            self.fail(stream_id, str(error))
            raise
        if not complete:
            return
        with self._lock:  # whoever takes it out speaks of its end: `forget` may have been faster
            if self._streams.get(stream_id) is stream:
                del self._streams[stream_id]
                self._done.append(stream_id)
                self._events.put(StreamDone(stream_id, stream.report()))
