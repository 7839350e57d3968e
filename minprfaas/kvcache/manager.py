"""The KVCache manager of one node: requests' block tables, prefix reuse, snapshots, transfers. Chapter 06 (paper 3.2).

A block leads one of two lives. A *prefix-cache* block is full, indexed under its chain key, shared by reference count,
and kept after its request until evicted. A *transfer-cache* block (the unaligned tail, the exact-length state) belongs
to one request, is never indexed, and is freed when the request is closed and its last transfer acknowledged.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from minprfaas.config import CacheConfig
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.ledger import BlockLedger, OnEvent, chain_keys, root_key
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool


@dataclass(eq=False)
class RequestCache:
    """One request's hold on the pool. `block_tables[group]`: block ids, in token order or of the live state."""

    block_tables: list[array]
    prompt_tokens: int
    keys: list[bytes]  # of the full blocks, as far as they are known
    num_tokens: int = 0  # tokens whose state the blocks hold
    cached_tokens: int = 0  # of these, found in the cache at `open`
    num_blocks: int = 0  # reserved, in each token group
    entries: list[int] = field(default_factory=list)  # the index's entries of the leading full blocks, all held
    live: list[int] = field(default_factory=list)  # blocks of the request-level state
    branch: int = 0  # leading blocks in common with an earlier prompt, at `open`
    matched_snapshot: int | None = None  # the entry that the live state will begin as a copy of
    rolling: bytes | None = None  # key of the snapshot that gives way to the next (decode)
    expected: tuple[int, list[int]] | None = None  # (block count, ids) of a snapshot that arrives from elsewhere
    transfers: int = 0
    closed: bool = False


@dataclass(frozen=True)
class CacheStats:
    """Blocks: `free + cached + in_use == total`; `transfer`, a part of `in_use`, only wait for an acknowledgement."""

    total: int
    free: int
    cached: int
    in_use: int
    transfer: int
    prompt_tokens: int  # of all requests opened
    hit_tokens: int  # of these, found in the cache
    evicted_entries: int


class KVCacheManager:
    """Hands out the blocks of one pool. `root` is the model's fingerprint: two models never share a block.

    `on_event("stored" | "evicted", key, tokens)` tells at which chain keys a match can end. One thread calls the
    manager; other threads may only write into reserved blocks, through `pool`.
    """

    def __init__(self, layout: Layout, config: CacheConfig, device: torch.device | str, root: bytes,
                 on_event: OnEvent | None = None):
        self.layout, self.config, self.root = layout, config, root_key(root)
        self.pool = BlockPool(layout, config.num_blocks, device)
        self.ledger = BlockLedger(config.num_blocks, bool(layout.token_groups), bool(layout.request_groups), on_event)
        self._snapshots = bool(layout.request_groups) and config.prefix_cache
        self._requests: dict[int, RequestCache] = {}  # by identity; the closed ones too while in transfer
        self._prompt_tokens = self._hit_tokens = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request that the pool can hold by itself, 0 if not even its state fits."""
        rest = self.config.num_blocks - self.layout.state_blocks
        if rest < 0:
            return 0
        groups = len(self.layout.token_groups)
        return rest // groups * self.layout.block_tokens if groups else 2**62

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """The chain keys of the full blocks of a prompt: what the directory is asked with."""
        return chain_keys(self.root, token_ids, self.layout.block_tokens)

    def match(self, token_ids: Sequence[int]) -> int:
        """Tokens that `open` would find in the cache now; changes nothing."""
        return self._match(self.keys(token_ids), len(token_ids)) * self.layout.block_tokens

    def _match(self, keys: list[bytes], num_tokens: int) -> int:
        usable = max(num_tokens - 1, 0) // self.layout.block_tokens  # at least one token is always computed
        return self.ledger.match(keys[:usable]) if self.config.prefix_cache else 0

    # A request's life

    def open(self, token_ids: Sequence[int]) -> RequestCache:
        """Begin a request: attach the longest cached prefix that leaves at least one token to compute."""
        keys = self.keys(token_ids) if self.config.prefix_cache else []
        matched = self._match(keys, len(token_ids))
        tokens = matched * self.layout.block_tokens
        cache = RequestCache([array("q") for _ in self.layout.groups], len(token_ids), keys, tokens, tokens, matched,
                             branch=self.ledger.common(keys))
        if self.layout.token_groups:
            for key in keys[:matched]:
                entry = self.ledger.blocks[key]
                self.ledger.hold(entry)
                cache.entries.append(entry)
                for group, block in zip(self.layout.token_groups, self.ledger.members(entry)):
                    cache.block_tables[group.index].append(block)
        if matched and self._snapshots:
            cache.matched_snapshot = self.ledger.snapshots[keys[matched - 1]]
            self.ledger.hold(cache.matched_snapshot)
        self._prompt_tokens += len(token_ids)
        self._hit_tokens += tokens
        self._requests[id(cache)] = cache
        return cache

    def reserve(self, cache: RequestCache, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in every group, evicting by policy. False changes nothing."""
        more = max(-(-num_tokens // self.layout.block_tokens) - cache.num_blocks, 0)
        token_need = more * len(self.layout.token_groups)
        state_need = 0 if cache.live else self.layout.state_blocks
        blocks = self.ledger.allocate(token_need + state_need)
        if blocks is None and cache.matched_snapshot is not None and self.ledger.refs[cache.matched_snapshot] == 1:
            # No room for the snapshot and a copy of it: its only holder takes the snapshot itself. So a request that
            # fits the pool without its cached prefix fits with it too.
            blocks = self.ledger.allocate(token_need)
        if blocks is None:
            return False
        if state_need:
            self._begin_state(cache, blocks[token_need:])
        self.pool.zero(blocks[:token_need])
        for position, group in enumerate(self.layout.token_groups):
            cache.block_tables[group.index].extend(blocks[position * more:(position + 1) * more])
        cache.num_blocks += more
        return True

    def _begin_state(self, cache: RequestCache, blocks: Sequence[int]) -> None:
        """Make `blocks` the live state, beginning as the matched snapshot; without blocks, the snapshot becomes it."""
        snapshot, cache.matched_snapshot = cache.matched_snapshot, None
        if not blocks:
            blocks = self.ledger.forget(snapshot)
        elif snapshot is not None:
            self.pool.copy(self.ledger.members(snapshot), blocks)
            self.ledger.drop(snapshot)
        cache.live = list(blocks)
        self._split_state(blocks, cache.block_tables)

    def _split_state(self, blocks: Sequence[int], tables: list[array]) -> list[array]:
        """Deal the blocks of one whole state to the request groups' tables."""
        start = 0
        for group in self.layout.request_groups:
            tables[group.index].extend(blocks[start:start + group.state_blocks])
            start += group.state_blocks
        return tables

    def chunk_end(self, cache: RequestCache, token_count: int, max_chunk: int) -> int:
        """Where the next prefill chunk of a prompt of `token_count` tokens must end: at most `max_chunk` further, and
        not beyond the next boundary at which a snapshot is wanted."""
        end = min(cache.num_tokens + max_chunk, token_count)
        if not self._snapshots:
            return end
        size = self.layout.block_tokens
        period = size * self.config.snapshot_every
        wanted = [count * size for count in (cache.branch, *self._last_boundaries(token_count))]
        wanted.append((cache.num_tokens // period + 1) * period)
        return min((boundary for boundary in wanted if cache.num_tokens < boundary < end), default=end)

    def _last_boundaries(self, tokens: int) -> tuple[int, int]:
        """A prompt's last full boundary, in blocks, for whoever continues it, and for whoever repeats it exactly."""
        return tokens // self.layout.block_tokens, (tokens - 1) // self.layout.block_tokens

    def advance(self, cache: RequestCache, token_ids: Sequence[int]) -> None:
        """The blocks now hold the state of all of `token_ids`: index the blocks that became full, and snapshot the
        request-level state if this is a boundary at which a later request can begin."""
        size = self.layout.block_tokens
        if len(token_ids) > cache.num_blocks * size:
            raise ValueError(f"advance to {len(token_ids)} tokens, but {cache.num_blocks * size} are reserved")
        cache.num_tokens = len(token_ids)
        full, known = len(token_ids) // size, len(cache.keys)
        if not self.config.prefix_cache or not full:
            return
        if full > known:
            cache.keys += chain_keys(cache.keys[-1] if known else self.root, token_ids[known * size:full * size], size)
        while self.layout.token_groups and len(cache.entries) < full:
            self._index_block(cache, len(cache.entries))
        if cache.expected and cache.expected[0] <= full:
            self._publish_expected(cache)
        if self._snapshots and full * size == len(token_ids):
            self._take_snapshot(cache, full)

    def _index_block(self, cache: RequestCache, position: int) -> None:
        """Index a full block; if an equal one is there already, use that and free this one. So a request holds the
        index's own entry of every full block before its tail, which the eviction order rests on."""
        key, tables = cache.keys[position], [cache.block_tables[group.index] for group in self.layout.token_groups]
        own = [table[position] for table in tables]
        entry = self.ledger.blocks.get(key)
        if entry is None:
            entry = self.ledger.insert_block(key, own, (position + 1) * self.layout.block_tokens)
        else:
            self.ledger.hold(entry)
            for table, block in zip(tables, self.ledger.members(entry)):
                table[position] = block
            self.ledger.release(own)
        cache.entries.append(entry)

    def _take_snapshot(self, cache: RequestCache, full: int) -> None:
        """Snapshot the state at `full` blocks if it is wanted: periodically; at a prompt's last boundaries; where it
        departs from an earlier prompt (a prefix that two share, a third may); and while decoding always at the latest
        boundary, in place of the one before."""
        periodic = full % self.config.snapshot_every == 0
        decoding = full * self.layout.block_tokens > cache.prompt_tokens
        if not (periodic or decoding or full in (cache.branch, *self._last_boundaries(cache.prompt_tokens))):
            return
        previous, cache.rolling = self.ledger.snapshots.get(cache.rolling), None
        if previous is not None and self.ledger.refs[previous] == 0:
            self.ledger.remove(previous)
        key = cache.keys[full - 1]
        if key in self.ledger.snapshots:
            return
        blocks = self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return  # no room: this boundary cannot be hit later, and nothing else suffers
        self.pool.copy(cache.live, blocks)
        self.ledger.insert_snapshot(key, blocks, full * self.layout.block_tokens)
        if decoding and not periodic:
            cache.rolling = key

    def close(self, cache: RequestCache) -> None:
        """End a request: its indexed blocks stay as prefix cache; the others are freed, after its last transfer.
        Closing twice is harmless."""
        cache.closed = True
        if cache.transfers or self._requests.pop(id(cache), None) is None:
            return
        if cache.matched_snapshot is not None:
            self.ledger.drop(cache.matched_snapshot)
        for entry in reversed(cache.entries):  # from the tail: see the ledger's eviction policy
            self.ledger.drop(entry)
        self.ledger.release(self._owned(cache))

    def _owned(self, cache: RequestCache) -> list[int]:
        """The blocks that are a request's alone: its tail, its live state, an expected snapshot."""
        owned = [*cache.live, *(cache.expected[1] if cache.expected else ())]
        for group in self.layout.token_groups:
            owned += cache.block_tables[group.index][len(cache.entries):]
        return owned

    def state(self, caches: Sequence[RequestCache]) -> PagedState:
        """What the model reads and writes in one forward pass over these requests."""
        return PagedState(self.pool, [cache.block_tables for cache in caches], [cache.num_tokens for cache in caches])

    # Transfers

    def begin_transfer(self, cache: RequestCache) -> None:
        """Keep the request's blocks, beyond `close` too, until the matching `end_transfer`."""
        if id(cache) not in self._requests:
            raise ValueError("the request is closed; its blocks may be another's already")
        cache.transfers += 1

    def end_transfer(self, cache: RequestCache) -> None:
        """The transfer is acknowledged, or given up."""
        if not cache.transfers:
            raise ValueError("the request has no transfer under way")
        cache.transfers -= 1
        if cache.closed:
            self.close(cache)

    def expect_snapshot(self, cache: RequestCache, num_tokens: int) -> list[array] | None:
        """For the receiver of a prefix, whose live state will be that of a later token: block tables (per group; empty
        for token groups) to write the state at the block boundary `num_tokens` into. `advance` to there or beyond
        indexes it. None when there is no room, or no use for it."""
        full, rest = divmod(num_tokens, self.layout.block_tokens)
        if rest or not full or cache.expected or not self._snapshots:
            return None
        blocks = self.ledger.allocate(self.layout.state_blocks)
        if blocks is None:
            return None
        cache.expected = (full, blocks)
        return self._split_state(blocks, [array("q") for _ in self.layout.groups])

    def forget_snapshot(self, cache: RequestCache) -> None:
        """The expected snapshot did not arrive in time: give its blocks back. Nobody may write into them any more."""
        if cache.expected:
            (_, blocks), cache.expected = cache.expected, None
            self.ledger.release(blocks)

    def snapshot_tables(self, cache: RequestCache, num_tokens: int) -> list[array] | None:
        """For the sender: block tables of the indexed snapshot at the boundary `num_tokens` of this request, if there
        is one. They hold until the manager is called again."""
        full, rest = divmod(num_tokens, self.layout.block_tokens)
        if rest or not 0 < full <= len(cache.keys) or cache.keys[full - 1] not in self.ledger.snapshots:
            return None
        blocks = self.ledger.members(self.ledger.snapshots[cache.keys[full - 1]])
        return self._split_state(blocks, [array("q") for _ in self.layout.groups])

    def _publish_expected(self, cache: RequestCache) -> None:
        (full, blocks), cache.expected = cache.expected, None
        if cache.keys[full - 1] in self.ledger.snapshots:
            self.ledger.release(blocks)
        else:
            self.ledger.insert_snapshot(cache.keys[full - 1], blocks, full * self.layout.block_tokens)

    # The books

    def stats(self) -> CacheStats:
        """Counts of blocks and tokens, now."""
        free, cached, total = len(self.ledger.free), self.ledger.cached, self.config.num_blocks
        transfer = sum(len(self._owned(cache)) for cache in self._requests.values() if cache.closed)
        return CacheStats(total, free, cached, total - free - cached, transfer, self._prompt_tokens, self._hit_tokens,
                          self.ledger.evicted_entries)

    def check(self) -> None:
        """Recount everything (see `BlockLedger.check`). RuntimeError names a violation. Time grows with the pool."""
        requests = self._requests.values()
        holders = Counter(entry for cache in requests for entry in cache.entries)
        holders.update(cache.matched_snapshot for cache in requests if cache.matched_snapshot is not None)
        self.ledger.check([block for cache in requests for block in self._owned(cache)], holders)
