"""The router: the threshold rule, the two bandwidth regimes, node choice, and reasons. Chapter 11."""

import pytest

from minprfaas.config import Role
from minprfaas.errors import RequestError, UserError
from minprfaas.scheduling.router import (
    DECODE_SLACK_REQUESTS, ClusterView, Decision, LinkView, NodeView, Router, RouteRequest, ShippingCosts)

COSTS = ShippingCosts(token_bytes=17_000, state_bytes=2e8, prfaas_s_per_token=5e-5, pdp_s_per_token=1.6e-4)


def view(prfaas=(0, 0), pdp=(0, 0), pdd=(0, 0), regime="scarce", egress=None, ingress=None) -> ClusterView:
    def nodes(prefix, loads):
        return [NodeView(f"{prefix}{i}", load) for i, load in enumerate(loads)]
    return ClusterView(nodes("a", prfaas), nodes("p", pdp), nodes("d", pdd), egress or LinkView(100.0, 0.41),
                       ingress or LinkView(100.0), regime)


def route(router: Router, tokens: int, seen: ClusterView, avoid=(), **matches: int) -> Decision:
    """The decision on a prompt of so many tokens, of which nodes hold `matches`."""
    return router.route(RouteRequest("r", tokens, avoid=frozenset(avoid)), matches, seen)


def test_a_request_at_the_threshold_stays_local_and_one_token_more_is_offloaded():
    router = Router(5120)
    assert route(router, 5120, view()).route is Role.PDP
    decision = route(router, 5121, view())
    assert (decision.route, decision.uncached_tokens, decision.threshold) == (Role.PRFAAS, 5121, 5120)


def test_the_reason_says_what_was_compared_and_what_was_chosen():
    decision = route(Router(5120), 10_240, view(), p0=2048, a1=2048)
    assert decision.reason == "8,192 uncached > t=5,120, egress 41% of limit, scarce: PrfaaS a1, cached 2,048"


def test_the_same_request_and_view_give_the_same_decision():
    router = Router(5120, COSTS, ship_prefixes=True)
    seen = view((10, 20), (30, 40), (1, 2), "abundant")
    assert len({route(router, 30_000, seen, p1=9000, a0=12_000) for _ in range(20)}) == 1


def test_scarce_bandwidth_judges_each_cluster_by_its_own_cache():
    decision = route(Router(5120, COSTS, ship_prefixes=True), 20_000, view(regime="scarce"), a0=18_000)
    assert (decision.route, decision.node, decision.cached_tokens, decision.shipment) == ("prfaas", "a0", 18_000, None)
    assert decision.uncached_tokens == 20_000


def test_abundant_bandwidth_judges_by_the_longer_cache_and_ships_it_to_where_it_is_used():
    router = Router(5120, COSTS, ship_prefixes=True)
    decision = route(router, 40_000, view(regime="abundant"), a0=38_000, p1=8000)
    assert (decision.route, decision.uncached_tokens, decision.cached_tokens) == ("pdp", 2000, 38_000)
    shipment = decision.shipment
    assert (shipment.source, shipment.start, shipment.end) == ("a0", 8000, 38_000)
    assert shipment.bytes == 30_000 * COSTS.token_bytes + COSTS.state_bytes
    assert decision.reason.endswith("PD-P p1, cached 38,000, of them 30,000 shipped from a0")


def test_a_cached_prefix_crosses_towards_the_prfaas_cluster_too():
    router = Router(5120, COSTS, ship_prefixes=True)
    decision = route(router, 90_000, view(regime="abundant"), p0=60_000)
    assert (decision.route, decision.cached_tokens, decision.shipment.source) == ("prfaas", 60_000, "p0")


def test_a_cached_prefix_that_would_arrive_later_than_it_can_be_computed_is_not_shipped():
    router, slow = Router(5120, COSTS, ship_prefixes=True), LinkView(0.5)
    decision = route(router, 40_000, view(regime="abundant", egress=slow), a0=38_000)
    assert (decision.route, decision.shipment, decision.uncached_tokens) == ("prfaas", None, 40_000)
    queued = LinkView(100.0, queued_bytes=1e12)
    assert route(router, 40_000, view(regime="abundant", egress=queued), a0=38_000).shipment is None
    assert route(Router(5120, COSTS), 40_000, view(regime="abundant"), a0=38_000).shipment is None
    assert route(Router(5120), 40_000, view(regime="abundant"), a0=38_000).shipment is None


def test_a_prefix_is_weighed_by_the_direction_in_which_it_would_cross():
    router, slow = Router(5120, COSTS, ship_prefixes=True), LinkView(0.5)
    into = route(router, 90_000, view(regime="abundant", ingress=slow), p0=60_000)
    assert (into.route, into.shipment, into.uncached_tokens) == ("prfaas", None, 30_000)
    assert route(router, 90_000, view(regime="abundant", egress=slow), p0=60_000).shipment.source == "p0"
    assert route(router, 40_000, view(regime="abundant", ingress=slow), a0=38_000).shipment.source == "a0"


def test_of_nodes_that_hold_nothing_of_a_prompt_the_least_loaded_are_chosen():
    decision = route(Router(5120), 9000, view(prfaas=(500, 20), pdd=(3, 1)))
    assert (decision.node, decision.decode_node) == ("a1", "d1")
    assert route(Router(50_000), 9000, view(pdp=(500, 20))).node == "p1"


def test_a_prefix_on_a_decode_node_is_fetched_to_the_prefill_node_that_continues_it():
    decision = route(Router(5120, COSTS), 10_000, view(pdp=(0, 0), regime="scarce"), d1=8000, p1=1000)
    assert (decision.route, decision.uncached_tokens) == ("pdp", 2000)  # the cluster's cache counts, not the node's
    assert (decision.node, decision.cached_tokens) == ("p1", 8000)
    assert (decision.shipment.source, decision.shipment.start, decision.shipment.end) == ("d1", 1000, 8000)
    assert (decision.decode_node, decision.decode_cached_tokens) == ("d1", 8000)
    without = route(Router(5120), 10_000, view(pdp=(0, 0)), d1=8000, p1=1000)  # of costs nothing is known
    assert (without.route, without.uncached_tokens, without.shipment) == ("prfaas", 9000, None)


def test_a_prefix_inside_the_cluster_is_computed_again_where_that_is_sooner():
    seen = view()
    seen.fabric = LinkView(0.5)
    decision = route(Router(50_000, COSTS), 10_000, seen, d1=8000)
    assert (decision.shipment, decision.cached_tokens) == (None, 0)


def test_a_busy_holder_gives_its_prefix_to_an_idle_node_of_its_cluster():
    router = Router(50_000, COSTS)
    near = route(router, 20_000, view(pdp=(0, 20)), p1=12_000)
    assert (near.node, near.shipment) == ("p1", None)  # a fetch would take longer than the queue
    far = route(router, 20_000, view(pdp=(0, 11_000)), p1=12_000)
    assert (far.node, far.cached_tokens, far.shipment.source) == ("p0", 12_000, "p1")
    remote = route(Router(100, COSTS), 20_000, view(prfaas=(0, 11_000)), a1=12_000)
    assert (remote.node, remote.shipment.source) == ("a0", "a1")


def test_a_node_that_failed_this_request_is_avoided_and_the_reason_says_so():
    router = Router(5120, COSTS)
    decision = route(router, 9000, view(), avoid=("a0",), a0=4000)
    assert (decision.node, decision.cached_tokens) == ("a1", 0) and decision.reason.endswith("; avoiding a0")
    local = route(router, 9000, view(), avoid=("a0", "a1", "d0"))
    assert (local.route, local.decode_node) == ("pdp", "d1") and "avoiding a0, a1, d0" in local.reason
    with pytest.raises(RequestError, match="no_node"):
        route(router, 9000, view(), avoid=("d0", "d1"))


def test_cache_affinity_is_weighed_against_the_queue():
    router = Router(50_000)
    assert route(router, 20_000, view(pdp=(0, 11_000)), p1=12_000).node == "p1"
    decision = route(router, 20_000, view(pdp=(0, 13_000)), p1=12_000)
    assert (decision.node, decision.cached_tokens) == ("p0", 0)


def test_of_equal_queues_the_node_that_holds_the_prefix_is_chosen():
    decision = route(Router(50_000), 1000, view(pdp=(0, 0)), p1=512)
    assert (decision.node, decision.cached_tokens) == ("p1", 512)


def test_at_least_one_token_is_always_computed():
    decision = route(Router(50_000), 1024, view(), p0=1024)
    assert (decision.cached_tokens, decision.uncached_tokens) == (1023, 1)


def test_what_the_other_cluster_lacks_too_is_not_fetched_from_it():
    router = Router(5120, COSTS, ship_prefixes=True)
    decision = route(router, 90_000, view(regime="abundant"), a0=30_000)
    assert (decision.node, decision.cached_tokens, decision.shipment) == ("a0", 30_000, None)
    equal = route(router, 90_000, view(regime="abundant"), a0=30_000, p0=30_000)
    assert (equal.node, equal.shipment) == ("a0", None)


def test_the_decode_node_holds_the_prefix_unless_it_is_much_busier():
    router = Router(100)
    for more, node in ((DECODE_SLACK_REQUESTS, "d1"), (DECODE_SLACK_REQUESTS + 1, "d0")):
        assert route(router, 20_000, view(pdd=(3, 3 + more)), d1=4096).decode_node == node
    decision = route(router, 20_000, view(pdd=(3, 6)), d1=4096)
    assert (decision.decode_node, decision.decode_cached_tokens) == ("d1", 4096)
    decision = route(router, 20_000, view(pdd=(3, 9)), d1=4096)
    assert (decision.decode_node, decision.decode_cached_tokens) == ("d0", 0)


def test_everything_is_local_when_the_link_or_the_prfaas_cluster_is_down():
    for down in (view(egress=LinkView(100.0, up=False)), view(prfaas=())):
        decision = route(Router(5120, COSTS, ship_prefixes=True), 90_000, down, p1=60_000)
        assert decision.route == "pdp" and "down" in decision.reason
        assert decision.uncached_tokens == 30_000, "judged by what the cluster that computes has cached"


def test_everything_is_offloaded_when_no_local_node_prefills():
    decision = route(Router(5120), 10_000, view(pdp=()), a1=8000)
    assert decision.route == "prfaas" and decision.uncached_tokens == 2000


def test_a_cluster_without_decode_or_without_prefill_is_a_named_error():
    for gone in (view(pdd=()), view(prfaas=(), pdp=()), view(pdp=(), egress=LinkView(100.0, up=False))):
        with pytest.raises(RequestError, match="no_node"):
            route(Router(5120), 10, gone)


def test_without_a_threshold_the_least_loaded_node_of_both_clusters_is_chosen():
    router = Router(0, selective=False)
    assert route(router, 90_000, view((500, 600), (400, 700))).node == "p0"
    assert route(router, 10, view((300, 600), (400, 700))).node == "a0"


def test_bytes_leave_behind_what_is_queued_and_never_over_a_line_that_carries_nothing():
    assert LinkView(8.0, queued_bytes=1e9).seconds_for(2e9) == 3.0
    for dead in (LinkView(0.0), LinkView(-1.0), LinkView(8.0, up=False)):
        assert dead.seconds_for(1) == float("inf")


@pytest.mark.parametrize("threshold", [-1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        Router(threshold)
