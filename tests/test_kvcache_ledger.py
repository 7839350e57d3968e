"""The ledger: chain keys, prefix index, reference counts, and one order in which blocks are evicted. Chapter 06."""

import hashlib
import random
import tracemalloc
from collections import Counter

import pytest

from kvcache_helpers import hear
from minprfaas.kvcache.ledger import BlockLedger, chain_keys, root_key

ROOT = root_key(b"model")


def use(ledger, keys, hold=False):
    """What a request does with a prompt's blocks: hold those that are there, enter the others, let go from the tail."""
    held = []
    for count, key in enumerate(keys, 1):
        if key in ledger.blocks:
            ledger.hold(ledger.blocks[key])
            held.append(ledger.blocks[key])
        else:
            held.append(ledger.insert_block(key, ledger.allocate(1), count))
    if hold:
        return held
    for entry in reversed(held):
        ledger.release(entry)


def names(text):
    return [text[:end].encode() for end in range(1, len(text) + 1)]  # a key a prefix, as a chain has


def test_keys_are_chained_so_equal_blocks_after_unequal_prefixes_differ():
    first, second = chain_keys(ROOT, [1, 2, 3, 4, 9, 9], 2), chain_keys(ROOT, [1, 2, 3, 5, 9, 9], 2)
    assert first[0] == second[0]
    assert len({*first, *second}) == 5
    assert chain_keys(first[0], [3, 4, 9, 9], 2) == first[1:]


def test_a_key_is_the_hash_of_the_key_before_and_of_the_tokens_as_eight_bytes_each():
    """On any machine: nodes compare what they hold by these."""
    data = ROOT + b"".join(token.to_bytes(8, "little", signed=True) for token in (1, 256, -2))
    assert chain_keys(ROOT, [1, 256, -2], 3) == [hashlib.blake2b(data, digest_size=32).digest()]
    assert ROOT == hashlib.blake2b(b"model", digest_size=32).digest()


def test_a_partly_filled_block_has_no_key():
    assert len(chain_keys(ROOT, list(range(7)), 4)) == 1
    assert chain_keys(ROOT, [1, 2, 3], 4) == []


def test_another_model_has_other_keys_for_the_same_tokens():
    assert not set(chain_keys(ROOT, range(64), 4)) & set(chain_keys(root_key(b"other"), range(64), 4))


def test_token_lists_whose_bytes_could_be_mistaken_for_each_other_have_different_keys():
    lists = [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [256, 0, 0, 0], [1, 0, 0, 0], [1 << 32, 0, 0, 0],
             [1 << 56, 0, 0, 0], [-1, 0, 0, 0], [(1 << 63) - 1, 0, 0, 0], [-(1 << 63), 0, 0, 0], [12, 3, 0, 0],
             [1, 23, 0, 0], [123, 0, 0, 0], [0x3031, 0, 0, 0], [0x30, 0x31, 0, 0]]
    assert len({chain_keys(ROOT, tokens, 4)[0] for tokens in lists}) == len(lists)
    assert len({key for size in (1, 2, 4) for key in chain_keys(ROOT, [0, 0, 0, 0], size)}) == 7


@pytest.mark.parametrize("token", [1 << 63, -(1 << 63) - 1, 1 << 100])
def test_a_token_beyond_64_bits_is_refused_not_wrapped(token):
    with pytest.raises(ValueError, match="64 bits"):
        chain_keys(ROOT, [token], 1)


def test_a_match_ends_at_the_first_block_that_is_not_there():
    ledger = BlockLedger(8, has_tokens=True, has_state=False)
    use(ledger, names("abcd"))
    assert ledger.match(names("abcd")) == 4
    assert ledger.match(names("abxd")) == ledger.common(names("abxd")) == 2
    assert ledger.match(names("xbcd")) == 0


def test_a_hybrid_match_ends_at_the_longest_snapshot_whose_blocks_are_all_there():
    ledger = BlockLedger(16, has_tokens=True, has_state=True)
    use(ledger, names("abcdef"))
    assert ledger.match(names("abcdef")) == 0
    for prefix in ("ab", "abcd"):
        ledger.insert_snapshot(prefix.encode(), ledger.allocate(2), len(prefix))
    for text, length in {"a": 0, "ab": 2, "abc": 2, "abcd": 4, "abcdef": 4, "abx": 2, "abcx": 2}.items():
        assert ledger.match(names(text)) == length
    assert ledger.common(names("abcdef")) == 6


def test_a_model_of_linear_layers_only_matches_by_snapshots_alone():
    ledger = BlockLedger(4, has_tokens=False, has_state=True)
    ledger.insert_snapshot(b"abc", ledger.allocate(2), 3)
    assert ledger.match(names("abcd")) == 3 and ledger.match(names("abxd")) == 0


def test_the_least_recently_used_prefix_goes_first_and_from_its_tail():
    ledger = BlockLedger(6, has_tokens=True, has_state=False)
    use(ledger, names("abc"))
    use(ledger, names("xyz"))
    use(ledger, names("a"))  # "a" is now the newest of all
    lengths = []
    for _ in range(6):
        ledger.allocate(1)
        lengths.append((ledger.match(names("abc")), ledger.match(names("xyz"))))
    assert lengths == [(2, 3), (1, 3), (1, 2), (1, 1), (1, 0), (0, 0)]


def test_a_held_prefix_is_never_evicted_and_too_large_a_demand_changes_nothing():
    ledger = BlockLedger(6, has_tokens=True, has_state=False)
    use(ledger, names("abc"), hold=True)
    use(ledger, names("xy"))
    assert ledger.allocate(4) is None
    assert ledger.match(names("abc")) == 3 and ledger.match(names("xy")) == 2
    assert sorted(ledger.allocate(3)) == sorted(set(range(6)) - {ledger.blocks[key] for key in names("abc")})
    assert ledger.match(names("abc")) == 3 and ledger.match(names("xy")) == 0


def test_a_snapshot_leaves_with_the_block_that_it_ends_at():
    ledger = BlockLedger(5, has_tokens=True, has_state=True)
    use(ledger, names("abc"))
    ledger.insert_snapshot(b"abc", ledger.allocate(2), 3)  # the newest entry of all
    ledger.allocate(1)  # evicts the tail "c"
    assert b"abc" not in ledger.snapshots and ledger.match(names("abc")) == 0
    assert len(ledger.free) == 2  # its blocks are free at once


def test_the_news_add_up_to_what_can_be_hit():
    rng = random.Random(0)
    for has_state in (False, True):
        told, ledger = {}, BlockLedger(24, True, has_state)
        ledger.news = []
        for _ in range(500):
            keys = names("".join(rng.choice("ab") for _ in range(6)))
            use(ledger, keys)
            if has_state and keys[-1] not in ledger.snapshots:
                ledger.insert_snapshot(keys[-1], ledger.allocate(2), 6)
            hear(told, ledger.news)
            ledger.news.clear()
            assert told == {news.key: news.tokens for news in ledger.inventory()}
        assert ledger.evicted_entries > 100


def test_an_entry_costs_less_than_300_bytes():
    tracemalloc.start()
    ledger = BlockLedger(50_000, has_tokens=True, has_state=False)
    for number in range(50_000):
        ledger.release(ledger.insert_block(root_key(number.to_bytes(4, "big")), ledger.allocate(1), number))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(ledger.blocks) == 50_000 and used < 300 * 50_000


@pytest.mark.parametrize("damage, complaint", [
    (lambda ledger: ledger.free.append(ledger.blocks[b"ab"]), "two lives"),
    (lambda ledger: ledger.free.pop(), "leaked"),
    (lambda ledger: ledger.refs.__setitem__(ledger.blocks[b"ab"], 1), "holders"),
    (lambda ledger: ledger._unlink(ledger.blocks[b"ab"]), "eviction order"),
    (lambda ledger: setattr(ledger, "cached", 7), "counted as cached"),
    (lambda ledger: ledger.give_back(ledger.forget(ledger.blocks[b"abc"])), "eviction order"),
])
def test_the_check_names_what_is_wrong(damage, complaint):
    ledger = BlockLedger(8, has_tokens=True, has_state=True)
    use(ledger, names("abc"))
    ledger.insert_snapshot(b"ab", ledger.allocate(2), 2)
    ledger.check([], Counter())
    damage(ledger)
    with pytest.raises(RuntimeError, match=complaint):
        ledger.check([], Counter())
