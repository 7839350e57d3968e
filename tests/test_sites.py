"""Several PrfaaS datacenters: who prefills, by what is expected of each one's nodes and line. Chapter 15."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from minprfaas import UserError
from minprfaas.config import LinkSample, Role
from minprfaas.errors import RequestError
from minprfaas.scheduling.control import (
    ControlSettings, DecodeStarted, LineChanged, LinkMeasured, NodeJoined, NodeLeft, RequestEnded)
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.congestion import CongestionMonitor
from minprfaas.scheduling.paper_case import paper_fleet, paper_lengths
from minprfaas.scheduling.router import RouteRequest, ShippingCosts
from minprfaas.scheduling.sites import AllLines, SitesControlPlane, site_of
from minprfaas.simulator.arrivals import drawn, poisson
from minprfaas.simulator.simulation import PrfaaSSite, Setup, Simulation

FLEET = paper_fleet()


def plane(a_gbps=100.0, b_gbps=100.0, nodes=2, **settings):
    settings = ControlSettings(1000.0, 0.0, **(settings or dict(fleet=FLEET)))
    control = SitesControlPlane(settings, {"prfaas-a": a_gbps, "prfaas-b": b_gbps})
    prfaas = [(f"prfaas-{site}-{number}", Role.PRFAAS) for site in "ab" for number in range(nodes)]
    for name, role in (*prfaas, ("pd-0", Role.PDD), ("pd-1", Role.PDP)):
        control.hear(NodeJoined(name, role), 0.0)
    return control


def routed(control, *numbers, tokens=32_768, now_s=0.0):
    """The datacenters of so many long requests, in order."""
    return [site_of(control.route(RouteRequest(number, tokens), now_s).node) for number in numbers]


def test_equal_datacenters_share_by_their_queues_and_a_slow_line_gets_what_it_can_carry():
    assert Counter(routed(plane(), *range(8))) == {"prfaas-a": 4, "prfaas-b": 4}
    assert Counter(routed(plane(b_gbps=1.0), *range(4))) == {"prfaas-a": 4}, "5.9 s on its line; a node is done in 3.7"
    shares = Counter(routed(plane(b_gbps=1.0), *range(12)))
    assert 1 <= shares["prfaas-b"] < shares["prfaas-a"], "but a queue of nodes is worth a slow line"


def test_what_a_line_owes_is_counted_until_it_is_there_or_its_request_has_ended():
    control = plane(a_gbps=3.0, b_gbps=2.0, nodes=4)
    assert routed(control, 0, 1) == ["prfaas-a", "prfaas-b"]
    for event in (DecodeStarted(0), RequestEnded(1)):
        control.hear(event, 0.0)
    assert not any(site.owed for site in control.sites.values())
    control.route(RouteRequest(2, 32_768), 0.0)
    again = control.route(RouteRequest(2, 32_768), 0.0)
    assert sum(len(site.owed) for site in control.sites.values()) == 1, "an attempt takes the place of the one before"
    assert "expected: prfaas-a in " in again.reason and ", prfaas-b in " in again.reason


def test_all_lines_together_carry_what_those_that_are_up_carry_and_are_scarce_where_each_of_them_is():
    one, two = CongestionMonitor(10.0), CongestionMonitor(30.0)
    both = AllLines([one, two])
    one.observe(LinkSample(0.0, 5.0, 0.5, 0.0))
    two.observe(LinkSample(0.0, 27.0, 0.9, 3e9))
    assert (both.gbps, both.queued_bytes, both.utilization) == (40.0, 3e9, pytest.approx((0.5 * 10 + 0.9 * 30) / 40))
    assert both.regime(0.0) == "abundant" and two.regime(0.0) == "scarce"
    one.observe(LinkSample(1.0, 10.0, 1.0, 1e9))
    assert both.regime(1.0) == "scarce" and both.queued_bytes == 4e9
    two.up = False
    assert both.gbps == one.gbps and both.up
    one.up = False
    assert both.gbps == 0 and not both.up


def expected_of(control, tokens, keys=()):
    """What a decision's reason says of each datacenter, in seconds."""
    said = control.route(RouteRequest(f"r{tokens}", tokens, keys), 0.0).reason.rpartition("expected: ")[2]
    return {part.split()[0]: float(part.split()[2]) for part in said.split(", ")}


def test_what_is_expected_of_a_datacenter_is_the_time_of_its_nodes_or_of_its_line_whichever_is_longer():
    control, profile = plane(b_gbps=0.5, nodes=1), FLEET.prfaas_profile
    for node, tokens in (("prfaas-a-0", 16_384), ("prfaas-b-0", 65_536), ("pd-0", 8192)):
        control.hear(CacheChanged(node, 0, [(f"{node}'s", tokens)], inventory=True), 0.0)
    keys = ("pd-0's", "prfaas-a-0's", "prfaas-b-0's")
    crossing = profile.kv_bytes(65_536) - profile.kv_bytes(8192) + profile.kv_bytes(0)
    computed_s = profile.prefill_s(65_536 - 16_384)
    assert expected_of(control, 65_536, keys) == {
        "prfaas-a": pytest.approx(computed_s, abs=0.006), "prfaas-b": pytest.approx(crossing * 8e-9 / 0.5, abs=0.006)}
    assert control.sites["prfaas-a"].owed == {"r65536": crossing}
    again = expected_of(control, 32_768)
    assert again["prfaas-a"] == pytest.approx(computed_s + profile.prefill_s(32_768), abs=0.006)
    control.sites["prfaas-a"].owed["more"] = 1e12
    owed = crossing + 1e12 + sum(control.sites["prfaas-a"].owed.get(f"r{tokens}", 0) for tokens in (32_768,))
    assert expected_of(control, 20_000)["prfaas-a"] == pytest.approx((owed + profile.kv_bytes(20_000)) * 8e-9 / 100,
                                                                     abs=0.006)


def test_without_profiles_a_datacenter_is_judged_by_what_a_token_costs_and_without_costs_by_nothing():
    control = plane(nodes=1, a_gbps=0.004, costs=ShippingCosts(10_000, 500_000, 1e-3, 1e-3))
    for node, tokens in (("prfaas-a-0", 1000), ("prfaas-b-0", 0), ("pd-0", 500)):
        control.hear(CacheChanged(node, 0, [("key", tokens)] if tokens else [], inventory=True), 0.0)
    first = expected_of(control, 3000, ("key",))
    assert first == {"prfaas-a": pytest.approx((2500 * 10_000 + 500_000) * 8e-9 / 0.004), "prfaas-b": 3.0}
    assert control.sites["prfaas-b"].owed == {"r3000": 2500 * 10_000 + 500_000}
    assert expected_of(control, 2000)["prfaas-b"] == 5.0, "behind what it was given"
    blind = plane(nodes=1, adaptive=False)
    assert expected_of(blind, 3000) == {"prfaas-a": 0.0, "prfaas-b": 0.0}


def test_each_lines_samples_count_for_itself_whoever_tells_them():
    control = plane()
    for second in range(20):
        control.hear(LinkMeasured("prfaas-a-1", LinkSample(second, 0.5, 1.0, 1e9)), second)
        inward = LinkSample(second, 3.0, 1.0, 0.0, link="prfaas-b-0:pd-0")
        control.hear(LinkMeasured("pd-0", inward, ingress=True), second)
    a, b = control.sites["prfaas-a"], control.sites["prfaas-b"]
    assert a.egress.gbps == pytest.approx(0.5, rel=0.1) and b.egress.gbps == a.ingress.gbps == 100.0
    assert b.ingress.gbps == pytest.approx(3.0, rel=0.1)
    assert control.egress.gbps == a.egress.gbps + b.egress.gbps
    assert control.regime(19.0) == "scarce", "nothing was heard of the way out of b"
    assert routed(control, *range(6), now_s=20.0).count("prfaas-b") == 6


def test_a_datacenter_that_is_cut_off_or_empty_gets_nothing_and_without_any_the_pd_cluster_prefills():
    control = plane()
    control.hear(LineChanged(False, "prfaas-a"), 0.0)
    assert control.egress.up, "one line out is enough"
    assert {*routed(control, *range(4))} == {"prfaas-b"}
    for name in ("prfaas-b-0", "prfaas-b-1"):
        control.hear(NodeLeft(name), 0.0)
    assert control.route(RouteRequest(9, 32_768), 0.0).route is Role.PDP
    control.hear(LineChanged(True, "prfaas-a"), 0.0)
    assert routed(control, 10) == ["prfaas-a"]
    refused = RouteRequest(11, 32_768, avoid=frozenset({"prfaas-a-0", "prfaas-a-1"}))
    assert control.route(refused, 0.0).route is Role.PDP
    control.hear(NodeLeft("pd-0"), 0.0)
    with pytest.raises(RequestError, match="0 decode nodes"):
        control.route(RouteRequest(12, 32_768), 0.0)


# ---- simulated


def simulated(a, b, requests=600, rate=2.0):
    """The requests that each datacenter prefilled, by tenths of the time."""
    fleet = replace(FLEET, prfaas_instances=a.instances + b.instances, link_gbps=a.gbps + b.gbps)
    setup = Setup(fleet, n_p=3, threshold=19_400, adaptive=False, sites=(a, b))
    rng, seen = random.Random(1), []
    source = drawn(poisson(rate, rng), requests, paper_lengths(), FLEET.output_tokens, rng)
    run = Simulation(setup, source, lambda at_s, request: seen.append((at_s, site_of(request.decision.node))))
    return run.run(), seen


def between(seen, first_s, last_s):
    return Counter(site for at_s, site in seen if first_s <= at_s < last_s and site.startswith("prfaas"))


def test_the_slow_line_loses_requests_to_the_fast_one_and_weather_turns_that_round():
    fast, slow = PrfaaSSite("prfaas-a", 2, 50.0), PrfaaSSite("prfaas-b", 2, 4.0)
    report, seen = simulated(fast, slow)
    whole = between(seen, 0, 1e9)
    assert whole["prfaas-a"] > 1.3 * whole["prfaas-b"] > 0
    assert sum(report.prefilled_at[node] for node in ("prfaas-a-0", "prfaas-a-1")) == whole["prfaas-a"]
    turned = (replace(fast, weather=((150.0, 2.0),)), replace(slow, weather=((150.0, 50.0),)))
    report, seen = simulated(*turned)
    before, after = between(seen, 0, 150), between(seen, 165, 1e9)
    assert before["prfaas-a"] > before["prfaas-b"] and after["prfaas-b"] > 1.3 * after["prfaas-a"]
    assert report.failed == 0 and report.requests == 600


def test_a_datacenter_that_fails_is_made_up_for_by_the_other():
    a, b = PrfaaSSite("prfaas-a", 1, 50.0), PrfaaSSite("prfaas-b", 1, 50.0)
    fleet = replace(FLEET, prfaas_instances=2, link_gbps=100.0)
    setup = Setup(fleet, 3, 19_400, adaptive=False, sites=(a, b), failures=(("prfaas-a-0", 30.0, 60.0),))
    rng, seen = random.Random(1), []
    source = drawn(poisson(1.0, rng), 100, paper_lengths(), FLEET.output_tokens, rng)
    report = Simulation(setup, source, lambda at_s, one: seen.append((at_s, site_of(one.decision.node)))).run()
    assert between(seen, 31, 60).keys() == {"prfaas-b"} and between(seen, 0, 30)["prfaas-a"] > 0
    assert report.requests == 100 and report.failed == 0
    with pytest.raises(UserError, match="failure of 'prfaas0'"):
        replace(setup, failures=(("prfaas0", 1.0, 2.0),))
