"""The router: the threshold rule, the two bandwidth regimes, node choice, and reasons."""

import pytest

from minprfaas.errors import RequestError, UserError
from minprfaas.scheduling.router import ClusterView, LinkView, NodeView, Router, RouteRequest, TransferCosts

COSTS = TransferCosts(token_bytes=17_000, state_bytes=2e8, prfaas_s_per_token=5e-5, pdp_s_per_token=1.6e-4)


def view(prfaas=(0, 0), pdp=(0, 0), pdd=(0, 0), regime="scarce", egress=None, ingress=None) -> ClusterView:
    def nodes(prefix, loads):
        return [NodeView(f"{prefix}{i}", load) for i, load in enumerate(loads)]
    return ClusterView(7.0, nodes("a", prfaas), nodes("p", pdp), nodes("d", pdd), egress or LinkView(100.0, 0.41),
                       ingress or LinkView(100.0), regime)


def test_a_request_at_the_threshold_stays_local_and_one_token_more_is_offloaded():
    router = Router(5120)
    assert router.route(RouteRequest(5120), view()).route == "pdp"
    decision = router.route(RouteRequest(5121), view())
    assert (decision.route, decision.incremental_tokens, decision.threshold) == ("prfaas", 5121, 5120)


def test_the_reason_says_what_was_compared_and_what_was_chosen():
    decision = Router(5120).route(RouteRequest(10_240, {"p0": 2048, "a1": 2048}), view())
    assert decision.reason == "8,192 uncached > t=5,120, egress 41% of limit, scarce: PrfaaS a1, cached 2,048"


def test_the_same_request_and_view_give_the_same_decision():
    router, request = Router(5120, COSTS), RouteRequest(30_000, {"p1": 9000, "a0": 12_000})
    seen = view((10, 20), (30, 40), (1, 2), "abundant")
    assert len({router.route(request, seen) for _ in range(20)}) == 1


def test_scarce_bandwidth_judges_each_cluster_by_its_own_cache():
    request = RouteRequest(20_000, {"a0": 18_000})
    decision = Router(5120, COSTS).route(request, view(regime="scarce"))
    assert (decision.route, decision.node, decision.cached_tokens, decision.transfer) == ("prfaas", "a0", 18_000, None)
    assert decision.incremental_tokens == 20_000


def test_abundant_bandwidth_judges_by_the_longer_cache_and_ships_it_to_where_it_is_used():
    request = RouteRequest(40_000, {"a0": 38_000, "p1": 8000})
    decision = Router(5120, COSTS).route(request, view(regime="abundant"))
    assert (decision.route, decision.incremental_tokens, decision.cached_tokens) == ("pdp", 2000, 38_000)
    transfer = decision.transfer
    assert (transfer.source, transfer.start, transfer.end) == ("a0", 8000, 38_000)
    assert transfer.bytes == 30_000 * COSTS.token_bytes + COSTS.state_bytes


def test_a_cached_prefix_crosses_towards_the_prfaas_cluster_too():
    request = RouteRequest(90_000, {"p0": 60_000})
    decision = Router(5120, COSTS).route(request, view(regime="abundant"))
    assert (decision.route, decision.cached_tokens, decision.transfer.source) == ("prfaas", 60_000, "p0")


def test_a_cached_prefix_that_would_arrive_later_than_it_can_be_computed_is_not_shipped():
    request, slow = RouteRequest(40_000, {"a0": 38_000}), LinkView(0.5)
    decision = Router(5120, COSTS).route(request, view(regime="abundant", egress=slow))
    assert (decision.route, decision.transfer, decision.incremental_tokens) == ("prfaas", None, 40_000)
    queued = LinkView(100.0, queued_bytes=1e12)
    assert Router(5120, COSTS).route(request, view(regime="abundant", egress=queued)).transfer is None
    assert Router(5120).route(request, view(regime="abundant")).transfer is None


def test_cache_affinity_is_weighed_against_the_queue():
    router, request = Router(50_000), RouteRequest(20_000, {"p1": 12_000})
    assert router.route(request, view(pdp=(0, 11_000))).node == "p1"
    decision = router.route(request, view(pdp=(0, 13_000)))
    assert (decision.node, decision.cached_tokens) == ("p0", 0)


def test_of_equal_queues_the_node_that_holds_the_prefix_is_chosen():
    decision = Router(50_000).route(RouteRequest(1000, {"p1": 512}), view(pdp=(0, 0)))
    assert (decision.node, decision.cached_tokens) == ("p1", 512)


def test_at_least_one_token_is_always_computed():
    decision = Router(50_000).route(RouteRequest(1024, {"p0": 1024}), view())
    assert (decision.cached_tokens, decision.incremental_tokens) == (1023, 1)


def test_the_decode_node_holds_the_prefix_unless_it_is_much_busier():
    router, request = Router(100), RouteRequest(20_000, {"d1": 4096})
    decision = router.route(request, view(pdd=(3, 6)))
    assert (decision.decode_node, decision.decode_cached_tokens) == ("d1", 4096)
    decision = router.route(request, view(pdd=(3, 9)))
    assert (decision.decode_node, decision.decode_cached_tokens) == ("d0", 0)


def test_everything_is_local_when_the_link_or_the_prfaas_cluster_is_down():
    for down in (view(egress=LinkView(100.0, up=False)), view(prfaas=())):
        decision = Router(5120, COSTS).route(RouteRequest(90_000), down)
        assert decision.route == "pdp" and "down" in decision.reason


def test_everything_is_offloaded_when_no_local_node_prefills():
    assert Router(5120).route(RouteRequest(10), view(pdp=())).route == "prfaas"


def test_a_cluster_without_decode_or_without_prefill_is_a_named_error():
    for gone in (view(pdd=()), view(prfaas=(), pdp=()), view(pdp=(), egress=LinkView(100.0, up=False))):
        with pytest.raises(RequestError, match="no_node"):
            Router(5120).route(RouteRequest(10), gone)


def test_without_a_threshold_the_least_loaded_node_of_both_clusters_is_chosen():
    router = Router(0, selective=False)
    assert router.route(RouteRequest(90_000), view((500, 600), (400, 700))).node == "p0"
    assert router.route(RouteRequest(10), view((300, 600), (400, 700))).node == "a0"


@pytest.mark.parametrize("threshold", [-1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        Router(threshold)
