"""The sending half of a fabric: what is ready leaves as one batch, from the thread that puts it.

Chapters 08 and 09; paper 3.1.

Of the GPU that thread waits for memory alone: pieces are copied into a batch, sealed and sent in the order of one CUDA
stream. The batch is announced when the GPU has all that fills it, and before it is sent: the peer's threads wake and
post its receive meanwhile, and that waits for no kernel that may still have to be loaded.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from minprfaas.errors import one_line
from minprfaas.transport.base import LinkDown, SendStream, Source, StreamAborted, StreamPlan
from minprfaas.transport.events import StreamReport
from minprfaas.transport.pair_group import ANNOUNCED, CONNECT_S, PairGroup, seal
from minprfaas.transport.streams import Piece, PutLog, next_in_group

PIECE_ALIGN_BYTES = 16  # so that a piece can be viewed in its dtype where it landed
PIECES = 128  # of a batch at most: its announcement is one word
Placed = tuple[int, Piece]  # where in its batch a piece begins, and the piece


def batches_of(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[list[Placed]]:
    """Pieces in their order, as many to a batch as fit."""
    batch: list[Placed] = []
    end = 0
    for piece in pieces:
        if batch and (end + piece.nbytes > limit_bytes or len(batch) == PIECES):
            yield batch
            batch, end = [], 0
        batch.append((end, piece))
        end += -(-piece.nbytes // PIECE_ALIGN_BYTES) * PIECE_ALIGN_BYTES
    if batch:
        yield batch


class FabricOutbox:
    """One for each side of a fabric; it outlives epochs. Any thread may call any method.

    `say(word, **fields)` tells the peer by the link; `end_epoch(epoch, reason)` is for a group that is broken."""

    def __init__(self, name: str, say: Callable[..., None], end_epoch: Callable[[int, str], None]):
        self._name, self._say, self._end_epoch = name, say, end_epoch
        self._changed = threading.Condition()  # an epoch began, or an acknowledgement came
        self._turn = threading.Lock()  # one batch at a time: the peer receives them in the order of their announcements
        self._lost: str | None = None  # why nothing leaves any more
        self._group: PairGroup | None = None
        self._streams: set[FabricStream] = set()  # that have not ended
        self._unwritten: dict[int, FabricStream] = {}  # by number of the batch
        self._batches = 0

    def open(self, plan: StreamPlan, limit_bytes: int) -> "FabricStream":
        """Raises LinkDown."""
        stream = FabricStream(plan, self, limit_bytes)
        with self._changed:
            self.check(stream)
            self._streams.add(stream)
        return stream

    def begin_epoch(self, group: PairGroup) -> None:
        """Both sides have joined; batches may leave."""
        with self._changed:
            self._group = None if group.is_over else group
            self._changed.notify_all()

    def send(self, stream: "FabricStream", batch: list[Placed],
             read: Callable[[Piece, torch.Tensor], object]) -> float:
        """Send a batch, once there is room for it; returns the seconds that took. `read` writes a piece's bytes to
        where they shall be. Raises StreamAborted, LinkDown, and what `read` raises."""
        began_at_s = time.monotonic()
        group = self._wait_for_epoch(stream)
        with self._turn:
            at, last = batch[-1]
            with self._ends_epoch(group, stream):
                data = group.new_batch(at + last.nbytes)
            waited_s = time.monotonic() - began_at_s
            for at, piece in batch:
                read(piece, data[at:at + piece.nbytes])
            with self._changed:
                self.check(stream)
                self._batches += 1
                number, key = self._batches, random.getrandbits(62)
                self._unwritten[number] = stream
                stream.unwritten += 1
            with self._ends_epoch(group, stream):
                seal(data, key)
                group.say(ANNOUNCED, number, data.numel(), key, stream.plan.stream_id,
                          [[at, *vars(piece).values()] for at, piece in batch])
                group.send(number, data)
        return waited_s

    @contextlib.contextmanager
    def _ends_epoch(self, group: PairGroup, stream: "FabricStream") -> Iterator[None]:
        """A group that fails ends its epoch, and the stream with it."""
        try:
            yield
        except RuntimeError as error:
            self._end_epoch(group.epoch, one_line(error))
            self.check(stream)
            raise StreamAborted(f"stream {stream.plan.stream_id}: {one_line(error)}") from None

    def _wait_for_epoch(self, stream: "FabricStream") -> PairGroup:
        with self._changed:
            if not self._wait(stream, lambda: self._group is not None, CONNECT_S):
                raise LinkDown(f"fabric {self._name}: no epoch within {CONNECT_S:g} s")
            return self._group

    def _wait(self, stream: "FabricStream", reached: Callable[[], bool], deadline_s: float) -> bool:
        """Until `reached()`; False if that does not come to hold in time. Raises as `check` does."""

        def has_ended_or_reached() -> bool:
            self.check(stream)
            return reached()

        return self._changed.wait_for(has_ended_or_reached, deadline_s)

    def check(self, stream: "FabricStream") -> None:
        """Raises StreamAborted, LinkDown."""
        if self._lost is not None:
            raise LinkDown(self._lost)
        if stream.failure is not None:
            raise StreamAborted(f"stream {stream.plan.stream_id}: {stream.failure}")

    def wait_until_written(self, stream: "FabricStream", deadline_s: float) -> None:
        """Block until every piece is acknowledged. Raises TimeoutError, StreamAborted, LinkDown."""
        with self._changed:
            if not self._wait(stream, lambda: not stream.unwritten, deadline_s):
                raise TimeoutError(f"stream {stream.plan.stream_id}: {stream.unwritten} pieces are not acknowledged "
                                   f"after {deadline_s} s")
            self._streams.discard(stream)

    def give_up(self, stream: "FabricStream", reason: str) -> None:
        """End a stream and tell the receiver, unless it has ended."""
        with self._changed:
            if stream not in self._streams:
                return
            self._fail(stream, reason)
        self._say("abort", stream=stream.plan.stream_id)

    def settle(self, group: PairGroup, number: int, is_refused: bool) -> None:
        """The peer is done with a batch: it has written it, or refuses its stream."""
        with self._changed:
            if group is not self._group:
                return
            group.written(number)
            stream = self._unwritten.pop(number)
            stream.unwritten -= 1
            stream.acked_at_s = time.monotonic()
            if is_refused and stream.failure is None:
                self._fail(stream, "refused by the receiver")
            self._changed.notify_all()

    def _fail(self, stream: "FabricStream", reason: str) -> None:
        stream.failure = reason
        self._streams.discard(stream)
        self._changed.notify_all()

    def end_epoch(self, reason: str, is_lost: bool) -> None:
        """Every stream fails. If `is_lost`, nothing will leave any more."""
        with self._changed:
            if is_lost:
                self._lost = reason
            self._group = None
            self._unwritten = {}
            ended = list(self._streams)
            for stream in ended:
                self._fail(stream, reason)
            self._changed.notify_all()
        for stream in ended:
            self._say("abort", stream=stream.plan.stream_id)


class FabricStream(SendStream):
    """A SendStream, made by `Fabric.open`. One thread calls `put`, `put_ready` and `finish`; any may call `abort`."""

    def __init__(self, plan: StreamPlan, outbox: FabricOutbox, limit_bytes: int):
        self.plan = plan
        self.failure: str | None = None
        self.unwritten = 0  # batches
        self.acked_at_s = 0.0
        self._outbox, self._limit_bytes = outbox, limit_bytes
        self._put_log, self._next = PutLog(plan), next_in_group(plan)
        self._stalled_s, self._chunks = 0.0, 0

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """See `SendStream.put`. Copies within the device; blocks while all batches are on their way."""
        self._outbox.check(self)
        whole = self._put_log.add(layer, start, end, data)
        for piece, part in self._put_log.cut(whole, data.view(-1), lambda: self._limit_bytes):
            self._send([(0, piece)], lambda piece, out, part=part: out.copy_(part))

    def put_ready(self, pieces: Iterable[tuple[int, int, int]], source: Source) -> None:
        """See `SendStream.put_ready`. The same rows of layers that follow each other are one piece, and what fits into
        one batch crosses as one."""
        self._outbox.check(self)
        for batch in batches_of(self._noted(pieces, source), self._limit_bytes):
            self._send(batch, lambda piece, out: source(piece.layer, piece.start, piece.end, out))

    def _noted(self, pieces: Iterable[tuple[int, int, int]], source: Source) -> Iterator[Piece]:
        for run in self._runs(pieces):
            layer, start, end = run[0]
            if self._put_log.nbytes(layer, start, end) <= self._limit_bytes:
                yield self._put_log.note(layer, start, end, len(run))
            else:
                self.put(layer, start, end, source(layer, start, end, None))

    def _runs(self, pieces: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
        """The pieces in their order; what one piece can hold, and one batch, together."""
        run: list[tuple[int, int, int]] = []
        for layer, start, end in pieces:
            fits = (len(run) + 1) * self._put_log.nbytes(layer, start, end) <= self._limit_bytes
            if run and not (fits and run[0][1:] == (start, end) and self._next.get(run[-1][0]) == layer):
                yield run
                run = []
            run.append((layer, start, end))
        if run:
            yield run

    def _send(self, batch: list[Placed], read: Callable[[Piece, torch.Tensor], object]) -> None:
        self._stalled_s += self._outbox.send(self, batch, read)
        self._chunks += len(batch)

    def finish(self, deadline_s: float) -> StreamReport:
        self._put_log.check_complete()
        self._outbox.wait_until_written(self, deadline_s)
        log = self._put_log
        return StreamReport(self.plan.total_bytes, self._chunks, log.first_put_at_s, log.last_put_at_s, self.acked_at_s,
                            self._stalled_s, resent_chunks=0)

    def abort(self, reason: str = "aborted by the sender") -> None:
        self._outbox.give_up(self, reason)

