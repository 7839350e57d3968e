"""The short-term loop: it finds the planner's threshold, follows a step without overshoot, and does not oscillate.

Chapter 12.
"""

import random
from dataclasses import replace

import pytest

from minprfaas.scheduling.paper_case import paper_fleet, paper_lengths
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.threshold import DRAIN_S, HOLD_S, LOCAL_LOAD, MAX_STEP, Observation, ThresholdLoop

FLEET, LENGTHS = paper_fleet(), paper_lengths()


def loop_with_traffic(threshold: float, count: int = 2048) -> ThresholdLoop:
    loop, rng = ThresholdLoop(FLEET, threshold), random.Random(0)
    for _ in range(count):
        loop.record(round(rng.choice(LENGTHS.values)))
    return loop


def seen(at_s: float, **changes) -> Observation:
    return Observation(**{**dict(at_s=at_s, prfaas_instances=4, n_p=3, n_d=5, egress_gbps=100.0), **changes})


def moves(loop: ThresholdLoop, observations) -> list[float]:
    """Each new threshold that these bring."""
    path = [loop.threshold, *(loop.update(now) for now in observations)]
    return [later for earlier, later in zip(path, path[1:]) if later != earlier]


def best(gbps: float) -> float:
    return plan(replace(FLEET, link_gbps=gbps), LENGTHS, n_p=3).threshold


def test_a_wrong_threshold_finds_its_way_to_the_planners():
    loop = loop_with_traffic(4000)
    for second in range(600):
        loop.update(seen(second))
    assert loop.threshold == pytest.approx(best(100.0), rel=0.1)


def test_a_step_down_in_bandwidth_is_followed_without_overshoot():
    loop = loop_with_traffic(best(100.0))
    loop.update(seen(0))
    path = moves(loop, [seen(second, egress_gbps=4.0, scarce=True) for second in range(1, 121)])
    assert 1 <= len(path) <= 4 and path == sorted(path)
    assert path[-1] == pytest.approx(best(4.0), rel=0.1)
    assert all(later / earlier <= 1.5 + 1e-9 for earlier, later in zip(path, path[1:]))


def test_the_bandwidth_that_queued_bytes_will_take_is_not_there_for_new_requests():
    loop = loop_with_traffic(best(10.0))
    for second in range(600):
        loop.update(seen(second, egress_gbps=10.0, queued_bytes=5e9 / 8 * DRAIN_S, scarce=True))  # half of the line
    assert loop.threshold == pytest.approx(best(5.0), rel=0.1)
    assert best(5.0) > 1.2 * best(10.0)


def test_a_square_wave_of_bandwidth_moves_the_threshold_only_as_often_as_it_may_turn_around():
    loop = loop_with_traffic(best(100.0))
    weather = [dict(egress_gbps=100.0, scarce=False), dict(egress_gbps=4.0, scarce=True)]
    path = moves(loop, [seen(second, **weather[second // 10 % 2]) for second in range(600)])
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(path, path[1:], path[2:]))
    assert turns <= 600 / HOLD_S
    assert 0.9 * best(100.0) < min(path) and max(path) < 1.1 * best(4.0)


def test_without_a_reason_nothing_is_searched():
    loop = loop_with_traffic(best(100.0))
    loop.update(seen(0))
    for _ in range(2048):
        loop.record(500)  # the lengths change, but nothing presses
    loop.update(seen(30))
    assert loop.threshold == pytest.approx(best(100.0), rel=0.1)
    loop.update(seen(61))
    assert loop.threshold < 0.8 * best(100.0)


@pytest.mark.parametrize("change", [
    dict(scarce=True, egress_gbps=4.0), dict(prfaas_queue_s=400.0), dict(prfaas_instances=2)])
def test_scarce_bandwidth_a_long_queue_or_a_lost_node_keeps_more_requests_local(change):
    loop = loop_with_traffic(best(100.0))
    before = loop.update(seen(0))
    assert loop.update(seen(6, **change)) > 1.1 * before


def test_a_queue_in_the_pd_cluster_sends_more_requests_away():
    loop = loop_with_traffic(best(100.0))
    before = loop.update(seen(0))
    assert loop.update(seen(6, pdp_queue_s=400.0)) < 0.9 * before


def test_a_change_within_the_deadband_is_not_made():
    loop = loop_with_traffic(1.03 * best(100.0))
    assert moves(loop, [seen(second) for second in range(200)]) == []


def test_beyond_any_capacity_the_local_nodes_are_kept_below_saturation():
    loop, rng = loop_with_traffic(best(100.0)), random.Random(1)
    for second in range(300):
        for _ in range(5):  # requests a second; the fleet sustains 3.2, and far fewer through 4 Gbps
            loop.record(round(rng.choice(LENGTHS.values)))
        loop.update(seen(second, egress_gbps=4.0, scarce=True))
    local_share = 1 - LENGTHS.tail(loop.threshold)
    local_s = LENGTHS.mean(FLEET.pd_profile.prefill_s, loop.threshold)
    assert loop.threshold < best(4.0) / 1.5
    assert 0.75 < 5 * local_share * local_s / 3 < 1.0


def test_what_a_backlog_takes_of_prefill_is_no_decode_capacity():
    """3.25 requests/s, and a backlog that takes two of five PD-P nodes: with five decode nodes the fleet carries them;
    three decode nodes take 2.3, so that the PD-P nodes are kept below saturation."""
    busy = {}
    for n_d in (5, 3):
        loop, rng = loop_with_traffic(best(100.0)), random.Random(1)
        for second in range(0, 600, 20):
            for _ in range(65):
                loop.record(round(rng.choice(LENGTHS.values)))
            loop.threshold = 1.4 * best(100.0)  # so far away that the deadband hides nothing
            loop.update(seen(second, n_p=5, n_d=n_d, pdp_queue_s=2 * DRAIN_S))
        lengths = loop.lengths()
        local_s = lengths.mean(FLEET.pd_profile.prefill_s, loop.threshold)
        busy[n_d] = 3.25 * (1 - lengths.tail(loop.threshold)) * local_s / 3
    assert busy[3] < LOCAL_LOAD + 0.02 < 0.95 < busy[5] < 1


def test_a_handful_of_requests_says_nothing():
    loop = loop_with_traffic(4000, count=63)
    assert loop.lengths() is None and loop.update(seen(0)) == 4000
    loop.record(20_000)
    assert len(loop.lengths().values) == 64 and loop.update(seen(1)) == 4000 * MAX_STEP
    assert loop.reason == "lengths drift: 4 PrfaaS and 3 PD-P nodes, 100 Gbps, 0.02 req/s"


@pytest.mark.parametrize("since_s, change, cause", [
    (60, {}, "lengths drift"), (59.9, {}, None), (5, dict(scarce=True), "bandwidth is scarce"),
    (4.9, dict(scarce=True), None), (4.9, dict(prfaas_instances=2), None), (5, dict(n_p=4), "capacity changed"),
    (5, dict(egress_gbps=70.0), "capacity changed"), (5, dict(egress_gbps=104.0), None),
    (5, dict(prfaas_queue_s=60.0), None), (5, dict(prfaas_queue_s=60.1), "a prefill queue surges"),
    (5, dict(pdp_queue_s=45.0), None), (5, dict(pdp_queue_s=45.1), "a prefill queue surges"),
    (5, dict(prfaas_instances=0, prfaas_queue_s=15.1), "a prefill queue surges")])
def test_a_search_has_a_cause_and_says_it(since_s, change, cause):
    loop = loop_with_traffic(best(100.0))
    loop.update(seen(0))
    loop.reason = "none"
    loop.update(seen(since_s, **change))
    assert loop.reason.partition(":")[0] == (cause or "none")


def test_a_move_that_fell_short_is_followed_by_another_and_a_turn_waits():
    loop = loop_with_traffic(best(100.0))
    loop.update(seen(0))
    steps = [loop.update(seen(second, egress_gbps=4.0)) for second in (5, 10, 15, 20)]
    assert steps[0] == pytest.approx(best(100.0) * MAX_STEP) and steps == sorted(steps) and "fell short" in loop.reason
    assert steps[0] < steps[1] == steps[3], "it moved at 5 and at 10 s"
    again = [loop.update(seen(second, scarce=True)) for second in (25, 30, 9.9 + HOLD_S - 5, 10 + HOLD_S)]
    assert again[:-1] == [steps[-1]] * 3 and again[-1] < steps[-1]


def test_while_every_decode_node_is_away_the_threshold_stays_and_moves_again_when_one_is_back():
    loop = loop_with_traffic(4000)
    for n_p in (1, 0):
        assert moves(loop, [seen(second, n_p=n_p, n_d=0, scarce=True) for second in range(100)]) == []
    assert moves(loop, [seen(second) for second in range(100, 200)])
