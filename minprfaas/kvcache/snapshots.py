"""Request-level state: where copies of it are wanted, and how they are taken, received and sent. Chapter 06; paper 3.2.

The state of a linear layer belongs to exactly one length, so a prefix can be begun only where a copy of the whole
state, a *snapshot*, was kept. First its blocks are in no index while they are filled: *planned* by a request, for the
forward pass that goes through its boundary, or *expected* from a stream. Then it is *indexed*: in the ledger, for
everybody, until evicted. At the very end of a pass nothing need be planned: there the live state is copied.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from minprfaas.config import CacheConfig
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.ledger import BlockLedger
from minprfaas.kvcache.pool import BlockPool
from minprfaas.kvcache.request_cache import RequestCache


@dataclass(eq=False)
class ExpectedSnapshot:
    """A snapshot that a stream fills. No request owns it: one that comes late still serves the conversation's next."""

    keys: list[bytes]  # of the blocks up to its boundary
    blocks: list[int]
    tables: list[array]  # by group; empty for token groups


class Snapshots:
    """The request-level half of a KVCache manager. Boundaries are counted in full blocks."""

    def __init__(self, layout: Layout, config: CacheConfig, pool: BlockPool, ledger: BlockLedger):
        self.layout, self.config, self.pool, self.ledger = layout, config, pool, ledger
        self.enabled = bool(layout.request_groups) and config.prefix_cache
        # Every layer must be able to give its state there; without such layers this is 1, and nothing is wanted.
        self.stride = math.lcm(*(group.spec.snapshot_stride for group in layout.request_groups))
        self._expected: set[ExpectedSnapshot] = set()

    # From node to node

    def expect(self, keys: Sequence[bytes], num_tokens: int) -> ExpectedSnapshot | None:
        """For the receiver: blocks to write the state at the block boundary `num_tokens` into, of a prompt with these
        keys. None when there is no room, or no use for it."""
        full, rest = divmod(num_tokens, self.layout.block_tokens)
        if rest or not full or not self.enabled or keys[full - 1] in self.ledger.snapshots:
            return None
        blocks = self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return None
        expected = ExpectedSnapshot(list(keys[:full]), blocks, self._tables(blocks))
        self._expected.add(expected)
        return expected

    def index_expected(self, expected: ExpectedSnapshot) -> bool:
        """It has arrived: index it if the rows up to it are indexed, without which nobody can begin there."""
        full = len(expected.keys)
        if self.ledger.has_tokens and self.ledger.common(expected.keys) < full:
            return False
        self._expected.remove(expected)
        self._index(expected.keys[-1], expected.blocks, full)
        return True

    def forget(self, expected: ExpectedSnapshot) -> None:
        """It will not arrive, or nobody could begin there: give its blocks back. No byte may be written after this."""
        self._expected.remove(expected)
        self.ledger.give_back(expected.blocks)

    @property
    def expected_blocks(self) -> list[int]:
        """The blocks of all that are expected."""
        return [block for expected in self._expected for block in expected.blocks]

    def hold(self, cache: RequestCache, num_tokens: int) -> list[array] | None:
        """For the sender: block tables of the indexed snapshot at the boundary `num_tokens`, which this request has
        passed or begun at; None if there is none. It is held until the request is closed."""
        full, rest = divmod(num_tokens, self.layout.block_tokens)
        if rest or not 0 < num_tokens <= cache.num_tokens or not self._is_there(cache, full):
            return None
        entry = self.ledger.snapshots[cache.keys[full - 1]]
        self.ledger.hold(entry)
        cache.sending.append(entry)
        return self._tables(self.ledger.members(entry))

    def _tables(self, blocks: Sequence[int]) -> list[array]:
        tables = [array("q") for _ in self.layout.groups]
        self._deal(blocks, tables)
        return tables

    def _deal(self, blocks: Sequence[int], tables: list[array]) -> None:
        """Append the blocks of one whole state to the request groups' block tables."""
        start = 0
        for group in self.layout.request_groups:
            tables[group.index].extend(blocks[start:start + group.state_blocks])
            start += group.state_blocks

    # The live state

    def begin_at(self, cache: RequestCache, key: bytes) -> None:
        """The request's prefix was found: its live state will begin as the snapshot of that key."""
        cache.origin = self.ledger.snapshots[key]
        self.ledger.hold(cache.origin)

    def has_own_origin(self, cache: RequestCache) -> bool:
        """Whether the live state begins as a snapshot that nobody else holds."""
        return cache.origin is not None and self.ledger.refs[cache.origin] == 1

    def begin(self, cache: RequestCache, blocks: Sequence[int]) -> None:
        """Make `blocks` the live state, beginning as its origin; without blocks, the origin itself becomes it."""
        origin, cache.origin = cache.origin, None
        if not blocks:
            blocks = self.ledger.forget(origin)
        elif origin is not None:
            self.pool.copy(self.ledger.members(origin), blocks)
            self.ledger.release(origin)
        self._deal(blocks, cache.block_tables)
        cache.has_state = True

    def _live(self, cache: RequestCache) -> list[int]:
        return [block for group in self.layout.request_groups for block in cache.block_tables[group.index]]

    def owned(self, cache: RequestCache) -> list[int]:
        """Blocks of request-level state that are in no entry of the index."""
        owned = self._live(cache)
        for blocks in cache.planned.values():
            owned += blocks
        return owned

    def close(self, cache: RequestCache) -> None:
        """Let go of everything. The blocks before the snapshots must be held still (see the ledger's policy)."""
        for entry in cache.snapshots:
            self.ledger.release(entry)
        self.ledger.give_back(self.owned(cache))

    # Which boundaries

    def _is_wanted(self, cache: RequestCache, full: int) -> bool:
        """Whether to keep the state at `full` blocks of a prompt: periodically; at its last boundaries, for whoever
        continues it and for whoever repeats it exactly; and where it departs from an earlier prompt, because a prefix
        that two share is likely to come again."""
        size, tokens = self.layout.block_tokens, cache.prompt_tokens
        last = (tokens // size, (tokens - 1) // size)
        return self.enabled and (full % self.config.snapshot_every == 0 or full == cache.branch or full in last)

    def _is_there(self, cache: RequestCache, full: int) -> bool:
        return full <= len(cache.keys) and cache.keys[full - 1] in self.ledger.snapshots

    # Inside a pass

    def plan(self, cache: RequestCache, end: int, spare_blocks: int) -> int:
        """Where a pass over the tokens up to `end` at most must end: at the first wanted boundary at which the layers
        do not hold their state anyway. Makes blocks for the snapshots before that, of `spare_blocks` at most; the
        latest come first, because of one prompt the longest prefix saves most. Replaces the plan before."""
        for blocks in cache.planned.values():
            self.ledger.give_back(blocks)
        cache.planned.clear()
        start, size, inside = cache.num_tokens, self.layout.block_tokens, []
        for full in range(start // size + 1, -(-end // size)):
            if not self._is_wanted(cache, full) or self._is_there(cache, full):
                continue
            if (full * size - start) % self.stride:
                end = full * size
                break
            inside.append(full)
        for full in reversed(inside):
            spare_blocks -= self.layout.state_blocks
            if spare_blocks < 0:  # a boundary without room is no place to begin at later
                break
            cache.planned[full] = self.ledger.allocate(self.layout.state_blocks)
        return end

    def planned(self, cache: RequestCache) -> dict[int, list[array]]:
        """What the next pass is to store: tokens after its beginning -> block tables."""
        size = self.layout.block_tokens
        return {full * size - cache.num_tokens: self._tables(blocks) for full, blocks in cache.planned.items()}

    # After a pass

    def publish(self, cache: RequestCache, full: int) -> None:
        """Index the planned snapshots up to boundary `full`: the pass has stored the state in their blocks."""
        for boundary in sorted(cache.planned):
            if boundary <= full:
                self._index(cache.keys[boundary - 1], cache.planned.pop(boundary), boundary)

    def take(self, cache: RequestCache, full: int) -> None:
        """Copy the live state, which is that of `full` blocks, if that is wanted. While an answer grows it always is at
        the latest boundary, in place of the one before: the next turn begins there."""
        decoding = full * self.layout.block_tokens > cache.prompt_tokens
        if not self.enabled or (not decoding and not self._is_wanted(cache, full)):
            return
        previous, cache.rolling = self.ledger.snapshots.get(cache.rolling), None
        if previous is not None and self.ledger.refs[previous] == 0:
            self.ledger.remove(previous)
        blocks = None if self._is_there(cache, full) else self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return
        self.pool.copy(self._live(cache), blocks)
        self._index(cache.keys[full - 1], blocks, full)
        if decoding and full % self.config.snapshot_every:
            cache.rolling = cache.keys[full - 1]

    def _index(self, key: bytes, blocks: Sequence[int], full: int) -> None:
        if key in self.ledger.snapshots:  # another request was quicker
            self.ledger.give_back(blocks)
        else:
            self.ledger.insert_snapshot(key, blocks, full * self.layout.block_tokens)
