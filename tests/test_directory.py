"""The directory: matches per node, sequence numbers, inventories, stale entries. Chapter 11."""

import random

import pytest

from minprfaas.scheduling.directory import CacheChanged, Directory

PROMPT = [b"one", b"two", b"three", b"four"]


def directory_of(*names: str) -> Directory:
    """These nodes, each with an empty first inventory."""
    directory = Directory()
    for name in names:
        directory.add_node(name)
        directory.apply(CacheChanged(name, 0, (), inventory=True))
    return directory


def tokens_of(key: bytes) -> int:
    return 64 * (PROMPT.index(key) + 1)


def store(directory: Directory, node: str, keys, first: int = 1) -> int:
    """Tell of the keys as stored, 64 tokens each; returns the last sequence number."""
    assert directory.apply(CacheChanged(node, first, [(key, tokens_of(key)) for key in keys]))
    return first + len(keys) - 1


def evict(directory: Directory, node: str, sequence: int, key: bytes) -> bool:
    return directory.apply(CacheChanged(node, sequence, [(key, 0)]))


def test_a_match_names_every_node_that_holds_some_of_it():
    directory = directory_of("a0", "a1", "p0")
    store(directory, "a0", PROMPT[:1])
    store(directory, "a1", PROMPT[:3])
    store(directory, "p0", PROMPT[:2])
    assert directory.match(PROMPT) == {"a0": 64, "a1": 192, "p0": 128}
    assert directory.match([b"another", *PROMPT[1:1]]) == {}


def test_only_the_lengths_at_which_a_hybrid_model_has_a_snapshot_are_matched():
    directory = directory_of("a0")
    store(directory, "a0", [PROMPT[1]])  # a snapshot after the second block, none after the others
    assert directory.match(PROMPT[:1]) == {}
    assert directory.match(PROMPT) == {"a0": 128}


def test_an_evicted_prefix_is_not_matched_any_more():
    directory = directory_of("a0")
    last = store(directory, "a0", PROMPT)
    assert evict(directory, "a0", last + 1, PROMPT[3])
    assert directory.match(PROMPT) == {"a0": 192}


def test_a_gap_in_the_sequence_asks_for_an_inventory_and_ignores_news_until_then():
    directory = directory_of("a0")
    store(directory, "a0", PROMPT[:1])
    assert not directory.apply(CacheChanged("a0", 3, [(PROMPT[2], 192)]))
    assert not evict(directory, "a0", 4, PROMPT[0])
    assert directory.match(PROMPT) == {"a0": 64}
    assert directory.apply(CacheChanged("a0", 4, [(PROMPT[1], 128)], inventory=True))
    assert directory.match(PROMPT) == {"a0": 128}
    assert directory.apply(CacheChanged("a0", 5, [(PROMPT[2], 192)]))


def test_repeated_news_change_nothing_and_of_an_overlap_only_the_new_part_counts():
    directory = directory_of("a0")
    store(directory, "a0", PROMPT[:2])
    assert evict(directory, "a0", 3, PROMPT[1])
    assert directory.apply(CacheChanged("a0", 2, [(PROMPT[1], 128)]))
    assert directory.match(PROMPT) == {"a0": 64}
    assert directory.apply(CacheChanged("a0", 2, [(PROMPT[1], 128), (PROMPT[1], 0), (PROMPT[2], 192)]))
    assert directory.match(PROMPT) == {"a0": 192} and evict(directory, "a0", 5, PROMPT[2])


def test_a_node_that_reconnects_is_unknown_territory_until_its_inventory_comes():
    directory = directory_of("a0", "p0")
    store(directory, "a0", PROMPT)
    store(directory, "p0", PROMPT[:1])
    directory.add_node("a0")
    assert directory.match(PROMPT) == {"p0": 64}
    assert not directory.apply(CacheChanged("a0", 1, [(PROMPT[0], 64)]))
    directory.drop_node("p0")
    directory.drop_node("p0")
    assert directory.match(PROMPT) == {}


def test_a_stale_entry_is_dropped_when_it_is_reported():
    directory = directory_of("a0", "a1")
    store(directory, "a0", PROMPT)
    store(directory, "a1", PROMPT)
    directory.forget("a0", PROMPT[3])
    directory.forget("a0", PROMPT[3])
    assert directory.match(PROMPT) == {"a0": 192, "a1": 256}


def test_an_unknown_node_is_refused_by_name():
    with pytest.raises(KeyError, match="'ghost'"):
        Directory().apply(CacheChanged("ghost", 1, [(b"key", 64)]))


def test_after_any_news_losses_and_inventories_the_directory_says_what_the_nodes_hold():
    rng, names = random.Random(5), ("a0", "a1", "p0")
    directory = directory_of("a0", "a1", "p0")
    truth, sequence, gaps = {name: {} for name in names}, dict.fromkeys(names, 0), 0
    for _ in range(5000):
        name, key = rng.choice(names), rng.choice(PROMPT)
        tokens = 0 if key in truth[name] else tokens_of(key)
        if tokens:
            truth[name][key] = tokens
        else:
            del truth[name][key]
        sequence[name] += 1
        if rng.random() < 0.9:  # the others are lost on the way
            if not directory.apply(CacheChanged(name, sequence[name], [(key, tokens)])):
                gaps += 1
                directory.apply(CacheChanged(name, sequence[name], list(truth[name].items()), inventory=True))
    for node in names:
        directory.apply(CacheChanged(node, sequence[node], list(truth[node].items()), inventory=True))
    expected = {name: max(held.values()) for name, held in truth.items() if held}
    assert directory.match(PROMPT) == expected and gaps > 300
