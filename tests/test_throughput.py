"""Equations 1 to 6, against numbers that the paper prints. Chapters 00 and 10."""

from math import inf

import pytest

from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.throughput import (
    egress_needed_gbps, kv_throughput_gbps, lambda_max, theta_pdd, theta_pdp, theta_prfaas)


@pytest.mark.parametrize("mebibytes, prefill_s, gbps", [(190.8, 0.44, 3.61), (308.9, 0.72, 3.59), (701.3, 1.84, 3.19),
                                                        (2316.3, 7.40, 2.62)])
def test_equation_1_gives_the_kv_throughput_of_table_5(mebibytes, prefill_s, gbps):
    assert kv_throughput_gbps(mebibytes * 2**20, prefill_s) == pytest.approx(gbps, rel=0.01)


@pytest.mark.parametrize("model, tokens, gpus, gbps, within", [
    ("MiniMax-M2.5", 32_768, 512, 3800, 0.02), ("Qwen3-235B", 32_768, 512, 2100, 0.02),
    ("Ring-2.5-1T", 32_768, 512, 170, 0.03), ("Ring-2.5-1T", 131_072, 10_000, 1800, 0.02)])
def test_equation_2_gives_the_papers_worked_cases(model, tokens, gpus, gbps, within):
    instance_gbps = paper.TABLE_3_GBPS[model][paper.TABLE_3_TOKENS.index(tokens)]
    assert egress_needed_gbps(gpus, paper.GPUS_PER_INSTANCE, instance_gbps) == pytest.approx(gbps, rel=within)


def test_the_worked_cases_that_plan_prints_are_the_papers():
    assert [case[:3] for case in paper.EGRESS_CASES] == [
        ("MiniMax-M2.5", 32_768, 512), ("Qwen3-235B", 32_768, 512), ("Ring-2.5-1T", 32_768, 512),
        ("Ring-2.5-1T", 131_072, 512), ("Ring-2.5-1T", 131_072, 10_000)]


def test_what_the_paper_prints_was_copied_right():
    """A second time from the paper: table 3 by the sums of its columns, the case study's numbers one by one."""
    columns = list(zip(*paper.TABLE_3_GBPS.values()))
    assert [round(sum(column), 2) for column in columns] == [22.47, 71.18, 112.65, 87.84]
    assert paper.TABLE_3_TOKENS == (2**10, 2**13, 2**15, 2**17) and len(columns[0]) == 6
    assert paper.GPUS_PER_INSTANCE == 8 and paper.LINK_GBPS == 100 and paper.OUTPUT_TOKENS == 2**10
    ours, alone, naive = paper.TABLE_6["prfaas_pd"], paper.TABLE_6["homogeneous"], paper.TABLE_6["naive"]
    assert ours["threshold"] == paper.PUBLISHED_THRESHOLD == 19_400
    assert [each.get(key) for each in (ours, alone, naive) for key in ("n_prfaas", "n_p", "n_d")] == [
        4, 3, 5, None, 9, 3, 4, None, 8]
    assert [each["ttft_mean_s"] + each["ttft_p90_s"] for each in (ours, alone, naive)] == [
        pytest.approx(5.73), pytest.approx(14.17), pytest.approx(5.25)]
    assert (ours["mean_offloaded_tokens"], ours["offloaded_fraction"]) == (44_000, 0.496)
    table_5 = paper.h200_profile()
    assert [point.tokens for point in table_5.points] == [2**10, 2**13, 2**15, 2**17]
    assert sum(point.kv_bytes for point in table_5.points) == pytest.approx((190.8 + 308.9 + 701.3 + 2316.3) * 2**20)
    assert sum(point.prefill_s for point in table_5.points) == pytest.approx(0.44 + 0.72 + 1.84 + 7.40)
    fleet, alone = paper.paper_fleet(), paper.paper_plans()["homogeneous"][0]
    assert (fleet.prfaas_instances, fleet.pd_instances, alone.prfaas_instances, alone.pd_instances) == (4, 8, 0, 12)
    assert table_5.bs_max == paper.h20_profile().bs_max == 20 and paper.h20_profile().t_decode_s == 0.025


def test_equation_3_takes_the_slower_of_compute_and_egress():
    kv_bytes = 10e9 / 8  # ten gigabits
    assert theta_prfaas(n_prfaas=4, prefill_s=2.0, link_gbps=100, kv_bytes=kv_bytes) == 2.0  # compute: 4 / 2 s
    assert theta_prfaas(n_prfaas=4, prefill_s=2.0, link_gbps=15, kv_bytes=kv_bytes) == 1.5  # egress: 15 / 10
    assert theta_prfaas(n_prfaas=4, prefill_s=2.0, link_gbps=0, kv_bytes=kv_bytes) == 0


def test_equations_4_and_5_give_table_6():
    assert theta_pdp(n_p=9, prefill_s=9 / 2.11) == pytest.approx(2.11)
    for n_d, published in ((5, 3.91), (3, 2.35), (8, 6.25)):
        assert theta_pdd(n_d, bs_max=20, t_decode_s=0.025, output_tokens=1024) == pytest.approx(published, rel=0.005)


def test_equation_6_is_the_smallest_bound_for_each_stages_share_of_the_requests():
    assert lambda_max(1.61, 1.64, 3.91, offloaded_fraction=0.496) == pytest.approx(1.61 / 0.496)
    assert lambda_max(1.61, 1.2, 3.91, offloaded_fraction=0.496) == pytest.approx(1.2 / 0.504)
    assert lambda_max(9, 9, 3.91, offloaded_fraction=0.5) == 3.91


def test_a_stage_that_no_request_reaches_bounds_nothing():
    assert lambda_max(inf, 2.11, 2.35, offloaded_fraction=0) == 2.11
    assert lambda_max(0.0, 2.11, 2.35, offloaded_fraction=0) == 2.11
    assert lambda_max(2.45, 0.0, 6.25, offloaded_fraction=1) == 2.45
