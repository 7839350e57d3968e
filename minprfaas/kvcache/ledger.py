"""Who holds each block: free list, prefix index, reference counts and the one eviction order. Chapter 06 (paper 3.2).

Pure bookkeeping, no tensors. An indexed *entry* is either a full block of tokens (one block in every token group) or a
snapshot of all request-level state; it is named by its first block's id, so the books are flat arrays over blocks.

Eviction policy, for entries that nobody holds:
1. The least recently used goes first. A holder lets go of a prefix from its tail, so of one prefix the later block is
   always the older entry: a prefix shrinks from its tail and is never cut in the middle.
2. A snapshot without the block that it ends at can never be matched again, so it leaves with that block. It becomes as
   recent as its block when that is let go of, so that what is left of a prefix can still be begun from.
"""

import hashlib
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEY_BYTES = 32  # a collision must not be able to hand one prompt another's state: 128 bits of collision resistance


@dataclass(frozen=True)
class PrefixNews:
    """A request can begin after the `tokens` tokens that end at the block of this chain key; 0: it no longer can."""

    key: bytes
    tokens: int


def chain_keys(previous: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of the full blocks of `token_ids`, chained over `previous` (the last key before them, or the root). A token
    is 8 little-endian bytes, so no two token lists encode alike. Raises ValueError on a token beyond 64 bits.

    >>> one, other = (chain_keys(root_key(b"model"), tokens, 2) for tokens in ([1, 2, 3, 4], [1, 2, 3, 5, 6]))
    >>> one[0] == other[0], one[1] == other[1]  # equal up to where they part; a block that is not full has no key
    (True, False)
    """
    full = len(token_ids) // block_tokens * block_tokens
    try:
        data = memoryview(struct.pack(f"<{full}q", *token_ids[:full]))
    except struct.error:
        raise ValueError(f"token ids from {min(token_ids)} to {max(token_ids)} do not fit 64 bits") from None
    keys, size = [], 8 * block_tokens
    for start in range(0, len(data), size):
        digest = hashlib.blake2b(previous, digest_size=KEY_BYTES)
        digest.update(data[start:start + size])
        previous = digest.digest()
        keys.append(previous)
    return keys


def root_key(fingerprint: bytes) -> bytes:
    """The key that a model's chains begin with; `fingerprint` may have any length."""
    return hashlib.blake2b(fingerprint, digest_size=KEY_BYTES).digest()


class BlockLedger:
    """The books over `num_blocks` blocks. `has_tokens`, `has_state`: what a match needs, full blocks and snapshots."""

    def __init__(self, num_blocks: int, has_tokens: bool, has_state: bool):
        self.num_blocks, self.has_tokens, self.has_state = num_blocks, has_tokens, has_state
        self.free = list(range(num_blocks - 1, -1, -1))  # a stack: what was freed last is taken first
        self.cached = 0  # blocks of entries that nobody holds
        self.evicted_entries = 0
        self.blocks: dict[bytes, int] = {}  # key -> entry
        self.snapshots: dict[bytes, int] = {}
        self.refs = array("i", bytes(4 * num_blocks))  # holders of the entry that begins at this block
        self._keys: list[bytes | None] = [None] * num_blocks
        self._tokens = array("i", bytes(4 * num_blocks))
        self._members: dict[int, tuple[int, ...]] = {}  # only of entries of more than one block
        self._unheld: OrderedDict[int, None] = OrderedDict()  # entries that nobody holds, oldest to newest
        self._hit_points = self.snapshots if has_state else self.blocks  # where a match can end
        self.news: list[PrefixNews] | None = None  # None until somebody watches: what nobody takes would only grow

    @property
    def available(self) -> int:
        """How many blocks `allocate` could give now."""
        return len(self.free) + self.cached

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting as many entries as that needs; None, and no change, if there are too few."""
        if count > self.available:
            return None
        while len(self.free) < count:
            self.evicted_entries += 1
            self.remove(next(iter(self._unheld)))
        cut = len(self.free) - count
        taken = self.free[cut:]
        del self.free[cut:]
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Give back blocks that are in no entry."""
        self.free.extend(blocks)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of `keys` can be reused: all their blocks, and a snapshot at exactly their end."""
        length = self.common(keys) if self.has_tokens else len(keys)
        if self.has_state:
            while length and keys[length - 1] not in self.snapshots:
                length -= 1
        return length

    def common(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of `keys` are there, whether or not a snapshot lets a request begin at their end."""
        return next((count for count, key in enumerate(keys) if key not in self.blocks), len(keys))

    def inventory(self) -> list[PrefixNews]:
        """Every prefix at which a request can begin now: what the news so far add up to."""
        return [PrefixNews(key, self._tokens[entry]) for key, entry in self._hit_points.items()]

    def take_news(self) -> list[PrefixNews]:
        """What `inventory` gained and lost since the last call, oldest first; the first call only begins to watch."""
        news, self.news = self.news, []
        return news or []

    def _note(self, index: dict[bytes, int], key: bytes, tokens: int) -> None:
        if self.news is not None and index is self._hit_points:
            self.news.append(PrefixNews(key, tokens))

    # Entries

    def insert_block(self, key: bytes, members: Sequence[int], tokens: int) -> int:
        """Index a full block, held once. Its holder must hold the entry of the block before it too: the eviction order
        rests on that. Returns the entry."""
        return self._insert(self.blocks, key, members, tokens)

    def insert_snapshot(self, key: bytes, members: Sequence[int], tokens: int) -> None:
        """Index a snapshot, unheld and most recently used."""
        self.release(self._insert(self.snapshots, key, members, tokens))

    def _insert(self, index: dict[bytes, int], key: bytes, members: Sequence[int], tokens: int) -> int:
        entry = members[0]
        index[key] = entry
        self._keys[entry], self.refs[entry], self._tokens[entry] = key, 1, tokens
        if len(members) > 1:
            self._members[entry] = tuple(members)
        self._note(index, key, tokens)
        return entry

    def members(self, entry: int) -> tuple[int, ...]:
        """The blocks of an entry, in the order in which they were entered."""
        return self._members.get(entry, (entry,))

    def hold(self, entry: int) -> None:
        """One holder more; a held entry is not evicted."""
        if self.refs[entry] == 0:
            self._unlink(entry)
        self.refs[entry] += 1

    def release(self, entry: int) -> None:
        """One holder less; the last one leaves the entry, and a snapshot at its end, as the most recently used."""
        self.refs[entry] -= 1
        if self.refs[entry]:
            return
        self._link(entry)
        snapshot = self.snapshots.get(self._keys[entry], entry)
        if self.refs[snapshot] == 0:
            self._unheld.move_to_end(snapshot)

    def remove(self, entry: int) -> None:
        """Take an unheld entry out of the index and free its blocks."""
        self._unlink(entry)
        self.give_back(self.forget(entry))

    def forget(self, entry: int) -> tuple[int, ...]:
        """Take an entry out of the index, and the snapshot at its end too; its own blocks are now the caller's."""
        key, members = self._keys[entry], self.members(entry)
        self._members.pop(entry, None)
        self._keys[entry], self.refs[entry] = None, 0
        index = self.snapshots if self.snapshots.get(key) == entry else self.blocks
        del index[key]
        self._note(index, key, 0)
        if index is self.blocks and key in self.snapshots:
            self.remove(self.snapshots[key])  # unheld: whoever holds a snapshot holds the blocks before it
        return members

    def _link(self, entry: int) -> None:
        self._unheld[entry] = None
        self.cached += len(self.members(entry))

    def _unlink(self, entry: int) -> None:
        del self._unheld[entry]
        self.cached -= len(self.members(entry))

    # The audit

    def check(self, owned: Sequence[int], holders: Counter) -> None:
        """Recount everything, given the blocks in no entry that requests own and how many requests hold each entry:
        every block in exactly one place, every reference count exact. Raises RuntimeError that names the violation."""
        lives: dict[int, str] = {}
        entries = [*self.blocks.values(), *self.snapshots.values()]
        indexed = [block for entry in entries for block in self.members(entry)]
        for life, blocks in (("free", self.free), ("owned", owned), ("indexed", indexed)):
            for block in blocks:
                if block in lives:
                    raise RuntimeError(f"block {block} leads two lives: {lives[block]} and {life}")
                lives[block] = life
        if len(lives) != self.num_blocks:
            raise RuntimeError(f"of {self.num_blocks} blocks, {self.num_blocks - len(lives)} leaked")
        for entry in entries:
            if holders[entry] != self.refs[entry]:
                raise RuntimeError(f"entry {entry} counts {self.refs[entry]} holders and has {holders[entry]}")
        if self._unheld.keys() != {entry for entry in entries if not self.refs[entry]}:
            raise RuntimeError("the eviction order and the index disagree on which entries nobody holds")
        if self.cached != sum(len(self.members(entry)) for entry in self._unheld):
            raise RuntimeError(f"{self.cached} blocks are counted as cached; the unheld entries have another number")
        if self.has_tokens and not self.snapshots.keys() <= self.blocks.keys():
            raise RuntimeError("a snapshot has lost the block that it ends at")
