"""What a decode step of fixed shape is told, and what its layers see of pages and state. Chapters 04, 05.

Everything that changes from step to step (tokens, lengths, block tables) is one small tensor on the device, which the
host overwrites; rows without a request point at the pool's scratch block.

State of one size is kept out of its blocks while its request decodes: reading it from there and writing it back would
take a step of many requests as long again as computing with it.
"""

from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64
from functools import partial

import torch

from minprfaas.config import RopeConfig, StateKind
from minprfaas.engine.request import Request
from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.pool import BlockPool, put_rows
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.model.layers import frequencies_on, rotary_tables
from minprfaas.model.paged_attention import (
    PageIndex, PageOutputs, attend_to_copied_pages, attend_to_pages, flash_can_read, page_index, pieces_of_pages)
from minprfaas.model.spec import Pages, TensorSpec, TokenContext


class StepTables:
    """What a step is told: `[batch, columns]` int64, on the device and as the host writes it."""

    def __init__(self, pool: BlockPool, batch: int, pages: int):
        self.layout, self.batch, self.pages = pool.layout, batch, pages
        self.columns: dict[int, slice] = {}  # of each group's block table
        width = 2
        for group in pool.layout.token_groups:
            self.columns[group.index] = slice(width, width + pages)
            width += pages
        self.host = torch.full((batch, width), pool.scratch_block, dtype=torch.int64,
                               pin_memory=pool.device.type == "cuda")
        self.host[:, :2] = 0  # a row without a request: token 0 at position 0, which attends to itself
        # The same memory, number by number: an operation of torch takes as long for one as for a thousand.
        self._numbers = (c_int64 * width * batch).from_address(self.host.data_ptr())
        self._empty_row, self._null_block = self.host[0].clone(), pool.null_block
        self._written: list[tuple | None] = [None] * batch  # what each row's tables were last written from
        self.device = self.host.to(pool.device)
        self.tokens, self.start = self.device[:, :1], self.device[:, 1]

    def table(self, group: KVGroup) -> torch.Tensor:
        """A token group's block table `[batch, pages]`."""
        return self.device[:, self.columns[group.index]]

    def fill(self, requests: Sequence[Request]) -> None:
        """Write down what the next step is to be told: these requests, a row each."""
        count = len(requests)
        for row, request in enumerate(requests):
            self._numbers[row][0], self._numbers[row][1] = request.token_ids[-1], request.cache.num_tokens
            # A table changes when a block is added to it, or indexed (an equal one may take its place).
            version = (request.cache, request.cache.num_blocks, len(request.cache.entries))
            if self._written[row] != version:
                self._write_row(row, request)
                self._written[row] = version
        for row in range(count, self.batch):
            if self._written[row] is not None:  # its blocks are a request's that is not in this step, or another's now
                self.host[row] = self._empty_row
                self._written[row] = None

    def tell(self) -> None:
        """Tell the device: the first thing in a step. Who fills the tables again has waited for its tokens."""
        self.device.copy_(self.host, non_blocking=True)

    def _write_row(self, row: int, request: Request) -> None:
        for index, columns in self.columns.items():
            blocks = request.cache.block_tables[index][:columns.stop - columns.start]
            self.host[row, columns] = self._null_block
            if blocks:
                self.host[row, columns.start:columns.start + len(blocks)] = torch.frombuffer(blocks, dtype=torch.int64)


class LiveState:
    """The request-level state of the batch that decodes: row r of each layer's tensors is request r's, and steps change
    it in its place. The request's blocks fall behind; `settle` brings them up to date, which whoever reads them needs.
    """

    def __init__(self, pool: BlockPool, most_requests: int):
        self.pool = pool
        self.tensors = {
            layer: tuple(_zeros(most_requests, group, tensor, pool.device) for tensor, _ in places)
            for group in pool.layout.request_groups for layer, places in group.places.items()}
        self._caches: list[RequestCache] = []

    def arranged(self, batch: Sequence[Request]) -> list[Request]:
        """The batch in an order in which as many requests as can keep their rows."""
        of_cache = {request.cache: request for request in batch}
        stayed = [of_cache.pop(cache, None) for cache in self._caches[:len(batch)]]
        others = iter(of_cache.values())
        return [request or next(others) for request in stayed] + list(others)

    def hold(self, caches: list[RequestCache]) -> None:
        """Make the rows those of a batch: who left gets its blocks written, who came is read from its own."""
        if caches == self._caches:
            return
        before = {cache: row for row, cache in enumerate(self._caches)}
        self.settle([row for cache, row in before.items() if cache not in caches])
        moved = [(before[cache], row) for row, cache in enumerate(caches) if before.get(cache, row) != row]
        if moved:
            sources, targets = torch.tensor(moved, device=self.pool.device).unbind(1)
            for held in (held for tensors in self.tensors.values() for held in tensors):
                held.index_copy_(0, targets, held.index_select(0, sources))
        self._caches = list(caches)
        for layer, places, rows in self._places([row for row, cache in enumerate(caches) if cache not in before]):
            for held, read in zip(self.tensors[layer], self.pool.read_state(layer, places)):
                held.index_copy_(0, rows, read)

    def settle(self, rows: Sequence[int]) -> None:
        """Write these rows into their requests' blocks, as far as those are the requests' still."""
        for layer, places, rows in self._places([row for row in rows if not self._caches[row].closed]):
            self.pool.write_state(layer, places, *(held.index_select(0, rows) for held in self.tensors[layer]))

    def _places(self, rows: list[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each layer, the pool's rows with its state of the requests in `rows`, and `rows` on the device."""
        for group in self.pool.layout.request_groups if rows else ():
            tables = torch.tensor([list(self._caches[row].block_tables[group.index]) for row in rows])
            places = self.pool.state_rows(group, tables.to(self.pool.device))
            on_device = torch.tensor(rows, device=self.pool.device)
            for layer in group.layers:
                yield layer, places, on_device


def _zeros(most_requests: int, group: KVGroup, tensor: TensorSpec, device: torch.device) -> torch.Tensor:
    """`[most_requests, *shape]`. A memory `[heads, key_dim, value_dim]` lies with a value's channels of the key side by
    side: what a step sums over them and what it then adds to each is one kernel, which reads the memory once. So lie a
    convolution's last inputs `[channels, kernel - 1]` as they come."""
    *outer, rows, columns = tensor.shape
    if group.spec.kind is StateKind.WINDOW:
        return torch.zeros(most_requests, *tensor.shape, dtype=tensor.torch_dtype, device=device)
    return torch.zeros(most_requests, *outer, columns, rows, dtype=tensor.torch_dtype, device=device).transpose(-1, -2)


class StepState:
    """The state of one bucket's requests (implements `ModelState`): what `PagedState` is, without one shape or number
    that depends on the requests."""

    new = None

    def __init__(self, pool: BlockPool, tables: StepTables, live: LiveState, compiled: Callable[[Callable], Callable]):
        self.pool, self.tables, self.live, self.start = pool, tables, live, tables.start
        self.lengths, self._compiled = self.start + 1, compiled  # `compiled` makes few kernels of a function
        self._slots: dict[int, tuple] = {}  # by group, made once a step and shared by its layers
        self._indexes: dict[tuple, tuple] = {}
        self._rotary: dict[tuple, tuple] = {}

    def layer(self, index: int) -> "StepLayer":
        """The state of layer `index`."""
        return StepLayer(self, self.pool.layout.group_of_layer[index], index)

    def slots(self, group: KVGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of each request's new token, `[batch]` each."""
        if group.index not in self._slots:
            table, size = self.tables.table(group), self.pool.layout.block_tokens
            self._slots[group.index] = self._compiled(slots_of)(table, self.start, size)
        return self._slots[group.index]

    def index(self, group: KVGroup, pages: Pages, groups: int, pieces: int) -> PageIndex:
        """Where the pieces of pages lie, for mixers with `groups` query heads for each KV head."""
        if (group.index, groups, pieces) not in self._indexes:
            # Not compiled: no warm-up meets every number of pieces, and a request would wait for the compiler.
            self._indexes[group.index, groups, pieces] = page_index(pages, groups, pieces)
        return self._indexes[group.index, groups, pieces]

    def rotary(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Positions.rotary`."""
        if (rope, head_dim) not in self._rotary:
            frequencies = frequencies_on(self.start.device, rope, head_dim)
            self._rotary[rope, head_dim] = self._compiled(rotary_tables)(
                self.start[:, None], frequencies, rope.amplitude, dtype)
        return self._rotary[rope, head_dim]


def slots_of(table: torch.Tensor, positions: torch.Tensor, block_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of `positions` `[batch]` in the block table `[batch, pages]`, `[batch]` each."""
    return table.gather(1, (positions // block_tokens)[:, None])[:, 0], positions % block_tokens


class StepLayer:
    """One layer of a bucket (implements `LayerState`)."""

    snapshot_offsets = ()  # what a boundary leaves behind is copied after the step

    def __init__(self, state: StepState, group: KVGroup, index: int):
        self.state, self.group, self.index = state, group, index

    def append(self, rows: torch.Tensor) -> TokenContext:
        """Store `rows` `[batch, 1, width]`; returns the context, as long as the bucket has room for."""
        pages = self.pages()
        put_rows(pages.view, *self.slots(), rows[:, 0])
        return TokenContext(pages, self.state.tables.pages * pages.view.shape[1], partial(self.attend, pages))

    def pages(self) -> Pages:
        """Where the context lies, with the step's token."""
        state = self.state
        return Pages(state.pool.token_view(self.index), state.tables.table(self.group), state.lengths)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of each request's new token, `[batch]` each."""
        return self.state.slots(self.group)

    def attend(self, pages: Pages, q: torch.Tensor, scale: float, kv_heads: int) -> PageOutputs:
        """`q` `[batch, 1, heads, dim]` over each page."""
        index = self.flash_index(pages, q.shape[3], q.shape[2], kv_heads)
        if index is not None:
            return attend_to_pages(q, pages.view, index, scale)
        row_counts = self.state.index(self.group, pages, q.shape[2] // kv_heads, pieces=1).row_counts
        return attend_to_copied_pages(q, pages, row_counts, scale, kv_heads)

    def flash_index(self, pages: Pages, head_dim: int, heads: int, kv_heads: int) -> PageIndex | None:
        """Where the flash kernel finds the pages; None where it cannot read them."""
        if not flash_can_read(pages.view, head_dim, kv_heads):
            return None
        return self.state.index(self.group, pages, heads // kv_heads, pieces_of_pages(pages, kv_heads))

    def load(self) -> tuple[torch.Tensor, ...]:
        """The layer's tensors, each `[batch, *shape]`; a decoding request has had a token before."""
        return tuple(tensor[:self.state.tables.batch] for tensor in self.state.live.tensors[self.index])

    def store(self, *tensors: torch.Tensor) -> None:
        """Replace what `load` returned; a mixer may have done that in its place."""
        for held, tensor in zip(self.load(), tensors, strict=True):
            if tensor.data_ptr() != held.data_ptr():
                held.copy_(tensor)
