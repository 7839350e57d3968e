"""The control plane: what it makes of events, what it books, when its loops act; the simulator only drives it.

Chapters 11 and 12.
"""

import math
import random
from dataclasses import replace

import pytest

from minprfaas.config import LinkSample, Role
from minprfaas.errors import RequestError
from minprfaas.scheduling.books import LoadBooks, NodeBook
from minprfaas.scheduling.control import (INVENTORY_S, AskInventory, ControlPlane, ControlSettings,
                                          DecodeStarted, LinkMeasured, LineChanged, NewThreshold, NodeJoined, NodeLeft,
                                          PrefillEnded, PrefixMissing, RequestEnded, profile_costs)
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.paper_case import paper_fleet, paper_lengths
from minprfaas.scheduling.profiles import Profile, ProfilePoint
from minprfaas.scheduling.roles import COOLDOWN_S, RoleChange
from minprfaas.scheduling.router import Decision, RouteRequest, ShippingCosts

COSTS = ShippingCosts(token_bytes=17_000, state_bytes=2e8, prfaas_s_per_token=1e-4, pdp_s_per_token=1e-4)
KEYS = ("system prompt", "document", "question")


def control_plane(**changes) -> ControlPlane:
    """Two PrfaaS nodes, two PD-P and two PD-D nodes, empty, at time 0."""
    control = ControlPlane(ControlSettings(**{**dict(threshold=5120, link_gbps=100.0, costs=COSTS), **changes}))
    for name, role in (("a0", Role.PRFAAS), ("a1", Role.PRFAAS), ("p0", Role.PDP), ("p1", Role.PDP), ("d0", Role.PDD),
                       ("d1", Role.PDD)):
        join(control, name, role)
    return control


def join(control: ControlPlane, name: str, role: Role, now_s: float = 0.0) -> None:
    assert control.hear(NodeJoined(name, role), now_s) == [AskInventory(name)]
    assert control.hear(CacheChanged(name, 0, [], inventory=True), now_s) == []


def measure(control: ControlPlane, start_s: int, end_s: int, gbps: float, utilization: float, nodes=("a0",)) -> list:
    """Each second a sample of each of these senders, and a tick; the actions of the ticks."""
    actions = []
    for second in range(start_s, end_s):
        for node in nodes:
            control.hear(LinkMeasured(node, LinkSample(0.0, gbps, utilization, 0.0)), float(second))
        actions += control.tick(float(second))
    return actions


# Load books


def test_load_is_uncached_tokens_on_the_prefill_node_and_a_request_on_the_decode_node():
    control = control_plane()
    control.hear(CacheChanged("p1", 1, [("document", 4096)]), 0.0)
    decision = control.route(RouteRequest("r", 5000, KEYS), 0.0)
    assert (decision.node, decision.decode_node) == ("p1", "d0")
    assert (control.loads()["p1"], control.loads()["d0"]) == (5000 - 4096, 1)
    control.hear(PrefillEnded("r", 904, 0.1), 1.0)
    assert (control.loads()["p1"], control.loads()["d0"]) == (0, 1)
    control.hear(PrefillEnded("r", 0, 0.0), 1.0)  # too late to matter
    control.hear(RequestEnded("r", 30), 2.0)
    control.hear(RequestEnded("r", 30), 2.0)
    assert set(control.loads().values()) == {0}


def test_a_decode_node_has_what_decodes_on_its_page_from_its_start_to_its_end():
    decision = control_plane().route(RouteRequest("r", 5000, KEYS), 0.0)
    books, page = LoadBooks(), NodeBook(decision.decode_node)
    books.nodes = {decision.node: NodeBook(decision.node), page.name: page}
    books.open("r", decision, load_tokens=5000, expected_s=1.0)
    assert (page.load, page.decoding) == (1, set())
    books.start_decode("r")
    assert (page.load, page.decoding) == (1, {"r"})
    books.open("s", decision, load_tokens=700, expected_s=2.0)
    books.open("t", decision, load_tokens=70, expected_s=4.0)
    prefill = books.nodes[decision.node]
    assert (prefill.load, prefill.waiting_s) == (5770, 6.0), "one is in work"
    assert books.end_prefill("r") is decision and (prefill.load, prefill.waiting_s) == (770, 4.0)
    books.close("s")
    books.close("t")
    assert (prefill.load, prefill.waiting_s) == (0, 0.0)
    books.close("r")
    assert (page.load, page.decoding) == (0, set())


def test_a_request_that_is_routed_again_is_booked_once_and_not_where_it_failed():
    control = control_plane()
    first = control.route(RouteRequest("r", 9000), 0.0)
    control.hear(PrefillEnded("r", 0, 0.0), 1.0)
    assert control.loads()[first.node] == 0 and control.loads()[first.decode_node] == 1
    second = control.route(RouteRequest("r", 9000, avoid=frozenset({first.node})), 1.0)
    assert second.node != first.node and f"avoiding {first.node}" in second.reason
    assert sorted(control.loads().values()) == [0, 0, 0, 0, 1, 9000]
    assert second.decode_node == first.decode_node  # its own earlier booking was not weighed against it


def test_what_a_node_was_given_before_it_left_does_not_burden_it_when_it_returns():
    control = control_plane()
    for number in range(4):
        control.route(RouteRequest(number, 9000), 0.0)
    control.hear(NodeLeft("a0"), 1.0)
    control.hear(NodeLeft("a0"), 1.0)
    assert "a0" not in control.loads() and control.nodes(Role.PRFAAS) == ["a1"]
    join(control, "a0", Role.PRFAAS, 2.0)
    for number in range(4):
        control.hear(PrefillEnded(number, 0, 0.0), 2.0)
    assert control.loads()["a0"] == control.loads()["a1"] == 0


def test_with_a_profile_short_prompts_count_with_what_any_request_costs():
    fleet = paper_fleet()
    control = control_plane(fleet=fleet, costs=None)
    decision = control.route(RouteRequest("r", 1000), 0.0)
    assert control.loads()[decision.node] == 1000 + fleet.pd_profile.overhead_tokens > 3000


def test_events_of_unknown_requests_and_of_nodes_that_have_left_are_harmless():
    control = control_plane()
    for event in (PrefillEnded("ghost", 10, 1.0), DecodeStarted("ghost"),
                  RequestEnded("ghost", 5), NodeLeft("ghost"), PrefixMissing("ghost", "key"),
                  CacheChanged("ghost", 1, [("key", 64)])):
        assert control.hear(event, 1.0) == []
    with pytest.raises(RequestError, match="no_node"):
        ControlPlane(ControlSettings(5120, 100.0)).route(RouteRequest("r", 10), 0.0)


# What nodes hold


def test_lost_news_ask_for_an_inventory_once_and_again_when_it_does_not_come():
    control = control_plane()
    assert control.hear(CacheChanged("a0", 3, [("document", 4096)]), 1.0) == [AskInventory("a0")]
    assert control.hear(CacheChanged("a0", 4, [("question", 8192)]), 1.1) == []  # it is on its way
    assert control.tick(2.0) == []
    assert control.tick(1.0 + INVENTORY_S) == [AskInventory("a0")]
    control.hear(CacheChanged("a0", 4, [("document", 4096)], inventory=True), 12.0)
    assert control.tick(30.0) == [] and control.directory.match(KEYS) == {"a0": 4096}


def test_who_ticks_more_often_than_once_a_second_changes_nothing():
    control = control_plane()
    assert control.hear(CacheChanged("a0", 3, [("document", 4096)]), 1.0) == [AskInventory("a0")]
    assert control.tick(0.5 + INVENTORY_S) == []
    assert control.tick(1.0 + INVENTORY_S) == [], "it is due, but half a second is no second"
    assert control.tick(1.5 + INVENTORY_S) == [AskInventory("a0")]


def test_a_prefix_that_was_not_there_is_not_counted_on_again():
    control = control_plane()
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 0.0)
    control.hear(PrefixMissing("p0", "document"), 1.0)
    assert control.route(RouteRequest("r", 5000, KEYS), 1.0).cached_tokens == 0


def test_a_node_that_was_started_again_holds_nothing_and_has_nothing_to_do():
    control = control_plane()
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 0.0)
    assert control.route(RouteRequest("r", 5000, KEYS), 0.0).node == "p0"
    assert control.hear(NodeJoined("p0", Role.PDP), 20.0) == [AskInventory("p0")]
    assert control.directory.match(KEYS) == {} and control.loads()["p0"] == 0
    assert control.nodes(Role.PDP) == ["p1", "p0"], "once"
    assert control.hear(NodeJoined("p0", Role.PDP), 21.0) == [AskInventory("p0")], "the one that was asked is gone"
    assert control.hear(CacheChanged("p0", 2, [("question", 8192)]), 21.0) == [], "asked for already"
    assert control.directory.match(KEYS) == {}, "nothing is believed before its inventory"


def test_the_decode_nodes_cache_counts_for_the_pd_cluster_and_is_fetched():
    control = control_plane()
    control.hear(CacheChanged("d1", 1, [("document", 8192)]), 0.0)
    decision = control.route(RouteRequest("r", 9000, KEYS), 0.0)
    assert (decision.route, decision.uncached_tokens, decision.shipment.source) == (Role.PDP, 808, "d1")
    assert control.loads()[decision.node] == 808


# Learning


def test_what_a_token_costs_is_learned_from_prefills_so_that_shipping_follows_it():
    control = control_plane(ship_prefixes=True)
    measure(control, 0, 20, 10.0, 0.1)
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 0.0)
    assert control.route(RouteRequest("slow?", 30_000, KEYS), 20.0).shipment.source == "p0"
    control.route(RouteRequest("r", 6000), 20.0)
    control.hear(PrefillEnded("r", 6000, 0.006), 20.0)  # 1 µs a token: 4,096 of them are sooner than 270 MB
    assert control.route(RouteRequest("fast", 30_000, KEYS), 20.0).shipment is None


def test_what_was_not_measured_teaches_nothing_and_what_was_adds_up_for_each_cluster():
    """4,096 tokens and a state cross in 22 ms: at more than 5.3 µs a token they are sooner fetched than computed."""
    control = control_plane(ship_prefixes=True)
    measure(control, 0, 20, 10.0, 0.1)
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 0.0)
    control.hear(CacheChanged("a0", 1, [("question", 8192)]), 0.0)

    def fetches(tokens):
        keys = KEYS[:2] if tokens > 20_000 else KEYS
        return control.route(RouteRequest("look", tokens, keys), 20.0).shipment is not None

    def learn(tokens, uncached, seconds, count=1):
        for _ in range(count):
            control.route(RouteRequest("r", tokens), 20.0)
            control.hear(PrefillEnded("r", uncached, seconds), 20.0)

    for uncached, seconds in ((0, 1e-9), (6000, 0.0), (6000, math.inf), (6000, -1.0), (-6000, 1.0)):
        learn(6000, uncached, seconds)
        assert fetches(30_000) and fetches(10_000)
    learn(6000, 6000, 1.2)
    learn(6000, 6000, 0.0006)
    assert fetches(30_000) and fetches(10_000), "a tenth of a millisecond in the mean"
    learn(6000, 6000, 0.0006, 60)
    assert not fetches(30_000) and not fetches(10_000), "until it was seen, the other cluster is like this one"
    learn(1000, 1000, 0.2)
    assert not fetches(30_000) and fetches(10_000)
    known = control_plane(ship_prefixes=True, fleet=paper_fleet(), costs=None)
    before = known.route(RouteRequest("r", 6000), 20.0)
    known.hear(PrefillEnded("r", 6000, 1e-9), 20.0)
    known.hear(CacheChanged("a0", 1, [("document", 4096)]), 20.0)
    assert before.route is Role.PRFAAS and known.loads()["a0"] + known.loads()["a1"] == 0
    known.hear(LinkMeasured("a0", LinkSample(0.0, 10.0, 0.1, 0.0)), 20.0)
    assert known.route(RouteRequest("t", 5000, KEYS), 20.0).shipment.source == "a0", "a profile knows better"


def line(name: str, token_bytes: float, state_bytes: float, token_s: float, fixed_s: float) -> Profile:
    points = tuple(ProfilePoint(tokens, state_bytes + token_bytes * tokens, fixed_s + token_s * tokens)
                   for tokens in (1024, 16_384, 65_536))
    return Profile(name, points, 0.025, 20)


def test_what_a_token_costs_by_its_profile_is_the_slope_of_the_curves_and_the_state_their_beginning():
    fleet = replace(paper_fleet(), prfaas_profile=line("far", 5.0, 1e6, 2e-5, 0.1),
                    pd_profile=line("near", 7.0, 2e6, 6e-5, 0.3))
    costs = profile_costs(fleet)
    assert (costs.token_bytes, costs.state_bytes) == (pytest.approx(5.0), pytest.approx(1e6))
    assert costs.prfaas_s_per_token == pytest.approx(2e-5) and costs.pdp_s_per_token == pytest.approx(6e-5)


def test_without_leave_to_ship_nothing_crosses_between_the_clusters():
    control = control_plane(ship_prefixes=False)
    measure(control, 0, 20, 10.0, 0.1)
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 0.0)
    assert control.regime(20.0) == "abundant"
    assert control.route(RouteRequest("r", 30_000, KEYS), 20.0).shipment is None


# The line


def test_what_several_senders_put_on_the_line_adds_up():
    control = control_plane()
    measure(control, 0, 20, 45.0, 0.45, ("a0", "a1"))
    assert control.regime(19.0) == "scarce"  # 90%; one sender alone leaves more than half of the line
    alone = control_plane()
    measure(alone, 0, 20, 45.0, 0.45)
    assert alone.regime(19.0) == "abundant"
    measure(control, 20, 50, 45.0, 0.45)  # a1 is silent
    assert control.regime(49.0) == "abundant"


def test_each_direction_of_the_line_is_known_by_its_own_samples():
    control = control_plane(ship_prefixes=True)
    measure(control, 0, 20, 10.0, 0.1)
    for second in range(20):
        control.hear(LinkMeasured("p0", LinkSample(0.0, 0.1, 1.0, 1e9), ingress=True), float(second))
    assert control.regime(19.0) == "abundant" and control.egress.gbps == pytest.approx(100.0)
    control.hear(CacheChanged("p0", 1, [("document", 4096)]), 19.0)
    assert control.route(RouteRequest("in", 30_000, KEYS), 19.0).shipment is None
    control.hear(CacheChanged("a0", 1, [("question", 28_000)]), 19.0)
    assert control.route(RouteRequest("out", 30_000, KEYS), 19.0).shipment.source == "a0"


def test_a_line_that_is_down_keeps_requests_local_until_it_is_up():
    control = control_plane()
    control.hear(LineChanged(False), 0.0)
    assert control.route(RouteRequest(1, 90_000), 0.0).route is Role.PDP
    control.hear(LineChanged(True), 1.0)
    assert control.route(RouteRequest(2, 90_000), 1.0).route is Role.PRFAAS


# The loops


def with_traffic(**changes) -> ControlPlane:
    """The paper's cluster, whose control plane has seen 200 prompts and a calm link."""
    settings = dict(threshold=19_400, link_gbps=100.0, fleet=paper_fleet())
    control = ControlPlane(ControlSettings(**{**settings, **changes}))
    for i in range(4):
        join(control, f"prfaas{i}", Role.PRFAAS)
    for i in range(8):
        join(control, f"pd{i}", Role.PDP if i < 3 else Role.PDD)
    ask(control, 200, now_s=0.0)
    measure(control, 0, 5, 13.0, 0.13, ("prfaas0",))
    return control


def ask(control: ControlPlane, count: int, stretch: float = 1.0, now_s: float = 4.0) -> list[Decision]:
    rng, lengths = random.Random(0), paper_lengths()
    return [control.route(RouteRequest(number, round(stretch * rng.choice(lengths.values))), now_s)
            for number in range(count)]


def test_when_bandwidth_is_lost_the_threshold_rises_and_the_reason_says_why():
    control = with_traffic(adaptive=True)
    actions = measure(control, 5, 60, 4.0, 1.0, ("prfaas0",))
    assert actions and all(isinstance(action, NewThreshold) for action in actions)
    assert control.threshold == actions[-1].threshold > 25_000
    assert "bandwidth is scarce: 4 PrfaaS and 3 PD-P nodes" in actions[-1].reason


def test_without_a_profile_or_when_told_not_to_the_threshold_stays():
    for control in (control_plane(), with_traffic(adaptive=False)):
        assert measure(control, 5, 60, 4.0, 1.0) == []
        assert control.threshold == control.settings.threshold


def convert(control: ControlPlane, start_s: int, end_s: int) -> tuple[float, RoleChange] | None:
    for second in range(start_s, end_s):
        for action in control.tick(float(second)):
            if isinstance(action, RoleChange):
                return float(second), action
    return None


def test_a_node_that_is_to_change_its_role_gets_no_new_work_and_changes_when_it_has_none():
    control = with_traffic(convert_roles=True)
    for number, decision in enumerate(ask(control, 400, stretch=3.0)):  # long prompts: prefill binds
        if decision.route is Role.PRFAAS:  # there nobody computes: the busier of the two clusters is what counts
            control.hear(PrefillEnded(number, 0, 0.0), 4.0)
    assert convert(control, 5, 200) is None  # every decode node has requests
    draining = {f"pd{i}" for i in range(3, 8)} - set(control.nodes(Role.PDD))
    assert len(draining) == 1
    assert {control.route(RouteRequest(f"new {i}", 900), 200.0).decode_node for i in range(9)}.isdisjoint(draining)
    for number in range(400):
        control.hear(RequestEnded(number, 1024), 200.0)
    _, change = convert(control, 200, 203)
    assert (change.node, change.role) == (draining.pop(), Role.PDP) and change.reason.startswith("prefill 99% busy")
    assert change.node not in control.loads() and change.node not in control.directory
    assert convert(control, 204, 215) is None, "it is told once"
    join(control, change.node, Role.PDP, 215.0)
    assert len(control.nodes(Role.PDP)) == 4


@pytest.mark.parametrize("cluster", [Role.PRFAAS, Role.PDP])
def test_a_queue_in_either_cluster_has_the_threshold_searched(cluster):
    control = with_traffic(adaptive=True)
    for number in range(1000):
        if control.route(RouteRequest(number, 9000 + 40 * number), 4.0).route is not cluster:
            control.hear(PrefillEnded(number, 0, 0.0), 4.0)
    actions = measure(control, 5, 12, 13.0, 0.13, ("prfaas0",))
    assert "a prefill queue surges: 4 PrfaaS and 3 PD-P nodes" in actions[-1].reason


def role_change_of(control: ControlPlane) -> RoleChange:
    """The conversion that the loads ask for, whose node has nothing left to do."""
    _, change = convert(control, 5, 200)
    return change


def test_a_node_is_converted_to_decode_by_what_fits_the_batches_and_by_the_mean_answer_as_it_is():
    control = with_traffic(convert_roles=True)
    for number in range(2000):
        control.hear(RequestEnded(f"of before {number}", 4096 if number % 2 else 0), 4.0)
    started = dict.fromkeys(control.nodes(Role.PDD), 0)
    for number in range(200):
        decision = control.route(RouteRequest(number, 20_000), 4.0)
        control.hear(PrefillEnded(number, 0, 0.0), 4.0)
        started[decision.decode_node] += 1
        if started[decision.decode_node] <= 18 or decision.decode_node == "pd3":
            control.hear(DecodeStarted(number), 4.0)
    change = role_change_of(control)
    assert change.role is Role.PDD and change.node in ("pd0", "pd1", "pd2")
    # 18 of 20 places on four nodes, and all of them on the fifth, where others wait; 4,096 steps of 25 ms an answer.
    assert change.reason.startswith("decode 92% busy, producers ") and "consumer 0.98 req/s" in change.reason


def test_a_node_that_fails_while_it_drains_is_drained_no_more_and_another_can_follow():
    control = with_traffic(convert_roles=True)
    ask(control, 400, stretch=3.0)
    assert convert(control, 5, 200) is None
    draining = ({f"pd{i}" for i in range(3, 8)} - set(control.nodes(Role.PDD))).pop()
    control.hear(NodeLeft(draining), 200.0)
    join(control, draining, Role.PDD, 201.0)
    after_s, change = convert(control, 201, 600)
    assert after_s >= 200 + COOLDOWN_S and change.role is Role.PDP
