"""What leaves one pool for another: blocks that a stream reads, increments, snapshots on their way. Chapter 06."""

import pytest
import torch
from kvcache_helpers import DENSE, HYBRID, decode, manager, prefill
from test_kvcache_manager import PROMPT, SPECS
from transport_support import DEADLINE_S, next_event

from minprfaas.cluster.kv_send import KVSend, SendingThreads
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import StateKind
from minprfaas.kvcache.pool_copies import WholeBlocks
from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import StreamFailed
from minprfaas.transport.loopback import Loopback


def test_blocks_that_a_stream_reads_outlive_their_request_until_the_acknowledgement():
    kvcache = manager(HYBRID, 400)
    cache = prefill(kvcache, PROMPT)
    kvcache.hold(cache)
    kvcache.hold(cache)  # to a second receiver
    shipped = kvcache.pool.read_bytes(3, cache.block_tables[3], 0, 42)
    kvcache.close(cache)
    kvcache.check()
    assert kvcache.stats().transfer == 1 + kvcache.layout.state_blocks  # the unaligned tail and the state
    squeeze = prefill(kvcache, [9] * 600, max_chunk=600)
    assert torch.equal(kvcache.pool.read_bytes(3, cache.block_tables[3], 0, 42), shipped)
    kvcache.release(cache)
    assert kvcache.stats().transfer > 0
    kvcache.release(cache)
    kvcache.check()
    assert kvcache.stats().transfer == 0
    with pytest.raises(ValueError, match="nothing holds"):
        kvcache.release(cache)
    with pytest.raises(ValueError, match="closed"):
        kvcache.hold(cache)
    kvcache.close(squeeze)


def ship(source, sent, target, received, start, end):
    """What the link does: tokens `[start, end)` of every token layer, and every layer's final state."""
    crossed = 0
    for layer in range(len(source.layout.specs)):
        group = source.layout.group_of_layer[layer].index
        data = source.pool.read_bytes(layer, sent.block_tables[group], start, end)
        target.pool.write_bytes(layer, received.block_tables[group], start, end, data)
        crossed += data.numel()
    return crossed


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_only_the_increment_crosses_to_a_pool_that_has_the_prefix(specs):
    """The receiver's blocks then serve decoding, and its next turn, as if it had computed them itself."""
    prefiller, decoder = manager(specs, 800), manager(specs, 800)
    tokens, crossed = list(PROMPT), []
    for turn in range(3):
        sent = prefill(prefiller, tokens)
        received = decoder.open(tokens, to_receive=True)
        assert decoder.reserve(received, len(tokens))
        crossed.append(ship(prefiller, sent, decoder, received, received.cached_tokens, len(tokens)))
        decoder.advance(received, tokens)
        prefiller.close(sent)
        answered = decode(decoder, received, tokens, range(turn, turn + 9))  # the toy model checks what arrived
        decoder.close(received)
        decoder.check()
        tokens = [*answered, 200 + turn]
    if decoder.layout.token_groups:
        assert crossed[1] < crossed[0] and crossed[2] < crossed[0]


def test_a_receiver_asks_only_for_rows_after_its_longest_run_of_full_blocks():
    """To begin a prefill after 29 common tokens, a snapshot must be there; to receive the rest, none has to."""
    kvcache = manager(HYBRID, 800, snapshot_every=1000)
    first = prefill(kvcache, PROMPT)
    kvcache.close(first)
    tokens = [*PROMPT[:29], *range(13)]
    assert kvcache.match(tokens) == 0
    in_use = kvcache.stats().in_use
    received = kvcache.open(tokens, to_receive=True)
    assert received.cached_tokens == 28 and kvcache.reserve(received, 42)
    kvcache.check()
    groups, state = len(kvcache.layout.token_groups), kvcache.layout.state_blocks
    assert kvcache.stats().in_use - in_use == 11 * groups + state  # 7 of the 11 blocks a group were cached
    for group in kvcache.layout.token_groups:
        assert received.block_tables[group.index][:7] == first.block_tables[group.index][:7]

    other = manager(HYBRID, 800)
    sent = prefill(other, tokens)
    ship(other, sent, kvcache, received, received.cached_tokens, 42)
    kvcache.advance(received, tokens)
    kvcache.check()
    shared = prefill(kvcache, [*tokens[:40], 9, 9, 9])  # the toy model fails on a block that holds something else
    assert shared.cached_tokens == 0  # no snapshot arrived beside the final state; the rows are shared all the same
    for group in kvcache.layout.token_groups:
        assert shared.block_tables[group.index][:10] == received.block_tables[group.index][:10]
    decode(kvcache, received, tokens, range(9))


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_a_receiver_always_asks_for_at_least_one_token(specs):
    kvcache = manager(specs, 800, snapshot_every=1)
    kvcache.close(prefill(kvcache, PROMPT[:40]))
    assert kvcache.open(PROMPT[:40], to_receive=True).cached_tokens == (36 if kvcache.layout.token_groups else 0)


def test_rows_that_arrived_before_a_stream_broke_off_need_not_cross_again():
    kvcache, other = manager(HYBRID, 800), manager(HYBRID, 800)
    sent = prefill(other, PROMPT)
    broken = kvcache.open(PROMPT, to_receive=True)
    assert kvcache.reserve(broken, 42)
    for layer in (3, 7):
        data = other.pool.read_bytes(layer, sent.block_tables[3], 0, 22)
        kvcache.pool.write_bytes(layer, broken.block_tables[3], 0, 22, data)
    kvcache.advance(broken, PROMPT[:22], has_state=False)
    kvcache.close(broken)
    kvcache.check()
    assert kvcache.ledger.inventory() == [] and kvcache.match(PROMPT) == 0  # rows without a state are no place to begin
    again = kvcache.open(PROMPT, to_receive=True)
    assert again.cached_tokens == 20 and kvcache.reserve(again, 42)
    ship(other, sent, kvcache, again, 20, 42)
    kvcache.advance(again, PROMPT)
    decode(kvcache, again, PROMPT, range(9))


def test_a_snapshot_that_arrives_beside_the_final_state_can_be_hit_although_the_answer_is_short():
    prefiller, decoder = manager(HYBRID, 800), manager(HYBRID, 800)
    received = decoder.open(PROMPT)
    assert decoder.reserve(received, len(PROMPT))
    expected = decoder.snapshots.expect(received.keys, 40)
    sent = prefill(prefiller, PROMPT[:40])
    for layer, spec in enumerate(HYBRID):
        if spec.kind is not StateKind.TOKEN:
            group = decoder.layout.group_of_layer[layer].index
            data = prefiller.pool.read_bytes(layer, sent.block_tables[group], 0, 40)
            decoder.pool.write_bytes(layer, expected.tables[group], 0, 40, data)
    assert not decoder.snapshots.index_expected(expected), "the rows up to it are not here yet"
    prefiller.close(sent)
    sent = prefill(prefiller, PROMPT)
    ship(prefiller, sent, decoder, received, 0, len(PROMPT))
    decoder.advance(received, PROMPT)
    decoder.check()
    decoder.close(received)
    decoder.check()
    assert decoder.match(PROMPT) == 0
    assert decoder.snapshots.index_expected(expected)
    decoder.check()
    assert prefill(decoder, [*PROMPT, 1, 2]).cached_tokens == 40  # and the toy model finds the right state there


def test_a_sender_finds_the_snapshot_of_a_boundary_that_its_request_has_passed():
    kvcache = manager(HYBRID, 800, snapshot_every=1000)
    cache = prefill(kvcache, PROMPT)
    assert kvcache.snapshots.hold(cache, 36) is None and kvcache.snapshots.hold(cache, 41) is None
    tables = kvcache.snapshots.hold(cache, 40)
    group = kvcache.layout.request_groups[0]
    now = kvcache.pool.read_bytes(0, cache.block_tables[group.index], 0, 42)
    then = kvcache.pool.read_bytes(0, tables[group.index], 0, 40)
    same = prefill(kvcache, PROMPT[:40])
    assert torch.equal(then, kvcache.pool.read_bytes(0, same.block_tables[group.index], 0, 40))
    assert not torch.equal(then, now)


def test_a_held_snapshot_outlives_its_request_until_the_transfer_is_acknowledged():
    kvcache = manager(HYBRID, 400)
    cache = prefill(kvcache, PROMPT)
    tables = kvcache.snapshots.hold(cache, 40)
    group = kvcache.layout.request_groups[0].index
    before = kvcache.pool.read_bytes(0, tables[group], 0, 40)
    kvcache.hold(cache)
    kvcache.close(cache)
    kvcache.check()
    taken = kvcache.ledger.allocate(kvcache.ledger.available)  # all that can be had, and written over
    kvcache.pool.zero(taken)
    assert torch.equal(kvcache.pool.read_bytes(0, tables[group], 0, 40), before)
    kvcache.ledger.give_back(taken)
    kvcache.release(cache)
    kvcache.check()
    assert kvcache.stats().in_use == 0


def test_an_expected_snapshot_that_never_came_gives_its_blocks_back():
    kvcache = manager(HYBRID, 200)
    cache = kvcache.open(PROMPT)
    assert kvcache.reserve(cache, 42)
    in_use = kvcache.stats().in_use
    expected = kvcache.snapshots.expect(cache.keys, 40)
    assert kvcache.stats().in_use > in_use
    kvcache.check()
    kvcache.snapshots.forget(expected)
    kvcache.check()
    assert kvcache.stats().in_use == in_use
    kvcache.advance(cache, PROMPT[:41])
    assert kvcache.ledger.inventory() == []


def test_an_expected_snapshot_needs_a_boundary_and_outlives_its_request():
    kvcache = manager(HYBRID, 200)
    cache = kvcache.open(PROMPT)
    assert kvcache.snapshots.expect(cache.keys, 41) is None and kvcache.snapshots.expect(cache.keys, 0) is None
    expected = kvcache.snapshots.expect(cache.keys, 40)
    kvcache.close(cache)
    kvcache.check()
    assert kvcache.stats().in_use == len(expected.blocks)
    kvcache.snapshots.forget(expected)
    kvcache.check()
    assert kvcache.stats().free == 200
    taken = kvcache.ledger.allocate(200 - len(expected.blocks) + 1)
    assert kvcache.snapshots.expect(cache.keys, 40) is None and kvcache.stats().free == 200 - len(taken), "no room"
    dense = manager(DENSE, 200)
    assert dense.snapshots.expect(dense.open(PROMPT).keys, 40) is None


def test_a_cached_prefix_can_be_shipped_to_another_cluster_as_it_is():
    source, target = manager(HYBRID, 800), manager(HYBRID, 800)
    source.close(prefill(source, PROMPT))
    prefix = PROMPT[:source.match(PROMPT)]
    sent, received = source.open(PROMPT), target.open(PROMPT, to_receive=True)
    assert target.reserve(received, len(prefix))
    state = source.snapshots.hold(sent, len(prefix))
    for group in source.layout.request_groups:
        sent.block_tables[group.index] = state[group.index]
    ship(source, sent, target, received, 0, len(prefix))
    target.advance(received, prefix)
    target.close(received)
    source.close(sent)
    assert prefill(target, PROMPT).cached_tokens == len(prefix) == 40


def test_an_error_that_nobody_foresaw_ends_a_stream_at_both_ends(monkeypatch):
    """A GPU's, for example: a RuntimeError of several lines. The receiver does not wait until its deadline."""
    kvcache, loopback = manager(HYBRID, 400), Loopback()
    cache, plan = prefill(kvcache, PROMPT), stream_plan(kvcache.layout, 1, 0, 42)
    loopback.expect(plan, lambda *_: None)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(WholeBlocks, "read", fail)
    send = KVSend(kvcache, loopback, plan, cache.block_tables, SendingThreads("test"), DEADLINE_S)
    send.finish()
    with pytest.raises(StreamAborted, match="^CUDA error: an illegal memory access was encountered$"):
        send.outcome.result(DEADLINE_S)
    assert isinstance(next_event(loopback), StreamFailed)
