"""Request-level state: where copies of it are wanted, and how they are taken, received and sent. Chapter 06; paper 3.2.

The state of a linear layer belongs to exactly one length, so a prefix can be begun only where a copy of the whole
state, a *snapshot*, was kept. A snapshot is first *pending*: its blocks are its request's own while they are filled, by
the forward pass that goes through its boundary or by a stream from another node. Then it is *indexed*: in the ledger,
for everybody, until evicted. At the very end of a pass no pending one is needed: there the live state is copied.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from minprfaas.config import CacheConfig
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.ledger import BlockLedger
from minprfaas.kvcache.pool import BlockPool


@dataclass(frozen=True)
class PendingSnapshot:
    """Blocks that are to hold the state at a boundary: filled by a stream (`arrives`), else by the next pass."""

    blocks: list[int]
    arrives: bool


@dataclass(eq=False)
class StateHold:
    """One request's hold on request-level state. Boundaries are counted in blocks."""

    prompt_tokens: int
    branch: int  # leading blocks in common with an earlier prompt
    live: list[int] = field(default_factory=list)  # the blocks that passes read and write
    origin: int | None = None  # the snapshot (an entry) that the live state will begin as a copy of
    pending: dict[int, PendingSnapshot] = field(default_factory=dict)  # by boundary
    sending: list[int] = field(default_factory=list)  # snapshots (entries) that a stream reads
    rolling: bytes | None = None  # key of the snapshot that gives way to the next (decode)

    @property
    def owned(self) -> list[int]:
        """Blocks that are in no entry of the index."""
        return [*self.live, *(block for snapshot in self.pending.values() for block in snapshot.blocks)]

    @property
    def entries(self) -> list[int]:
        """Entries of the index that must not be evicted."""
        return self.sending if self.origin is None else [*self.sending, self.origin]


class Snapshots:
    """The request-level half of a KVCache manager, which is its only caller. `keys` are a request's chain keys."""

    def __init__(self, layout: Layout, config: CacheConfig, pool: BlockPool, ledger: BlockLedger):
        self.layout, self.config, self.pool, self.ledger = layout, config, pool, ledger
        self.enabled = bool(layout.request_groups) and config.prefix_cache
        # Every layer must be able to give its state there; without such layers this is 1, and nothing is wanted.
        self.stride = math.lcm(*(group.spec.snapshot_stride for group in layout.request_groups))

    def deal(self, blocks: Sequence[int], tables: list[array]) -> list[array]:
        """Append the blocks of one whole state to the request groups' block tables; returns the tables."""
        start = 0
        for group in self.layout.request_groups:
            tables[group.index].extend(blocks[start:start + group.state_blocks])
            start += group.state_blocks
        return tables

    def _tables(self, blocks: Sequence[int]) -> list[array]:
        return self.deal(blocks, [array("q") for _ in self.layout.groups])

    # The live state

    def begin_at(self, hold: StateHold, key: bytes) -> None:
        """The request's prefix was found: its live state will begin as the snapshot of that key."""
        hold.origin = self.ledger.snapshots[key]
        self.ledger.hold(hold.origin)

    def has_own_origin(self, hold: StateHold) -> bool:
        """Whether the live state begins as a snapshot that nobody else holds."""
        return hold.origin is not None and self.ledger.refs[hold.origin] == 1

    def begin(self, hold: StateHold, blocks: Sequence[int]) -> None:
        """Make `blocks` the live state, beginning as its origin; without blocks, the origin itself becomes it."""
        origin, hold.origin = hold.origin, None
        if not blocks:
            blocks = self.ledger.forget(origin)
        elif origin is not None:
            self.pool.copy(self.ledger.members(origin), blocks)
            self.ledger.drop(origin)
        hold.live = list(blocks)

    def close(self, hold: StateHold) -> None:
        """Let go of everything. The blocks before the snapshots must be held still (see the ledger's policy)."""
        for entry in hold.entries:
            self.ledger.drop(entry)
        self.ledger.release(hold.owned)

    # Which boundaries

    def _is_wanted(self, hold: StateHold, full: int) -> bool:
        """Whether to keep the state at `full` blocks of a prompt: periodically; at its last boundaries, for whoever
        continues it and for whoever repeats it exactly; and where it departs from an earlier prompt, because a prefix
        that two share is likely to come again."""
        size, tokens = self.layout.block_tokens, hold.prompt_tokens
        last = (tokens // size, (tokens - 1) // size)
        return self.enabled and (full % self.config.snapshot_every == 0 or full == hold.branch or full in last)

    def _is_there(self, keys: Sequence[bytes], full: int) -> bool:
        return full <= len(keys) and keys[full - 1] in self.ledger.snapshots

    # Inside a pass

    def plan(self, hold: StateHold, keys: Sequence[bytes], start: int, end: int, spare_blocks: int) -> int:
        """Where a pass over tokens `start` to `end` at most must end: at the first wanted boundary at which the layers
        do not hold their state anyway. Makes blocks for the snapshots before that, of `spare_blocks` at most.

        The latest come first: of one prompt, the longest prefix saves most. A plan replaces the one before.
        """
        self.give_back(hold, arrives=False)
        size, inside = self.layout.block_tokens, []
        for full in range(start // size + 1, -(-end // size)):
            if not self._is_wanted(hold, full) or self._is_there(keys, full):
                continue
            if (full * size - start) % self.stride:
                end = full * size
                break
            inside.append(full)
        for full in reversed(inside):
            spare_blocks -= self.layout.state_blocks
            if spare_blocks >= 0 and full not in hold.pending:  # without room, it is no place to begin at later
                hold.pending[full] = PendingSnapshot(self.ledger.allocate(self.layout.state_blocks), arrives=False)
        return end

    def planned(self, hold: StateHold, start: int) -> dict[int, list[array]]:
        """What the pass that begins at token `start` is to store: offset in tokens -> block tables."""
        size = self.layout.block_tokens
        return {full * size - start: self._tables(snapshot.blocks)
                for full, snapshot in hold.pending.items() if not snapshot.arrives}

    # After a pass

    def publish(self, hold: StateHold, keys: Sequence[bytes], full: int) -> None:
        """Index the pending snapshots up to boundary `full`: the state that they were to hold is in their blocks."""
        for boundary in sorted(hold.pending):
            if boundary <= full:
                self._index(keys[boundary - 1], hold.pending.pop(boundary).blocks, boundary)

    def take(self, hold: StateHold, keys: Sequence[bytes], full: int) -> None:
        """Copy the live state, which is that of `full` blocks, if that is wanted. While an answer grows it always is at
        the latest boundary, in place of the one before: the next turn begins there."""
        decoding = full * self.layout.block_tokens > hold.prompt_tokens
        if not decoding and not self._is_wanted(hold, full):
            return
        previous, hold.rolling = self.ledger.snapshots.get(hold.rolling), None
        if previous is not None and self.ledger.refs[previous] == 0:
            self.ledger.remove(previous)
        if self._is_there(keys, full):
            return
        blocks = self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return
        self.pool.copy(hold.live, blocks)
        self._index(keys[full - 1], blocks, full)
        if decoding and full % self.config.snapshot_every:
            hold.rolling = keys[full - 1]

    def _index(self, key: bytes, blocks: Sequence[int], full: int) -> None:
        if key in self.ledger.snapshots:  # another request was quicker
            self.ledger.release(blocks)
        else:
            self.ledger.insert_snapshot(key, blocks, full * self.layout.block_tokens)

    # From node to node

    def expect(self, hold: StateHold, keys: Sequence[bytes], full: int) -> list[array] | None:
        """Block tables for the state at boundary `full`, which a stream will bring; None without room or use for it."""
        if not self.enabled or full in hold.pending or self._is_there(keys, full):
            return None
        blocks = self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return None
        hold.pending[full] = PendingSnapshot(blocks, arrives=True)
        return self._tables(blocks)

    def give_back(self, hold: StateHold, arrives: bool) -> None:
        """Free the blocks of pending snapshots of that kind: they will not be filled."""
        for full, snapshot in list(hold.pending.items()):
            if snapshot.arrives == arrives:
                self.ledger.release(hold.pending.pop(full).blocks)

    def send(self, hold: StateHold, key: bytes) -> list[array] | None:
        """Block tables of the indexed snapshot of that key, held until `close`; None if it is not there."""
        entry = self.ledger.snapshots.get(key)
        if entry is None:
            return None
        self.ledger.hold(entry)
        hold.sending.append(entry)
        return self._tables(self.ledger.members(entry))
