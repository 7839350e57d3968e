"""Relay decode: first tokens that do not wait for the KVCache, and a handover that nobody can see. Chapter 15."""

import pytest
from desk import HERE, PEER, PROMPT, Desk, expecting, ordered, prefilled, served, ship, step_until
from test_two_datacenters import prompts_of, reference
from world import World

from minprfaas import SamplingParams, generate
from minprfaas.cluster import messages
from minprfaas.cluster.node import PeerLost
from minprfaas.cluster.stream_plans import snapshot_plan, stream_plan
from minprfaas.config import FRONT, Role

LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(autouse=True)
def _turns_are_short(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.node.IDLE_S", 0.0005)  # many nodes wait by turns here, in one thread


def slow_line(world, decoder="pd-0"):
    """Nothing of a KVCache crosses until its `room` is set; messages do."""
    line = world.machines["prfaas-0"].ends[decoder]
    line.room.clear()
    return line


def relayed(world):
    """Decode steps on the prefill node, in requests."""
    return world.part("prfaas-0").engine.decoded_tokens


def has_arrived(decode):
    """Whether a KVCache is all here, and its request does not decode yet."""
    return any(serving.kv is not None and serving.kv.has_arrived for serving in decode.servings.values())


def each_once(world, journeys, updates):
    """The client got each token once, in order, and the text that goes with them."""
    world.check(journeys)
    for journey in journeys:
        seen = [update for update in updates if update.journey is journey and update.token_id is not None]
        assert [update.token_id for update in seen] == journey.output_ids
        assert "".join(update.new_text for update in seen) == journey.text


@pytest.mark.parametrize("family, drawn", [("kimi_linear", 20), ("qwen3", 9), ("mimo_v2_flash", 1)])
def test_tokens_come_before_the_kvcache_and_the_answer_is_that_of_one_process(models, family, drawn):
    with World(*models[family], pd=1, split=0, relay=True) as world:
        line = slow_line(world)
        (journey,) = world.submit(prompts_of(150), LONG)
        world.step_until(lambda: len(journey.output_ids) >= drawn)
        assert not journey.is_finished and journey.kv_bytes == 0 and relayed(world) >= drawn - 1
        line.room.set()
        world.step_until(lambda: not world.front.has_work)
        each_once(world, [journey], world.front.take_updates())
        here = world.part("pd-0").engine
        assert relayed(world) < 39 and here.decoded_tokens + relayed(world) >= 39, "both drew a part of it"
        assert here.kvcache.ledger.common(here.kvcache.keys(journey.token_ids)) == 11, "rows of relayed tokens too"
    assert journey.kv_bytes > 0 and journey.attempts == 1


def test_tokens_go_on_coming_while_their_rows_are_computed(hybrid):
    with World(*hybrid, pd=1, split=0, relay=True, prefill_chunk=16) as world:
        line, here = slow_line(world), world.part("pd-0")
        (journey,) = world.submit(prompts_of(150), LONG)
        world.step_until(lambda: len(journey.output_ids) >= 30)
        line.room.set()
        world.step_until(lambda: has_arrived(here))
        at_first = relayed(world)
        world.step_until(lambda: here.engine.decoded_tokens > 0)
        assert relayed(world) > at_first + 1
        world.step_until(lambda: not world.front.has_work)
        each_once(world, [journey], world.front.take_updates())


def test_sampled_and_stopped_answers_go_through_the_handover_unchanged(hybrid):
    sampled = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    prompts = prompts_of(150, 160, 170)
    text = generate(*hybrid, prompts[1:2], sampled)[0].text
    stopped = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True, stop=(text[-6:-2],))
    with World(*hybrid, pd=1, split=0, relay=True) as world:
        line = slow_line(world)
        journeys = world.submit(prompts, [sampled, stopped, LONG])
        world.step_until(lambda: all(len(journey.output_ids) > 5 for journey in journeys))
        line.room.set()
        world.step_until(lambda: not world.front.has_work)
        each_once(world, journeys, world.front.take_updates())
    assert [journey.finish_reason for journey in journeys] == ["length", "stop", "length"]


def test_an_answer_may_end_before_its_kvcache_is_there_which_nobody_needs_then(hybrid):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with World(*hybrid, pd=1, split=0, relay=True) as world:
        line = slow_line(world)
        (journey,) = world.submit(prompts_of(150), params)
        world.step_until(lambda: journey.is_finished)
        assert journey.finish_reason == "length" and len(journey.output_ids) == 3
        line.room.set()
        each_once(world, [journey], world.front.take_updates())


def test_a_relay_goes_on_until_the_decode_batch_has_a_place(hybrid):
    with World(*hybrid, pd=1, split=0, relay=True) as world:
        line, here = slow_line(world), world.part("pd-0")
        here.engine.scheduler.max_batch = 1
        journeys = world.submit(prompts_of(150, 160), LONG)
        world.step_until(lambda: all(len(one.output_ids) > 5 for one in journeys))
        line.room.set()
        decoding = []
        world.step_until(lambda: decoding.append(len(here.engine.running)) or not world.front.has_work)
        assert max(decoding) == 1
        each_once(world, journeys, world.front.take_updates())


def test_two_that_find_no_room_for_their_relayed_tokens_do_not_wait_for_each_other(hybrid):
    with World(*hybrid, pd=1, split=0, relay=True) as world:
        line, here = slow_line(world), world.part("pd-0")
        journeys = world.submit(prompts_of(150, 160), LONG)
        world.step_until(lambda: all(len(one.output_ids) > 20 for one in journeys))
        ledger = here.engine.kvcache.ledger
        taken = ledger.allocate(ledger.available)  # as others would: what they have now is all that they get
        line.room.set()
        world.step_until(lambda: max(one.attempts for one in journeys) > 1)
        ledger.give_back(taken)
        world.step_until(lambda: not world.front.has_work)
        each_once(world, journeys, world.front.take_updates())


@pytest.mark.parametrize("moment", ["while it crosses", "while its rows are computed", "after the handover"])
@pytest.mark.parametrize("loss", ["cut", "kill"])
def test_a_loss_at_any_moment_of_the_handover_costs_time_and_no_token(hybrid, loss, moment):
    with World(*hybrid, pd=2, split=1, relay=True, prefill_chunk=16) as world:
        line, here = slow_line(world, "pd-1"), world.part("pd-1")
        (journey,) = world.submit(prompts_of(150), LONG)
        world.step_until(lambda: len(journey.output_ids) >= 24)
        if moment != "while it crosses":
            line.room.set()
            in_the_middle = moment == "while its rows are computed"
            world.step_until(lambda: (has_arrived(here) and in_the_middle) or here.engine.decoded_tokens > 0)
            assert in_the_middle == (here.engine.decoded_tokens == 0)
        assert not journey.is_finished
        if loss == "cut":
            world.cut_line("prfaas-0", "pd-1")
        else:
            world.kill("prfaas-0")
        world.step_until(lambda: not world.front.has_work)
        each_once(world, [journey], world.front.take_updates())
    assert journey.attempts == (2 if moment == "while it crosses" else 1)


def test_a_node_that_decodes_and_is_lost_in_the_handover_leaves_its_client_no_token_short(hybrid):
    with World(*hybrid, pd=2, split=0, relay=True) as world:
        for name in ("pd-0", "pd-1"):
            slow_line(world, name)
        (journey,) = world.submit(prompts_of(150), LONG)
        world.step_until(lambda: len(journey.output_ids) > 5)
        world.kill(journey.decision.decode_node)
        world.machines["prfaas-0"].ends[({"pd-0", "pd-1"} & {*world.machines}).pop()].room.set()
        world.step_until(lambda: not world.front.has_work)
        each_once(world, [journey], world.front.take_updates())
    assert journey.recoveries == 1


def test_a_client_that_goes_away_ends_the_relay_too(hybrid):
    with World(*hybrid, pd=1, split=0, relay=True) as world:
        line = slow_line(world)
        (journey,) = world.submit(prompts_of(150), LONG)
        world.step_until(lambda: len(journey.output_ids) > 2)
        world.front.abort(journey.id)
        line.room.set()
        world.step_until(lambda: world.is_empty)


def test_a_prompt_is_never_put_out_of_its_blocks_for_a_relay(models):
    """An engine makes room for a token by preempting the youngest, whose rows a stream may be reading here."""
    with World(*models["qwen3"], pd=1, split=0, relay=True, pool=31, prefill_chunk=16) as world:
        line, engine = slow_line(world), world.part("prfaas-0").engine
        journeys = world.submit(prompts_of(150, 300), LONG)
        world.step_until(lambda: len(journeys[0].output_ids) > 2)
        world.step_until(lambda: not engine.has_work)
        assert 0 < relayed(world) < 39, "the relay ended for want of a block, while the other prompt held its own"
        line.room.set()
        world.step_until(lambda: not world.front.has_work)
        each_once(world, journeys, world.front.take_updates())
    assert [journey.attempts for journey in journeys] == [1, 1]


# ---- each side alone, word by word


TWELVE = {"max_tokens": 12, "ignore_eos": True}


def with_relayed(hybrid, count, **change):
    """A decode role to which so many tokens were relayed; the answer of one process."""
    desk, order = served(hybrid, relay=True, sampling=TWELVE, **change)
    answer = reference(*hybrid, [PROMPT], SamplingParams(**TWELVE))[0]
    desk.now_s = 1010.0
    desk.role.hear(PEER, relay_of(answer[0]))
    assert desk.said() == [], "no token before the word that the prompt is prefilled"
    desk.role.hear(PEER, messages.PrefillDone("a#1", answer[0], 32, 2.0, 0, False))
    assert desk.said() == [messages.Prefilled("a#1", 68, 2.0, 0)]
    for number, token in enumerate(answer[:count]):
        for sender in ("pd-9", PEER):
            desk.role.hear(sender, relay_of(token))
        started = [messages.Started("a#1", 0, 0, 1010.0 - 1000.0 - 2.0, 2.0, 0.0, 0.0)]
        assert desk.said() == started * (number == 0) + [relay_of(token)]
    return desk, order, answer


def relay_of(token, reason=""):
    return messages.TokenDrawn("a#1", token, f"t{token}", reason, "")


@pytest.mark.parametrize("count", [1, 3, 11])
def test_relayed_tokens_are_handed_on_and_once_the_kvcache_is_here_the_next_are_drawn_here(hybrid, count):
    desk, order, answer = with_relayed(hybrid, count)
    desk.after(1.0)
    sender, sent = prefilled(hybrid)
    plan = stream_plan(desk.engine.layout, order.stream_id, 0, 100)
    assert not desk.role.is_ready and desk.told() == []
    assert desk.said() == [messages.Progress("a#1", 100, 0, plan.total_bytes)]
    ship(desk.there.open(plan), sender, sent.cache.block_tables)
    desk.notice()
    assert desk.role.is_ready
    words = []
    if count == 11:  # a long pass over ten tokens, during which more may be relayed, comes first
        desk.after(0.0)
        assert desk.told() == [] and desk.role.is_ready
    desk.after(0.0)
    assert desk.told() == [messages.RelayOver("a#1")]
    words = [word for word in desk.said() if not isinstance(word, messages.Progress)]
    while desk.role.has_work:
        desk.after(0.0)
        words += [word for word in desk.said() if not isinstance(word, messages.Progress)]
    started, *drawn = words
    assert started == messages.Started(
        "a#1", 0, plan.total_bytes, 8.0, 2.0, 1011.0 - 1010.0, 0.0, transfer_s=started.transfer_s)
    assert started.transfer_s > 0
    assert [one.token_id for one in drawn] == answer[count:] and drawn[-1].finish_reason == "length"
    assert desk.told() == [] and not desk.role.is_ready
    assert desk.is_empty


def test_an_answer_whose_last_token_was_relayed_ends_here_without_its_kvcache(hybrid):
    desk, order, answer = with_relayed(hybrid, 2)
    stream = desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100))
    sender, sent = prefilled(hybrid)
    ship(stream, sender, sent.cache.block_tables, stream.plan.entries[:1])
    desk.role.hear(PEER, relay_of(answer[2], "stop"))
    started, last = desk.said()
    assert last == relay_of(answer[2], "stop") and started.kv_bytes == stream.plan.entries[0].row_bytes
    assert desk.told() == [messages.Abort("a#1")]
    assert desk.is_empty
    desk.after(0.0)
    desk.role.hear(PEER, relay_of(5))
    assert desk.said() == []


def test_a_relayed_token_that_is_none_is_a_prefill_that_failed(hybrid):
    for token in (-1, 257):
        desk, _, _ = with_relayed(hybrid, 1)
        desk.role.hear(PEER, relay_of(token))
        assert desk.said() == [messages.Failed("a#1", f"relayed token {token} is outside the vocabulary", "lost")]


def test_a_client_that_goes_away_while_relayed_rows_are_computed_leaves_nothing_behind(hybrid):
    desk, order, _ = with_relayed(hybrid, 11)
    sender, sent = prefilled(hybrid)
    ship(desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100)), sender, sent.cache.block_tables)
    desk.notice()
    desk.after(0.0)
    assert desk.role.is_ready and desk.told() == [], "after one pass of several"
    desk.role.hear(FRONT, messages.Abort("a#1"))
    assert desk.is_empty


def test_relayed_tokens_beyond_what_this_node_could_hold_end_the_answer_as_its_own_would(hybrid):
    blocks = Desk(hybrid, Role.PDD).engine.layout.blocks_for(112)
    desk, order, answer = with_relayed(hybrid, 11, pool=blocks)
    assert desk.engine.kvcache.max_tokens == 112
    desk.role.hear(PEER, relay_of(answer[11]))
    assert desk.said()[-1] == messages.TokenDrawn("a#1", answer[11], f"t{answer[11]}", "length", "pool")
    assert not desk.role.has_work


def test_an_answer_that_ends_before_its_kvcache_came_says_all_that_had_crossed(hybrid):
    """Of the rows, and of the snapshot that was to come after them."""
    desk, order = served(hybrid, relay=True, sampling=TWELVE)
    sender, sent = prefilled(hybrid)
    desk.role.hear(PEER, messages.PrefillDone("a#1", 5, 32, 2.0, 0, True))
    layout, tables = desk.engine.layout, sent.cache.block_tables
    rows = stream_plan(layout, order.stream_id, 0, 100)
    ship(desk.there.open(rows), sender, tables, end=32, entries=rows.entries[-1:])
    state = snapshot_plan(layout, order.snapshot_stream_id, order.snapshot_at)
    ship(desk.there.open(state), sender, sender.kvcache.snapshots.hold(sent.cache, 96), entries=state.entries[:1])
    desk.role.hear(PEER, relay_of(5))
    desk.role.hear(PEER, relay_of(6, reason="stop"))
    told = [word.kv_bytes for word in desk.said() if isinstance(word, messages.Started)]
    assert told == [0, 32 * rows.entries[-1].row_bytes + state.entries[0].row_bytes]


def test_a_prompt_that_was_prefilled_beside_its_decode_role_is_relayed_to_nobody(hybrid):
    """Its KVCache is there with the first token: to draw the next ones here, too, would be work for nothing."""
    desk, order = Desk(hybrid, Role.PDP, relay=True), ordered(sampling=TWELVE, snapshot_at=0)
    plan = stream_plan(desk.engine.layout, order.stream_id, order.start, 100)
    desk.mail.transport(HERE).expect(plan, lambda *_: None)
    desk.role.hear(HERE, order)
    step_until(desk, lambda: not desk.role.has_work)
    words = desk.said(messages.CacheNews, messages.NodeFigures, messages.PrefillProgress)
    assert [type(word) for word in words] == [messages.PrefillDone] and desk.engine.decoded_tokens == 0


def test_a_relay_goes_on_until_the_decode_node_takes_over_and_at_nobody_elses_word(hybrid):
    answer = reference(*hybrid, [PROMPT], SamplingParams(**TWELVE))[0]
    for end in ("", "over", "abort", "lost", "deadline", "refused"):
        desk, order = Desk(hybrid, Role.PRFAAS, relay=True), ordered(sampling=TWELVE)
        expecting(desk, order)
        if end == "refused":
            desk.line.room.clear()  # the KVCache is on its way still
        desk.role.hear(PEER, order)
        words = []

        def drawn():
            words.extend(desk.told())
            return [word for word in words if isinstance(word, messages.TokenDrawn)]

        step_until(desk, lambda: len(drawn()) >= 3)
        desk.role.hear("pd-9", messages.RelayOver("a#1"))
        desk.role.notice(PeerLost("pd-9", "gone"))
        step_until(desk, lambda: len(drawn()) >= 5)
        if end == "deadline":
            desk.now_s += 31.0
        elif end:
            {"over": lambda: desk.role.hear(PEER, messages.RelayOver("a#1")),
             "abort": lambda: desk.role.hear(PEER, messages.Abort("a#1")),
             "lost": lambda: desk.role.notice(PeerLost(PEER, "gone")),
             "refused": lambda: (desk.there.forget(order.stream_id), desk.line.room.set())}[end]()
        before = len(drawn())
        step_until(desk, lambda: not desk.role.has_work)
        if end == "refused":  # the sending thread takes its time to hear of it
            before = len(drawn())
            assert before < 12 and any(isinstance(word, messages.Failed) for word in words)
        assert [one.token_id for one in drawn()] == answer[:before if end else 12]
        assert (drawn()[-1].finish_reason, drawn()[-1].length_limit) == (("", "") if end else ("length", "max_tokens"))
        assert desk.engine.kvcache.stats().in_use == 0 and not desk.engine.has_work
