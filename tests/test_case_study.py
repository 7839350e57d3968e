"""What the live case study is judged by: scales, the rule for a sustained rate, its file, its verdict. Chapter 13."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minprfaas.cluster.emulation import Emulation, verdict
from minprfaas.cluster.messages import Goodbye
from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE
from minprfaas.config import CacheConfig, LinkSample, Role, SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.paced import Pace, PacedEngine
from minprfaas.engine.reference import generate
from minprfaas.errors import UserError
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import ControlSettings, LinkMeasured, NodeJoined
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.profiles import Scale
from minprfaas.scheduling.router import RouteRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from case_study.loops import Outcome, gain_in_words, gains, loops  # noqa: E402
from case_study.loops import simulate as simulate_loop  # noqa: E402
from case_study.plane import EmulatedPlane  # noqa: E402
from case_study.probe import Answer, wrong_answers  # noqa: E402
from case_study.results import Results  # noqa: E402
from case_study.side_by_side import Job, expected_s, run_all  # noqa: E402
from case_study.soak import Watch, growing  # noqa: E402
from case_study.study import Deployment, Study, capacity_rps, in_real_units, simulate  # noqa: E402
from case_study.sustained import (  # noqa: E402
    STRATUM, Reading, highest_sustained, reading, stratified)

SCALE = Scale(time=3, length=64, size=0.001)


def a_reading(rate_rps, growth=0.0, served_rps=1.0):
    return Reading(rate_rps, growth, served_rps, 2.0, 3.0, 0.5, 10.0)


def test_a_plan_made_in_the_runs_units_is_the_real_one_once_the_scale_is_undone():
    fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
    run = replace(fleet, prfaas_profile=SCALE.profile(fleet.prfaas_profile), output_tokens=16,
                  pd_profile=SCALE.profile(fleet.pd_profile), link_gbps=SCALE.run_gbps(fleet.link_gbps))
    short = type(lengths).__mro__[1](length / SCALE.length for length in lengths.values)
    real, scaled = plan(fleet, lengths, threshold=19_400), plan(run, short, threshold=19_400 / SCALE.length)
    assert scaled.n_p == real.n_p
    assert SCALE.rate_rps(scaled.lambda_max) == pytest.approx(real.lambda_max, rel=1e-6)
    assert SCALE.gbps(scaled.egress_gbps) == pytest.approx(real.egress_gbps, rel=1e-6)
    assert SCALE.tokens(scaled.mean_offloaded_tokens) == pytest.approx(real.mean_offloaded_tokens, rel=1e-6)
    prefill_s = Emulation(fleet.prfaas_profile, fleet.pd_profile, SCALE).profile_at(PD_SITE).prefill_s(500)
    assert SCALE.seconds(prefill_s) == pytest.approx(fleet.pd_profile.prefill_s(500 * 64), rel=1e-6)


def test_figures_of_a_run_are_given_in_real_units():
    run = Reading(1.0, 0.01, 0.9, 6.0, 9.0, 0.5, 0.004)
    assert in_real_units(SCALE, run, 3.0) == Reading(3.0, 0.01, pytest.approx(2.7), 2.0, 3.0, 0.5, pytest.approx(12.0))


@pytest.mark.parametrize("text", ["2,64", "2,64,x", "0,1,1", "", "nan,1,1"])
def test_a_scale_that_is_none_is_refused(text):
    with pytest.raises(UserError):
        Scale.parse(text)


def test_each_stratum_of_a_probe_holds_every_part_of_the_lengths_once():
    lengths = paper.paper_lengths()
    requests = stratified(2.0, 3 * STRATUM, lengths, 1024, seed=4)
    bounds = [lengths.quantile(part / STRATUM) for part in range(STRATUM + 1)]
    for first in range(0, len(requests), STRATUM):
        block = requests[first:first + STRATUM]
        for low, tokens, high in zip(bounds, sorted(one.input_tokens for one in block), bounds[1:]):
            assert low - 1 <= tokens <= high + 1
        assert first / 2.0 <= block[0].arrived_at_s <= block[-1].arrived_at_s <= (first + STRATUM) / 2.0


def test_a_rate_is_sustained_when_the_backlog_does_not_grow_with_it():
    arrivals = [index / 4 for index in range(200)]  # 4 a second
    steady = reading(4.0, arrivals, [at_s + 3 for at_s in arrivals], [False] * 200, 0)
    assert steady.is_sustained and steady.growth == pytest.approx(0, abs=0.01) and steady.ttft_mean_s == 3
    behind = reading(4.0, arrivals, [index / 3 for index in range(200)], [True] * 200, 1e9)  # 3 a second are served
    assert not behind.is_sustained and behind.growth == pytest.approx(0.25, abs=0.01)
    assert behind.served_rps == pytest.approx(3.0, rel=0.03) and behind.offloaded_fraction == 1
    lost = reading(4.0, arrivals, [at_s + 3 if at_s < 25 else None for at_s in arrivals], [False] * 200, 0)
    assert not lost.is_sustained


def test_what_is_served_is_measured_by_the_route_that_cannot_keep_up():
    arrivals, remote = [index / 4 for index in range(200)], [index % 2 == 0 for index in range(200)]
    firsts = [at_s + 1 if far else 2 * at_s for at_s, far in zip(arrivals, remote)]  # half of what is local waits
    assert reading(4.0, arrivals, firsts, remote, 0).served_rps == pytest.approx(2.0, rel=0.05)
    assert reading(4.0, arrivals, firsts, remote, 0).growth == pytest.approx(0.5, abs=0.02)
    assert reading(4.0, arrivals, firsts, remote, 0, by_length=False).served_rps == pytest.approx(3.0, rel=0.05)


def test_the_search_ends_between_a_rate_that_is_sustained_and_one_that_is_not():
    for start_rps in (0.5, 2.9, 9.0):
        readings = highest_sustained(lambda rate: a_reading(rate, growth=max(0.0, 1 - 3 / rate) + 0.079), start_rps, 40)
        best = max(one.rate_rps for one in readings if one.is_sustained)
        grew = min(one.rate_rps for one in readings if not one.is_sustained)
        assert 2.85 <= best < 3.01 and 3.0 < grew <= best * 1.05
    assert not any(one.is_sustained for one in highest_sustained(lambda rate: a_reading(rate, growth=1.0), 4.0, 5))
    assert capacity_rps([a_reading(2.0), a_reading(4.0, 0.3, served_rps=2.8)]) == 2.8
    assert capacity_rps([a_reading(3.0, 0.06), a_reading(4.0, 0.3, served_rps=2.7)]) == pytest.approx(2.82)


def test_the_simulated_homogeneous_cluster_sustains_what_is_planned():
    study, deployment = Study(SCALE, 288, 0, quick=True), Deployment("homogeneous", *paper.paper_plans()["homogeneous"])
    below, above = study.search(lambda rate: simulate(study, deployment, rate), 2.11)
    assert below.is_sustained and not above.is_sustained and below.offloaded_fraction == 0
    assert above.served_rps == pytest.approx(2.11, rel=0.06)
    counts = [len(study.probe_arrivals(rate, 2.11)) for rate in (1.69, 2.64)]
    assert 2 * counts[0] == counts[1] and sum(counts) == 576, "Lambda is read at the second rate"
    assert study.patience_s(1.69, 2.11) > study.patience_s(2.64, 2.11) == 0, "no figure needs what comes after it"


def test_results_are_taken_up_again_after_half_a_line(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path, "these")
    results.add("naive", "reading", a_reading(2.5))
    Results(path, "others").add("naive", "reading", a_reading(9.0))
    results.add("naive", "verdict", {"words": "fine", "is_valid": True, "wrong": 0, "checked": 3})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"settings": "these", "deploy')
    again = Results(path, "these")
    assert again.reading("naive", 2.5) == a_reading(2.5) and again.reading("naive", 9.0) is None
    assert again.last("naive", "verdict")["is_valid"] and again.last("prfaas_pd", "verdict") is None
    again.add("prfaas_pd", "reading", a_reading(3.0))
    assert Results(path, "these").readings("prfaas_pd") == [a_reading(3.0)], "the half line took nothing with it"
    with pytest.raises(UserError):
        Results(tmp_path, "a directory")


def test_an_emulation_is_valid_while_every_node_kept_its_pace():
    good = Goodbye(1, "", allowed_s=100.0, needed_s=40.0, late_s=1.0)
    words, is_valid = verdict({"pd-0": good, "pd-1": Goodbye(1, "")})
    assert is_valid and "pd-0 was late by 1.0%" in words and "40%" in words
    words, is_valid = verdict({"pd-0": good, "pd-1": replace(good, allowed_s=10.0)})
    assert not is_valid and "NOT VALID" in words and "pd-1 was late by 10.0%" in words
    assert not verdict({})[1]


def test_nodes_of_each_datacenter_have_their_own_machine():
    emulation = Emulation(paper.h200_profile(), paper.h20_profile(), SCALE)
    assert emulation.profile_at(PRFAAS_SITE).prefill_s(100) < emulation.profile_at(PD_SITE).prefill_s(100)


def test_a_decode_step_passes_without_holding_up_its_node_and_no_more_than_the_batch_take_part():
    from minprfaas import load
    now_s = [0.0]
    engine = PacedEngine(*load(), CacheConfig(64), clock=lambda: now_s[0])
    params = SamplingParams(8, ignore_eos=True)
    requests = [engine.add(engine.request(str(number), [5, 6, 7 + number], params)) for number in range(3)]
    while engine.waiting or engine.prefilling:
        Engine.step(engine)
    engine.emulate(Pace(lambda tokens: 0.0, lambda batch: float(batch)), max_batch=2)
    drawn = [len(one.output_ids) for one in requests]
    assert engine.step() == [] and not engine.is_ready, "a step of 2 s has begun"
    now_s[0] += 2.25  # it is looked at late; the next one is not
    assert engine.is_ready and [update.request for update in engine.step()] == requests[:2]
    assert [len(one.output_ids) - before for one, before in zip(requests, drawn)] == [1, 1, 0]
    assert engine.step() == [], "the next step has begun when the first was due"
    now_s[0] += 1.5
    assert not engine.is_ready
    now_s[0] += 0.25
    assert engine.is_ready and len(engine.step()) == 2 and engine.runner.pace.late_s == 0
    for request in requests:
        engine.abort(request)
    now_s[0] += 60.0
    admit(engine, "later", params)
    assert engine.step() == [] and engine.runner.pace.late_s == 0, "who comes much later begins a step, and ends none"


def admit(engine, name, params):
    request = engine.request(name, [5, 6, 7], params)
    assert engine.reserve_remote(request)
    engine.admit_remote(request, 8)
    return request


def test_who_joins_in_the_second_half_of_a_step_that_stands_for_many_takes_part_in_the_next():
    from minprfaas import load
    now_s = [0.0]
    engine = PacedEngine(*load(), CacheConfig(64), clock=lambda: now_s[0])
    engine.emulate(Pace(lambda tokens: 0.0, lambda batch: 4.0 + batch), max_batch=8)
    params = SamplingParams(8, ignore_eos=True)
    first = admit(engine, "first", params)
    assert engine.step() == []  # until 5 s
    now_s[0] = 2.0
    early = admit(engine, "early", params)
    now_s[0] = 3.0
    late, gone = admit(engine, "late", params), admit(engine, "gone", params)
    engine.abort(gone)
    assert engine.runner.step_due_at_s == 5.0, "the others are in the step still"
    now_s[0] = 5.0
    assert [update.request for update in engine.step()] == [first, early]
    assert engine.step() == [] and engine.runner.step_due_at_s == 12.0, "a step of three, from when the first was due"
    now_s[0] = 12.0
    assert [update.request for update in engine.step()] == [first, early, late]


def test_a_loops_verdict_is_that_of_its_figures():
    assert gain_in_words("it", [0.2, 0.3], [0.1, 0.4]).startswith("as predicted: it shortens the mean TTFT by 25 ± 21%")
    words = gain_in_words("it", [0.2, 0.3], [0.1, -0.4])
    assert words.startswith("NOT as predicted") and "same in 1 of 2 seeds" in words
    assert gains({"off": [Outcome(4.0, 9.0, 0, 0, 0.0)], "on": [Outcome(3.0, 9.0, 2, 0, 0.0)]}, "off", "on") == [0.25]


def test_the_simulator_predicts_that_every_loop_helps_in_each_seed_it_is_run_with():
    for loop in loops(None):
        outcomes = {policy: [simulate_loop(loop, policy, 0)] for policy in loop.policies}
        (gain,) = gains(outcomes, *loop.policies)
        assert gain > 0.2, loop.name
        cluster = loop.emulated([*loop.policies][1])
        real, run = loop.requests(0), cluster.requests(loop.requests(0))
        assert loop.scale.seconds(run[-1].arrived_at_s) == pytest.approx(real[-1].arrived_at_s)
        assert all(one.output_tokens >= 2 and one.keys == of.keys for one, of in zip(run, real))


def test_the_control_plane_of_an_emulated_run_lives_in_the_emulated_machines_time():
    units = Scale(1, SCALE.length, SCALE.size)
    fleet = replace(paper.paper_fleet(), prfaas_profile=units.profile(paper.h200_profile()),
                    pd_profile=units.profile(paper.h20_profile()), link_gbps=units.run_gbps(100))
    plane = EmulatedPlane(ControlSettings(300, 1.0, fleet=fleet, adaptive=True), SCALE.time)
    for name, role in (("a", Role.PRFAAS), ("b", Role.PDP), ("c", Role.PDD)):
        plane.hear(NodeJoined(name, role), 0.0)
    assert plane.egress.gbps == pytest.approx(0.1)
    for tick in range(100):  # half of the line's bandwidth, in the run's seconds, all of it in use
        plane.hear(LinkMeasured("a", LinkSample(0.0, SCALE.run_gbps(50), 1.0, 0.0)), tick * SCALE.time)
    assert units.gbps(plane.egress.gbps) == pytest.approx(50)
    assert plane.regime(99.0) == "scarce" and plane.regime(99.0 + 14) == "scarce"
    request = RouteRequest("r", 400, ("key",))
    plane.hear(CacheChanged("b", 1, [("key", 399)], inventory=True), 300.0)
    assert plane.route(request, 300.0).cached_tokens == 399
    blind = EmulatedPlane(plane.settings, SCALE.time, cache_aware=False)
    for name, role in (("b", Role.PDP), ("c", Role.PDD)):
        blind.hear(NodeJoined(name, role), 0.0)
    blind.hear(CacheChanged("b", 1, [("key", 399)], inventory=True), 300.0)
    assert blind.route(request, 300.0).cached_tokens == 0


def test_a_soak_kills_every_second_node_by_turns_and_compares_its_beginning_with_its_end(tmp_path):
    processes = [subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for process in processes:  # all of it is loaded once it has answered
            process.stdin.write(b"here\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"here\n"
        for name, process in zip(("front", "pd-0", "pd-1"), processes):
            (tmp_path / name).write_text(str(process.pid))
        watch = Watch(tmp_path, ["pd-0"], seconds=59.0)
        for _ in range(18):
            watch(5.0)
        assert watch.kills == 1 and processes[1].wait(10) == -9 and processes[2].poll() is None
        windows = watch.windows()
        assert {*windows} == {"front", "pd-1"} and windows["front"][0].threads == 1
        assert growing(windows) == []
        first = windows["front"][0]
        assert growing({"front": (first, replace(first, descriptors=2 * first.descriptors))}) == ["front: descriptors"]
        watch.seen["pd-1"] = [(11.0, first), (50.0, replace(first, threads=9)), (55.0, first)]
        assert growing(watch.windows()) == [], "a load that comes and goes is no growth"
        watch.seen["pd-1"] = [(11.0, first)]
        assert growing(watch.windows()) == ["pd-1: not there at the end"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_runs_go_side_by_side_and_one_that_fails_is_named_when_all_are_over(tmp_path):
    def fails():
        raise UserError("it cannot")
    jobs = [Job("a", (tmp_path / "a").touch, 1.0), Job("b", fails, 3.0), Job("c", (tmp_path / "c").touch, 1.5)]
    assert (expected_s(jobs, 1), expected_s(jobs, 2), expected_s([], 2)) == (5.5, 3.0, 0.0)
    with pytest.raises(UserError, match=r"1 of 3 runs have failed \(b\)"):
        run_all(jobs, 2)
    assert (tmp_path / "a").exists() and (tmp_path / "c").exists()


def test_an_answer_that_differs_and_one_that_never_came_are_wrong(hybrid):
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    right = [one.token_ids for one in generate(*hybrid, prompts, SamplingParams(6, ignore_eos=True))]
    assert wrong_answers([*map(Answer, prompts, right)], *hybrid) == []
    given = [right[0], [*right[1][:-1], right[1][-1] + 1], []]
    none, other = wrong_answers([*map(Answer, prompts, given)], *hybrid)
    assert (none.expected, none.logit_gap) == ([], None) and other.expected == right[1] and other.logit_gap > 0
