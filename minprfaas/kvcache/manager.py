"""The KVCache manager of one node: block tables, prefix reuse, a request's life, holds. Chapter 06 (paper 3.2).

A block leads one of two lives. A *prefix-cache* block is full, indexed under its chain key, shared by reference count,
and kept after its request until evicted. A *transfer-cache* block (the unaligned tail, the exact-length state) belongs
to one request, is never indexed, and is freed when the request is closed and no stream reads it any more.
This file is about rows of tokens; what is different for request-level state stands in `snapshots.py`.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minprfaas.config import CacheConfig
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.ledger import BlockLedger, chain_keys, root_key
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.kvcache.snapshots import Snapshots


@dataclass(frozen=True)
class CacheStats:
    """Blocks: `free + cached + in_use == total`; `transfer`, a part of `in_use`, only wait for an acknowledgement."""

    total: int
    free: int
    cached: int
    in_use: int
    transfer: int
    evicted_entries: int


class KVCacheManager:
    """Hands out the blocks of one pool. `root` is the model's fingerprint: two models never share a block.

    One thread calls the manager, its `ledger` (the index and its news) and its `snapshots`; other threads may only read
    and write blocks that a request holds, through `pool`.
    """

    def __init__(self, layout: Layout, config: CacheConfig, device: torch.device | str, root: bytes):
        self.layout, self.config, self.root = layout, config, root_key(root)
        self.pool = BlockPool(layout, config.num_blocks, device)
        self.ledger = BlockLedger(config.num_blocks, bool(layout.token_groups), bool(layout.request_groups))
        self.snapshots = Snapshots(layout, config, self.pool, self.ledger)
        self._requests: set[RequestCache] = set()  # the closed ones too while in transfer

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request that the pool can hold by itself, 0 if not even its state fits."""
        rest, groups = self.config.num_blocks - self.layout.state_blocks, len(self.layout.token_groups)
        if rest < 0:
            return 0
        return rest // groups * self.layout.block_tokens if groups else 2**62  # without rows, length costs nothing

    def keys(self, token_ids: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The chain keys of the full blocks of a prompt: what the directory is asked with. `known` are the first ones,
        if the caller has them; they are not computed again."""
        size, previous = self.layout.block_tokens, known[-1] if known else self.root
        return [*known, *chain_keys(previous, token_ids[len(known) * size:], size)]

    def match(self, token_ids: Sequence[int]) -> int:
        """Tokens that `open` would find in the cache now; changes nothing."""
        return self.ledger.match(self._usable(self.keys(token_ids), len(token_ids))) * self.layout.block_tokens

    def _usable(self, keys: list[bytes], num_tokens: int) -> list[bytes]:
        """The keys of the blocks that a prompt may share: at least one token is always left to compute, because an
        answer begins with the logits of the prompt's last token, and those are kept nowhere."""
        return keys[:max(num_tokens - 1, 0) // self.layout.block_tokens] if self.config.prefix_cache else []

    # A request's life

    def open(self, token_ids: Sequence[int], known: Sequence[bytes] = (), to_receive: bool = False) -> RequestCache:
        """Begin a request: attach, and hold, the longest cached prefix at which a prefill can begin, that is full
        blocks and a snapshot at exactly their end. `known` as in `keys`. With `to_receive`, its KVCache comes from
        another node: the longest run of full blocks serves, because the live state crosses in any case."""
        keys = self.keys(token_ids, known)
        usable = self._usable(keys, len(token_ids))
        matched = self.ledger.common(usable) if to_receive else self.ledger.match(usable)
        branch = self.ledger.common(keys) if self.config.prefix_cache else 0
        tokens = matched * self.layout.block_tokens
        cache = RequestCache([array("q") for _ in self.layout.groups], keys, len(token_ids), branch,
                             num_tokens=tokens, cached_tokens=tokens, num_blocks=matched)
        if self.layout.token_groups:
            for key in keys[:matched]:
                entry = self.ledger.blocks[key]
                self.ledger.hold(entry)
                cache.entries.append(entry)
                for group, block in zip(self.layout.token_groups, self.ledger.members(entry)):
                    cache.block_tables[group.index].append(block)
        if matched and self.snapshots.enabled and not to_receive:
            self.snapshots.begin_at(cache, keys[matched - 1])
        self._requests.add(cache)
        return cache

    def reserve(self, cache: RequestCache, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in every group, evicting by policy. False changes nothing."""
        more = self._more_blocks(cache, num_tokens)
        if not more and not self._state_need(cache):  # so it is with most tokens of an answer
            return True
        # All or nothing: half of what a request needs would only be missing elsewhere.
        token_need = more * len(self.layout.token_groups)
        blocks = self.ledger.allocate(token_need + self._state_need(cache))
        if blocks is None and self.snapshots.has_own_origin(cache):
            # No room for the snapshot and a copy of it: its only holder takes the snapshot itself. So a request that
            # fits the pool without its cached prefix fits with it too.
            blocks = self.ledger.allocate(token_need)
        if blocks is None:
            return False
        if self._state_need(cache):
            self.snapshots.begin(cache, blocks[token_need:])
        filled = max(cache.prompt_tokens // self.layout.block_tokens - cache.num_blocks, 0)  # of a group, by the prompt
        for position, group in enumerate(self.layout.token_groups):
            own = blocks[position * more:(position + 1) * more]
            cache.block_tables[group.index].extend(own)
            self.pool.zero(own[filled:])  # attention reads beyond the last token too, masked; what is there may be NaN
        cache.num_blocks += more
        return True

    def _more_blocks(self, cache: RequestCache, num_tokens: int) -> int:
        """Blocks that each token group lacks for `num_tokens` tokens."""
        return max(-(-num_tokens // self.layout.block_tokens) - cache.num_blocks, 0)

    def _state_need(self, cache: RequestCache) -> int:
        return 0 if cache.has_state else self.layout.state_blocks

    def plan_chunk(self, cache: RequestCache, token_count: int, max_chunk: int) -> int:
        """Where the next prefill chunk of a prompt of `token_count` tokens must end, at most `max_chunk` further. What
        the chunk itself leaves of the pool is made ready for the snapshots that the pass is to take on its way."""
        end = min(cache.num_tokens + max_chunk, token_count)
        needed = self._more_blocks(cache, end) * len(self.layout.token_groups) + self._state_need(cache)
        return self.snapshots.plan(cache, end, self.ledger.available - needed)

    def state(self, caches: Sequence[RequestCache], new: Sequence[int] = (), width: int = 0) -> PagedState:
        """What the model reads and writes in one forward pass over `new` tokens of each of these requests, and padding
        up to `width` (0: up to the longest's)."""
        tables = [cache.block_tables for cache in caches]
        planned = [self.snapshots.planned(cache) for cache in caches]
        return PagedState(self.pool, tables, [cache.num_tokens for cache in caches], planned, new, width)

    def advance(self, cache: RequestCache, token_ids: Sequence[int], has_state: bool = True) -> None:
        """The blocks now hold all of `token_ids`, and every planned snapshot up to there its state: index what
        became full, and keep a copy of the live state if this is a boundary at which a later request may begin.
        ValueError when so many tokens were not reserved. Without `has_state` only the rows are there, because a stream
        broke off before the live state came; such a request can only be closed."""
        full, rest = divmod(len(token_ids), self.layout.block_tokens)
        reserved = cache.num_blocks * self.layout.block_tokens
        if len(token_ids) > reserved:
            raise ValueError(f"advance to {len(token_ids)} tokens, but {reserved} are reserved")
        cache.num_tokens = len(token_ids)
        if not self.config.prefix_cache or not cache.is_exact:
            return
        if full > len(cache.keys):
            cache.keys = self.keys(token_ids, cache.keys)
        while self.layout.token_groups and len(cache.entries) < full:
            self._index_block(cache, len(cache.entries))
        self.snapshots.publish(cache, full)
        if has_state and full and not rest:
            self.snapshots.take(cache, full)

    def _index_block(self, cache: RequestCache, position: int) -> None:
        """Index a full block; if an equal one is there already, use that and free this one. So a request holds the
        index's own entry of every full block before its tail, which the eviction order rests on."""
        tables = [cache.block_tables[group.index] for group in self.layout.token_groups]
        own = [table[position] for table in tables]
        entry = self.ledger.blocks.get(cache.keys[position])
        if entry is None:
            entry = self.ledger.insert_block(cache.keys[position], own, (position + 1) * self.layout.block_tokens)
        else:
            self.ledger.hold(entry)
            for table, block in zip(tables, self.ledger.members(entry)):
                table[position] = block
            if cache.holds:  # a sending thread may be reading them by the table that it was given
                cache.replaced += own
            else:
                self.ledger.give_back(own)
        cache.entries.append(entry)

    def close(self, cache: RequestCache) -> None:
        """End a request: indexed blocks stay as prefix cache, others once no stream reads them. Idempotent."""
        cache.closed = True
        if cache.holds or cache not in self._requests:
            return
        self._requests.remove(cache)
        self.snapshots.close(cache)
        for entry in reversed(cache.entries):  # from the tail: see the ledger's eviction policy
            self.ledger.release(entry)
        self.ledger.give_back(self._tail(cache))

    def _tail(self, cache: RequestCache) -> list[int]:
        """Blocks of rows that are a request's alone: not full, not indexed, or replaced under a transfer."""
        tail = list(cache.replaced)
        for group in self.layout.token_groups:
            tail += cache.block_tables[group.index][len(cache.entries):]
        return tail

    # Streams that read a request's blocks

    def hold(self, cache: RequestCache) -> None:
        """Keep the request's blocks, beyond `close` too, until the matching `release`."""
        if cache not in self._requests:
            raise ValueError("the request is closed; its blocks may be another's already")
        cache.holds += 1

    def release(self, cache: RequestCache) -> None:
        """The stream is acknowledged, or given up."""
        if not cache.holds:
            raise ValueError("nothing holds the request's blocks")
        cache.holds -= 1
        if cache.closed:
            self.close(cache)

    # The books

    def stats(self) -> CacheStats:
        """Counts of blocks, now."""
        free, cached, total = len(self.ledger.free), self.ledger.cached, self.config.num_blocks
        transfer = sum(len(self._owned(cache)) for cache in self._requests if cache.closed)
        return CacheStats(total, free, cached, total - free - cached, transfer, self.ledger.evicted_entries)

    def check(self) -> None:
        """Recount everything (see `BlockLedger.check`). RuntimeError names a violation. Time grows with the pool."""
        holders, owned = Counter(), self.snapshots.expected_blocks
        for cache in self._requests:
            holders.update(cache.entries)
            holders.update(cache.snapshots)
            owned += self._owned(cache)
        self.ledger.check(owned, holders)

    def _owned(self, cache: RequestCache) -> list[int]:
        return self._tail(cache) + self.snapshots.owned(cache)
