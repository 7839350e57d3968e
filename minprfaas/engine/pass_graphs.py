"""A prefill pass over one request as captured CUDA graphs, one from layer to layer. Chapters 04 and 08.

A pass is some 500 kernels, however few tokens it has. The host needs 17 to 36 ms to launch them; of 8,192 tokens the
GPU needs less than 30 to run them, and a thread that sends KVCache meanwhile takes turns with the launches. Graphs are
launched in 1 to 2 ms. Each ends where a layer's state is final, so that who listens to the pass is called where it
always was.
"""

import struct
from ctypes import c_char

import torch
from torch import Tensor

from minprfaas.engine.decode_graphs import capture_stream
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.attention import PLANNED_TOKENS
from minprfaas.model.gqa import GQA
from minprfaas.model.layers import MLP
from minprfaas.model.mla import MLA
from minprfaas.model.spec import OnLayer
from minprfaas.model.transformer import Transformer

CHUNK_TOKENS = 8192  # of a long prompt on a GPU, a pass each
# Further shapes are computed as they come; prompts of up to 64K tokens have so many. Each takes 2 to 40 MiB, beside the
# working memory, which all share (8,192 tokens of Qwen3-0.6B's shape: 376 MiB).
MOST_SHAPES = 64


class PassGraphs:
    """The captured passes of one model over one request, by shape: a multiple of `unit` tokens (what a prompt's end
    has less is padding) that follow a multiple of `chunk`. A shape is captured when it is met for the second time: the
    first time compiles and plans."""

    def __init__(self, model: Transformer, pool: BlockPool, memory: tuple[int, int] | None,
                 unit: int = PLANNED_TOKENS, chunk: int = CHUNK_TOKENS):
        self.model, self.pool, self._memory, self._unit, self._chunk = model, pool, memory, unit, chunk
        # A state of one size is overwritten by its pass, and experts that are counted are waited for.
        self._can_be = not pool.layout.request_groups and all(
            isinstance(layer.self_attn, (GQA, MLA)) and isinstance(layer.mlp, MLP) for layer in model.model.layers)
        self._graphs: dict[tuple[int, int, bool], PassGraph] = {}
        self._met: set[tuple[int, int, bool]] = set()
        self._most_shapes = MOST_SHAPES

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
        shape = room, chunk.start, chunk.end - chunk.start < room
        if shape in self._graphs:
            return self._graphs[shape]
        if shape not in self._met or len(self._graphs) == self._most_shapes:
            self._met.add(shape)
            return None
        try:
            self._graphs[shape] = PassGraph(self.model, self.pool, *shape, self._memory)
        except torch.OutOfMemoryError:  # in a capture the allocator cannot give back what it keeps for later
            self._most_shapes = len(self._graphs)
        return self._graphs.get(shape)


class PassGraph:
    """The pass of one shape: `room` tokens, some of them padding if it `is_padded`, that `start` others precede.
    Without CUDA it is computed each time."""

    def __init__(self, model: Transformer, pool: BlockPool, room: int, start: int, is_padded: bool,
                 memory: tuple[int, int] | None):
        self.model, self._room, self._null_block = model, room, pool.null_block
        pages = -(-(start + room) // pool.layout.block_tokens)
        self._pages = {group.index: pages for group in pool.layout.token_groups}
        # What the request gives: its tokens, how many they are, and a block table for each group.
        sizes, is_cuda = [room, 1, *self._pages.values()], pool.device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._bytes = (c_char * self._host.nbytes).from_address(self._host.data_ptr())
        self._device = self._host.to(pool.device)
        tokens, new, *tables = self._device.split(sizes)
        self._tokens = tokens[None]
        self._state = _PassState(pool, start, new if is_padded else None, dict(zip(self._pages, tables)))
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
        tokens = chunk.request.token_ids[chunk.start:chunk.end]
        numbers = [*tokens, *bytes(self._room - len(tokens)), len(tokens)]
        for index, pages in self._pages.items():
            blocks = chunk.request.cache.block_tables[index][:pages]
            numbers += [*blocks, *[self._null_block] * (pages - len(blocks))]
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

        with torch.cuda.stream(beside):
            begin()
            try:
                self._compute(next_graph)
            finally:
                self._graphs[-1].capture_end()
        torch.cuda.current_stream(device).wait_stream(beside)


class _PassState(PagedState):
    """The state of whichever request the pass is told about. `tables` are a block table `[pages]` for each group."""

    def __init__(self, pool: BlockPool, start: int, new: Tensor | None, tables: dict[int, Tensor]):
        super().__init__(pool, [], [start])
        self.new, self._tables = new, tables

    def begin(self) -> None:
        """Forget where the rows of the request before lie."""
        self._token_indexes = {}

    def _table(self, group: KVGroup, lengths: list[int], width: int) -> Tensor:
        return self._tables[group.index][None, :width]
