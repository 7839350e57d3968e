"""The front end alone: what it says to whom, and what it makes of each word of the nodes. Chapter 13.

The nodes are names in the same process: what is sent to them is looked at, and the test speaks for them.
"""

import queue

import pytest

from minprfaas import SamplingParams
from minprfaas.cluster import messages
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import PeerLost
from minprfaas.cluster.recovery import MOST_ATTEMPTS, RETRY_S, WAIT_FOR_NODE_S
from minprfaas.config import FRONT, LinkSample, Role
from minprfaas.errors import UserError
from minprfaas.scheduling.control import AskInventory, ControlPlane, ControlSettings, LineChanged, PrefixMissing
from minprfaas.scheduling.router import PrefixShipment

NODES = {"prfaas-0": Role.PRFAAS, "pd-0": Role.PDP, "pd-1": Role.PDD, "pd-2": Role.PDD}
PARAMS = SamplingParams(max_tokens=4, temperature=0.5, seed=3, ignore_eos=True)
LONG, SHORT = list(range(1, 201)), [7, 8, 9]


class Desk:
    """A front end, the nodes that are ready, and a clock that is turned by hand."""

    def __init__(self, nodes=NODES):
        self.now_s, self.mail = 0.0, Mail(queue.SimpleQueue())
        for name in (FRONT, *nodes):
            self.mail.add_local(name)
        self.plane = ControlPlane(ControlSettings(threshold=100, link_gbps=10.0))
        self.front = FrontEnd(self.plane, self.mail, lambda tokens: [bytes([len(tokens) // 16])], 16, 60.0,
                              lambda: self.now_s)
        for name in nodes:
            self.join(name)

    def join(self, name):
        self.front.hear(name, messages.NodeReady(NODES[name].value, "cpu", 100))
        assert self.said() == [(name, messages.SendInventory())]
        self.front.hear(name, messages.CacheNews(0, [], [], True))

    def said(self):
        """(to whom, message) since the last call."""
        return [(envelope.to, envelope.message) for envelope in self.mail.take_local()]

    def submit(self, id, prompt):
        """A request, and the order that a decode node got for it."""
        journey = self.front.submit(id, prompt, PARAMS)
        self.front.step()
        ((to, serve),) = self.said()
        assert to == journey.decision.decode_node and isinstance(serve, messages.Serve)
        return journey, serve

    def draw(self, journey, token, reason="", limit=""):
        drawn = messages.TokenDrawn(journey.attempt, token, f"t{token}", reason, limit)
        self.front.hear(journey.decision.decode_node, drawn)

    @property
    def loads(self):
        return {name: load for name, load in self.plane.loads().items() if load}


def test_a_request_is_ordered_from_a_decode_node_with_all_that_it_needs():
    desk = Desk()
    far, serve = desk.submit("far", LONG)
    assert (far.route, far.decision.node, far.reason) == ("prfaas", "prfaas-0", far.decision.reason)
    assert far.reason.startswith("200 uncached > t=100")
    assert serve == messages.Serve("far#1", LONG, 0, vars(PARAMS), "prfaas-0", 60.0, "", 0)
    near, serve = desk.submit("near", SHORT)
    assert (near.route, serve.prefill_node, serve.id) == ("pdp", "pd-0", "near#2") and serve.deadline_s > 60.0
    assert desk.loads == {"prfaas-0": 200, "pd-0": 3, "pd-1": 1, "pd-2": 1}


def test_the_parts_of_the_time_to_the_first_token_are_those_that_the_nodes_measured():
    desk = Desk()
    desk.now_s = 10.0
    journey, serve = desk.submit("a", LONG)
    node = journey.decision.decode_node
    desk.front.hear(node, messages.Progress(serve.id, 96, 1000, 4000))
    assert (journey.prefilled_tokens, journey.received_bytes, journey.expected_bytes) == (96, 1000, 4000)
    desk.front.hear(node, messages.Prefilled(serve.id, 150, 2.0, 77))
    assert (journey.cached_tokens, journey.prefix_bytes) == (50, 77)
    assert "prfaas-0" not in desk.loads
    started = messages.Started(serve.id, 32, 4000, 1.0, 2.0, 0.5, 0.25, 2.0, 1.5)
    for sender in ("prfaas-0", node):  # who prefilled it cannot say when it is there
        desk.front.hear(sender, started)
        assert (journey.transfer_s, journey.hidden) == ((2.0, 0.75) if sender == node else (0.0, 0.0))
    desk.now_s = 15.0
    desk.draw(journey, 5)
    assert (journey.queue_s, journey.prefill_s, journey.transfer_exposed_s, journey.admit_s) == (1.0, 2.0, 0.5, 0.25)
    assert journey.ttft_s == 5.0 and journey.route_s == pytest.approx(1.25)
    assert (journey.held_tokens, journey.kv_bytes, journey.prefilled_tokens) == (32, 4000, 200)
    updates = desk.front.take_updates()
    assert [(update.journey, update.token_id, update.new_text) for update in updates] == [
        (journey, None, ""), (journey, 5, "t5")] and desk.front.take_updates() == []


def test_of_a_request_that_was_prefilled_in_its_own_datacenter_no_bytes_crossed():
    desk = Desk()
    journey, serve = desk.submit("a", SHORT)
    desk.front.hear(journey.decision.decode_node, messages.Started(serve.id, 0, 4000, 0.0, 0.0, 0.0, 0.0))
    assert journey.kv_bytes == 0


def test_an_answer_ends_with_its_last_token_and_frees_what_was_booked():
    desk = Desk()
    journey, serve = desk.submit("a", LONG)
    for token, reason, limit in ((5, "", ""), (6, "length", "pool")):
        desk.now_s += 1.0
        desk.draw(journey, token, reason, limit)
    assert journey.is_finished and (journey.output_ids, journey.text) == ([5, 6], "t5t6")
    assert (journey.finish_reason, journey.length_limit, journey.finished_at_s) == ("length", "pool", 2.0)
    assert not desk.front.has_work and desk.loads == {}
    desk.draw(journey, 7)  # a late word
    assert journey.output_ids == [5, 6]


def test_what_nodes_say_of_themselves_is_kept_the_newest_of_each():
    desk = Desk()
    for computed_s in (1.0, 2.0):
        desk.front.hear("pd-1", messages.NodeFigures(9.0, computed_s, 5, 6, 7, 8, 9))
    desk.front.hear("pd-1", messages.Goodbye(5, ""))
    for name in ("pd-1", "pd-2"):
        desk.front.hear(name, messages.TimelinePart([{"name": name}]))
    assert desk.front.figures == {"pd-1": messages.NodeFigures(9.0, 2.0, 5, 6, 7, 8, 9)}
    assert desk.front.goodbyes == {"pd-1": messages.Goodbye(5, "")}
    assert desk.front.timeline_events == [{"name": "pd-1"}, {"name": "pd-2"}] and desk.said() == []


def test_an_id_is_in_use_until_its_request_has_ended_and_no_prompt_is_empty():
    desk = Desk()
    assert not desk.front.is_ready and not desk.front.has_work
    desk.front.submit("a", SHORT, PARAMS)
    assert desk.front.is_ready and desk.front.has_work
    for id, prompt, said in (("a", SHORT, "request id 'a' is in use"), ("b", [], "request 'b' has an empty prompt")):
        with pytest.raises(UserError, match=said):
            desk.front.submit(id, prompt, PARAMS)
    desk.front.step()
    assert not desk.front.is_ready
    desk.front.abort("a")
    desk.front.submit("a", SHORT, PARAMS)


def test_a_journey_that_nobody_has_decided_on_has_no_route_and_no_reason():
    journey = Desk().front.submit("a", LONG, PARAMS)
    assert (journey.route, journey.reason, journey.fallback, journey.prompt_tokens) == ("", "", None, 200)
    assert not (journey.output_ids or journey.is_finished)
    counted = ("attempts recoveries held_tokens cached_tokens prefix_bytes kv_bytes queue_s prefill_s admit_s hidden "
               "transfer_exposed_s transfer_s first_token_at_s finished_at_s prefilled_tokens received_bytes "
               "expected_bytes")
    assert {getattr(journey, name) for name in counted.split()} == {0}


def test_a_client_that_went_away_is_told_to_the_decode_node_and_to_nobody_else():
    desk = Desk()
    journey, serve = desk.submit("a", LONG)
    desk.front.abort("a")
    assert desk.said() == [(journey.decision.decode_node, messages.Abort(serve.id))]
    assert (journey.finish_reason, desk.loads, desk.front.has_work) == ("aborted", {}, False)
    desk.front.abort("a")
    desk.front.submit("b", SHORT, PARAMS)
    desk.front.abort("b")  # before it was routed
    desk.front.step()
    assert desk.said() == []


def test_a_word_of_another_node_than_the_one_that_decodes_is_not_believed():
    desk = Desk()
    journey, serve = desk.submit("a", LONG)
    other = ({"pd-1", "pd-2"} - {journey.decision.decode_node}).pop()
    desk.front.hear(other, messages.TokenDrawn(serve.id, 5, "x", "", ""))
    desk.front.hear(other, messages.Failed(serve.id, "x", "too_long"))
    assert journey.output_ids == [] and not journey.is_finished


# ---- when something is lost


def test_a_request_whose_decode_node_is_lost_goes_on_at_another_with_the_tokens_that_the_client_has():
    desk = Desk()
    journey, first = desk.submit("a", LONG)
    desk.front.hear(journey.decision.decode_node, messages.Started(first.id, 0, 4000, 1.0, 2.0, 0.5, 0.25))
    desk.now_s = 3.0
    desk.draw(journey, 5)
    lost = journey.decision.decode_node
    desk.now_s = 9.0
    desk.front.notice(PeerLost(lost, "killed"))
    ((to, serve),) = desk.said()
    assert to == ({"pd-1", "pd-2"} - {lost}).pop() and serve.id == "a#2"
    assert (serve.token_ids, serve.answered_tokens) == (LONG + [5], 1)
    assert journey.keys == [bytes([200 // 16]).hex()], "the keys of the prompt and the answer, but for the last token"
    assert journey.prefilled_tokens == journey.received_bytes == journey.expected_bytes == 0
    desk.front.hear(to, messages.Started(serve.id, 64, 500, 3.0, 3.0, 3.0, 3.0))
    assert (journey.queue_s, journey.held_tokens) == (1.0, 0), "those of the attempt that gave the first token"
    assert journey.kv_bytes == 4500 and (journey.attempts, journey.recoveries) == (2, 1)
    desk.front.notice(PeerLost(lost, "again"))
    assert desk.said() == []


def test_after_a_prefill_that_was_lost_its_node_is_avoided_until_it_comes_back():
    desk = Desk()
    journey, first = desk.submit("a", LONG)
    desk.front.hear(journey.decision.decode_node, messages.Failed(first.id, "the link broke", "lost"))
    ((_, serve),) = desk.said()
    assert (serve.prefill_node, journey.route, journey.fallback) == ("pd-0", "pdp", "the link broke")
    assert journey.avoid == {"prfaas-0"} and desk.loads["pd-0"] == 200 and "prfaas-0" not in desk.loads
    desk.join("prfaas-0")
    assert journey.avoid == frozenset()


def test_what_every_node_refuses_ends_in_the_routers_error():
    desk = Desk()
    journey, serve = desk.submit("a", LONG)
    for _ in range(2):
        desk.front.hear(journey.decision.decode_node, messages.Failed(journey.attempt, "too long", "refused"))
    assert journey.error.kind == "no_node" and journey.finish_reason == "error" and desk.loads == {}
    assert [update.journey for update in desk.front.take_updates()] == [journey] and not desk.front.has_work


def test_a_request_waits_for_a_node_looks_again_now_and_then_and_gives_up_at_its_deadline():
    desk = Desk({"prfaas-0": Role.PRFAAS})  # nobody decodes
    waits, overdue = (desk.front.submit(id, LONG, PARAMS) for id in ("waits", "overdue"))
    desk.front.step()
    assert desk.said() == [] and not waits.is_finished
    desk.mail.add_local("pd-1")
    desk.now_s = WAIT_FOR_NODE_S
    desk.join("pd-1")
    desk.front.step()
    assert [message.id for _, message in desk.said()] == ["waits#1", "overdue#2"]
    desk.front.notice(PeerLost("pd-1", "killed"))
    desk.now_s += RETRY_S
    desk.front.step()
    assert overdue.error.kind == waits.error.kind == "no_node"


def test_those_that_wait_for_a_node_are_routed_before_new_ones_and_only_now_and_then():
    desk = Desk({"prfaas-0": Role.PRFAAS, "pd-1": Role.PDD})
    desk.plane.hear(LineChanged(False), 0.0)
    asked, route = [], desk.plane.route
    desk.plane.route = lambda request, now_s: (asked.append(request.id), route(request, now_s))[1]
    for id in "ab":
        desk.front.submit(id, LONG, PARAMS)
    for _ in range(5):
        desk.front.step()
    assert asked == ["a", "b"] + ["a", "b"], "at once, then not before its time"
    desk.plane.hear(LineChanged(True), 0.0)
    desk.front.submit("c", LONG, PARAMS)
    desk.front.step()
    assert asked[4:] == ["c"]
    desk.now_s = RETRY_S
    desk.front.submit("d", LONG, PARAMS)
    desk.front.step()
    assert asked[5:] == ["a", "b", "d"]
    assert [message.id for _, message in desk.said()] == ["c#1", "a#2", "b#3", "d#4"]


def test_a_prefix_that_did_not_come_is_forgotten_where_it_was_to_be_and_nobody_is_avoided():
    desk = Desk()
    journey, serve = desk.submit("a", LONG)
    journey.keys = [f"key {number}" for number in range(12)]
    journey.decision = journey.decision._replace(shipment=PrefixShipment("pd-2", 0, 64, 1e6))
    forgotten, hear = [], desk.plane.hear
    desk.plane.hear = lambda event, now_s: (forgotten.append(event), hear(event, now_s))[1]
    node = journey.decision.decode_node
    desk.front.hear(node, messages.Progress(serve.id, 96, 1000, 4000))
    desk.front.hear(node, messages.Failed(serve.id, "it did not come", "no_prefix"))
    assert forgotten[0] == PrefixMissing("pd-2", "key 3"), "the fourth block of 16"
    assert (journey.avoid, journey.fallback, journey.attempts) == (frozenset(), None, 2)
    assert journey.prefilled_tokens == journey.received_bytes == journey.expected_bytes == 0
    ((_, again),) = desk.said()
    assert again.id == "a#2" and again.prefix_tokens == 0
    desk.front.hear(node, messages.Failed("a#2", "there was none", "no_prefix"))
    assert journey.avoid == {"prfaas-0"}, "none was to come: it is the node that failed"


def test_where_a_prefix_is_to_be_fetched_the_order_says_so():
    desk = Desk()
    route = desk.plane.route
    fetch = PrefixShipment("pd-2", 16, 64, 1e6)
    desk.plane.route = lambda request, now_s: route(request, now_s)._replace(shipment=fetch)
    _, serve = desk.submit("a", LONG)
    assert (serve.prefix_source, serve.prefix_tokens) == ("pd-2", 64)


def test_a_request_that_fails_everywhere_ends_after_so_many_attempts():
    desk = Desk()
    journey, _ = desk.submit("a", LONG)
    for _ in range(10 * MOST_ATTEMPTS):
        if journey.is_finished:
            break
        if journey.attempt:
            desk.front.hear(journey.decision.decode_node, messages.Failed(journey.attempt, "it broke", "lost"))
        desk.now_s += RETRY_S
        desk.front.step()
    assert journey.attempts == MOST_ATTEMPTS and f"{MOST_ATTEMPTS} attempts failed" in str(journey.error)


# ---- what goes to the control plane


def test_samples_of_a_prfaas_node_are_of_the_way_out_and_those_of_others_of_the_way_in():
    desk = Desk()
    for second in range(30):
        desk.now_s = float(second)
        desk.front.hear("pd-1", LinkSample(0.0, 10.0, 1.0, 1e12))
        desk.front.hear("prfaas-0", LinkSample(0.0, 1.0, 0.1, 0.0))
    assert desk.plane.regime(29.0) == "abundant"
    desk.front.hear("prfaas-0", LinkSample(0.0, 10.0, 1.0, 1e12))
    desk.now_s = 40.0
    desk.front.hear("prfaas-0", LinkSample(0.0, 10.0, 1.0, 1e12))
    assert desk.plane.regime(40.0) == "scarce"


def test_news_of_a_node_that_is_not_ready_are_not_believed():
    desk = Desk()
    desk.front.notice(PeerLost("pd-1", "killed"))
    assert "pd-1" not in desk.front.ready
    desk.front.hear("pd-1", messages.CacheNews(5, ["ab"], [16], False))
    assert desk.said() == [], "nobody asks it for an inventory"
    desk.front.take_actions()
    desk.front.hear("pd-2", messages.CacheNews(5, ["ab"], [16], False))
    assert desk.said() == [("pd-2", messages.SendInventory())]
    assert desk.front.take_actions() == [AskInventory("pd-2")] and desk.front.take_actions() == []
    desk.now_s = 60.0
    desk.front.step()
    assert desk.said() == [("pd-2", messages.SendInventory())], "it did not come"


def test_everybody_who_is_ready_is_told_to_shut_down():
    desk = Desk()
    desk.front.notice(PeerLost("pd-0", "killed"))
    desk.front.shut_down_nodes()
    assert desk.said() == [(name, messages.Shutdown()) for name in ("prfaas-0", "pd-1", "pd-2")]
