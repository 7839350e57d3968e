"""State in blocks, as the model sees it: `ModelState` over a pool and block tables. Chapter 03 (paper 3.2)."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.pool import BlockPool


class PagedState:
    """The state of a batch of requests during one forward pass (implements `ModelState`).

    `block_tables[request][group]` are block ids; `starts[request]` tokens are already there. Every request must have
    room for the tokens that the pass appends. Index tensors are built once per group and shared by its layers.
    """

    def __init__(self, pool: BlockPool, block_tables: Sequence[Sequence[array]], starts: Sequence[int]):
        self.pool = pool
        self.starts = list(starts)
        self.start = torch.tensor(self.starts, dtype=torch.int64, device=pool.device)
        self._tables = block_tables
        self._state_tables: dict[int, torch.Tensor] = {}
        self._token_indexes: dict[int, _TokenIndex] = {}

    def layer(self, index: int) -> "PagedTokens | PagedRequestState":
        group = self.pool.layout.group_of_layer[index]
        return PagedTokens(self, group, index) if group.per_token else PagedRequestState(self, group, index)

    def token_index(self, group: KVGroup, new: int) -> "_TokenIndex":
        """Where `new` tokens of each request go in `group`, and which blocks hold the context they complete."""
        if group.index not in self._token_indexes:
            self._token_indexes[group.index] = self._build_token_index(group, new)
        return self._token_indexes[group.index]

    def state_table(self, group: KVGroup) -> torch.Tensor:
        """The blocks of each request's state in `group`, `[batch, state_blocks]`."""
        if group.index not in self._state_tables:
            self._state_tables[group.index] = self._padded_table(group, group.state_blocks)
        return self._state_tables[group.index]

    def _build_token_index(self, group: KVGroup, new: int) -> "_TokenIndex":
        size = self.pool.layout.block_tokens
        for tables, start in zip(self._tables, self.starts):
            if start + new > len(tables[group.index]) * size:
                raise ValueError(f"{start + new} tokens do not fit the {len(tables[group.index])} blocks of {size} "
                                 f"tokens that are reserved in group {group.index}")
        context = max(self.starts) + new
        table = self._padded_table(group, -(-context // size))
        positions = self.start.unsqueeze(1) + torch.arange(new, device=self.pool.device)
        return _TokenIndex(table.gather(1, positions // size), positions % size, table.reshape(-1), context)

    def _padded_table(self, group: KVGroup, width: int) -> torch.Tensor:
        table = torch.full((len(self._tables), width), self.pool.null_block, dtype=torch.int64)
        for row, tables in zip(table, self._tables):
            blocks = tables[group.index]
            used = min(len(blocks), width)
            if not used:
                raise ValueError(f"nothing is reserved in group {group.index} for a request of the batch")
            row[:used] = torch.frombuffer(blocks, dtype=torch.int64, count=used)
        return table.to(self.pool.device)


@dataclass(frozen=True)
class _TokenIndex:
    new_blocks: torch.Tensor  # [batch, new]
    new_offsets: torch.Tensor  # [batch, new]
    context_blocks: torch.Tensor  # [batch * blocks]
    context: int  # tokens


@dataclass(frozen=True)
class PagedTokens:
    """One token-state layer of a batch."""

    state: PagedState
    group: KVGroup
    index: int

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Store `rows` `[batch, new, width]`; returns `[batch, context, width]`, padded with finite rows."""
        where = self.state.token_index(self.group, rows.shape[1])
        view = self.state.pool.token_view(self.index)
        view[where.new_blocks, where.new_offsets] = rows
        context = view.index_select(0, where.context_blocks).view(len(rows), -1, rows.shape[2])
        return context[:, :where.context]


@dataclass(frozen=True)
class PagedRequestState:
    """One request-level layer of a batch."""

    state: PagedState
    group: KVGroup
    index: int

    def load(self) -> tuple[torch.Tensor, ...]:
        """The layer's tensors, each `[batch, *shape]`; a request at its beginning starts from zeros."""
        tensors = self.state.pool.read_state(self.index, self.state.state_table(self.group))
        if min(self.state.starts) == 0:  # its blocks hold whatever was there before
            fresh = self.state.start == 0
            tensors = tuple(t.masked_fill(fresh.view(-1, *[1] * (t.dim() - 1)), 0) for t in tensors)
        return tensors

    def store(self, *tensors: torch.Tensor) -> None:
        self.state.pool.write_state(self.index, self.state.state_table(self.group), *tensors)
