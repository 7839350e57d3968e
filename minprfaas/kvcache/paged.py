"""State in blocks, as the model sees it: `ModelState` over a pool and block tables. Chapter 03 (paper 3.2)."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.pool import BlockPool, put_rows
from minprfaas.model.spec import Pages, TokenContext


class PagedState:
    """The state of a batch of requests during one forward pass (implements `ModelState`).

    `block_tables[request][group]` are block ids, with room for what the pass appends; `starts[request]` tokens are
    already there; `snapshots[request]` are the block tables to store the state into at an offset of this pass. `new`
    are the tokens of each request, where some have fewer than the pass is wide (`width`; 0: as the longest).
    """

    def __init__(self, pool: BlockPool, block_tables: Sequence[Sequence[array]], starts: Sequence[int],
                 snapshots: Sequence[Mapping[int, Sequence[array]]] = (), new: Sequence[int] = (), width: int = 0):
        self.pool = pool
        self.starts, self.counts = list(starts), list(new)
        is_padded = len({*new, width or max(new, default=0)}) > 1
        self.new = torch.tensor(self.counts).to(pool.device, non_blocking=True) if is_padded else None
        # A pass begins without a wait: what is in no pinned memory CUDA has put aside when the call returns.
        self.start = torch.tensor(self.starts).to(pool.device, non_blocking=True)
        self.snapshot_offsets = tuple(sorted({offset for planned in snapshots for offset in planned}))
        self.snapshots, self._block_tables = snapshots, block_tables
        self._token_indexes: dict[int, _TokenIndex] = {}  # by group: built once, shared by its layers
        self.state_rows = {}  # by group: the rows of the pool that hold each request's state
        for group in pool.layout.request_groups:
            blocks = self._table(group, [group.state_blocks] * len(starts), group.state_blocks)
            self.state_rows[group.index] = pool.state_rows(group, blocks)

    def layer(self, index: int) -> "PagedLayer":
        """The state of layer `index`."""
        return PagedLayer(self, self.pool.layout.group_of_layer[index], index)

    def token_index(self, group: KVGroup, new: int) -> "_TokenIndex":
        """Where `new` tokens of each request go in `group`, and which blocks hold the context that they complete."""
        if group.index not in self._token_indexes:
            size = self.pool.layout.block_tokens
            ends = [start + count for start, count in zip(self.starts, self.counts or [new] * len(self.starts))]
            width = -(-(max(self.starts) + new) // size)
            table = self._table(group, [-(-end // size) for end in ends], width)
            offsets = torch.arange(new, device=self.pool.device)
            positions = self.start.unsqueeze(1) + offsets
            blocks = table.gather(1, positions // size)
            if self.new is not None:  # padding is written where nobody reads
                blocks = blocks.masked_fill(offsets >= self.new[:, None], self.pool.scratch_block)
            self._token_indexes[group.index] = _TokenIndex(blocks, positions % size, table, self.start + new)
        return self._token_indexes[group.index]

    def _table(self, group: KVGroup, lengths: list[int], width: int) -> torch.Tensor:
        """The first `lengths[request]` blocks of each request, padded with the null block to `width`."""
        table = torch.full((len(lengths), width), self.pool.null_block, dtype=torch.int64)
        for row, tables, length in zip(table, self._block_tables, lengths):
            blocks = tables[group.index]
            if length > len(blocks):
                raise ValueError(f"a request needs {length} blocks in group {group.index}; {len(blocks)} are reserved")
            row[:length] = torch.frombuffer(blocks, dtype=torch.int64, count=length)
        # Built on the host, so that a device gets one copy and not one a request.
        return table.to(self.pool.device, non_blocking=True)


@dataclass(frozen=True)
class _TokenIndex:
    new_blocks: torch.Tensor  # [batch, new]
    new_offsets: torch.Tensor  # [batch, new]
    block_table: torch.Tensor  # [batch, blocks]
    lengths: torch.Tensor  # [batch]: tokens of each request, the new ones included


@dataclass(frozen=True)
class PagedLayer:
    """One layer of a batch (implements `LayerState`)."""

    state: PagedState
    group: KVGroup
    index: int

    def append(self, rows: torch.Tensor) -> TokenContext:
        """Store `rows` `[batch, new, width]` in the reserved blocks; returns the whole context."""
        new, view = rows.shape[1], self.state.pool.token_view(self.index)
        where = self.state.token_index(self.group, new)
        put_rows(view, where.new_blocks, where.new_offsets, rows)
        longest = max(self.state.starts) + new
        return TokenContext(Pages(view, where.block_table, where.lengths), longest)

    def load(self) -> tuple[torch.Tensor, ...]:
        """The layer's tensors, each `[batch, *shape]`; a request at its beginning starts from zeros."""
        tensors = self.state.pool.read_state(self.index, self.state.state_rows[self.group.index])
        if min(self.state.starts) == 0:  # its blocks hold whatever was there before
            fresh = self.state.start == 0
            tensors = tuple(tensor.masked_fill(fresh.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in tensors)
        return tensors

    def store(self, *tensors: torch.Tensor) -> None:
        """Replace what `load` returned."""
        self.state.pool.write_state(self.index, self.state.state_rows[self.group.index], *tensors)

    @property
    def snapshot_offsets(self) -> tuple[int, ...]:
        """Tokens after the pass's beginning at which a copy of the state is wanted as well."""
        return self.state.snapshot_offsets

    def store_snapshot(self, offset: int, *tensors: torch.Tensor) -> None:
        """The state after `offset` tokens of this pass, `[batch, *shape]` each, into the blocks made ready for it."""
        pool = self.state.pool
        for row, planned in enumerate(self.state.snapshots):
            if offset in planned:  # others of the batch may not want theirs
                table = torch.tensor([planned[offset][self.group.index]], dtype=torch.int64, device=pool.device)
                own = (tensor[row:row + 1] for tensor in tensors)
                pool.write_state(self.index, pool.state_rows(self.group, table), *own)
