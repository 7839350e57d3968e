"""The KVCache manager of one node: requests' block tables, prefix reuse, snapshots, transfers. Chapter 06 (paper 3.2).

A block leads one of two lives. A *prefix-cache* block is full, indexed under its chain key, shared by reference count,
and kept after its request until evicted. A *transfer-cache* block (the unaligned tail, the exact-length state) belongs
to one request, is never indexed, and is freed when the request is closed and its last transfer acknowledged.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from minprfaas.config import CacheConfig
from minprfaas.kvcache.layout import KVGroup, Layout
from minprfaas.kvcache.ledger import BlockLedger, OnEvent, chain_keys, root_key
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool


@dataclass(eq=False)
class RequestCache:
    """One request's hold on the pool. `block_tables[group]`: block ids in token order, or of the live state."""

    block_tables: list[array]
    prompt_tokens: int
    keys: list[bytes]  # of the full blocks, as far as they are known
    num_tokens: int = 0  # tokens whose state the blocks hold
    cached_tokens: int = 0  # of these, found in the cache at `open`
    indexed: int = 0  # leading blocks that are entries of the index, held by this request
    matched_snapshot: int | None = None  # entry to start from, until `reserve` has copied it
    newest_snapshot: bytes | None = None  # key of the longest snapshot that this request took or used
    rolling: bool = False  # whether that one is replaced at the next boundary (decode)
    expected: tuple[int, list[int]] | None = None  # (blocks, ids) of a snapshot whose bytes arrive from elsewhere
    transfers: int = 0
    closed: bool = False


@dataclass(frozen=True)
class CacheStats:
    """Blocks: `free + cached + in_use == total`; `transfer` of those in use only wait for an acknowledgement."""

    total: int
    free: int
    cached: int
    in_use: int
    transfer: int
    prompt_tokens: int  # of all requests opened
    hit_tokens: int  # of these, found in the cache
    evicted_entries: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class _Counts:
    prompt_tokens: int = 0
    hit_tokens: int = 0


class KVCacheManager:
    """Hands out the blocks of one pool. `root` is the model's fingerprint: two models never share a block.

    `on_event("stored" | "evicted", key, tokens)` tells at which chain keys a match can end. One thread calls the
    manager; other threads may only write into reserved blocks, through `pool`.
    """

    def __init__(self, layout: Layout, config: CacheConfig, device: torch.device | str, root: bytes,
                 on_event: OnEvent | None = None):
        self.layout, self.config = layout, config
        self.pool = BlockPool(layout, config.num_blocks, device)
        self.ledger = BlockLedger(config.num_blocks, bool(layout.token_groups), bool(layout.request_groups), on_event)
        self.root = root_key(root)
        self._open: dict[int, RequestCache] = {}  # by identity; also the closed ones in transfer
        self._counts = _Counts()

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request that the pool can hold by itself, 0 if not even its state fits."""
        rest = self.config.num_blocks - self.layout.state_blocks
        if not self.layout.token_groups:
            return 0 if rest < 0 else 2**63 - 1
        return max(rest, 0) // len(self.layout.token_groups) * self.layout.block_tokens

    # --- a request's life --------------------------------------------------------------------------------------------

    def keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """The chain keys of the full blocks of a prompt: what the directory is asked with."""
        return chain_keys(self.root, token_ids, self.layout.block_tokens)

    def match(self, token_ids: Sequence[int]) -> int:
        """Tokens that `open` would find in the cache now; changes nothing."""
        return self._match(self.keys(token_ids), len(token_ids)) * self.layout.block_tokens

    def open(self, token_ids: Sequence[int]) -> RequestCache:
        """Begin a request: attach the longest cached prefix that leaves at least one token to compute."""
        keys = self.keys(token_ids) if self.config.prefix_cache else []
        matched = self._match(keys, len(token_ids))
        cache = RequestCache([array("q") for _ in self.layout.groups], len(token_ids), keys, indexed=matched)
        if self.layout.token_groups:
            for key in keys[:matched]:
                self._attach(cache, self.ledger.blocks[key])
        if matched and self.layout.request_groups:
            cache.newest_snapshot = keys[matched - 1]
            cache.matched_snapshot = self.ledger.snapshots[cache.newest_snapshot]
            self.ledger.hold(cache.matched_snapshot)
        cache.num_tokens = cache.cached_tokens = matched * self.layout.block_tokens
        self._counts.prompt_tokens += len(token_ids)
        self._counts.hit_tokens += cache.cached_tokens
        self._open[id(cache)] = cache
        return cache

    def reserve(self, cache: RequestCache, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in every group, evicting by policy. False changes nothing."""
        have = len(cache.block_tables[self.layout.token_groups[0].index]) if self.layout.token_groups else 0
        more = max(-(-num_tokens // self.layout.block_tokens) - have, 0) if self.layout.token_groups else 0
        needs_state = any(not cache.block_tables[group.index] for group in self.layout.request_groups)
        tokens_need, state_need = more * len(self.layout.token_groups), self.layout.state_blocks if needs_state else 0

        blocks = self.ledger.allocate(tokens_need + state_need)
        if blocks is not None:
            state = blocks[tokens_need:]
            if state and cache.matched_snapshot is not None:
                self.pool.copy(self.ledger.members(cache.matched_snapshot), state)
                self.ledger.drop(cache.matched_snapshot)
        else:
            # A pool with no room for the snapshot and a copy of it: the only holder takes the snapshot itself, so that
            # a request that fits the pool without its cached prefix fits with it too.
            snapshot = cache.matched_snapshot
            if not state_need or snapshot is None or self.ledger.refs[snapshot] != 1:
                return False
            blocks = self.ledger.allocate(tokens_need)
            if blocks is None:
                return False
            state, cache.newest_snapshot = self.ledger.forget(snapshot), None

        fresh = blocks[:tokens_need]
        self.pool.zero(fresh)
        for position, group in enumerate(self.layout.token_groups):
            cache.block_tables[group.index].extend(fresh[position * more:(position + 1) * more])
        if state_need:
            cache.matched_snapshot = None
            for group, ids in self._split_state(state):
                cache.block_tables[group.index].extend(ids)
        return True

    def chunk_end(self, cache: RequestCache, token_count: int, max_chunk: int) -> int:
        """Where the next prefill chunk of a prompt of `token_count` tokens must end: at most `max_chunk` further, and
        not beyond the next boundary at which a snapshot is wanted."""
        end = min(cache.num_tokens + max_chunk, token_count)
        if not (self.config.prefix_cache and self.layout.request_groups):
            return end
        size = self.layout.block_tokens
        period = size * self.config.snapshot_every
        periodic = (cache.num_tokens // period + 1) * period
        boundaries = (periodic, token_count // size * size, (token_count - 1) // size * size)
        return min((boundary for boundary in boundaries if cache.num_tokens < boundary < end), default=end)

    def advance(self, cache: RequestCache, token_ids: Sequence[int]) -> None:
        """The blocks now hold the state of all of `token_ids`: index the blocks that became full, and snapshot the
        request-level state if this is a boundary at which a later request can begin."""
        size = self.layout.block_tokens
        if self.layout.token_groups:
            room = len(cache.block_tables[self.layout.token_groups[0].index]) * size
            if len(token_ids) > room:
                raise ValueError(f"advance to {len(token_ids)} tokens, but {room} are reserved")
        cache.num_tokens = len(token_ids)
        if not self.config.prefix_cache:
            return
        full = len(token_ids) // size
        known = len(cache.keys)
        if full > known:
            cache.keys += chain_keys(cache.keys[-1] if known else self.root, token_ids[known * size:full * size], size)
        while cache.indexed < full:
            if self.layout.token_groups:
                self._index_block(cache, cache.indexed)
            cache.indexed += 1
        if self.layout.request_groups:
            self._publish_expected(cache)
            if full and full * size == len(token_ids):
                self._take_snapshot(cache, full)

    def close(self, cache: RequestCache) -> None:
        """End a request: its indexed blocks stay as prefix cache, the others are freed, or wait for the end of its
        transfers. Closing twice is harmless."""
        if not cache.closed:
            cache.closed = True
            self._release_if_done(cache)

    def begin_transfer(self, cache: RequestCache) -> None:
        """Keep the request's blocks, also beyond `close`, until the matching `end_transfer`."""
        if id(cache) not in self._open:
            raise ValueError("the request is closed; its blocks may be another's already")
        cache.transfers += 1

    def end_transfer(self, cache: RequestCache) -> None:
        """The transfer is acknowledged, or given up."""
        if not cache.transfers:
            raise ValueError("the request has no transfer under way")
        cache.transfers -= 1
        self._release_if_done(cache)

    def expect_snapshot(self, cache: RequestCache, num_tokens: int) -> list[array] | None:
        """Tables (per group, as in `block_tables`; empty for token groups) to write the state at the block boundary
        `num_tokens` into; `advance` to that length or beyond indexes it. For the receiver of a prefix, whose live state
        is that of a later token. None when there is no room, or no use."""
        blocks, rest = divmod(num_tokens, self.layout.block_tokens)
        if rest or not blocks or cache.expected or not (self.config.prefix_cache and self.layout.request_groups):
            return None
        ids = self.ledger.allocate(self.layout.state_blocks)
        if ids is None:
            return None
        cache.expected = (blocks, ids)
        tables = [array("q") for _ in self.layout.groups]
        for group, part in self._split_state(ids):
            tables[group.index].extend(part)
        return tables

    def state(self, caches: Sequence[RequestCache]) -> PagedState:
        """What the model reads and writes in one forward pass over these requests."""
        return PagedState(self.pool, [cache.block_tables for cache in caches], [cache.num_tokens for cache in caches])

    # --- inside ------------------------------------------------------------------------------------------------------

    def _match(self, keys: list[bytes], num_tokens: int) -> int:
        if not self.config.prefix_cache:
            return 0
        return self.ledger.match(keys[:max(num_tokens - 1, 0) // self.layout.block_tokens])

    def _attach(self, cache: RequestCache, entry: int) -> None:
        self.ledger.hold(entry)
        for group, block in zip(self.layout.token_groups, self.ledger.members(entry)):
            cache.block_tables[group.index].append(block)

    def _index_block(self, cache: RequestCache, position: int) -> None:
        """Enter a full block; if an equal one is there already, use that and free this one. So a request holds the
        index's own entry of every full block before its tail, which the eviction order rests on."""
        key = cache.keys[position]
        tables = [cache.block_tables[group.index] for group in self.layout.token_groups]
        own = [table[position] for table in tables]
        entry = self.ledger.blocks.get(key)
        if entry is None:
            self.ledger.insert(self.ledger.blocks, key, own, (position + 1) * self.layout.block_tokens)
            return
        self.ledger.hold(entry)
        for table, block in zip(tables, self.ledger.members(entry)):
            table[position] = block
        self.ledger.release(own)

    def _take_snapshot(self, cache: RequestCache, full: int) -> None:
        """Snapshot the state at `full` blocks if it is wanted: periodically, at a prompt's last boundary, and while
        decoding always the latest boundary, in place of the one before."""
        size = self.layout.block_tokens
        periodic = full % self.config.snapshot_every == 0
        decoding = full * size > cache.prompt_tokens
        if not (periodic or decoding or full in (cache.prompt_tokens // size, (cache.prompt_tokens - 1) // size)):
            return
        key, previous = cache.keys[full - 1], self.ledger.snapshots.get(cache.newest_snapshot)
        if cache.rolling and previous is not None and self.ledger.refs[previous] == 0:
            self.ledger.remove(previous)
        cache.newest_snapshot, cache.rolling = key, False
        if key in self.ledger.snapshots:
            return
        ids = self.ledger.allocate(self.layout.state_blocks)
        if ids is None:
            return  # no room: this boundary cannot be hit later, and nothing else suffers
        live = [block for group in self.layout.request_groups for block in cache.block_tables[group.index]]
        self.pool.copy(live, ids)
        self.ledger.drop(self.ledger.insert(self.ledger.snapshots, key, ids, full * size))
        cache.rolling = decoding and not periodic

    def _publish_expected(self, cache: RequestCache) -> None:
        if cache.expected is None or cache.expected[0] > cache.indexed:
            return
        (blocks, ids), cache.expected = cache.expected, None
        key = cache.keys[blocks - 1]
        if key in self.ledger.snapshots:
            self.ledger.release(ids)
        else:
            self.ledger.drop(self.ledger.insert(self.ledger.snapshots, key, ids, blocks * self.layout.block_tokens))
        cache.newest_snapshot = key

    def _split_state(self, ids: Sequence[int]) -> list[tuple[KVGroup, Sequence[int]]]:
        """The blocks of one whole state, group by group."""
        parts, start = [], 0
        for group in self.layout.request_groups:
            parts.append((group, ids[start:start + group.state_blocks]))
            start += group.state_blocks
        return parts

    def _release_if_done(self, cache: RequestCache) -> None:
        if not cache.closed or cache.transfers or id(cache) not in self._open:
            return
        del self._open[id(cache)]
        for entry in reversed(self._held(cache)):  # from the tail: see the ledger's eviction policy
            self.ledger.drop(entry)
        self.ledger.release(self._owned(cache))
        newest = self.ledger.snapshots.get(cache.newest_snapshot)
        if newest is not None:  # where the next turn will begin: it must not be older than its blocks
            self.ledger.hold(newest)
            self.ledger.drop(newest)

    def _held(self, cache: RequestCache) -> list[int]:
        """The index entries that a request holds, in token order."""
        held = list(cache.block_tables[self.layout.token_groups[0].index][:cache.indexed]) \
            if self.layout.token_groups else []
        return held if cache.matched_snapshot is None else [*held, cache.matched_snapshot]

    def _owned(self, cache: RequestCache) -> list[int]:
        """The blocks that are a request's alone: its tail, its live state, an expected snapshot."""
        owned = list(cache.expected[1]) if cache.expected else []
        for group in self.layout.groups:
            owned += cache.block_tables[group.index][cache.indexed if group.per_token else 0:]
        return owned

    # --- the books ---------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Counts of blocks and tokens, now."""
        free, cached, total = len(self.ledger.free), self.ledger.cached, self.config.num_blocks
        transfer = sum(len(self._owned(cache)) for cache in self._open.values() if cache.closed)
        return CacheStats(total, free, cached, total - free - cached, transfer, self._counts.prompt_tokens,
                          self._counts.hit_tokens, self.ledger.evicted_entries)

    def check(self) -> None:
        """Recount everything: each block in exactly one place, every reference count exact, no snapshot without its
        block. Raises RuntimeError that names the violation. Takes time in proportion to the pool."""
        ledger = self.ledger
        lives: dict[int, str] = {}

        def claim(blocks: Sequence[int], life: str) -> None:
            for block in blocks:
                if block in lives:
                    raise RuntimeError(f"block {block} leads two lives: {lives[block]} and {life}")
                lives[block] = life

        claim(ledger.free, "free")
        entries = [*ledger.blocks.values(), *ledger.snapshots.values()]
        for entry in entries:
            claim(ledger.members(entry), "cached" if ledger.refs[entry] == 0 else "in use")
        for cache in self._open.values():
            claim(self._owned(cache), "owned")
        missing = set(range(self.config.num_blocks)) - set(lives)
        if missing:
            raise RuntimeError(f"{len(missing)} blocks leaked, among them {min(missing)}")

        holders = Counter(entry for cache in self._open.values() for entry in self._held(cache))
        for entry in entries:
            if holders[entry] != ledger.refs[entry]:
                raise RuntimeError(f"entry {entry} counts {ledger.refs[entry]} holders and has {holders[entry]}")
        unheld = ledger.unheld()
        if set(unheld) != {entry for entry in entries if ledger.refs[entry] == 0} or len(set(unheld)) != len(unheld):
            raise RuntimeError("the eviction order and the index disagree on which entries nobody holds")
        if ledger.cached != sum(len(ledger.members(entry)) for entry in unheld):
            raise RuntimeError(f"the ledger counts {ledger.cached} cached blocks, the index holds otherwise")
        if ledger.has_tokens:
            orphans = set(ledger.snapshots) - set(ledger.blocks)
            if orphans:
                raise RuntimeError(f"{len(orphans)} snapshots have lost the block that they end at")
