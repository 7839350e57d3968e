"""KVCache on its way out: shipped layer by layer, while the next layer computes. Chapter 08; paper 3.3.

The model's thread only says what is ready. A sending thread reads it from the pool and puts it into the stream, and
there waits for room: a slow peer holds up its own stream and no forward pass. Nothing is copied before there is room
for it, because the blocks keep it: they are held until the stream has ended.
"""

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

from minprfaas.config import StateKind
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.whole_blocks import read_into
from minprfaas.transport.base import KVTransport, LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.events import StreamReport
from minprfaas.transport.encoding import codecs
from minprfaas.transport.fabric_sending import FabricStream

STREAMS_AT_ONCE = 64  # of one node; further ones wait for their turn, and their KVCache in its blocks
HAND_OVER_S = 0.001  # on a GPU, layers that the model's thread reaches within it are handed over together
_beside_prefill = cache(torch.cuda.Stream)  # by device: one for all streams, whose memory is used again


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, end) of a layer are in blocks of `group`."""

    layer: int
    group: int
    start: int
    end: int


class KVSend:
    """The sending half of one stream: tokens from `plan.start` on, whether computed here or found in the cache.

    `tables` are block tables per group, which the caller holds until `outcome` is there. `overlap` False ships
    everything after prefill, for comparison. Raises LinkDown, or ValueError for an impossible plan.
    """

    def __init__(self, kvcache: KVCacheManager, transport: KVTransport, plan: StreamPlan, tables: Sequence,
                 threads: ThreadPoolExecutor, deadline_s: float, overlap: bool = True):
        self.plan = plan
        self._pool, self._layout, self._block_tables = kvcache.pool, kvcache.layout, tables
        self._on_gpu = kvcache.pool.device.type == "cuda"
        self._overlap, self._deadline_s = overlap, deadline_s
        self._codecs = codecs(self._layout.specs, plan)
        self._ready_end = {entry.layer: plan.start for entry in plan.entries}
        self._tables: dict[int, torch.Tensor] = {}
        self._noted: list[_Piece] = []
        self._hand_over_at_s = 0.0
        self._handed_over: queue.SimpleQueue[tuple[list[_Piece], torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._stream = transport.open(plan)
        self.outcome: Future[StreamReport] = threads.submit(self._run)  # or what ended the stream early

    def ready(self, layer: int, end: int) -> None:
        """Layer `layer` now holds tokens up to `end`. Called between two layers of a forward pass: it never blocks."""
        if self._overlap:
            self._hand_over(layer, end)

    def finish(self) -> None:
        """Everything is computed: what was not handed over yet is, and the stream ends once it is acknowledged."""
        for entry in self.plan.entries:
            self._hand_over(entry.layer, self.plan.end)
        self._pass_on()
        self._handed_over.put(None)

    def abort(self) -> None:
        """Give the stream up; `outcome` comes as soon as its thread has let go of the blocks."""
        self._stream.abort()
        self._handed_over.put(None)

    def _hand_over(self, layer: int, end: int) -> None:
        start = self._ready_end[layer]
        is_state = self.plan.layers[layer].kind is not StateKind.TOKEN
        if end <= start or (is_state and end < self.plan.end):  # state crosses once, when the last token is in it
            return
        self._noted.append(_Piece(layer, self._layout.group_of_layer[layer].index, start, end))
        self._ready_end[layer] = end
        if not self._on_gpu or time.monotonic() >= self._hand_over_at_s:
            self._pass_on()

    def _pass_on(self) -> None:
        """Pass what is noted to the sending thread; on a GPU with an event, which says when the model's kernels have
        run. It costs the model's thread as much as some launches, so layers that follow at once share one."""
        written = None
        if self._on_gpu:
            written = torch.cuda.Event(blocking=True)
            written.record(torch.cuda.current_stream(self._pool.device))
            self._hand_over_at_s = time.monotonic() + HAND_OVER_S
        self._handed_over.put((self._noted, written))
        self._noted = []

    def _run(self) -> StreamReport:
        """The sending thread."""
        try:
            with torch.inference_mode(), torch.cuda.stream(_beside_prefill(self._pool.device) if self._on_gpu else None):
                while (handed_over := self._handed_over.get()) is not None:
                    pieces, written = handed_over
                    if written is not None:
                        # Waiting here, not on the device, keeps this thread from Python while the model's thread
                        # still launches the pass: the two would take turns at the interpreter, launch by launch.
                        written.synchronize()
                    for piece in pieces:
                        self._put(piece)
            return self._stream.finish(self._deadline_s)
        except (LinkDown, StreamAborted, TimeoutError, ValueError) as error:
            self._stream.abort()
            raise StreamAborted(str(error)) from None

    def _put(self, piece: _Piece) -> None:
        layer, codec, table = piece.layer, self._codecs.get(piece.layer), self._table(piece.group)
        are_rows = codec is None and self.plan.layers[layer].kind is StateKind.TOKEN
        if are_rows and isinstance(self._stream, FabricStream):
            def read(start: int, end: int, out: torch.Tensor) -> None:
                read_into(self._pool, layer, table, start, end, out)

            return self._stream.put_from(layer, piece.start, piece.end, read)
        data = self._pool.read_bytes(layer, table, piece.start, piece.end).reshape(-1)
        if codec is not None:
            data = codec.encode(data)  # here, beside the forward pass, and on the pool's device
        self._stream.put(layer, piece.start, piece.end, data)

    def _table(self, group: int) -> torch.Tensor:
        """A group's block table on the device, where it is copied once, unless it has grown."""
        table = self._tables.get(group)
        if table is None or len(table) < len(self._block_tables[group]):
            table = self._tables[group] = self._pool.index(self._block_tables[group])
        return table
