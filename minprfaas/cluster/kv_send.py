"""KVCache on its way out: shipped layer by layer, while the next layer computes. Chapter 08; paper 3.3.

The model's thread only says what is ready. A sending thread reads it from the pool and puts it into the stream, and
there waits for room: a slow peer holds up its own stream and no forward pass. Nothing is copied before there is room
for it, because the blocks keep it: they are held until the stream has ended.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache

import torch

from minprfaas.cluster.mail import Mail
from minprfaas.config import StateKind
from minprfaas.errors import one_line
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.pool_copies import WholeBlocks
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.transport.base import KVTransport, LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.encoding import codecs
from minprfaas.transport.events import StreamReport

STREAMS_AT_ONCE = 64  # of one node; further ones wait for their turn, and their KVCache in its blocks
# On a GPU, what the model's thread reaches before one of them is over is handed over together: each hand-over costs the
# pass some launches, and the interpreter twice.
HAND_OVER_BYTES, HAND_OVER_S = 128 * 2**20, 0.02
_beside_prefill = cache(torch.cuda.Stream)  # by device: one for all streams, whose memory is used again


class SendingThreads:
    """A node's: one for each stream, as many as `STREAMS_AT_ONCE`, and none where nothing is sent. A thread that waited
    for work would keep what the allocator has given it: a node would grow with the most streams it ever had at once."""

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._running = 0
        self._waiting: deque[tuple[Callable[[], StreamReport], Future[StreamReport]]] = deque()

    def submit(self, send: Callable[[], StreamReport]) -> Future[StreamReport]:
        """Call `send` in a thread; its result or exception is the future's."""
        outcome: Future[StreamReport] = Future()
        with self._lock:
            self._waiting.append((send, outcome))
            if self._running < STREAMS_AT_ONCE:
                self._running += 1
                threading.Thread(target=self._work, name=f"{self._name} send", daemon=True).start()
        return outcome

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                send, outcome = self._waiting.popleft()
            try:
                outcome.set_result(send())
            except BaseException as error:
                outcome.set_exception(error)


class KVSend:
    """The sending half of one stream: tokens from `plan.start` on, whether computed here or found in the cache.

    `tables` are block tables per group, which the caller holds until `outcome` is there. `overlap` False ships
    everything after prefill, for comparison. Raises LinkDown, or ValueError for an impossible plan.
    """

    def __init__(self, kvcache: KVCacheManager, transport: KVTransport, plan: StreamPlan, tables: Sequence,
                 threads: SendingThreads, deadline_s: float, overlap: bool = True):
        self.plan = plan
        self._device, self._blocks = kvcache.pool.device, WholeBlocks(kvcache.pool, tables)
        self._overlap, self._deadline_s = overlap, deadline_s
        self._codecs = codecs(kvcache.layout.specs, plan)
        self._ready_end = {entry.layer: plan.start for entry in plan.entries}
        self._noted: list[tuple[int, int, int]] = []  # (layer, start, end) of what is ready and not handed over
        self._noted_bytes, self._hand_over_at_s = 0, time.monotonic() + HAND_OVER_S
        # What is handed over; on a GPU with an event, which says when the model's kernels have run.
        self._handed_over: queue.SimpleQueue[tuple[list, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._stream = transport.open(plan)
        self.outcome: Future[StreamReport] = threads.submit(self._run)  # or what ended the stream early

    def ready(self, layer: int, end: int) -> None:
        """Layer `layer` now holds tokens up to `end`. Called between two layers of a forward pass: it never blocks."""
        if self._overlap:
            self._note(layer, end)
            is_enough = self._noted_bytes >= HAND_OVER_BYTES or time.monotonic() >= self._hand_over_at_s
            if self._noted and (is_enough or self._device.type != "cuda"):
                self._hand_over()

    def finish(self) -> None:
        """Everything is computed: what was not handed over yet is, and the stream ends once it is acknowledged."""
        for entry in self.plan.entries:
            self._note(entry.layer, self.plan.end)
        self._hand_over()
        self._handed_over.put(None)

    def abort(self) -> None:
        """Give the stream up; `outcome` comes as soon as its thread has let go of the blocks."""
        self._stream.abort()
        self._handed_over.put(None)

    def _note(self, layer: int, end: int) -> None:
        start, entry = self._ready_end[layer], self.plan.layers[layer]
        is_state = entry.kind is not StateKind.TOKEN
        if end > start and not (is_state and end < self.plan.end):  # state crosses once, with the last token in it
            self._noted.append((layer, start, end))
            self._noted_bytes += entry.row_bytes * (1 if is_state else end - start)
            self._ready_end[layer] = end

    def _hand_over(self) -> None:
        written = None
        if self._device.type == "cuda":  # an event costs the model's thread some launches: several layers share one
            written = torch.cuda.Event(blocking=True)
            written.record(torch.cuda.current_stream(self._device))
            self._hand_over_at_s = time.monotonic() + HAND_OVER_S
        self._handed_over.put((self._noted, written))
        self._noted, self._noted_bytes = [], 0

    def _run(self) -> StreamReport:
        """The sending thread."""
        beside_prefill = _beside_prefill(self._device) if self._device.type == "cuda" else None
        try:
            with torch.inference_mode(), torch.cuda.stream(beside_prefill):
                self._blocks.prepare()
                while (handed_over := self._handed_over.get()) is not None:
                    pieces, written = handed_over
                    if written is not None:
                        # Waiting here, not on the device, keeps this thread from Python while the model's thread
                        # still launches the pass: the two would take turns at the interpreter, launch by launch.
                        written.synchronize()
                    self._stream.put_ready(pieces, self._read)
            return self._stream.finish(self._deadline_s)
        except Exception as error:  # whatever it is, a GPU's as well: the receiver would wait until its own deadline
            self._stream.abort()
            if beside_prefill is not None:
                beside_prefill.synchronize()  # nothing reads the blocks any more
            raise StreamAborted(one_line(error)) from None

    def _read(self, layer: int, start: int, end: int, out: torch.Tensor | None) -> torch.Tensor:
        """The source of what is put."""
        codec = self._codecs.get(layer)
        if codec is None:
            return self._blocks.read(layer, start, end, out)
        data = codec.encode(self._blocks.read(layer, start, end, None))  # beside the forward pass, on the pool's device
        return data if out is None else out.copy_(data)


@dataclass(eq=False)
class _Leaving:
    stream: KVSend
    cache: RequestCache
    peer: str
    deadline_at_s: float


class Outgoing:
    """The streams that one node sends. Each keeps the blocks that it reads until it has ended, whatever becomes of
    their request; one that its receiver does not take in time is ended. Only the node's own loop calls it."""

    def __init__(self, name: str, kvcache: KVCacheManager, mail: Mail, clock: Callable[[], float],
                 finish_deadline_s: float):
        self.finish_deadline_s = finish_deadline_s  # from a stream's last put to its last acknowledgement
        self._kvcache, self._mail, self._clock = kvcache, mail, clock
        self._threads = SendingThreads(name)
        self._leaving: list[_Leaving] = []

    def __bool__(self) -> bool:
        return bool(self._leaving)

    def open(self, peer: str, plan: StreamPlan, cache: RequestCache, tables: Sequence, deadline_at_s: float,
             overlap: bool = True) -> KVSend | None:
        """Begin to send what `cache` holds, in the blocks of `tables`. None when there is no way to `peer`, or it
        cannot carry the plan."""
        try:
            transport = self._mail.transport(peer)
            stream = KVSend(self._kvcache, transport, plan, tables, self._threads, self.finish_deadline_s, overlap)
        except (LinkDown, ValueError):
            return None
        self._kvcache.hold(cache)
        self._leaving.append(_Leaving(stream, cache, peer, deadline_at_s))
        return stream

    def abort(self, peer: str, stream_id: int) -> None:
        """`peer` wants this stream no more. Harmless for one that is not sent there."""
        for one in self._leaving:
            if (one.peer, one.stream.plan.stream_id) == (peer, stream_id):
                one.stream.abort()

    def step(self) -> None:
        """Let go of the blocks of streams that have ended; end what is overdue."""
        now_s = self._clock()
        for one in list(self._leaving):
            if now_s > one.deadline_at_s:
                one.stream.abort()
            if one.stream.outcome.done():
                self._leaving.remove(one)
                self._kvcache.release(one.cache)
