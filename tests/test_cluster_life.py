"""Many nodes, one request's life: whatever the topology and whoever is lost, the answers are those of one process."""

import random

import pytest
from test_two_datacenters import prompts_of
from world import World

from minprfaas import SamplingParams
from minprfaas.config import Role
from minprfaas.engine.request import Status

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(autouse=True)
def _turns_are_short(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.node.IDLE_S", 0.0005)  # many nodes wait by turns here, in one thread


@pytest.mark.parametrize("prfaas, pd, split", [(1, 1, 0), (1, 2, 1), (2, 3, 1), (3, 5, 2)])
def test_a_burst_and_its_next_turns_get_the_answers_of_one_process_in_every_topology(hybrid, prfaas, pd, split):
    with World(*hybrid, prfaas, pd, split) as world:
        first = world.serve(prompts_of(20, 150, 200, 64, 130, 31, 180, 90), GREEDY)
        turns = [journey.token_ids + new for journey, new in zip(first, prompts_of(*[40] * 8, seed=5))]
        second = world.serve(turns, GREEDY)
        world.check([*first, *second])
    assert all(journey.kv_bytes > 0 for journey in (*first, *second) if journey.route == "prfaas")
    assert {journey.route for journey in first} == ({"prfaas", "pdp"} if split else {"prfaas"})
    assert len({journey.decision.decode_node for journey in first}) > 1 or pd - split == 1
    assert any(journey.held_tokens for journey in second) and any(journey.cached_tokens for journey in second)


# ---- the loss of the node that decodes


def test_when_the_node_that_decodes_is_killed_the_stream_goes_on_where_it_was(hybrid):
    """Greedy, sampled with a seed, with a stop string, up to its length: everything that a request needs goes on."""
    model, tokenizer = hybrid
    prompts = prompts_of(150, 20, 140, 160, 30)
    sampled = SamplingParams(max_tokens=60, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    from minprfaas import generate
    text = generate(model, tokenizer, prompts[2:3], sampled)[0].text
    stopped = SamplingParams(max_tokens=60, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True, stop=(text[40:43],))
    with World(model, tokenizer, prfaas=1, pd=3, split=1) as world:
        journeys = world.submit(prompts, [LONG, LONG, stopped, sampled, sampled])
        world.step_until(lambda: all(len(journey.output_ids) > 10 or journey.is_finished for journey in journeys))
        assert not any(journey.is_finished for journey in journeys), "nothing is left to lose"
        streamed = {journey.id: journey.text for journey in journeys}
        updates = world.front.take_updates()
        victim = journeys[0].decision.decode_node
        lost = [journey for journey in journeys if journey.decision.decode_node == victim]
        world.kill(victim)
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)
        updates += world.front.take_updates()
    assert lost and all(journey.recoveries == 1 for journey in lost)
    for journey in journeys:
        seen = [update for update in updates if update.journey is journey and update.token_id is not None]
        assert [update.token_id for update in seen] == journey.output_ids, "the client got each token once"
        assert "".join(update.new_text for update in seen) == journey.text
        assert journey.text.startswith(streamed[journey.id])
        assert journey.text.count(text[40:43]) == 0 or journey is not journeys[2]


def test_without_another_node_that_decodes_a_request_waits_until_one_comes(hybrid):
    with World(*hybrid, prfaas=1, pd=2, split=1) as world:
        journeys = world.submit(prompts_of(150, 20), LONG)
        world.step_until(lambda: all(journey.output_ids for journey in journeys))
        world.kill("pd-1")
        world.step_until(lambda: "pd-1" not in world.front.ready)
        drawn = [len(journey.output_ids) for journey in journeys]
        for _ in range(20):
            world.step()
        assert [len(journey.output_ids) for journey in journeys] == drawn and world.front.has_work
        world.start("pd-1")
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)
    assert all(journey.recoveries == 1 for journey in journeys)


def test_a_stopped_node_that_returns_takes_work_again_and_what_it_still_says_of_before_does_no_harm(hybrid):
    with World(*hybrid, prfaas=1, pd=3, split=1) as world:
        journeys = world.submit(prompts_of(150, 20, 140, 30), LONG)
        world.step_until(lambda: all(len(journey.output_ids) > 5 for journey in journeys))
        for name in ("pd-1", "prfaas-0"):
            world.stop(name)
        late = world.submit(prompts_of(170, seed=4), GREEDY)
        world.step_until(lambda: {"pd-1", "prfaas-0"}.isdisjoint(world.front.ready))
        world.step_until(lambda: any(len(journey.output_ids) > 20 for journey in journeys))
        for name in ("pd-1", "prfaas-0"):
            world.resume(name)
        world.step_until(lambda: {"pd-1", "prfaas-0"} <= world.front.ready.keys())
        again = world.submit(prompts_of(150, 33, 160, 34, 165, 35, seed=8), GREEDY)
        world.step_until(lambda: not world.front.has_work)
        world.check([*journeys, *late, *again])
    assert any(journey.recoveries for journey in journeys)
    assert {journey.decision.decode_node for journey in again} == {"pd-1", "pd-2"}
    assert "prfaas" in {journey.route for journey in again}


# ---- the loss of a node that prefills, at every stage


STAGES = {
    "computing": lambda prefill: prefill.request.status is Status.PREFILL and prefill.cache is not None,
    "sending": lambda prefill: prefill.request.status is Status.HELD,
}


@pytest.mark.parametrize("end", ["kill", "stop"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("victim, lengths", [("prfaas-0", (400, 410)), ("pd-0", (90, 95))])
def test_when_a_node_that_prefills_is_lost_another_one_does_it(hybrid, victim, lengths, stage, end):
    with World(*hybrid, prfaas=2, pd=3, split=2) as world:
        for other in ("pd-1", "pd-2"):  # what it sends stays on its way
            if other in world.machines[victim].ends:
                world.machines[victim].ends[other].room.clear()
        journeys = world.submit(prompts_of(*lengths, 30), GREEDY)
        prefills = world.part(victim).prefills
        world.step_until(lambda: any(STAGES[stage](prefill) for prefill in prefills.values()))
        getattr(world, end)(victim)
        world.step_until(lambda: not world.front.has_work)
        if end == "stop":
            world.resume(victim)
            world.step_until(lambda: victim in world.front.ready)
        world.check(journeys)
    assert any(journey.attempts > 1 for journey in journeys)
    assert not any(journey.decision.node == victim and journey.attempts > 1 for journey in journeys)


def test_blocks_that_are_held_for_a_peer_that_takes_nothing_are_freed_by_a_deadline_on_both_sides(hybrid):
    """The line stands still, and nobody says that the peer is lost."""
    with World(*hybrid, prfaas=1, pd=2, split=1, deadline_s=0.5) as world:
        world.machines["prfaas-0"].ends["pd-1"].room.clear()
        (journey,) = world.submit(prompts_of(300), GREEDY)
        held = world.part("prfaas-0").prefills
        world.step_until(lambda: held)
        world.step_until(lambda: not world.front.has_work)
        world.step_until(lambda: not held)
        world.check([journey])
    assert journey.route == "pdp" and "deadline" in journey.fallback


# ---- roles


def test_a_node_changes_its_role_while_requests_run_and_nothing_is_dropped(hybrid):
    model, tokenizer = hybrid
    with World(model, tokenizer, prfaas=1, pd=3, split=1) as world:
        plane = world.front.plane
        journeys = world.submit(prompts_of(150, 20, 140, 90, 30, 60), LONG)
        world.step_until(lambda: all(journey.output_ids for journey in journeys))
        busy = journeys[0].decision.decode_node
        before = journeys[0].decision.decode_node
        world.convert(busy, Role.PDP)
        more = world.submit(prompts_of(45, 150, 70, seed=3), GREEDY)
        world.step_until(lambda: world.roles_now()[busy] is Role.PDP)
        assert journeys[0].is_finished and journeys[0].decision.decode_node == before, "it had drained first"
        world.step_until(lambda: busy in plane.nodes(Role.PDP))
        keys = [key.hex() for key in world.part(busy).engine.kvcache.keys(journeys[0].token_ids)]
        world.step_until(lambda: busy in plane.directory.match(keys))  # its cache is kept, and told again
        after = world.serve(prompts_of(80, 81, 82, 83, seed=6), GREEDY)
        world.convert("pd-0", Role.PDD)
        world.step_until(lambda: world.roles_now()["pd-0"] is Role.PDD)
        back = world.serve(prompts_of(50, 51, 52, 53, seed=7), GREEDY)
        world.check([*journeys, *more, *after, *back])
    assert busy in {journey.decision.node for journey in after}
    assert {journey.decision.node for journey in back} == {busy}
    assert "pd-0" in {journey.decision.decode_node for journey in back}
    assert not any(journey.recoveries or journey.attempts > 1 for journey in (*journeys, *more, *after, *back))
