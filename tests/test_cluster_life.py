"""Many nodes, one request's life: whatever the topology and whoever is lost, the answers are those of one process.

Chapters 13 and 14.
"""

import random
import time
from dataclasses import replace

import pytest
from test_two_datacenters import prompts_of
from world import World

from minprfaas import SamplingParams, generate
from minprfaas.config import FRONT, Role
from minprfaas.engine.request import Status
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.paper_case import paper_fleet
from minprfaas.scheduling.roles import RoleChange

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(autouse=True)
def _turns_are_short(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.node.IDLE_S", 0.0005)  # many nodes wait by turns here, in one thread


@pytest.mark.parametrize("prfaas, pd, split", [(1, 1, 0), (2, 3, 1), (3, 5, 2)])
def test_a_burst_and_its_next_turns_get_the_answers_of_one_process_in_every_topology(hybrid, prfaas, pd, split):
    with World(*hybrid, prfaas, pd, split) as world:
        short = SamplingParams(max_tokens=6, ignore_eos=True)
        first = world.serve(prompts_of(20, 150, 200, 64, 130, 31), short)
        turns = [journey.token_ids + new for journey, new in zip(first, prompts_of(*[40] * 6, seed=5))]
        second = world.serve(turns, short)
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
        before = {*world.part("pd-1").servings}
        for name in ("pd-1", "prfaas-0"):
            world.stop(name)
        late = world.submit(prompts_of(170, seed=4), GREEDY)
        world.step_until(lambda: {"pd-1", "prfaas-0"}.isdisjoint(world.front.ready))
        world.step_until(lambda: any(len(journey.output_ids) > 20 for journey in journeys))
        for name in ("pd-1", "prfaas-0"):
            world.resume(name)
        world.step_until(lambda: {"pd-1", "prfaas-0"} <= world.front.ready.keys())
        assert before and before.isdisjoint(world.part("pd-1").servings), "it goes on with nothing of before"
        again = world.submit(prompts_of(150, 33, 160, 34, 165, 35, seed=8), GREEDY)
        world.step_until(lambda: not world.front.has_work)
        world.check([*journeys, *late, *again])
    assert any(journey.recoveries for journey in journeys)
    assert {journey.decision.decode_node for journey in again} == {"pd-1", "pd-2"}
    assert "prfaas" in {journey.route for journey in again}


def test_a_front_end_that_stood_still_goes_on_with_every_request_where_it_was(hybrid):
    """Nobody else knows what the clients have: every token that comes later comes once."""
    with World(*hybrid, prfaas=1, pd=3, split=1) as world:
        journeys = world.submit(prompts_of(150, 20), SamplingParams(max_tokens=25, ignore_eos=True))
        world.step_until(lambda: all(len(journey.output_ids) > 5 for journey in journeys))
        world.stop(FRONT)
        for _ in range(50):  # the others go on for a while, with nobody to tell
            world.step()
        world.resume(FRONT)
        late = world.submit(prompts_of(130, seed=4), GREEDY)
        world.step_until(lambda: not world.front.has_work)
        world.check([*journeys, *late])
        seen = [update for update in world.front.take_updates() if update.token_id is not None]
        world.step_until(lambda: world.is_empty)
    for journey in (*journeys, *late):
        assert [update.token_id for update in seen if update.journey is journey] == journey.output_ids
    assert all(journey.recoveries == 1 for journey in journeys)


# ---- the loss of a node that prefills, at every stage


STAGES = {
    "computing": lambda prefill: prefill.request.status is Status.PREFILL and prefill.cache is not None,
    "sending": lambda prefill: prefill.request.status is Status.HELD,
}


@pytest.mark.parametrize("victim, lengths, stage, end", [
    ("prfaas-0", (400, 410), "computing", "kill"), ("prfaas-0", (400, 410), "sending", "stop"),
    ("pd-0", (90, 95), "computing", "stop"), ("pd-0", (90, 95), "sending", "kill")])
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
        world.step_until(lambda: held or journey.attempts > 1)
        world.step_until(lambda: not world.front.has_work)
        world.step_until(lambda: not held)
        world.check([journey])
    assert journey.route == "pdp" and "deadline" in journey.fallback


def test_a_node_that_failed_a_request_is_tried_again_when_none_is_left(hybrid):
    """Only the line between the two is away, so that for everybody else both are well."""
    with World(*hybrid, prfaas=1, pd=1, split=0) as world:
        world.cut_line("prfaas-0", "pd-0")
        journeys = world.submit(prompts_of(150), GREEDY)
        world.step_until(lambda: journeys[0].attempts > 2)
        world.mend_line("prfaas-0", "pd-0")
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)


# ---- roles


def test_a_node_that_is_to_decode_first_sends_what_it_has_prefilled(hybrid):
    with World(*hybrid, prfaas=1, pd=3, split=2) as world:
        world.machines["pd-0"].ends["pd-2"].room.clear()
        journeys = world.submit(prompts_of(90), GREEDY)
        prefills = world.part("pd-0").prefills
        world.step_until(lambda: any(prefill.request.status is Status.HELD for prefill in prefills.values()))
        world.convert("pd-0", Role.PDD)
        actions = []
        world.step_until(lambda: actions.extend(world.front.take_actions()) or
                         any(isinstance(action, RoleChange) for action in actions))
        for _ in range(5):
            world.step()
        assert world.roles_now()["pd-0"] is Role.PDP and prefills
        world.machines["pd-0"].ends["pd-2"].room.set()
        world.step_until(lambda: world.roles_now()["pd-0"] is Role.PDD)
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)
    assert journeys[0].attempts == 1


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


def test_a_node_that_drains_ends_what_it_has_begun_and_what_waits_goes_to_another(hybrid):
    ahead_s = [0.0]
    with World(*hybrid, prfaas=1, pd=3, split=1, clock=lambda: time.monotonic() + ahead_s[0]) as world:
        journeys = world.submit(prompts_of(*range(150, 162)), GREEDY)
        world.step_until(lambda: any(journey.output_ids for journey in journeys))
        there = next(journey for journey in journeys if journey.output_ids).decision.decode_node
        waiting = [journey for journey in journeys if not journey.prefilled_tokens]
        world.convert(there, Role.PDP)

        def has_changed():
            ahead_s[0] += 1.0  # the control plane looks at a drain once a second
            return world.roles_now()[there] is Role.PDP

        world.step_until(has_changed)
        assert not any(journey.output_ids for journey in waiting[-4:]), "it did not wait for the end of the queue"
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)
    assert not any(journey.recoveries for journey in journeys)
    assert {journey.attempts for journey in journeys} == {1, 2}
    assert {journey.attempts for journey in journeys if journey not in waiting} == {1}


def test_the_long_term_loop_of_the_control_plane_converts_a_live_node(hybrid, monkeypatch):
    """Answers are long and one decode node is all there is: by its books decode is the bottleneck, for long enough."""
    for name, value in (("SUSTAIN_S", 0.0), ("INTERVAL_S", 0.0)):
        monkeypatch.setattr(f"minprfaas.scheduling.roles.{name}", value)
    monkeypatch.setattr("minprfaas.scheduling.control.BUSY_SMOOTH_S", 0.01)
    profile = replace(paper_fleet().pd_profile, bs_max=1)
    fleet = replace(paper_fleet(), prfaas_instances=1, pd_instances=4, pd_profile=profile, output_tokens=2000)
    settings = replace(ControlSettings(100, 100.0), fleet=fleet, convert_roles=True)
    now_s = [1000.0]
    with World(*hybrid, prfaas=1, pd=4, split=3, plane=ControlPlane(settings), clock=lambda: now_s[0]) as world:
        for number, prompt in enumerate(prompts_of(*[20] * 65)):
            world.front.submit(str(number), prompt, LONG)

        def has_changed():
            now_s[0] += 1.0
            return Role.PDD in [role for name, role in world.roles_now().items() if name != "pd-3"]

        world.step_until(has_changed)
        change = next(action for action in world.front.take_actions() if isinstance(action, RoleChange))
        assert world.front.has_work, "it was converted beside requests that go on"
        for id in list(world.front.journeys):
            world.front.abort(id)
        world.step_until(lambda: world.is_empty)
    assert change.role is Role.PDD and "decode" in change.reason and "would" in change.reason


# ---- prefixes


def test_a_hot_prefix_is_copied_to_an_idle_node_of_its_cluster_and_computed_by_none_of_them_again(hybrid):
    (prefix,) = prompts_of(320)
    with World(*hybrid, prfaas=2, pd=2, split=1) as world:
        (first,) = world.serve([prefix], GREEDY)
        holder = first.decision.node
        world.step_until(lambda: holder in world.front.plane.directory.match(first.keys))
        turns = world.serve([prefix + new for new in prompts_of(*[150] * 6, seed=2)], GREEDY)
        world.check([first, *turns])
        matches = world.front.plane.directory.match(turns[0].keys)
    assert {"prfaas-0", "prfaas-1"} <= matches.keys()
    copied = [journey for journey in turns if journey.decision.node != holder]
    assert copied and copied[0].decision.shipment.source == holder and copied[0].prefix_bytes > 0
    assert all(journey.cached_tokens >= 304 for journey in turns)


@pytest.mark.parametrize("victim", ["source", "fetcher"])
def test_a_node_that_is_lost_while_a_prefix_is_shipped_costs_a_prefill_elsewhere(hybrid, victim):
    (prefix,) = prompts_of(320)
    with World(*hybrid, prfaas=2, pd=2, split=1) as world:
        (first,) = world.serve([prefix], GREEDY)
        source = first.decision.node
        (fetcher,) = {"prfaas-0", "prfaas-1"} - {source}
        world.step_until(lambda: source in world.front.plane.directory.match(first.keys))
        world.machines[source].ends[fetcher].room.clear()
        turns = world.submit([prefix + new for new in prompts_of(*[150] * 4, seed=2)], GREEDY)
        world.step_until(lambda: world.part(fetcher).upkeep.prefixes and world.part(source).upkeep.outgoing)
        world.kill({"source": source, "fetcher": fetcher}[victim])
        world.step_until(lambda: not world.front.has_work)
        world.check([first, *turns])
    assert any(journey.attempts > 1 for journey in turns)


# ---- what a door that runs for weeks needs


def test_ended_requests_are_forgotten_and_their_ids_may_be_used_again(hybrid):
    with World(*hybrid, prfaas=1, pd=2, split=1) as world:
        one = SamplingParams(max_tokens=1)
        journeys = [journey for _ in range(2) for journey in world.serve(prompts_of(*[5] * 6), one)]
        assert not world.front.journeys and len({journey.attempt for journey in journeys}) == 12
        kept = [value for value in vars(world.front).values() if isinstance(value, dict | list | set)]
        assert not any(journey.attempt in value for value in kept for journey in journeys)
        world.front.submit("again", [1, 2], GREEDY)
        world.front.abort("again")
        (again,) = [world.front.submit("again", prompts_of(30)[0], GREEDY)]
        world.step_until(lambda: not world.front.has_work)
        world.check([*journeys, again])


# ---- everything at random


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(10))
def test_ten_losses_stops_and_role_changes_at_random_moments_lose_nothing(hybrid, seed):
    draw = random.Random(seed)
    sampled = SamplingParams(max_tokens=40, temperature=1.0, seed=seed, ignore_eos=True)
    with World(*hybrid, prfaas=2, pd=4, split=2) as world:
        journeys, away = [], {}
        for _ in range(10):
            lengths = [draw.choice((20, 60, 150, 250)) for _ in range(5)]
            new = [[draw.randrange(1, 257) for _ in range(length)] for length in lengths]
            told = [journey.token_ids for journey in journeys if journey.is_finished and len(journey.token_ids) < 300]
            new += [draw.choice(told) + new[0][:30]] if told else []
            started = [world.front.submit(f"{len(journeys) + i}", prompt, draw.choice((LONG, GREEDY, sampled)))
                       for i, prompt in enumerate(new)]
            journeys += started
            for _ in range(draw.randrange(60)):
                world.step()
            name = draw.choice([name for name in world.roles if name not in away])
            event = draw.choice(("kill", "stop", "convert"))
            if event != "convert":
                getattr(world, event)(name)
                away[name] = event
            elif name.startswith("pd"):
                world.convert(name, Role.PDP if world.roles_now()[name] is Role.PDD else Role.PDD)
            for _ in range(draw.randrange(60)):
                world.step()
            if len(away) > 2 or draw.random() < 0.5:
                for name, event in away.items():
                    world.start(name) if event == "kill" else world.resume(name)
                away.clear()
        for name, event in away.items():
            world.start(name) if event == "kill" else world.resume(name)
        world.step_until(lambda: not world.front.has_work)
        world.check(journeys)
