"""The fabric: KVCache between two nodes of one datacenter, from GPU to GPU. Chapter 09; paper 3.1.

Messages go over a link, which finds the peer, knows it, and notices when it is gone or a new process. Bytes, and what
is said of them, go through a `PairGroup`: NCCL between GPUs, Gloo between CPUs. NCCL cannot cancel one
operation, and one that is broken off ends like one that succeeded. So a batch lands in memory of its own, counts once
it is sealed with the key that the sender announced, and only then is written into blocks.

A pair's groups live for an *epoch*. When an operation takes longer than `deadline_s`, the link breaks, or either side
sees a failure, the epoch ends on both: its groups are aborted, its streams fail, and both meet again under the next
number. So whoever survives a peer goes on after `deadline_s` or the link's `silence_s`, whichever comes first.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from minprfaas.config import LinkConfig, StateKind
from minprfaas.errors import one_line
from minprfaas.transport.base import KVTransport, LinkDown, MessageChannel, Sink, StreamAborted, StreamPlan
from minprfaas.transport.events import Event, EventQueue, LinkLost, LinkRestored, MessageReceived
from minprfaas.transport.fabric_sending import FabricOutbox, FabricStream
from minprfaas.transport.pair_group import (ANNOUNCED, BATCH_BYTES, CONNECT_S, PEER_IS_GONE, WRITTEN, PairGroup,
                                            Transfer, require_error_handling)
from minprfaas.transport.streams import ExpectedStreams, Piece
from minprfaas.transport.wan.binding import choose_binding
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.monitor import LinkStats

log = logging.getLogger(__name__)
DEADLINE_S = 10.0  # of one operation; it takes about a millisecond
TICK_S = 0.1
PAUSE_S = 0.5  # between two epochs
CLOSING_S = 5.0


class Fabric(KVTransport, MessageChannel):
    """One side of a pair. Any thread may call any method."""

    def __init__(self, name: str, store: dist.Store, rank: int, config: LinkConfig, identity: LinkIdentity,
                 device: torch.device | str, events: EventQueue | None = None, deadline_s: float = DEADLINE_S,
                 batch_bytes: int | None = None, group_type: Callable[..., PairGroup] = PairGroup):
        """`rank` is 0 on one side and 1 on the other; KVCache is on `device`. Raises UserError as `Link` does, and when
        the environment would let a dead peer end this process."""
        self.name, self.device = name, torch.device(device)
        self.events = EventQueue() if events is None else events
        if self.device.type == "cuda":
            require_error_handling()
        self._rank, self._deadline_s, self._group_type = rank, deadline_s, group_type
        self._batch_bytes = batch_bytes or BATCH_BYTES[self.device.type]
        terms = f"{identity.block_layout}; {self.device.type} fabric, {self._batch_bytes} bytes a batch"
        self._link = Link(name, store, rank, config, replace(identity, block_layout=terms), events=EventQueue())
        self._store, self._binding = store.clone(), choose_binding(store)
        self._store.set_timeout(timedelta(seconds=CONNECT_S))
        self._outbox = FabricOutbox(name, self._say, self._end_epoch)
        on_gpu = self.device.type == "cuda"  # sinks have a CUDA stream of their own, beside the model's and before it
        self._writes = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self._expected = ExpectedStreams(_AfterWrites(self.events, self._writes) if on_gpu else self.events)
        self._lost: str | None = None
        self._threads: list[threading.Thread] = []

        self._changed = threading.Condition()  # guards the epoch
        self._epoch = 0  # 0 between two
        self._group: PairGroup | None = None  # the epoch's, once both sides have joined it
        self._due_at_s = time.monotonic()  # the next epoch, or this one's group

    def connect(self, deadline_s: float, met: Callable[[], None] = lambda: None) -> None:
        """Meet the peer; call `met` before anything that it sends is heard. The first epoch begins behind that: until
        then, messages cross and streams wait. Raises LinkRefused, or LinkDown when `deadline_s` passes."""
        self._link.connect(deadline_s, met)
        self._start("words", self._listen)

    def wait_until_lost(self) -> None:
        """Block until the fabric is lost for good, or closed."""
        self._link.wait_until_lost()

    @property
    def epoch(self) -> int:
        """The number of the epoch in which both sides are; 0 between two."""
        return 0 if self._group is None else self._epoch

    def send_message(self, message: dict) -> None:
        self._link.send_message(message)

    def stats(self) -> LinkStats:
        """Of the words that leave."""
        return self._link.stats()

    def open(self, plan: StreamPlan) -> FabricStream:
        """See `KVTransport.open`. Between two epochs, `put` waits for the next."""
        self._check(plan)
        return self._outbox.open(plan, self._batch_bytes)

    def expect(self, plan: StreamPlan, sink: Sink, device: torch.device | None = None) -> None:
        self._check(plan)
        self._expected.expect(plan, sink)

    def forget(self, stream_id: int) -> int | None:
        arrived_end = self._expected.forget(stream_id)
        if self._writes is not None:
            self._writes.synchronize()  # what the sink has queued has been written too
        return arrived_end

    def close(self) -> None:
        """Say goodbye and end; the peer's fabric is lost at once."""
        self._link.close()  # its LinkLost ends the rest
        give_up_at_s = time.monotonic() + CLOSING_S
        # A thread that is in C++ when its process ends makes that end by a signal.
        while time.monotonic() < give_up_at_s:
            alive = [thread for thread in self._threads if thread.is_alive()]
            if not alive:
                return
            alive[-1].join(max(0.0, give_up_at_s - time.monotonic()))  # the oldest; it may start another

    def _check(self, plan: StreamPlan) -> None:
        for entry in plan.entries:
            if entry.kind is StateKind.TOKEN and entry.row_bytes > self._batch_bytes:
                raise ValueError(f"layer {entry.layer}: a row of {entry.row_bytes} bytes does not fit into a batch of "
                                 f"{self._batch_bytes}")
        if self._lost is not None:
            raise LinkDown(self._lost)

    # Words

    def _say(self, word: str, **fields) -> None:
        try:
            self._link.send_message({"fabric": word, **fields})
        except LinkDown:
            pass  # the link's last event says so

    def _listen(self) -> None:
        """Hear the peer's words, hand on what else the link says, and watch the deadlines."""
        while self._lost is None:
            self._watch()
            event = self._link.receive(TICK_S)
            match event:
                case None:
                    continue
                case MessageReceived(message={"fabric": str(word), **fields}):
                    self._hear(word, fields)
                    continue
                case LinkRestored(peer_restarted=True):
                    self._end_epoch(self._epoch, "the peer restarted")
                case LinkLost(reason=reason):
                    self._lost = reason
                    self._end_epoch(self._epoch, reason)
            self.events.put(event)

    def _hear(self, word: str, fields: dict) -> None:
        match word, fields:
            case "begin", {"epoch": int(epoch)}:
                self._begin(epoch)
            case "ended", {"epoch": int(epoch), "reason": str(reason)} if epoch == self._epoch:
                self._end_epoch(epoch, f"ended by the peer: {reason}")
            case "abort", {"stream": int(stream_id)}:
                self._expected.fail(stream_id, "aborted by the sender")

    # Epochs: begun and joined here by rank 0's word, ended by whoever sees a reason to

    def _watch(self) -> None:
        now_s, group = time.monotonic(), self._group
        if not self._link.is_up:
            self._end_epoch(self._epoch, PEER_IS_GONE)
        elif group is not None and group.oldest_s(now_s) > self._deadline_s:
            self._end_epoch(group.epoch, f"an operation took longer than {self._deadline_s:g} s")
        elif group is None and now_s >= self._due_at_s:
            if self._epoch:
                self._end_epoch(self._epoch, f"the groups did not come up within {CONNECT_S:g} s")
            elif self._rank == 0:
                try:
                    epoch = self._store.add(f"{self.name}/fabric epoch", 1)
                except RuntimeError:  # the store is away, and its client does not come back: both sides meet anew
                    return self._link.close()
                self._say("begin", epoch=epoch)
                self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self._end_epoch(self._epoch, "the peer began another")
        with self._changed:
            self._epoch, self._due_at_s = epoch, time.monotonic() + CONNECT_S
        self._start("joins", self._in_epoch, epoch, None, lambda: self._join(epoch))

    def _join(self, epoch: int) -> None:
        store = dist.PrefixStore(f"{self.name}/fabric", self._store.clone())
        group = self._group_type(store, epoch, self._rank, self.device, self._batch_bytes, self._binding)
        with self._changed:
            is_late = epoch != self._epoch
            if not is_late:
                self._group = group
                self._changed.notify_all()
        if is_late:
            return group.abort()
        landing: queue.SimpleQueue[tuple[Transfer, list] | None] = queue.SimpleQueue()
        self._start("receives", self._in_epoch, epoch, self._writes, lambda: self._receive(group, landing))
        self._start("writes", self._in_epoch, epoch, self._writes, lambda: self._write(group, landing))
        self._start("settles", self._in_epoch, epoch, None, lambda: self._settle(group))
        self._outbox.begin_epoch(group)

    def _in_epoch(self, epoch: int, stream: torch.cuda.Stream | None, work: Callable[[], None]) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with torch.cuda.stream(stream):  # None: where this thread is anyway
                work()
        except Exception as error:  # whatever it is, the epoch is over
            self._end_epoch(epoch, one_line(error))

    def _start(self, what: str, work: Callable[..., None], *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments, name=f"{self.name} {what}", daemon=True)
        with self._changed:
            thread.start()
            self._threads = [thread, *(other for other in self._threads if other.is_alive())]

    def _end_epoch(self, epoch: int, reason: str) -> None:
        """The groups are aborted, then every stream fails. Harmless when it is over."""
        with self._changed:
            if epoch != self._epoch or (epoch == 0 and self._lost is None):
                return
            group, self._group, self._epoch = self._group, None, 0
            self._due_at_s = time.monotonic() + PAUSE_S
            self._changed.notify_all()
        if self._link.is_up and not reason.endswith(PEER_IS_GONE):  # what ends a link, it tells itself, on both sides
            log.warning("fabric %s: epoch %d ended: %s", self.name, epoch, reason)
        if group is not None:
            group.is_over = True
            self._start("aborts", group.abort)  # first: what follows may wait for what an operation holds up
        self._say("ended", epoch=epoch, reason=reason)
        self._expected.fail_all(reason)
        self._outbox.end_epoch(reason, is_lost=self._lost is not None)

    # Batches, each by a thread of the epoch that ends with it

    def _receive(self, group: PairGroup, landing: queue.SimpleQueue) -> None:
        """Post a receive for each batch as soon as it is announced: an earlier one may still be written."""
        try:
            while True:
                word = group.hear(ANNOUNCED)
                landing.put((group.receive(word[1]), word))
        finally:
            landing.put(None)

    def _write(self, group: PairGroup, landing: queue.SimpleQueue) -> None:
        """Write each batch that has landed, if it is what was announced."""
        while (landed := landing.get()) is not None:
            transfer, (number, _, key, stream_id, pieces) = landed
            is_there = group.has_landed(transfer, key)
            if group.is_over:  # what an operation left that was broken off is nobody's
                return
            is_refused = not self._take(stream_id, pieces, transfer.data, is_there)
            group.release(transfer)
            group.say(WRITTEN, number, is_refused)

    def _settle(self, group: PairGroup) -> None:
        while True:
            self._outbox.settle(group, *group.hear(WRITTEN))

    def _take(self, stream_id: int, pieces: list, data: torch.Tensor, is_there: bool) -> bool:
        try:
            if not is_there:
                raise StreamAborted("its bytes arrived damaged")
            for at, *place in pieces:
                piece = Piece(*place)
                self._expected.take(stream_id, piece, data[at:at + piece.nbytes])
        except StreamAborted as error:
            self._expected.fail(stream_id, str(error))
            return False
        return True


class _AfterWrites:
    """A queue of events that lets one in when everything which sinks have queued on their CUDA stream has run."""

    def __init__(self, events: EventQueue, stream: torch.cuda.Stream):
        self._events, self._stream = events, stream

    def put(self, event: Event) -> None:
        self._stream.synchronize()
        self._events.put(event)
