"""The directory: matches per node and cluster, sequence numbers, resyncs, stale entries, hot prefixes."""

import random

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling.directory import CacheEvent, Directory

PROMPT = [b"one", b"two", b"three", b"four"]


def directory_of(**clusters: str) -> Directory:
    """Nodes by name, each with an empty first snapshot."""
    directory = Directory()
    for name, cluster in clusters.items():
        directory.add_node(name, cluster)
        directory.resync(name, 0, ())
    return directory


def store(directory: Directory, node: str, keys, first: int = 1) -> int:
    """Publish the keys as stored, 64 tokens each; returns the last sequence number."""
    for position, key in enumerate(keys):
        assert directory.publish(CacheEvent(node, first + position, "stored", key, 64 * (PROMPT.index(key) + 1)))
    return first + len(keys) - 1


def test_a_match_names_every_node_that_holds_some_of_it_and_the_best_of_each_cluster():
    directory = directory_of(a0="prfaas", a1="prfaas", p0="pd")
    store(directory, "a0", PROMPT[:1])
    store(directory, "a1", PROMPT[:3])
    store(directory, "p0", PROMPT[:2])
    match = directory.match(PROMPT)
    assert match.nodes == {"a0": 64, "a1": 192, "p0": 128}
    assert match.clusters == {"prfaas": 192, "pd": 128}
    assert directory.match([b"another", *PROMPT[1:1]]).nodes == {}


def test_only_the_lengths_at_which_a_hybrid_model_has_a_snapshot_are_matched():
    directory = directory_of(a0="prfaas")
    store(directory, "a0", [PROMPT[1]])  # a snapshot after the second block, none after the others
    assert directory.match(PROMPT[:1]).nodes == {}
    assert directory.match(PROMPT).nodes == {"a0": 128}


def test_an_evicted_prefix_is_not_matched_any_more():
    directory = directory_of(a0="prfaas")
    last = store(directory, "a0", PROMPT)
    directory.publish(CacheEvent("a0", last + 1, "evicted", PROMPT[3], 256))
    assert directory.match(PROMPT).nodes == {"a0": 192}


def test_a_gap_in_the_sequence_asks_for_a_resync_and_ignores_events_until_then():
    directory = directory_of(a0="prfaas")
    store(directory, "a0", PROMPT[:1])
    assert not directory.publish(CacheEvent("a0", 3, "stored", PROMPT[2], 192))
    assert directory.needs_resync("a0")
    assert not directory.publish(CacheEvent("a0", 4, "evicted", PROMPT[0], 64))
    assert directory.match(PROMPT).nodes == {"a0": 64}
    directory.resync("a0", 4, [(PROMPT[1], 128)])
    assert not directory.needs_resync("a0") and directory.match(PROMPT).nodes == {"a0": 128}
    assert directory.publish(CacheEvent("a0", 5, "stored", PROMPT[2], 192))


def test_a_repeated_event_changes_nothing():
    directory = directory_of(a0="prfaas")
    store(directory, "a0", PROMPT[:2])
    directory.publish(CacheEvent("a0", 3, "evicted", PROMPT[1], 128))
    assert directory.publish(CacheEvent("a0", 2, "stored", PROMPT[1], 128))
    assert directory.match(PROMPT).nodes == {"a0": 64}


def test_a_node_that_reconnects_is_unknown_territory_until_it_resyncs():
    directory = directory_of(a0="prfaas", p0="pd")
    store(directory, "a0", PROMPT)
    store(directory, "p0", PROMPT[:1])
    directory.add_node("a0", "prfaas")
    assert directory.needs_resync("a0") and directory.match(PROMPT).nodes == {"p0": 64}
    directory.drop_node("p0")
    directory.drop_node("p0")
    assert directory.match(PROMPT).nodes == {}


def test_a_stale_entry_is_dropped_when_it_is_reported():
    directory = directory_of(a0="prfaas", a1="prfaas")
    store(directory, "a0", PROMPT)
    store(directory, "a1", PROMPT)
    directory.report_stale("a0", PROMPT[3])
    directory.report_stale("a0", PROMPT[3])
    assert directory.match(PROMPT).nodes == {"a0": 192, "a1": 256}


def test_an_unknown_node_is_refused_by_name():
    with pytest.raises(UserError, match="'ghost'"):
        Directory().publish(CacheEvent("ghost", 1, "stored", b"key", 64))


def test_after_any_events_losses_and_resyncs_the_directory_says_what_the_nodes_hold():
    rng, names = random.Random(5), ("a0", "a1", "p0")
    directory = directory_of(a0="prfaas", a1="prfaas", p0="pd")
    truth, sequence = {name: {} for name in names}, dict.fromkeys(names, 0)
    for _ in range(5000):
        name, position = rng.choice(names), rng.randrange(4)
        key, tokens = PROMPT[position], 64 * (position + 1)
        kind = "evicted" if key in truth[name] else "stored"
        truth[name].pop(key) if kind == "evicted" else truth[name].update({key: tokens})
        sequence[name] += 1
        if rng.random() < 0.9:  # the others are lost on the way
            directory.publish(CacheEvent(name, sequence[name], kind, key, tokens))
        for node in names:
            if directory.needs_resync(node):
                directory.resync(node, sequence[node], truth[node].items())
    for node in names:
        directory.resync(node, sequence[node], truth[node].items())
    expected = {name: max(held.values()) for name, held in truth.items() if held}
    assert directory.match(PROMPT).nodes == expected


def test_a_hot_prefix_moves_from_an_overloaded_node_to_the_idlest_of_its_cluster():
    directory = directory_of(a0="prfaas", a1="prfaas", a2="prfaas", p0="pd")
    store(directory, "a0", PROMPT[:2])
    for _ in range(8):
        directory.match(PROMPT)
    move = directory.rebalance({"a0": 50_000, "a1": 9000, "a2": 4000, "p0": 0})
    assert (move.key, move.tokens, move.source, move.target) == (PROMPT[1], 128, "a0", "a2")
    assert directory.rebalance({"a0": 50_000, "a1": 9000, "a2": 4000, "p0": 0}) is None  # one move, then new evidence


@pytest.mark.parametrize("hits, loads, copies", [
    (7, {"a0": 50_000, "a1": 0}, ()), (8, {"a0": 5000, "a1": 4000}, ()), (8, {"a0": 50_000, "a1": 0}, ("a1",)),
    (8, {"a0": 50_000}, ()), (8, {"a1": 0}, ())])
def test_a_prefix_that_is_not_hot_or_not_crowded_or_copied_already_stays(hits, loads, copies):
    directory = directory_of(a0="prfaas", a1="prfaas")
    for node in ("a0", *copies):
        store(directory, node, PROMPT[:2])
    for _ in range(hits):
        directory.match(PROMPT)
    assert directory.rebalance(loads) is None
