"""The planner: what the search finds, held against brute force, the equations and the paper. Chapter 10."""

import random
from dataclasses import replace
from math import inf

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling import throughput as model
from minprfaas.scheduling.lengths import LengthDistribution, TruncatedLogNormal
from minprfaas.scheduling.planner import (
    BINDING_STAGES, Fleet, Plan, first_token_times, plan, plan_least_loaded, round_thresholds, sensitivity, sweep)

LENGTHS = paper.paper_lengths()
FLEET = paper.paper_fleet()


def mean_above(lengths: LengthDistribution, of, threshold: float) -> float:
    """E[f(L) | L > t], or 0 where no length is above."""
    above = [of(length) for length in lengths.values if length > threshold]
    return sum(above) / max(1, len(above))


def rate_by_the_equations(fleet: Fleet, lengths: LengthDistribution, threshold: float, n_p: int) -> float:
    """Lambda_max of one point straight from equations 3 to 6, without running sums."""
    prfaas, pd = fleet.prfaas_profile, fleet.pd_profile
    theta_prfaas = model.theta_prfaas(fleet.prfaas_instances, mean_above(lengths, prfaas.prefill_s, threshold),
                                      fleet.link_gbps, mean_above(lengths, prfaas.kv_bytes, threshold))
    theta_pdp = model.theta_pdp(n_p, lengths.mean(pd.prefill_s, threshold))
    theta_pdd = model.theta_pdd(fleet.pd_instances - n_p, pd.bs_max, pd.t_decode_s, fleet.output_tokens)
    return model.lambda_max(theta_prfaas, theta_pdp, theta_pdd, lengths.tail(threshold))


def some_fleet(rng: random.Random) -> Fleet:
    return replace(FLEET, prfaas_instances=rng.randint(1, 6), pd_instances=rng.randint(2, 9),
                   link_gbps=rng.choice([0.5, 4.0, 12.0, 100.0]), output_tokens=rng.choice([128, 1024, 4096]))


def test_the_search_lands_on_the_papers_threshold_and_split():
    best = plan(FLEET, LENGTHS)
    assert abs(best.threshold - 19_400) <= 200 and (best.n_p, best.n_d) == (3, 5)
    homogeneous = plan(paper.paper_fleet(0, 12), LENGTHS)
    assert (homogeneous.n_p, homogeneous.n_d, homogeneous.threshold) == (9, 3, inf)


def test_every_published_rate_is_met_within_two_percent():
    for name, (_, found) in paper.paper_plans().items():
        for rate in ("theta_prfaas", "theta_pdp", "theta_pdd", "lambda_max"):
            if rate in paper.TABLE_6.get(name, {}):
                assert getattr(found, rate) == pytest.approx(paper.TABLE_6[name][rate], rel=0.02), (name, rate)


def test_published_first_token_times_are_met():
    for name, (fleet, found) in paper.paper_plans().items():
        if name in paper.TABLE_6:
            mean_s, p90_s = first_token_times(fleet, LENGTHS, found)
            assert mean_s == pytest.approx(paper.TABLE_6[name]["ttft_mean_s"], rel=0.05), name
            assert p90_s == pytest.approx(paper.TABLE_6[name]["ttft_p90_s"], rel=0.07), name


def test_no_other_point_of_the_grid_is_better_than_the_plan():
    rng = random.Random(1)
    for _ in range(6):
        fleet = some_fleet(rng)
        lengths = LengthDistribution(LENGTHS.quantile(rng.random()) for _ in range(40))
        grid = [rng.randint(0, 100_000) for _ in range(12)]
        best = plan(fleet, lengths, grid=grid)
        rates = {(t, n): rate_by_the_equations(fleet, lengths, t, n) for t in grid for n in range(fleet.pd_instances)}
        assert best.lambda_max == pytest.approx(max(rates.values()))
        assert rates[best.threshold, best.n_p] == pytest.approx(best.lambda_max)


def test_at_the_optimum_both_prefill_stages_saturate_together():
    best = plan(FLEET, LENGTHS)  # equation 7
    assert best.bounds["prfaas compute"] == pytest.approx(best.bounds["pdp"], rel=0.01)
    for threshold, busier in ((best.threshold - 2000, "prfaas compute"), (best.threshold + 2000, "pdp")):
        neighbour = plan(FLEET, LENGTHS, n_p=3, threshold=threshold)
        assert neighbour.binding_stage == busier and neighbour.lambda_max < best.lambda_max


def test_producers_overtake_the_consumer_between_the_best_split_and_the_next():
    for n_p, producers_lead in ((3, False), (4, True)):  # equation 8 has its root between two whole instances
        at = plan(FLEET, LENGTHS, n_p=n_p)
        assert (at.theta_prfaas + at.theta_pdp > at.theta_pdd) == producers_lead
    assert plan(FLEET, LENGTHS, n_p=3).lambda_max > plan(FLEET, LENGTHS, n_p=4).lambda_max


def test_what_is_fixed_stays_fixed_and_the_rest_is_searched():
    at_two = plan(FLEET, LENGTHS, n_p=2)
    assert at_two.n_p == 2 and at_two.threshold < plan(FLEET, LENGTHS).threshold  # less local prefill: offload more
    assert plan(FLEET, LENGTHS, threshold=40_000).threshold == 40_000


def test_a_thin_link_raises_the_threshold_and_is_named_as_the_bound():
    wide, thin = plan(FLEET, LENGTHS, n_p=3), plan(replace(FLEET, link_gbps=5), LENGTHS, n_p=3)
    assert thin.threshold > wide.threshold and thin.lambda_max < wide.lambda_max
    assert "prfaas egress" in sorted(thin.bounds, key=thin.bounds.get)[:2]
    assert thin.egress_gbps <= 5 + 1e-9


def test_a_dead_link_or_a_dead_prfaas_cluster_keeps_everything_local():
    for fleet in (replace(FLEET, link_gbps=0), replace(FLEET, prfaas_instances=0)):
        alone = plan(fleet, LENGTHS)
        assert alone.offloaded_fraction == 0 and alone.egress_gbps == 0
        assert alone.lambda_max == plan(paper.paper_fleet(0, 8), LENGTHS).lambda_max > 0


def test_spare_capacity_decides_between_equal_rates():
    decode_bound = replace(FLEET, output_tokens=40_000)  # decode binds whatever the threshold
    best = plan(decode_bound, LENGTHS, n_p=1)
    assert best.binding_stage == "pdd"
    others = sweep(decode_bound, LENGTHS, round_thresholds(LENGTHS)[::50], [1])
    assert sorted(best.bounds.values())[1] >= max(sorted(other.bounds.values())[1] for other in others)


def test_a_sweep_goes_through_the_figures_5a_and_5b():
    by_split = [at.lambda_max for at in sweep(FLEET, LENGTHS, [19_400], range(1, 8))]
    assert by_split.index(max(by_split)) + 1 == 3
    by_threshold = sweep(FLEET, LENGTHS, range(0, 60_001, 200), [3])
    remote, local = ([at.bounds[stage] for at in by_threshold] for stage in ("prfaas compute", "pdp"))
    assert remote == sorted(remote) and local == sorted(local, reverse=True)
    crossing = next(at.threshold for at in by_threshold if at.bounds["prfaas compute"] > at.bounds["pdp"])
    assert abs(crossing - 19_400) <= 200


def test_least_loaded_routing_stands_between_naive_offloading_and_the_threshold():
    naive, least = plan(FLEET, LENGTHS, n_p=0, threshold=0), plan_least_loaded(FLEET, LENGTHS)
    assert naive.lambda_max < least.lambda_max < plan(FLEET, LENGTHS).lambda_max
    busy = FLEET.prfaas_instances / LENGTHS.mean(FLEET.prfaas_profile.prefill_s) + least.n_p / LENGTHS.mean(
        FLEET.pd_profile.prefill_s)  # every prefill instance works all the time
    assert least.lambda_max == pytest.approx(min(busy, least.theta_pdd))
    assert first_token_times(FLEET, LENGTHS, least)[1] > first_token_times(FLEET, LENGTHS, plan(FLEET, LENGTHS))[1]


def test_least_loaded_routing_sends_no_more_than_the_link_carries():
    assert plan_least_loaded(replace(FLEET, link_gbps=3), LENGTHS).egress_gbps == pytest.approx(3)
    nobody = plan_least_loaded(replace(FLEET, link_gbps=0, pd_instances=1), LENGTHS)  # the one PD instance decodes
    assert (nobody.lambda_max, nobody.offloaded_fraction) == (0, 0)


def test_sensitivity_says_what_more_of_each_kind_would_buy():
    gains = {change: more.lambda_max - plan(FLEET, LENGTHS).lambda_max for change, more in sensitivity(FLEET, LENGTHS)}
    assert gains["one more PrfaaS instance"] > gains["one more PD instance"] > 0 == gains["twice the link"]
    thin = replace(FLEET, link_gbps=5)
    thin_rates = {change: more.lambda_max for change, more in sensitivity(thin, LENGTHS)}
    assert thin_rates["twice the link"] > thin_rates["one more PrfaaS instance"]


def test_first_token_times_are_prefill_and_the_wire_and_one_step():
    lengths = LengthDistribution([1024] * 85 + [131_072] * 15)
    split = plan(FLEET, lengths, threshold=1024)  # what is as long as the threshold is not above it
    mean_s, p90_s = first_token_times(FLEET, lengths, split)
    short_s = FLEET.pd_profile.prefill_s(1024) + 0.025
    long_s = FLEET.prfaas_profile.prefill_s(131_072) + 2316.3 * 2**20 * 8 / 100e9 + 0.025
    assert p90_s == pytest.approx(long_s) and mean_s == pytest.approx(0.85 * short_s + 0.15 * long_s)


@pytest.mark.parametrize("longest, step", [(500, 1), (2999, 10), (128 * 1024, 100), (10**6, 1000)])
def test_thresholds_are_round_numbers_from_zero_to_beyond_the_longest_length(longest, step):
    thresholds = round_thresholds(LengthDistribution([1, longest]))
    assert thresholds[:2] == [0, step] and thresholds[-2] <= longest < thresholds[-1] and len(thresholds) <= 1501


def test_relay_decode_takes_prefill_capacity_where_the_kvcache_outlasts_the_prefill_and_none_where_it_does_not():
    lengths, fleet = paper.paper_lengths(), paper.paper_fleet()
    for gbps, costs_something in ((100.0, False), (12.5, True)):
        without = replace(fleet, link_gbps=gbps)
        relaying = replace(without, relay=True)
        plans = [plan(each, lengths, n_p=3, threshold=19_400) for each in (without, relaying)]
        assert (plans[1].bounds["prfaas compute"] < plans[0].bounds["prfaas compute"]) == costs_something
        assert plans[1].bounds["prfaas egress"] == plans[0].bounds["prfaas egress"]
        assert first_token_times(relaying, lengths, plans[1]) < first_token_times(without, lengths, plans[0])
    longest = paper.h200_profile().prefill_s(32_768) + fleet.output_tokens * paper.h200_profile().decode_step_s(1)
    assert replace(fleet, link_gbps=0.0, relay=True).prfaas_s(32_768) == longest, "no more steps than the answer has"
    for instances in (0.5, 1, 2):  # each has its share of the link, and less than one has no more than all of it
        alone = replace(fleet, link_gbps=2.0, prfaas_instances=instances, relay=True)
        crossing_s = paper.h200_profile().kv_bytes(32_768) * 8e-9 / (2.0 / max(instances, 1))
        assert alone.prfaas_s(32_768) == pytest.approx(crossing_s), "until the last byte is there"


def test_observed_compute_may_be_a_fraction_of_an_instance():
    slow = plan(replace(FLEET, prfaas_instances=2.5), LENGTHS, n_p=3)
    assert plan(replace(FLEET, prfaas_instances=2), LENGTHS, n_p=3).lambda_max < slow.lambda_max
    assert slow.threshold > plan(FLEET, LENGTHS, n_p=3).threshold


def test_a_plan_names_its_smallest_bound():
    bounds = dict(zip(BINDING_STAGES, (3.0, 5.0, 2.0, 4.0)))
    made = Plan(100, 1, 1, 1, 1.0, 1.0, 4.0, 0.5, 200, 1e9, bounds)
    assert (made.lambda_max, made.binding_stage, made.egress_gbps) == (2.0, "pdp", 8.0)


@pytest.mark.parametrize("build, named", [
    (lambda: replace(FLEET, prfaas_instances=-1), "-1"),
    (lambda: replace(FLEET, pd_instances=0), "0"),
    (lambda: replace(FLEET, pd_instances=2.5), "2.5"),
    (lambda: replace(FLEET, link_gbps=-10), "-10"),
    (lambda: replace(FLEET, link_gbps=inf), "inf"),
    (lambda: replace(FLEET, output_tokens=0), "output tokens is 0"),
    (lambda: replace(FLEET, prfaas_instances=0, pd_instances=1), "cannot serve"),
    (lambda: plan(FLEET, LENGTHS, n_p=8), "at least 0 and of at most 7"),
    (lambda: plan(FLEET, LENGTHS, n_p=-1), "at least 0 and of at most 7"),
    (lambda: plan(FLEET, LENGTHS, threshold=-5), "threshold -5"),
    (lambda: plan(FLEET, LENGTHS, grid=[]), "threshold (none)"),
])
def test_a_fleet_or_a_request_that_cannot_be_is_refused_by_name(build, named):
    with pytest.raises(UserError) as refusal:
        build()
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_fleet_may_be_as_large_as_is_said():
    replace(FLEET, prfaas_instances=2000, pd_instances=2000, link_gbps=1e6)
    for change in (dict(prfaas_instances=2001), dict(pd_instances=2001), dict(link_gbps=1.01e6),
                   dict(output_tokens=1_000_000_001)):
        with pytest.raises(UserError):
            replace(FLEET, **change)


def test_a_plan_from_which_nothing_goes_out_and_one_from_which_everything_does():
    local, away = plan(FLEET, LENGTHS, threshold=inf), plan(FLEET, LENGTHS, n_p=0, threshold=0)
    assert (local.theta_prfaas, local.offloaded_fraction, local.mean_offloaded_tokens) == (inf, 0, 0)
    assert (local.mean_offloaded_bytes, local.egress_gbps) == (0.0, 0.0)
    assert (away.theta_pdp, away.offloaded_fraction) == (inf, 1)
    assert away.mean_offloaded_tokens == pytest.approx(LENGTHS.mean(float))
    assert away.mean_offloaded_bytes == pytest.approx(LENGTHS.mean(FLEET.prfaas_profile.kv_bytes))
    assert away.egress_gbps == pytest.approx(away.lambda_max * away.mean_offloaded_bytes * 8e-9)


def test_every_figure_of_table_6_is_met_by_the_plan_of_its_deployment():
    for name, (_, found) in paper.paper_plans().items():
        for figure, published in paper.TABLE_6.get(name, {}).items():
            if hasattr(found, figure):
                assert getattr(found, figure) == pytest.approx(published, rel=0.07), (name, figure)
    rates = {name: published["lambda_max"] for name, published in paper.TABLE_6.items()}
    for name, published in paper.TABLE_6.items():
        assert published["ratio"] == pytest.approx(rates[name] / rates["homogeneous"], abs=0.006)


def test_a_short_context_is_planned_in_single_tokens():
    lengths = TruncatedLogNormal(5.0, 0.8, 16, 512)
    assert 0 < plan(FLEET, lengths, n_p=3).threshold < 512
