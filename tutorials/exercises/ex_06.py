"""The exercises of chapter 06. Fill in the functions, then: python tutorials/06_hybrid_prefix_cache.py --check 1"""

from collections.abc import Sequence

from exercises.checking import first_wrong

from minprfaas.kvcache import ledger as package
from minprfaas.kvcache.ledger import BlockLedger, root_key


def chain_keys(root: bytes, token_ids: list[int], block_tokens: int) -> list[bytes]:
    """The keys of the full blocks of a prompt: each is the BLAKE2b hash, of 32 bytes, of the key before it (the first:
    of `root`) and the block's tokens, 8 little-endian bytes each."""
    raise NotImplementedError


def reusable_blocks(keys: Sequence[str], blocks: set[str], snapshots: set[str]) -> int:
    """How many leading blocks of a prompt with these `keys` a hybrid model can begin after: all of them must be in
    `blocks`, and at their end there must be a snapshot."""
    raise NotImplementedError


def still_cached(prompts: Sequence[str], capacity: int) -> set[str]:
    """Which keys are cached after these prompts, in a pool of `capacity` blocks. A prompt's letters are the keys of its
    blocks, one each. It takes them from the first to the last: one that is cached is used, one that is not needs a
    free block; if there is none, the least recently used block goes that this prompt does not use itself. Then it lets
    go of its blocks from the last to the first, so that of one prompt the last is the least recently used. No prompt
    is longer than the pool."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's chain."""
    cases = [(root_key(b"a"), [*range(10)], 4), (root_key(b"b"), [*range(10)], 4), (root_key(b"a"), [1, 2, 3], 4),
             (root_key(b"a"), [7, *range(1, 10)], 4), (root_key(b"a"), [-1, 2**40] * 8, 8), (root_key(b"a"), [], 4)]
    return first_wrong(chain_keys, [(case, package.chain_keys(*case)) for case in cases])


def check_2() -> str | None:
    """Against the package's ledger."""

    def expected(keys: str, blocks: set[str], snapshots: set[str]) -> int:
        ledger = BlockLedger(2 * len(blocks) + len(snapshots) + 1, has_tokens=True, has_state=True)
        for place, key in enumerate(sorted(blocks), 1):
            ledger.insert_block(key, ledger.allocate(1), place)
        for place, key in enumerate(sorted(snapshots), 1):
            ledger.insert_snapshot(key, ledger.allocate(1), place)
        return ledger.match(keys)

    cases = [("abcdef", {*"abcdef"}, {"f"}), ("abcdef", {*"abcdef"}, {"d"}), ("abcdef", {*"abcd"}, {"b", "f"}),
             ("abcdef", {*"abdef"}, {"b", "f"}), ("abcdef", {*"bcdef"}, {"f"}), ("abcdef", {*"abc"}, set())]
    return first_wrong(reusable_blocks, [(case, expected(*case)) for case in cases])


def check_3() -> str | None:
    """Against the package's ledger and its one eviction order."""

    def expected(prompts: list[str], capacity: int) -> set[str]:
        ledger = BlockLedger(capacity, has_tokens=True, has_state=False)
        for keys in prompts:
            held = []
            for count, key in enumerate(keys, 1):
                entry = ledger.blocks.get(key)
                if entry is None:
                    entry = ledger.insert_block(key, ledger.allocate(1), count)
                else:
                    ledger.hold(entry)
                held.append(entry)
            for entry in reversed(held):
                ledger.release(entry)
        return {*ledger.blocks}

    cases = [(["abcd", "xy"], 5), (["abcd", "xy", "abz"], 5), (["abc", "abd", "abe"], 4),
             (["abc", "xyz", "abc", "q"], 6), (["ab", "cd", "ef", "ab", "gh"], 6), (["abcd", "efgh"], 4)]
    return first_wrong(still_cached, [(case, expected(*case)) for case in cases])
