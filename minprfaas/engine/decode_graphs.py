"""Decode as captured CUDA graphs: a step of fixed shape that one launch replays. Chapter 05.

A step has a *bucket*: a number of requests and of pages for each, both rounded up. Everything that changes from step
to step (tokens, lengths, block tables) is one small tensor on the device, which the host overwrites before it replays
the graph; rows without a request point at the pool's scratch block. So a step costs one copy to the device, one launch
and one wait for the tokens, whatever the model does inside. Without CUDA the same step runs uncaptured.
"""

import math
from collections.abc import Sequence

import torch

from minprfaas.config import StateKind
from minprfaas.engine.request import Request
from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.paged_attention import (
    PageIndex, PageOutputs, attend_to_copied_pages, attend_to_pages, flash_can_read, page_index)
from minprfaas.model.spec import Pages, TokenContext
from minprfaas.model.transformer import Transformer

LEAST_PAGES = 8


def bucket_of(requests: int, pages: int) -> tuple[int, int]:
    """The smallest bucket that holds so many requests of at most so many pages: requests in powers of two up to 8 and
    multiples of 8 beyond, pages in powers of two and the halves between."""
    batch = 2 ** math.ceil(math.log2(requests)) if requests <= 8 else -(-requests // 8) * 8
    power = 2 ** math.ceil(math.log2(max(pages, LEAST_PAGES)))
    return batch, power * 3 // 4 if pages <= power * 3 // 4 and power > LEAST_PAGES else power


class StepTables:
    """What a step is told: `[batch, columns]` int64, on the device and as the host writes it."""

    def __init__(self, pool: BlockPool, batch: int, pages: int):
        self.layout, self.batch, self.pages = pool.layout, batch, pages
        self.columns: dict[int, slice] = {}  # of each group's block table
        width = 2
        for group in pool.layout.groups:
            columns = pages if group.spec.kind is StateKind.TOKEN else group.state_blocks
            self.columns[group.index] = slice(width, width + columns)
            width += columns
        self.host = torch.full((batch, width), pool.scratch_block, dtype=torch.int64,
                               pin_memory=pool.device.type == "cuda")
        self.host[:, :2] = 0  # a row without a request: token 0 at position 0, which attends to itself
        self._empty_row, self._null_block = self.host[0].clone(), pool.null_block
        self._written: list[tuple | None] = [None] * batch  # what each row's tables were last written from
        self.device = self.host.to(pool.device)
        self.tokens, self.start = self.device[:, :1], self.device[:, 1]

    def table(self, group: KVGroup) -> torch.Tensor:
        """A group's block table `[batch, pages or state_blocks]`."""
        return self.device[:, self.columns[group.index]]

    def fill(self, requests: Sequence[Request]) -> None:
        """Tell the device about a step of these requests."""
        count = len(requests)
        news = [(request.token_ids[-1], request.cache.num_tokens) for request in requests]
        self.host[:count, :2] = torch.tensor(news)
        for row, request in enumerate(requests):
            # A table changes when a block is added to it, or indexed (an equal one may take its place).
            version = (request.cache, request.cache.num_blocks, len(request.cache.entries))
            if self._written[row] != version:
                self._write_row(row, request)
                self._written[row] = version
        for row in range(count, self.batch):
            if self._written[row] is not None:  # its blocks are a request's that is not in this step, or another's now
                self.host[row] = self._empty_row
                self._written[row] = None
        self.device.copy_(self.host, non_blocking=True)

    def _write_row(self, row: int, request: Request) -> None:
        for index, columns in self.columns.items():
            blocks = request.cache.block_tables[index][:columns.stop - columns.start]
            self.host[row, columns] = self._null_block
            if blocks:
                self.host[row, columns.start:columns.start + len(blocks)] = torch.frombuffer(blocks, dtype=torch.int64)


class StepState:
    """The state of one bucket's requests (implements `ModelState`): what `PagedState` is, without one shape or number
    that depends on the requests."""

    new = None

    def __init__(self, pool: BlockPool, tables: StepTables):
        self.pool, self.tables, self.start = pool, tables, tables.start
        self._slots: dict[int, tuple] = {}  # by group, made once a step and shared by its layers
        self.state_rows = {group.index: pool.state_rows(group, tables.table(group))
                           for group in pool.layout.request_groups}
        self._indexes: dict[tuple, tuple] = {}

    def layer(self, index: int) -> "StepLayer":
        """The state of layer `index`."""
        return StepLayer(self, self.pool.layout.group_of_layer[index], index)

    def slots(self, group: KVGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of each request's new token, `[batch]` each."""
        if group.index not in self._slots:
            size = self.pool.layout.block_tokens
            blocks = self.tables.table(group).gather(1, (self.start // size)[:, None])[:, 0]
            self._slots[group.index] = (blocks, self.start % size)
        return self._slots[group.index]

    def index(self, group: KVGroup, pages: Pages, groups: int) -> PageIndex:
        """Where the pages lie, for mixers with `groups` query heads for each KV head."""
        if (group.index, groups) not in self._indexes:
            self._indexes[group.index, groups] = page_index(pages, groups)
        return self._indexes[group.index, groups]


class StepLayer:
    """One layer of a bucket (implements `LayerState`)."""

    snapshot_offsets = ()  # what a boundary leaves behind is copied after the step

    def __init__(self, state: StepState, group: KVGroup, index: int):
        self.state, self.group, self.index = state, group, index

    def append(self, rows: torch.Tensor) -> TokenContext:
        """Store `rows` `[batch, 1, width]`; returns the context, as long as the bucket has room for."""
        state, view = self.state, self.state.pool.token_view(self.index)
        blocks, offsets = state.slots(self.group)
        view[blocks, offsets] = rows[:, 0]
        pages = Pages(view, state.tables.table(self.group), state.start + 1)

        def attend(q: torch.Tensor, scale: float, kv_heads: int) -> PageOutputs:
            index = state.index(self.group, pages, groups=q.shape[2] // kv_heads)
            if flash_can_read(view, q.shape[3], kv_heads):
                return attend_to_pages(q, view, index, scale)
            return attend_to_copied_pages(q, pages, index.row_counts, scale, kv_heads)

        return TokenContext(pages, state.tables.pages * view.shape[1], attend)

    def load(self) -> tuple[torch.Tensor, ...]:
        """The layer's tensors, each `[batch, *shape]`; a decoding request has had a token before."""
        return self.state.pool.read_state(self.index, self.state.state_rows[self.group.index])

    def store(self, *tensors: torch.Tensor) -> None:
        """Replace what `load` returned."""
        self.state.pool.write_state(self.index, self.state.state_rows[self.group.index], *tensors)


class DecodeStep:
    """The step of one bucket. `run` replays it; where there is no CUDA it computes it."""

    def __init__(self, model: Transformer, pool: BlockPool, batch: int, pages: int,
                 memory: tuple[int, int] | None):
        self.model, self.pool = model, pool
        self.tables = StepTables(pool, batch, pages)
        self.graph: torch.cuda.CUDAGraph | None = None
        if pool.device.type == "cuda":
            self._capture(memory)

    def _forward(self) -> None:
        self.logits = self.model(self.tables.tokens, StepState(self.pool, self.tables), last_only=True)[:, 0]
        self.greedy = self.logits.argmax(dim=-1)

    def _capture(self, memory: tuple[int, int] | None) -> None:
        """Warm up beside the current stream (libraries set themselves up, pieces are compiled), then record."""
        beside = torch.cuda.Stream(self.pool.device)
        beside.wait_stream(torch.cuda.current_stream(self.pool.device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream(self.pool.device).wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        # The stream is named because the default one belongs to the first GPU. Other threads use the device meanwhile
        # (KVCache leaves and arrives): only what this one does may spoil the capture.
        with torch.cuda.graph(self.graph, pool=memory, stream=beside, capture_error_mode="thread_local"):
            self._forward()

    def run(self, requests: Sequence[Request]) -> None:
        """Begin the step: afterwards `greedy` `[batch]` and `logits` `[batch, vocab]` are on their way."""
        self.tables.fill(requests)
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()
