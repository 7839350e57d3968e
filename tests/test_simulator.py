"""The whole simulated cluster: it agrees with the throughput model, and each policy is worth something. Chapter 12.

The full tables, over more seeds: `python scripts/bench.py policies`. A million requests and 1,250 instances:
`python scripts/bench.py scheduling`, or `python -m pytest -m heavy tests/test_simulator.py`.
"""

import os
import random
import statistics
import time
from array import array
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from control_support import RecordingControlPlane, replay

from minprfaas.commands.live_status import p90
from minprfaas.config import Role
from minprfaas.errors import UserError
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import AskInventory, NewThreshold
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import plan
from minprfaas.simulator.arrivals import (day_lengths, diurnal, drawn, from_trace, poisson, read_trace,
                                          write_conversations)
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.recorder import of_all
from minprfaas.simulator.simulation import Setup, Simulation

FLEET, LENGTHS, PLANS = paper.paper_fleet(), paper.paper_lengths(), paper.paper_plans()
PLAN = PLANS["prfaas_pd"][1]
NEARBY_TRACE = Path(__file__).resolve().parents[2] / "shared/data/mooncake_conversation_trace.jsonl"
TRACE = Path(os.environ.get("MINPRFAAS_TRACE") or NEARBY_TRACE)


def simulation(setup: Setup, rate: float, count: int, seed: int, **seen) -> Simulation:
    rng = random.Random(seed)
    return Simulation(setup, drawn(poisson(rate, rng), count, LENGTHS, paper.OUTPUT_TOKENS, rng), **seen)


def as_planned(**changes) -> Setup:
    return Setup(**{**dict(fleet=FLEET, n_p=PLAN.n_p, threshold=PLAN.threshold, adaptive=False), **changes})


def waiting_in(report, start_s: float, end_s: float) -> float:
    return statistics.mean(tick.waiting for tick in report.series if start_s <= tick.at_s < end_s)


@pytest.mark.parametrize("deployment", ["prfaas_pd", "homogeneous", "naive"])
def test_at_95_percent_of_the_planned_rate_queues_stay_bounded_and_at_105_percent_they_grow(deployment):
    fleet, planned = PLANS[deployment]
    setup = Setup(fleet, planned.n_p, planned.threshold, adaptive=False)
    for load, stable in ((0.95, True), (1.05, False)):
        rate = load * planned.lambda_max
        report = simulation(setup, rate, 10_000, seed=11).run()
        halfway, end_s = 5000 / rate, 10_000 / rate
        early, late = waiting_in(report, 0.5 * halfway, halfway), waiting_in(report, 0.75 * end_s, end_s)
        if stable:
            assert report.peak_waiting < 120 and late < 60
        else:
            assert late > 200 and late > 2 * early


def test_the_simulated_stages_are_as_busy_as_the_model_says():
    report = simulation(as_planned(), 0.8 * PLAN.lambda_max, 10_000, seed=2).run()
    assert report.utilization["prfaas"] == pytest.approx(0.8, abs=0.04)
    assert report.utilization["pdp"] == pytest.approx(0.8, abs=0.04)
    assert report.offloaded_fraction == pytest.approx(PLAN.offloaded_fraction, abs=0.02)
    assert report.egress_gbps == pytest.approx(0.8 * PLAN.egress_gbps, rel=0.05)


def test_the_same_seed_gives_the_same_run_to_the_last_digit():
    first, second = (simulation(as_planned(adaptive=True), 3.0, 2000, seed=4).run() for _ in range(2))
    assert first == second and first != simulation(as_planned(adaptive=True), 3.0, 2000, seed=5).run()


def test_every_request_ends_once_and_every_decision_is_seen_with_its_reason():
    seen, ended = [], []
    run = simulation(as_planned(), 2.0, 1000, seed=1, on_decision=lambda *decided: seen.append(decided),
                     on_progress=ended.append)
    report = run.run()
    assert report.requests == len(seen) == sum(ended) == 1000 and report.failed == 0
    assert all("t=19,400" in request.decision.reason for _, request in seen)
    assert all((request.decision.route == "prfaas") == (request.input_tokens > 19_400) for _, request in seen)
    assert all(at_s <= request.first_token_at_s < request.finished_at_s for at_s, request in seen)
    loads = run.control.loads()
    assert len(loads) == 12 and set(loads.values()) == {0}


def test_requests_on_nodes_that_fail_are_routed_again_and_none_is_lost():
    failures = (("prfaas1", 50.0, 120.0), ("pd0", 60.0, 90.0), ("pd5", 70.0, 200.0), ("pd6", 70.0, 71.0))
    run = simulation(as_planned(failures=failures), 2.0, 800, seed=1)
    report = run.run()
    assert report.requests == 800 and report.failed == 0 and report.routed_again > 10
    loads = run.control.loads()
    assert set(loads) == {*(f"prfaas{i}" for i in range(4)), *(f"pd{i}" for i in range(8))}
    assert len(loads) == 12
    assert set(loads.values()) == {0} and run.lines[""].egress.queued_bytes < 1


def test_with_the_prfaas_cluster_gone_every_request_is_served_locally():
    failures = tuple((f"prfaas{i}", 0.0, 1e6) for i in range(4))
    report = simulation(as_planned(failures=failures), 1.0, 200, seed=1).run()
    assert (report.requests, report.offloaded_fraction) == (200, 0.0) and report.duration_s < 1000


def test_with_every_decode_node_gone_requests_end_in_a_named_failure_until_one_returns():
    failures = tuple((f"pd{i}", 0.0, 100.0) for i in range(3, 8))
    report = simulation(as_planned(failures=failures), 2.0, 400, seed=1).run()
    assert report.failed > 100 and report.requests + report.failed == 400


def test_while_the_link_is_down_new_requests_stay_local():
    seen = []
    outage = as_planned(weather=((50.0, 0.0), (150.0, 100.0)))
    simulation(outage, 1.0, 200, seed=1, on_decision=lambda *decided: seen.append(decided)).run()
    assert {request.decision.route for at_s, request in seen if 52 < at_s < 150} == {"pdp"}
    assert {request.decision.route for at_s, request in seen if at_s > 152} == {"pdp", "prfaas"}
    assert simulation(as_planned(fleet=replace(FLEET, link_gbps=0.0)), 1.0, 50, seed=1).run().offloaded_fraction == 0


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], [float(n * n) for n in range(101)]])
def test_a_percentile_is_what_the_live_cluster_says_of_the_same_times(values):
    found = of_all(array("d", values))
    assert found["p90"] == pytest.approx(p90(values)) and found["p50"] == pytest.approx(statistics.median(values))
    assert found["mean"] == pytest.approx(statistics.fmean(values)) and of_all(array("d")) == {}


def test_a_link_that_stalls_delays_requests_and_loses_none():
    calm = simulation(as_planned(), 1.5, 600, seed=1).run()
    stalled = simulation(as_planned(weather=((100.0, 0.0), (160.0, 100.0))), 1.5, 600, seed=1).run()
    assert stalled.requests == 600 and stalled.ttft_s["p99"] > calm.ttft_s["p99"] + 30
    assert stalled.ttft_s["p50"] < calm.ttft_s["p50"] + 2


def test_when_bandwidth_falls_to_a_tenth_the_adaptive_threshold_keeps_goodput_and_p90():
    fleet = replace(FLEET, link_gbps=40.0)
    rate, drop = 0.45 * PLAN.lambda_max, ((300.0, 4.0), (600.0, 40.0))
    for seed in range(3):
        setup = as_planned(fleet=fleet, weather=drop)
        fixed, adaptive = (simulation(replace(setup, adaptive=choice), rate, int(1200 * rate), seed).run()
                           for choice in (False, True))
        assert adaptive.ttft_s["p90"] < 0.8 * fixed.ttft_s["p90"] and adaptive.goodput_rps > fixed.goodput_rps
        assert adaptive.threshold_moves > 2


def test_when_lengths_shift_with_the_day_role_conversion_beats_a_fixed_split():
    day_s, rate = 3600.0, 2.7
    def one_day(convert_roles):
        rng = random.Random(1)
        times, count = diurnal(rate, rng, day_s), int(rate * day_s)
        requests = drawn(times, count, LENGTHS, paper.OUTPUT_TOKENS, rng, day_lengths(day_s))
        return Simulation(as_planned(adaptive=True, convert_roles=convert_roles), requests).run()
    fixed, converted = one_day(False), one_day(True)
    assert converted.goodput_rps > 1.1 * fixed.goodput_rps and converted.ttft_s["p90"] < 0.7 * fixed.ttft_s["p90"]
    times, _, roles, _ = zip(*converted.role_changes)
    assert {"pdp", "pdd"} == set(roles) and len(roles) < 10
    assert all(later - earlier > 120 for earlier, later in zip(times, times[1:]))


def cache_reports(trace, n_p: int) -> list:
    answers = sum(request.output_tokens for request in trace) / len(trace)
    fleet = replace(FLEET, output_tokens=answers)
    planned = plan(fleet, LengthDistribution(request.input_tokens for request in trace), n_p=n_p)
    speed = 1.05 * planned.lambda_max * trace[-1].arrived_at_s / len(trace)
    setup = Setup(fleet, n_p, planned.threshold, cache_blocks=2000)
    return [Simulation(replace(setup, cache_aware=aware), from_trace(trace, speed)).run() for aware in (False, True)]


def test_cache_aware_routing_finds_more_and_answers_sooner_than_cache_blind(tmp_path):
    write_conversations(tmp_path / "made_up.jsonl", 2500, 3.4, seed=0)
    blind, aware = cache_reports(read_trace(tmp_path / "made_up.jsonl"), n_p=4)
    assert aware.cached_fraction > 1.5 * blind.cached_fraction and aware.ttft_s["mean"] < 0.7 * blind.ttft_s["mean"]
    assert aware.shipped_cache_bytes > 0 == blind.shipped_cache_bytes


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not here (set MINPRFAAS_TRACE)")
def test_on_the_conversation_trace_cache_aware_routing_beats_cache_blind():
    blind, aware = cache_reports(read_trace(TRACE), n_p=4)
    assert aware.cached_fraction > 2 * blind.cached_fraction
    assert aware.goodput_rps > 1.2 * blind.goodput_rps and aware.ttft_s["p90"] < 0.5 * blind.ttft_s["p90"]


def test_a_prefix_that_a_decode_node_holds_is_fetched_inside_the_cluster():
    def second_turn(cache_aware):
        turns = [SimRequest(0.0, 16_384, 10, tuple(range(32))), SimRequest(60.0, 16_500, 10, tuple(range(33)))]
        setup = as_planned(cache_blocks=100, cache_aware=cache_aware, failures=(("pd0", 50.0, 55.0),))  # it forgets
        report = Simulation(setup, iter(turns)).run()
        return report.fetched_cache_bytes, turns[1].decision, turns[1].first_token_at_s - turns[1].arrived_at_s
    fetched_bytes, decision, ttft_s = second_turn(True)
    assert (decision.shipment.source, decision.shipment.end) == ("pd3", 16_384)
    assert decision.uncached_tokens == 116 and fetched_bytes == decision.shipment.bytes > 0
    blind_bytes, _, blind_ttft_s = second_turn(False)
    assert ttft_s < 0.5 * blind_ttft_s and blind_bytes == 0


def test_a_simulation_that_does_not_end_is_given_up_in_one_line(monkeypatch):
    monkeypatch.setattr("minprfaas.simulator.simulation.MAX_SIMULATED_S", 500.0)
    with pytest.raises(UserError, match="after 500 simulated seconds 1 requests have not ended"):
        Simulation(as_planned(), iter([SimRequest(0.0, 1000, 10**6)])).run()


def test_selective_offloading_beats_least_loaded_routing_on_the_same_hardware():
    fleet, planned = PLANS["least_loaded"]
    selective = simulation(as_planned(), 2.9, 10_000, seed=3).run()
    setup = Setup(fleet, planned.n_p, 0.0, selective=False, adaptive=False)
    least_loaded = simulation(setup, 2.9, 10_000, seed=3).run()
    assert selective.goodput_rps > least_loaded.goodput_rps and selective.ttft_s["p90"] < least_loaded.ttft_s["p90"]


@pytest.mark.parametrize("changes", [
    dict(n_p=8), dict(n_p=-1), dict(failures=(("pd9", 1.0, 2.0),)), dict(failures=(("pd1", 2.0, 1.0),)),
    dict(weather=((1.0, -3.0),)), dict(weather=((1.0, 5.0), (2.0, 0.0)))])
def test_an_impossible_setup_is_refused(changes):
    with pytest.raises(UserError):
        as_planned(**changes)


@pytest.mark.heavy
def test_a_million_requests_take_less_than_two_minutes_of_one_core():
    """`python -m pytest -m heavy tests/test_simulator.py`"""
    fleet = replace(paper.paper_fleet(20, 40), link_gbps=500.0)
    setup, started = as_planned(fleet=fleet, n_p=15, adaptive=True), time.process_time()
    report = simulation(setup, 0.9 * 5 * PLAN.lambda_max, 1_000_000, seed=1).run()
    assert report.requests == 1_000_000 and time.process_time() - started < 120


@pytest.mark.heavy
def test_ten_thousand_gpus_serve_an_hour_of_a_trace_played_many_times_over(tmp_path):
    """`python -m pytest -m heavy tests/test_simulator.py`"""
    fleet = replace(paper.paper_fleet(416, 832), link_gbps=10_400.0)
    write_conversations(tmp_path / "made_up.jsonl", 60_000, 100.0, seed=0)
    trace = read_trace(tmp_path / "made_up.jsonl")
    hour = islice(from_trace(trace, speed=trace[-1].arrived_at_s / 3600), 60_000)
    report = Simulation(as_planned(fleet=fleet, n_p=312, cache_blocks=500), hour).run()
    assert report.requests == 60_000 and report.duration_s >= 3590


def test_a_run_of_the_simulator_replayed_into_a_new_control_plane_gives_the_same_decisions_and_actions(tmp_path):
    """20 requests, weather and a failure: the same questions, the same answers, whoever asks."""
    write_conversations(tmp_path / "trace.jsonl", 20, 0.5, seed=2)
    setup = Setup(replace(FLEET, link_gbps=10.0), n_p=3, threshold=4000, convert_roles=True, cache_blocks=200,
                  weather=((10.0, 1.0), (30.0, 10.0)), failures=(("prfaas0", 5.0, 30.0), ("pd3", 12.0, 20.0)))
    control = RecordingControlPlane(setup.control_settings())
    report = Simulation(setup, from_trace(read_trace(tmp_path / "trace.jsonl")), control=control).run()
    assert report.requests == 20 and report.routed_again > 0
    again = replay(control.calls, setup.control_settings())
    assert again == control.calls
    routes = [call.answer.route for call in again if call.method == "route"]
    assert len(routes) > 20 and set(routes) == {Role.PRFAAS, Role.PDP}
    assert any(call.answer.shipment for call in again if call.method == "route")


def test_a_long_run_with_both_loops_replays_to_the_last_action(tmp_path):
    write_conversations(tmp_path / "trace.jsonl", 800, 3.0, seed=2)
    setup = Setup(replace(FLEET, link_gbps=10.0), n_p=3, threshold=4000, convert_roles=True, cache_blocks=200,
                  weather=((60.0, 1.0), (120.0, 10.0)), failures=(("prfaas1", 5.0, 90.0), ("pd4", 12.0, 20.0)))
    control = RecordingControlPlane(setup.control_settings())
    Simulation(setup, from_trace(read_trace(tmp_path / "trace.jsonl")), control=control).run()
    assert replay(control.calls, setup.control_settings()) == control.calls
    actions = {type(action) for call in control.calls if call.method != "route" for action in call.answer}
    assert {AskInventory, NewThreshold} <= actions
