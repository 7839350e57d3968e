"""Relay decode: first tokens that do not wait for the KVCache, and a handover that nobody can see. Chapter 15."""

import pytest
from test_two_datacenters import prompts_of
from world import World

from minprfaas import SamplingParams, generate

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
