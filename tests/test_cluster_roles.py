"""The prefill role and the decode role alone, on a clock that is turned by hand: each word they say, to the number.

Chapter 13.
"""

import pytest
import torch
from desk import (PEER, PROMPT, SAMPLING, Desk, expecting, ordered, prefilled, served, serving, ship,
                  step_until, taken)
from test_two_datacenters import reference
from transport_support import wait_until

from minprfaas import SamplingParams
from minprfaas.cluster import messages
from minprfaas.cluster.envelope import decode
from minprfaas.cluster.node import PeerLost
from minprfaas.cluster.stream_plans import snapshot_plan, stream_plan
from minprfaas.config import FRONT, Role, StateKind
from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import ArrivalReport, MessageReceived, StreamDone, StreamFailed


# ---- the decode role


def test_a_decode_role_orders_hands_on_admits_and_says_where_the_time_went(hybrid):
    desk, (sender, sent) = Desk(hybrid, Role.PDD), prefilled(hybrid)
    role, layout = desk.role, desk.engine.layout
    role.hear(PEER, serving())
    assert not role.has_work and not role.is_ready, "only the front end says what is to be served"
    role.hear(FRONT, serving())
    assert role.has_work and desk.said() == desk.told() == []
    desk.after(2.0)
    (order,) = desk.told()
    assert order == ordered(stream_id=order.stream_id, snapshot_stream_id=order.stream_id + 1, start=0,
                            prefix_source="pd-7", prefix_tokens=48)
    plan = stream_plan(layout, order.stream_id, 0, 100)
    rows = [entry for entry in plan.entries if entry.kind is StateKind.TOKEN]
    row_bytes = sum(entry.row_bytes for entry in rows)

    stream = desk.there.open(plan)
    ship(stream, sender, sent.cache.block_tables, rows, end=48)
    for name, tokens in ((PEER, 48), ("pd-9", 99)):  # another one does not prefill this
        role.hear(name, messages.PrefillProgress("a#1", tokens))
    role.hear(PEER, messages.PrefillProgress("of nobody", 99))
    desk.after(1.0)
    assert desk.said() == [messages.Progress("a#1", 48, 48 * row_bytes, plan.total_bytes)]
    desk.after(1.0)
    assert desk.said() == [], "there is nothing new"

    for entry in rows:
        data = sender.kvcache.pool.read_bytes(entry.layer, sent.cache.block_tables[entry.group], 48, 100)
        stream.put(entry.layer, 48, 100, data.reshape(-1))
    ship(stream, sender, sent.cache.block_tables, [entry for entry in plan.entries if entry not in rows])
    state = desk.there.open(snapshot_plan(layout, order.snapshot_stream_id, 96))
    ship(state, sender, sender.kvcache.snapshots.hold(sent.cache, 96))
    role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 32, 2.0, 77, True))
    assert desk.said() == [messages.Prefilled("a#1", 100 - 32, 2.0, 77)]
    desk.engine.scheduler.max_batch = 0  # there is no place in the batch
    desk.now_s = 1010.0
    for event in taken(desk.events):
        if event.stream_id == order.stream_id:  # as if it had come from 1003 to 1009
            event = StreamDone(order.stream_id, ArrivalReport(plan.total_bytes, 1003.0, 1009.0))
        role.notice(event)
    desk.after(0.0)
    assert desk.said() == [messages.Progress("a#1", 100, plan.total_bytes, plan.total_bytes)]
    desk.now_s, desk.engine.scheduler.max_batch = 1011.0, 8
    desk.after(0.0)
    started, *drawn = desk.said()
    assert started == messages.Started("a#1", 0, plan.total_bytes + state.plan.total_bytes, 1004.0 - 1000.0 - 2.0, 2.0,
                                       1010.0 - 1004.0, 1.0, transfer_s=6.0, hidden_s=1.0)
    assert role.is_ready
    desk.after(0.0)
    drawn += desk.said()
    assert [one.token_id for one in drawn] == reference(*hybrid, [PROMPT], SamplingParams(**SAMPLING))[0]
    assert [(one.id, one.finish_reason, one.length_limit) for one in drawn] == [
        ("a#1", "", ""), ("a#1", "", ""), ("a#1", "length", "max_tokens")]
    assert not role.has_work and desk.engine.kvcache.stats().in_use == 0 and desk.told() == []
    assert desk.engine.kvcache.match(PROMPT) == 96, "the snapshot was indexed"


def test_a_prefill_may_take_as_long_as_was_said_and_then_is_given_up_on_both_sides(hybrid):
    desk, _ = served(hybrid)
    desk.after(30.0)
    assert desk.said() == desk.told() == [] and desk.engine.kvcache.stats().in_use
    desk.after(0.1)
    assert desk.said() == [messages.Failed("a#1", "deadline of 30 s passed", "lost")]
    assert desk.told() == [messages.Abort("a#1")]
    assert desk.is_empty


def test_a_request_waits_for_room_behind_those_that_came_before_and_so_long_and_no_longer(hybrid):
    desk, _ = served(hybrid, pool=18)
    for number in (2, 3):
        desk.role.hear(FRONT, serving(id=f"a#{number}", token_ids=PROMPT if number == 2 else PROMPT[:5]))
    desk.after(5.0)
    assert desk.told() == desk.said() == [], "the short one does not overtake the long one"
    desk.after(0.1)
    assert desk.said() == [messages.Failed(f"a#{number}", "no room in the KVCache pool within 5 s", "no_room")
                           for number in (2, 3)]
    assert desk.told() == [] and len(desk.role.servings) == 1
    desk.role.hear(FRONT, serving(id="a#4", token_ids=PROMPT[:5]))
    desk.role.hear(FRONT, messages.Abort("a#1"))
    assert desk.told() == [messages.Abort("a#1")] and desk.said() == []
    desk.after(0.0)
    assert [order.id for order in desk.told()] == ["a#4"]


@pytest.mark.parametrize("change, said", [
    (dict(id="a#1"), "attempt 'a#1' came before, or has no prompt"),
    (dict(answered_tokens=100), "or has no prompt"), (dict(answered_tokens=-1), "or has no prompt"),
    (dict(token_ids=[257]), "token id 257"), (dict(token_ids=[5] * 600), "600 prompt tokens"),
    (dict(sampling={"max_tokens": 0}), "max_tokens is 0"), (dict(sampling={"surprise": 1}), "'surprise'")])
def test_what_can_never_be_served_is_refused_at_once(hybrid, change, said):
    desk, _ = served(hybrid)
    refused = serving(**{"id": "b#1", **change})
    desk.role.hear(FRONT, refused)
    (failed,) = desk.said()
    assert (failed.id, failed.cause) == (refused.id, "too_long") and said in failed.reason
    assert len(desk.role.servings) == 1 and desk.told() == []


def test_the_last_tokens_of_a_prompt_may_be_answer_already(hybrid):
    answer = reference(*hybrid, [PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))[0]
    tokens = PROMPT + answer[:6]
    sampling = {"max_tokens": 8, "ignore_eos": True}
    desk, order = served(hybrid, token_ids=tokens, answered_tokens=6, sampling=sampling)
    assert (order.answered_tokens, order.token_ids, order.sampling) == (6, tokens, sampling)
    sender, sent = prefilled(hybrid, tokens)
    ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 106)), sender, sent.cache.block_tables)
    desk.role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 0, 1.0, 0, False))
    desk.notice()
    desk.after(0.0)
    drawn = [word for word in desk.said() if isinstance(word, messages.TokenDrawn)]
    assert [one.token_id for one in drawn] == answer[6:] and drawn[-1].finish_reason == "length"


@pytest.mark.parametrize("happening, is_told", [
    (lambda desk, order: desk.role.hear(PEER, messages.Failed("a#1", "it broke", "refused")), True),
    (lambda desk, order: desk.role.notice(PeerLost(PEER, "it broke")), True),
    (lambda desk, order: desk.role.notice(StreamFailed(order.stream_id, "it broke", 0)), True),
    (lambda desk, order: desk.role.notice(PeerLost(FRONT, "it broke")), False),
    (lambda desk, order: desk.role.hear(FRONT, messages.Abort("a#1")), False)])
def test_an_attempt_that_comes_to_nothing_frees_what_it_held_and_its_prefill_node_is_told(hybrid, happening, is_told):
    desk, order = served(hybrid)
    desk.role.notice(PeerLost("pd-9", "what is that to us"))
    desk.role.notice(StreamFailed(order.stream_id + 100, "nobody's", 0))
    desk.role.hear(PEER, messages.Abort("a#1"))  # it is not for the prefill node to say so
    assert desk.said() == desk.told() == [] and desk.role.servings
    happening(desk, order)
    words = desk.said()
    assert [(word.id, word.reason) for word in words] == [("a#1", "it broke")] * is_told
    assert desk.told() == [messages.Abort("a#1")]
    assert desk.is_empty
    desk.role.hear(PEER, messages.PrefillDone("a#1", 5, 0, 2.0, 0, False))  # a late word
    desk.after(0.0)
    assert desk.said() == []


def test_a_first_token_that_is_none_is_a_prefill_that_failed(hybrid):
    for token in (-1, 257):
        desk, order = served(hybrid)
        sender, sent = prefilled(hybrid)
        ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
        desk.role.hear(PEER, messages.PrefillDone("a#1", token, 0, 2.0, 0, False))
        desk.notice()
        desk.after(0.0)
        assert desk.said()[-1] == messages.Failed("a#1", f"first token {token} is outside the vocabulary", "lost")
        assert desk.is_empty


@pytest.mark.parametrize("last", ["the last byte", "the first token"])
def test_a_prefill_whose_last_word_is_here_is_not_lost_with_its_node(hybrid, last):
    """Whatever came last: all of it is heard before anything is computed."""
    desk, order = served(hybrid)
    sender, sent = prefilled(hybrid)
    done = messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, False)
    if last == "the last byte":
        desk.role.hear(PEER, done)
    ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
    desk.notice()
    if last == "the first token":
        desk.role.hear(PEER, done)
    desk.role.notice(PeerLost(PEER, "it died"))
    desk.after(1e6)  # decoding waits for nobody, and no deadline ends it
    desk.after(0.0)
    words = desk.said()
    assert not any(isinstance(word, messages.Failed) for word in words) and words[-1].finish_reason == "length"


def test_what_is_all_here_and_waits_for_a_place_is_not_lost_when_its_sender_missed_the_last_acknowledgement(hybrid):
    desk, order = served(hybrid)
    sender, sent = prefilled(hybrid)
    desk.engine.scheduler.max_batch = 0
    ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
    desk.role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, False))
    desk.notice()
    desk.role.hear(PEER, messages.Failed("a#1", "its epoch ended before it was acknowledged", "lost"))
    for _ in range(2):  # however long it waits
        desk.after(1e6)
    desk.engine.scheduler.max_batch = 8
    desk.after(0.0)
    desk.after(0.0)
    drawn = [word.token_id for word in desk.said() if isinstance(word, messages.TokenDrawn)]
    assert drawn == reference(*hybrid, [PROMPT], SamplingParams(**SAMPLING))[0]


def answered_without_its_snapshot(hybrid, **options):
    """A decode role that has answered and still awaits the snapshot, and whom it is to come from."""
    desk, order = served(hybrid, **options)
    sender, sent = prefilled(hybrid)
    ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
    desk.role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, True))
    desk.notice()
    desk.after(0.0)
    desk.after(0.0)
    return desk, order, sender, sent


def test_a_snapshot_that_comes_when_its_rows_are_gone_holds_no_block_and_keeps_no_node_at_work(hybrid):
    desk, order, sender, sent = answered_without_its_snapshot(hybrid, pool=30)
    cache, layout = desk.engine.kvcache, desk.engine.layout
    other, blocks = cache.open([7]), cache.ledger.available - layout.state_blocks
    assert desk.said()[-1].finish_reason and cache.reserve(other, blocks // len(layout.token_groups) * 16)
    cache.close(other)
    assert cache.ledger.common(cache.keys(PROMPT)) < 6 and desk.role.has_work
    plan = snapshot_plan(layout, order.snapshot_stream_id, 96)
    ship(desk.there.open(plan), sender, sender.kvcache.snapshots.hold(sent.cache, 96))
    desk.notice()
    desk.after(0.0)
    assert desk.is_empty


@pytest.mark.parametrize("arrives", ["rows and snapshot", "rows", "snapshot"])
def test_of_a_request_that_is_given_up_what_has_arrived_is_kept(hybrid, arrives):
    desk, order = served(hybrid)
    sender, sent = prefilled(hybrid)
    desk.engine.scheduler.max_batch = 0
    desk.role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, True))
    layout, cache = desk.engine.layout, desk.engine.kvcache
    if "rows" in arrives:
        ship(desk.there.open(stream_plan(layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
    if "snapshot" in arrives:
        plan = snapshot_plan(layout, order.snapshot_stream_id, 96)
        ship(desk.there.open(plan), sender, sender.kvcache.snapshots.hold(sent.cache, 96))
    desk.notice()
    desk.after(0.0)
    desk.role.hear(FRONT, messages.Abort("a#1"))
    assert cache.ledger.common(cache.keys(PROMPT)) == (6 if "rows" in arrives else 0)
    assert cache.match(PROMPT) == (96 if arrives == "rows and snapshot" else 0)
    assert desk.is_empty
    cache.check()


@pytest.mark.parametrize("end", ["deadline", "peer", "stream"])
def test_a_snapshot_that_does_not_come_is_awaited_after_its_request_has_its_answer_and_then_given_up(hybrid, end):
    desk, order, sender, sent = answered_without_its_snapshot(hybrid)
    assert desk.said()[-1].finish_reason == "length" and not desk.role.servings and desk.role.has_work
    if end == "deadline":
        desk.after(30.0)
        assert desk.role.has_work
        desk.after(0.1)
    elif end == "peer":
        desk.role.notice(PeerLost("pd-9", "gone"))
        assert desk.role.has_work
        desk.role.notice(PeerLost(PEER, "gone"))
    else:
        desk.there.open(snapshot_plan(desk.engine.layout, order.snapshot_stream_id, 96)).abort()
        desk.notice()
    assert desk.is_empty
    pool, plan = desk.engine.kvcache.pool, snapshot_plan(desk.engine.layout, order.snapshot_stream_id, 96)
    before = pool.bytes.clone()
    with pytest.raises(StreamAborted):
        ship(desk.there.open(plan), sender, sender.kvcache.snapshots.hold(sent.cache, 96))
    assert torch.equal(pool.bytes, before), "others may have its blocks now"
    assert desk.engine.kvcache.match(PROMPT) == 0


def test_a_way_that_is_lost_while_a_request_waits_for_room_is_a_failed_attempt(hybrid):
    desk = Desk(hybrid, Role.PDD)
    desk.role.hear(FRONT, serving(prefill_node="pd-9"))
    desk.after(0.0)
    assert desk.said() == [messages.Failed("a#1", "there is no way to 'pd-9'", "lost")]
    assert desk.is_empty


# ---- the prefill role


def test_a_prefill_role_computes_ships_reports_and_says_where_the_time_went(hybrid):
    desk, (sender, sent) = Desk(hybrid, Role.PRFAAS), prefilled(hybrid)
    role, order = desk.role, ordered()
    arrived = expecting(desk, order)
    role.hear(PEER, order)
    assert role.has_work and role.is_ready is True
    desk.after(2.0)
    assert desk.told() == [messages.PrefillProgress("a#1", 48)]
    desk.after(1.0)
    assert desk.told() == [messages.PrefillProgress("a#1", 96)]
    desk.after(1.0)
    words = []

    def has_said_its_last():
        for event in taken(desk.far):
            if isinstance(event, MessageReceived):
                words.append(decode(event.message).message)
            else:
                desk.events.put(event)
        return any(isinstance(word, messages.PrefillDone) for word in words)

    wait_until(has_said_its_last)
    assert words == [messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, True)]
    step_until(desk, lambda: not role.has_work)
    assert desk.said() == [], "it has nothing to say to the front end"
    assert desk.engine.kvcache.stats().in_use == 0 and not role.is_ready
    desk.engine.kvcache.check()
    for layer, spec in enumerate(desk.engine.layout.specs):
        table = sent.cache.block_tables[sender.layout.group_of_layer[layer].index]
        whole = torch.cat([data for _, end, data in sorted(arrived[layer], key=lambda one: one[:2])
                           if spec.kind is StateKind.TOKEN or end == 100])
        assert torch.equal(whole, sender.kvcache.pool.read_bytes(layer, table, 16, 100).reshape(-1)), layer


@pytest.mark.parametrize("change, said", [
    (dict(id="a#1"), "order 'a#1' came before, and is not forgotten yet"), (dict(start=100), "starts at token 100 of"),
    (dict(start=-1), "starts at token -1"), (dict(answered_tokens=100), "starts at token 16 of 100"),
    (dict(answered_tokens=-1), "starts at"), (dict(token_ids=[257] * 20), "token id 257"),
    (dict(sampling={"heat": 1}), "heat"), (dict(sampling={"max_tokens": 0}), "max_tokens is 0"),
    (dict(stream_id=-1), "stream_id -1"), (dict(snapshot_stream_id=-1), "stream_id -1"),
    (dict(snapshot_at=-16), "stream 8")])
def test_an_order_that_cannot_be_is_refused_and_leaves_nothing(hybrid, change, said):
    desk = Desk(hybrid, Role.PRFAAS)
    desk.role.hear(PEER, ordered())
    refused = ordered(**{"id": "b#1", **change})
    desk.role.hear(PEER, refused)
    (failed,) = desk.told()
    assert (failed.id, failed.cause) == (refused.id, "refused") and said in failed.reason
    assert list(desk.role.prefills) == ["a#1"] and len(desk.engine.waiting) == 1


def test_an_order_may_take_as_long_as_it_says_and_then_fails(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)
    expecting(desk, ordered())
    desk.line.room.clear()
    desk.role.hear(PEER, ordered())
    desk.now_s += 30.0
    desk.after(0.0)
    assert [type(word) for word in desk.told()] == [messages.PrefillProgress] and desk.role.prefills
    desk.after(0.1)
    assert messages.Failed("a#1", "deadline of 30 s passed", "lost") in desk.told()
    step_until(desk, lambda: not desk.role.has_work)
    assert desk.is_empty


@pytest.mark.parametrize("end", [lambda role: role.hear(PEER, messages.Abort("a#1")),
                                 lambda role: role.notice(PeerLost(PEER, "gone"))])
def test_a_prefill_that_nobody_waits_for_ends_without_a_word(hybrid, end):
    desk = Desk(hybrid, Role.PRFAAS)
    expecting(desk, ordered())
    desk.role.hear(PEER, ordered())
    desk.after(0.0)
    desk.told()
    desk.role.hear("pd-9", messages.Abort("a#1"))
    desk.role.notice(PeerLost("pd-9", "gone"))
    assert "a#1" in desk.role.prefills
    end(desk.role)
    assert not desk.role.prefills and not desk.engine.has_work
    step_until(desk, lambda: not desk.role.has_work)
    assert desk.engine.kvcache.stats().in_use == 0 and desk.engine.prefilled_tokens == 48
    assert desk.said() == []


def test_a_prefill_without_a_way_to_its_decode_node_fails(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)
    desk.role.hear(PEER, ordered())
    desk.line.is_up = False
    sent = []
    desk.line.send_message = sent.append  # words find their way still
    desk.after(0.0)
    assert [decode(raw).message for raw in sent][-1] == messages.Failed(
        "a#1", "there is no way to the decode node", "lost")
    assert desk.is_empty


def test_a_stream_that_the_receiver_refuses_ends_its_prefill(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)  # nobody expects it there
    desk.role.hear(PEER, ordered())
    words = []
    step_until(desk, lambda: words.extend(desk.told()) or not desk.role.has_work)
    assert words[-1] == messages.Failed("a#1", "stream 7: refused by the receiver", "lost")
    assert desk.is_empty
