"""A prefill pass over one request as captured CUDA graphs, one from layer to layer. Chapters 04 and 08.

A pass is some 500 kernels, however few tokens it has, or 5,000 with delta rules. The host needs 17 to 36 ms to launch
them; of 8,192 tokens the GPU needs less than 30 to run them, or 46, and a thread that sends KVCache meanwhile takes
turns with the launches. Graphs are launched in 1 to 3 ms. Each ends where a layer's state is final, so that who listens
to the pass is called where it always was.
"""

import struct
from ctypes import c_char
from typing import NamedTuple

import torch
from torch import Tensor

from minprfaas.config import StateKind
from minprfaas.engine.decode_graphs import capture_stream, uncollected
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.paged import PagedLayer, PagedState
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.attention import PLANNED_TOKENS
from minprfaas.model.delta_segments import CHUNK, streams_for
from minprfaas.model.gqa import GQA
from minprfaas.model.kda import KDA
from minprfaas.model.layers import MLP
from minprfaas.model.mla import MLA
from minprfaas.model.spec import OnLayer
from minprfaas.model.transformer import Transformer

CHUNK_TOKENS = 8192  # of a long prompt on a GPU, a pass each
# Further shapes are computed as they come; prompts of up to 64K tokens have so many. Each takes 2 to 40 MiB, beside the
# working memory, which all share (8,192 tokens of Qwen3-0.6B's shape: 376 MiB; of the 1B hybrid's about 500, beside
# what its delta rules have).
MOST_SHAPES = 64
# Of working memory. A longer context has larger tensors, which do not fit where a shorter one's were: the 1B hybrid's
# three further chunks of 32K tokens took 1,122 MiB.
MOST_BYTES = 2**32
# Of blocks in what may be padding: at each, every layer's state is copied. With smaller blocks each set of boundaries
# that is wanted has a shape of its own.
MOST_BOUNDARIES = 4


def reserved_bytes(device: torch.device) -> int:
    """What the allocator has taken of a GPU's memory; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


class PassShape(NamedTuple):
    """What passes by the same graphs have in common."""

    room: int  # tokens, padding included
    start: int  # tokens that precede them
    is_padded: bool
    snapshots: tuple[int, ...]  # tokens after the pass's beginning, at which request-level state is stored as well


class PassGraphs:
    """The captured passes of one model over one request, by shape: a multiple of `unit` tokens (what a prompt's end
    has less is padding) that follow a multiple of `chunk`. A shape is captured when it is met for the second time: the
    first time compiles and plans."""

    def __init__(self, model: Transformer, kvcache: KVCacheManager, memory: tuple[int, int] | None,
                 unit: int = PLANNED_TOKENS, chunk: int = CHUNK_TOKENS):
        self.model, self.kvcache, self._memory, self._unit, self._chunk = model, kvcache, memory, unit, chunk
        # Experts that are counted are waited for; windows, and other states of one size, were never captured on a GPU.
        has_window = any(group.spec.kind is StateKind.WINDOW for group in kvcache.layout.groups)
        self._can_be = not has_window and all(
            isinstance(layer.self_attn, (GQA, MLA, KDA)) and isinstance(layer.mlp, MLP) for layer in model.model.layers)
        self._graphs: dict[PassShape, PassGraph] = {}
        self._met: set[PassShape] = set()
        self._most_shapes, self._taken_bytes = MOST_SHAPES, 0

    def room(self, chunks: list[PrefillChunk]) -> int | None:
        """Tokens, padding included, of a captured pass over these; None if there can be none."""
        chunk = chunks[0]
        if not self._can_be or len(chunks) > 1 or chunk.start % self._chunk:
            return None
        tokens = chunk.end - chunk.start
        padding = -tokens % self._unit
        if padding and chunk.end < len(chunk.request.token_ids):
            return None  # it would read what comes next in the request's blocks, which may be NaN until it is computed
        return tokens + padding

    def of(self, chunk: PrefillChunk, room: int) -> "PassGraph | None":
        """The pass over `chunk`; None if this is the first of its shape, or there are shapes enough."""
        shape = self._shape(chunk, room)
        if shape in self._graphs:
            return self._graphs[shape]
        if shape not in self._met or len(self._graphs) == self._most_shapes:
            self._met.add(shape)
            return None
        before = reserved_bytes(self.kvcache.pool.device)
        try:
            self._graphs[shape] = PassGraph(self.model, self.kvcache, shape, self._memory)
        except torch.OutOfMemoryError:  # in a capture the allocator cannot give back what it keeps for later
            self._most_shapes = len(self._graphs)
        self._taken_bytes += reserved_bytes(self.kvcache.pool.device) - before
        if self._taken_bytes > MOST_BYTES:
            self._most_shapes = len(self._graphs)
        return self._graphs.get(shape)

    def _shape(self, chunk: PrefillChunk, room: int) -> PassShape:
        """Of a pass over `chunk`. A prompt's last boundary is anywhere in what may be padding: so that each does not
        make a shape of its own, a state is stored at all of them, those that nobody wants where nobody reads."""
        offsets = {*self.kvcache.snapshots.planned(chunk.request.cache)}
        is_padded, step = chunk.end - chunk.start < room, self.kvcache.layout.block_tokens
        has_few_boundaries = self._unit <= MOST_BOUNDARIES * step
        if is_padded and self.kvcache.snapshots.enabled and has_few_boundaries:
            offsets.update(range(max(room - self._unit, step), room, step))
        return PassShape(room, chunk.start, is_padded, tuple(sorted(offsets)))


class PassGraph:
    """The pass of one shape. Without CUDA it is computed each time."""

    def __init__(self, model: Transformer, kvcache: KVCacheManager, shape: PassShape, memory: tuple[int, int] | None):
        self.model, self.kvcache, self._shape = model, kvcache, shape
        pool, layout = kvcache.pool, kvcache.layout
        # What the request gives: its tokens, how many they are, a block table for each group, those of each snapshot.
        pages = -(-(shape.start + shape.room) // layout.block_tokens)
        of_request = {group.index: group.state_blocks or pages for group in layout.groups}
        of_snapshot = {group.index: group.state_blocks for group in layout.request_groups}
        self._lengths = [of_request] + [of_snapshot] * len(shape.snapshots)
        self._scratch = {index: [pool.scratch_block] * length for index, length in of_snapshot.items()}
        sizes = [shape.room, 1, *(length for lengths in self._lengths for length in lengths.values())]
        is_cuda = pool.device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._bytes = (c_char * self._host.nbytes).from_address(self._host.data_ptr())
        self._device = self._host.to(pool.device)
        tokens, new, *rest = self._device.split(sizes)
        self._tokens, rest = tokens[None], iter(rest)
        tables = [{index: next(rest) for index in lengths} for lengths in self._lengths]
        self._state = _PassState(pool, shape, new if shape.is_padded else None, tables)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._is_told = torch.cuda.Event() if is_cuda else None
        if is_cuda:
            self._capture(pool.device, memory)

    def __call__(self, chunk: PrefillChunk, on_layer: OnLayer | None) -> Tensor:
        """As the model's, `[1, 1, vocab]`; valid until the next call."""
        self._tell(chunk)
        if not self._graphs:
            self._compute(on_layer)
        for layer, graph in enumerate(self._graphs):
            graph.replay()
            if layer == 0:
                self._is_told.record()
            if on_layer is not None and layer < len(self._graphs) - 1:
                on_layer(layer)
        return self._logits

    def _tell(self, chunk: PrefillChunk) -> None:
        """Write down what the pass is to be told, once it has read what it was told before."""
        if self._is_told is not None:
            self._is_told.synchronize()
        tokens, cache = chunk.request.token_ids[chunk.start:chunk.end], chunk.request.cache
        numbers = [*tokens, *bytes(self._shape.room - len(tokens)), len(tokens)]
        planned = self.kvcache.snapshots.planned(cache)
        tables = [cache.block_tables, *(planned.get(offset, self._scratch) for offset in self._shape.snapshots)]
        for table, lengths in zip(tables, self._lengths):
            for index, length in lengths.items():
                blocks = table[index][:length]
                numbers += [*blocks, *[self.kvcache.pool.null_block] * (length - len(blocks))]
        struct.pack_into(f"{len(numbers)}q", self._bytes, 0, *numbers)

    def _compute(self, on_layer: OnLayer | None) -> None:
        self._device.copy_(self._host, non_blocking=True)
        self._state.begin()
        self._logits = self.model(self._tokens, self._state, on_layer, last_only=True)

    def _capture(self, device: torch.device, memory: tuple[int, int]) -> None:
        beside = capture_stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))

        def begin() -> None:
            self._graphs.append(torch.cuda.CUDAGraph())
            self._graphs[-1].capture_begin(memory, capture_error_mode="thread_local")  # why: see `captured`

        def next_graph(layer: int) -> None:
            self._graphs[-1].capture_end()
            begin()

        with torch.cuda.stream(beside), uncollected():
            begin()
            try:
                self._compute(next_graph)
            except torch.OutOfMemoryError:  # a capture cannot end before the streams that left this one are back
                for stream in streams_for(device, -(-self._shape.room // CHUNK)):
                    with torch.cuda.stream(stream):
                        has_left = torch.cuda.is_current_stream_capturing()
                    if has_left:
                        beside.wait_stream(stream)
                raise
            finally:
                self._graphs[-1].capture_end()
        torch.cuda.current_stream(device).wait_stream(beside)


class _PassState(PagedState):
    """The state of whichever request the pass is told about. `tables` are a block table `[blocks]` for each group, and
    after them those of each snapshot."""

    def __init__(self, pool: BlockPool, shape: PassShape, new: Tensor | None, tables: list[dict[int, Tensor]]):
        self._tables, *of_snapshots = tables
        super().__init__(pool, [], [shape.start])
        self.new, self.snapshot_offsets = new, shape.snapshots
        self._snapshot_tables = dict(zip(shape.snapshots, of_snapshots))

    def begin(self) -> None:
        """Forget where the rows of the request before lie."""
        self._token_indexes = {}
        self.state_rows = self._rows(self._tables)
        self.snapshot_rows = {offset: self._rows(tables) for offset, tables in self._snapshot_tables.items()}

    def _rows(self, tables: dict[int, Tensor]) -> dict[int, Tensor]:
        groups = self.pool.layout.request_groups
        return {group.index: self.pool.state_rows(group, tables[group.index][None]) for group in groups}

    def layer(self, index: int) -> PagedLayer:
        """The state of layer `index`."""
        return _PassLayer(self, self.pool.layout.group_of_layer[index], index)

    def _table(self, group: KVGroup, lengths: list[int], width: int) -> Tensor:
        return self._tables[group.index][None, :width]


class _PassLayer(PagedLayer):
    """One layer of it."""

    def load(self) -> tuple[Tensor, ...]:
        """As a `PagedLayer`'s; what a prompt begins with is not read first."""
        if self.state.starts[0]:
            return super().load()
        return tuple(torch.zeros(1, *tensor.shape, dtype=tensor.torch_dtype, device=self.state.pool.device)
                     for tensor in self.group.spec.tensors)

    def store_snapshot(self, offset: int, *tensors: Tensor) -> None:
        """As a `PagedLayer`'s, into the blocks that the pass was told of."""
        rows = self.state.snapshot_rows[offset][self.group.index]
        self.state.pool.write_state(self.index, rows, *tensors)
