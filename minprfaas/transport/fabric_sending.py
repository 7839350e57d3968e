"""The sending half of a fabric: what streams put fills batches, which one thread sends. Chapters 08, 09; paper 3.1."""

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from minprfaas.transport.base import LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.events import StreamReport
from minprfaas.transport.pair_group import CONNECT_S, Batch, PairGroup, Transfer, digest
from minprfaas.transport.streams import Piece, PutLog

POSTED_AHEAD = 2  # one batch is on its way while the next is announced


class FabricOutbox:
    """One for each side of a fabric; it outlives epochs. Any thread may call any method.

    `say(word, **fields)` tells the peer."""

    def __init__(self, name: str, say: Callable[..., None]):
        self._name, self._say = name, say
        self._changed = threading.Condition()  # something to send, room, or an acknowledgement came
        self._lost: str | None = None  # why nothing leaves any more
        self._group: PairGroup | None = None
        self._streams: set[FabricStream] = set()  # that have not ended
        self._unwritten: dict[int, list[FabricStream]] = {}  # by batch: whose pieces are not acknowledged
        self._batches = 0

    def open(self, plan: StreamPlan, limit_bytes: int) -> "FabricStream":
        """Raises LinkDown."""
        stream = FabricStream(plan, self, limit_bytes)
        with self._changed:
            self.check(stream)
            self._streams.add(stream)
        return stream

    def add(self, stream: "FabricStream", piece: Piece, data: torch.Tensor) -> float:
        """Copy a piece into a batch, once there is room in one; returns the seconds that took. Raises StreamAborted,
        LinkDown."""
        began_s = time.monotonic()
        with self._changed:
            while True:
                self.check(stream)
                batch = None if self._group is None else self._group.room(piece.nbytes)
                waited_s = time.monotonic() - began_s
                if batch is not None:
                    batch.add(stream, piece, data)
                    stream.unwritten += 1
                    self._changed.notify_all()
                    return waited_s
                if waited_s >= CONNECT_S:
                    raise LinkDown(f"fabric {self._name}: no room in a batch within {CONNECT_S:g} s")
                self._changed.wait(CONNECT_S - waited_s)

    def check(self, stream: "FabricStream") -> None:
        """Raises StreamAborted, LinkDown."""
        if self._lost is not None:
            raise LinkDown(self._lost)
        if stream.failure is not None:
            raise StreamAborted(f"stream {stream.plan.stream_id}: {stream.failure}")

    def wait_until_written(self, stream: "FabricStream", deadline_s: float) -> None:
        """Block until every piece is acknowledged. Raises TimeoutError, StreamAborted, LinkDown."""
        until_s = time.monotonic() + deadline_s
        with self._changed:
            self.check(stream)
            while stream.unwritten:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"stream {stream.plan.stream_id}: {stream.unwritten} pieces are not "
                                       f"acknowledged after {deadline_s} s")
                self._changed.wait(left_s)
                self.check(stream)
            self._streams.discard(stream)

    def give_up(self, stream: "FabricStream", reason: str) -> None:
        """End a stream and tell the receiver, unless it has ended."""
        with self._changed:
            if stream not in self._streams:
                return
            self._fail(stream, reason)
        self._say("abort", stream=stream.plan.stream_id)

    def settle(self, number: int, refused: list[int]) -> None:
        """The peer has written batch `number`, but for the streams that it refused."""
        with self._changed:
            for stream in self._unwritten.pop(number, []):
                stream.unwritten -= 1
                stream.acked_s = time.monotonic()
                if stream.plan.stream_id in refused and stream.failure is None:
                    self._fail(stream, "refused by the receiver")
            self._changed.notify_all()

    def _fail(self, stream: "FabricStream", reason: str) -> None:
        stream.failure = reason
        self._streams.discard(stream)
        self._changed.notify_all()

    def send_batches(self, group: PairGroup) -> None:
        """The sending thread of an epoch. Raises RuntimeError."""
        with self._changed:
            if group.is_over:
                return
            self._group = group
            self._changed.notify_all()
        posted: deque[tuple[Transfer, Batch]] = deque()
        while True:
            batch = self._next_batch(group, block=not posted)
            if batch is not None:
                self._announce(group, batch)
                posted.append((group.send(batch.sent), batch))
            elif not posted:
                return
            if batch is None or len(posted) == POSTED_AHEAD:
                transfer, sent = posted.popleft()
                group.wait(transfer)
                with self._changed:
                    group.release(sent)
                    self._changed.notify_all()

    def _next_batch(self, group: PairGroup, block: bool) -> Batch | None:
        with self._changed:
            while not group.is_over:
                batch = group.take()
                if batch is not None or not block:
                    return batch
                self._changed.wait()
        return None

    def _announce(self, group: PairGroup, batch: Batch) -> None:
        for copied in batch.copied:
            torch.cuda.current_stream(group.device).wait_event(copied)
        checksum = int(digest(batch.sent))
        with self._changed:
            kept = [entry for entry in batch.pieces if entry[0].failure is None]
            self._batches += 1
            number = self._batches
            self._unwritten[number] = [stream for stream, _, _ in kept]
        pieces = [[at, stream.plan.stream_id, *vars(piece).values()] for stream, piece, at in kept]
        self._say("batch", epoch=group.epoch, number=number, bytes=batch.sent.numel(), digest=checksum, pieces=pieces)

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


class FabricStream:
    """A SendStream, made by `Fabric.open`. One thread calls `put` and `finish`; any may call `abort`."""

    def __init__(self, plan: StreamPlan, outbox: FabricOutbox, limit_bytes: int):
        self.plan = plan
        self.failure: str | None = None
        self.unwritten = 0  # pieces
        self.acked_s = 0.0
        self._outbox, self._limit_bytes = outbox, limit_bytes
        self._put_log = PutLog(plan)
        self._stalled_s, self._chunks = 0.0, 0

    def put(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """See `SendStream.put`. Copies within the device; blocks while every staging buffer is full or on its way."""
        self._outbox.check(self)
        whole = self._put_log.add(layer, start, end, data)
        for piece, part in self._put_log.cut(whole, data.view(-1), lambda: self._limit_bytes):
            self._stalled_s += self._outbox.add(self, piece, part)
            self._chunks += 1

    def finish(self, deadline_s: float) -> StreamReport:
        """See `SendStream.finish`."""
        self._put_log.check_complete()
        self._outbox.wait_until_written(self, deadline_s)
        log = self._put_log
        return StreamReport(self.plan.total_bytes, self._chunks, log.first_put_s, log.last_put_s, self.acked_s,
                            self._stalled_s, resent_chunks=0)

    def abort(self, reason: str = "aborted by the sender") -> None:
        """See `SendStream.abort`."""
        self._outbox.give_up(self, reason)
