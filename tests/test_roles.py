"""The long-term loop: sustained imbalance converts one node at a time, and never flaps. Chapter 12."""

from dataclasses import replace

from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.paper_case import paper_fleet, paper_lengths
from minprfaas.scheduling.roles import COOLDOWN_S, SUSTAIN_S, RoleLoop
from minprfaas.scheduling.router import NodeView
from minprfaas.scheduling.threshold import Observation

FLEET, LENGTHS = paper_fleet(), paper_lengths()
SHORT = LengthDistribution([length * 0.4 for length in LENGTHS.values])  # decode becomes the bottleneck
LONG = LengthDistribution([length * 2 for length in LENGTHS.values])  # prefill does
BUSY = Observation(0.0, 4, 3, 5, 100.0, prefill_utilization=0.95, decode_utilization=0.95)


def nodes(prefix: str, loads) -> list[NodeView]:
    return [NodeView(f"{prefix}{i}", load) for i, load in enumerate(loads)]


def first_change(loop: RoleLoop, lengths, start_s: int = 0, seconds: int = 600, seen: Observation = BUSY, pdp=(9, 5, 7),
                 pdd=(4, 2, 8, 6, 3)):
    for second in range(start_s, start_s + seconds):
        now = replace(seen, at_s=float(second))
        change = loop.update(now, lambda: lengths, 1024, nodes("p", pdp), nodes("d", pdd))
        if change:
            return second, change
    return None


def test_short_prompts_convert_the_least_loaded_prefill_node_to_decode():
    second, change = first_change(RoleLoop(FLEET), SHORT)
    assert (change.node, change.role) == ("p1", "pdd")
    assert second >= SUSTAIN_S
    assert "decode 95% busy" in change.reason and "consumer 3.91 req/s" in change.reason


def test_long_prompts_convert_the_least_loaded_decode_node_to_prefill():
    _, change = first_change(RoleLoop(FLEET), LONG)
    assert (change.node, change.role) == ("d1", "pdp")


def test_a_balanced_cluster_is_left_alone():
    assert first_change(RoleLoop(FLEET), LENGTHS) is None


def test_an_idle_bottleneck_is_left_alone():
    assert first_change(RoleLoop(FLEET), SHORT, seen=replace(BUSY, decode_utilization=0.5)) is None


def test_it_looks_every_ten_seconds_and_sorts_no_lengths_in_between():
    loop, looked_at_s = RoleLoop(FLEET), []
    for second in range(100):
        now = replace(BUSY, at_s=float(second))
        loop.update(now, lambda: looked_at_s.append(now.at_s), 1024, nodes("p", (9, 5)), nodes("d", (4, 2)))
    assert looked_at_s == list(range(0, 100, 10))


def test_a_short_imbalance_is_left_alone():
    loop = RoleLoop(FLEET)
    for start_s in range(0, 600, 60):
        assert first_change(loop, SHORT, start_s, 50) is None
        assert first_change(loop, LENGTHS, start_s + 50, 10) is None


def test_one_node_at_a_time_and_then_a_cool_down():
    loop = RoleLoop(FLEET)
    second, _ = first_change(loop, SHORT)
    assert first_change(loop, SHORT, second + 1, 600) is None  # it is still draining
    done_s = second + 601
    loop.converted(done_s)
    again, change = first_change(loop, SHORT, done_s, 600, replace(BUSY, n_p=2, n_d=6))
    assert again >= done_s + COOLDOWN_S and change.role == "pdd"


def test_after_a_conversion_the_same_traffic_does_not_convert_back():
    loop, seen = RoleLoop(FLEET), BUSY
    roles, start_s = [], 0
    while (found := first_change(loop, SHORT, start_s, 600, seen)) is not None:
        start_s = found[0] + 30
        loop.converted(start_s)
        roles.append(found[1].role)
        step = 1 if found[1].role == "pdp" else -1
        seen = replace(seen, n_p=seen.n_p + step, n_d=seen.n_d - step)
    assert 1 <= len(roles) <= 3 and set(roles) == {"pdd"}


def test_each_role_keeps_its_last_node():
    seen = replace(BUSY, n_p=1, n_d=7)
    assert first_change(RoleLoop(FLEET), LengthDistribution([200.0, 300.0]), seen=seen, pdp=(9,)) is None


def test_nothing_is_converted_before_there_are_requests():
    assert first_change(RoleLoop(FLEET), None) is None


def test_what_the_load_asks_for_is_done_after_as_long_as_was_said():
    second, _ = first_change(RoleLoop(FLEET, sustain_s=5.0), SHORT)
    assert 5 <= second < SUSTAIN_S


def test_while_every_decode_node_is_away_nothing_is_converted():
    gone = replace(BUSY, n_p=1, n_d=0)
    assert first_change(RoleLoop(FLEET), LONG, seen=gone, pdp=(9,), pdd=()) is None


def test_a_single_node_that_is_left_of_all_clusters_is_left_alone():
    """No fleet can be planned of it, which once ended the front end."""
    gone = replace(BUSY, prfaas_instances=0, n_p=0, n_d=1)
    assert first_change(RoleLoop(FLEET), LONG, seen=gone, pdp=(), pdd=(4,)) is None
