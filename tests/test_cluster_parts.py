"""The joints of the cluster: the node's loop, the roles' deadlines, and who decides. Chapter 13."""

import gc
import os
import queue
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from cluster_support import (
    DEADLINE_S, FAST, kill, nothing_in_use, pd_process, prfaas_process, serve, step_until, two_datacenters)
from control_support import RecordingControlPlane, replay
from test_two_datacenters import GREEDY, prompts_of, reference, tokens
from transport_support import connected, wait_until
from world import End

from minprfaas import SamplingParams, UserError
from minprfaas.cluster import messages
from minprfaas.cluster.envelope import Envelope, encode
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.kv_send import STREAMS_AT_ONCE, KVSend, SendingThreads
from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Node, PeerLost, PeerReturned
from minprfaas.cluster.processes import control_settings, front_end
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import FRONT, CacheConfig, LineConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import Status
from minprfaas.scheduling import control
from minprfaas.scheduling.control import ControlPlane
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.paper_case import paper_fleet
from minprfaas.simulator.arrivals import from_trace, read_trace, write_conversations
from minprfaas.simulator.simulation import Setup, Simulation
from minprfaas.transport.events import LinkLost, LinkRestored, MessageReceived
from minprfaas.transport.wan.link import Link


# ---- the loop


def test_a_step_drains_every_event_before_it_computes(hybrid):
    with two_datacenters(*hybrid, threshold=100) as (local, _):
        events = local.node.mail.events
        for number in range(500):
            raw = encode(Envelope(FRONT, "prfaas-0", messages.CacheNews(10**6 + number, ["ab"], [16], False)))
            events.put(MessageReceived(raw, "test"))
        local.front.submit("0", [1, 2, 3], GREEDY)
        local.node.step()
        assert events.empty(), "the queue cannot outgrow the loop"
        step_until(local, lambda: not local.front.has_work)


class Part:
    """Writes down what it hears and when it steps; what it hears from outside it tells the other part."""

    def __init__(self, name, other, mail, log):
        self.name, self.other, self.mail, self.log, self.is_ready = name, other, mail, log, True

    def hear(self, sender, message):
        self.log.append(f"{self.name} hears {sender}")
        if sender != self.other:
            self.mail.send(self.name, self.other, messages.Shutdown())

    def notice(self, happening):
        self.log.append(f"{self.name} notices {happening.name}")

    def step(self):
        self.log.append(f"{self.name} steps")


def test_a_part_steps_when_all_that_is_there_was_heard_and_what_was_said_to_that_too():
    mail, log, link = Mail(queue.SimpleQueue()), [], End("line", queue.SimpleQueue())
    node = Node(mail, [Part("one", "two", mail, log), Part("two", "one", mail, log)])
    mail.add_link(link, ["far", "away"])
    said = MessageReceived(encode(Envelope("two", "far", messages.Shutdown())), "line")
    mail.events.put(said)
    mail.events.put(LinkLost("cut", "line"))
    node.step()
    assert log == ["two hears far", "one hears two", "one notices far", "two notices far", "one notices away",
                   "two notices away", "one steps", "two steps"]
    log.clear()
    for event in (LinkRestored(2, False, "line"), LinkRestored(3, True, "line"), PeerReturned("new"),
                  MessageReceived({"type": "Surprise"}, "line")):
        mail.events.put(event)
    mail.send("far", "one", messages.Shutdown())
    node.step()
    each = [f"{part} notices {name}" for name in ("far", "far", "away", "away", "new") for part in ("one", "two")]
    assert log == ["one hears far", "two hears one", *each, "one steps", "two steps"]


def test_what_a_plane_is_told_of_a_model_are_the_bytes_of_its_rows_and_of_its_state(models):
    layout = Engine(*models["mimo_v2_flash"], CacheConfig(20, 16)).layout
    rows, state = ([spec.nbytes for spec in layout.specs if (spec.kind is StateKind.TOKEN) == is_row]
                   for is_row in (True, False))
    assert rows and state
    settings = control_settings(7.0, 0.5, layout, adaptive=False)
    assert (settings.threshold, settings.link_gbps) == (7.0, 0.5)
    assert (settings.costs.token_bytes, settings.costs.state_bytes) == (sum(rows), sum(state))
    assert 0 < settings.costs.prfaas_s_per_token == settings.costs.pdp_s_per_token < 0.01
    assert control_settings(7.0, None, layout).link_gbps == 100.0


def test_a_front_ends_process_collects_garbage_more_rarely_and_asks_for_keys_as_its_engine_makes_them(hybrid):
    engine, before = Engine(*hybrid, CacheConfig(20, 16)), gc.get_threshold()
    front = front_end(ControlPlane(control_settings(7.0, 0.5, engine.layout)), Mail(queue.SimpleQueue()), engine, 5.0)
    assert gc.get_threshold()[0] > before[0] or before[0] > 10_000
    gc.set_threshold(*before)
    (prompt,) = prompts_of(40)
    assert front.submit("a", prompt, GREEDY).keys == [key.hex() for key in engine.kvcache.keys(prompt[:-1])]
    assert front.deadline_s == 5.0


def test_streams_beyond_the_most_at_once_leave_in_the_order_in_which_they_came():
    threads, gates, begun = SendingThreads("order"), [threading.Event() for _ in range(STREAMS_AT_ONCE)], []
    sent = [threads.submit(lambda gate=gate: gate.wait(DEADLINE_S)) for gate in gates]
    later = [threads.submit(lambda number=number: begun.append(number)) for number in range(3)]
    assert not any(one.done() for one in (*sent, *later))
    gates[0].set()
    for one in later:
        one.result(DEADLINE_S)
    assert begun == [0, 1, 2]
    for gate in gates:
        gate.set()
    assert all(one.result(DEADLINE_S) for one in sent)


def test_a_line_that_stands_still_holds_no_forward_pass_up(hybrid):
    (long,) = prompts_of(480)
    crawl = LineConfig(gbps=2e-5)
    with two_datacenters(*hybrid, threshold=100, line=crawl) as (local, remote):
        journey = local.front.submit("0", long, GREEDY)
        held_early = []

        def prefilled():
            prefill = remote.prefill.prefills.get("0#1")
            if prefill is not None and prefill.request.status is Status.HELD:
                held_early.append(not prefill.stream.outcome.done())
            return bool(held_early)

        step_until(local, prefilled)
        assert held_early[0] and journey.received_bytes < journey.expected_bytes or journey.expected_bytes == 0
        local.decode.servings["0#1"].deadline_at_s = 0.0  # it has waited for long enough to be seen
        step_until(local, lambda: not local.front.has_work)
    assert "deadline" in journey.fallback
    assert tokens([journey]) == reference(*hybrid, [long], GREEDY)


def test_one_lost_peer_ends_its_own_streams_only(hybrid):
    """Two PrfaaS nodes with a link each; one dies while both send."""
    model, tokenizer = hybrid
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    engines = [Engine(model, tokenizer, CacheConfig(200, 16), 48) for _ in range(4)]
    identity, events = link_identity(model, engines[0].layout), queue.SimpleQueue()
    config = replace(FAST, timeout_s=2.0)  # so long the dead one is waited for
    names, ends, remotes, threads = ("prfaas-0", "prfaas-1"), {}, {}, []
    for name, engine in zip(names, engines):
        own = queue.SimpleQueue()
        far_end = Link(f"to {name}", store, 0, config, identity, events=own)
        ends[name] = Link(f"to {name}", store, 1, config, identity, events=events)
        remotes[name] = prfaas_process(engine, far_end, own, DEADLINE_S, name=name)

        def run(remote=remotes[name], link=far_end):
            link.connect(DEADLINE_S)
            remote.serve()

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        ends[name].connect(DEADLINE_S)
    plane = ControlPlane(control_settings(100, None, engines[0].layout))
    local = pd_process(engines[2], engines[3], ends, events, plane, DEADLINE_S)
    step_until(local, lambda: {*names} <= {*local.front.ready})
    write = engines[3].kvcache.pool.write_bytes

    def die_at_the_first_bytes(layer, table, start, end, data):
        write(layer, table, start, end, data)
        if threading.current_thread().name.startswith("to prfaas-0"):
            kill(remotes["prfaas-0"].node.mail.links[FRONT])

    engines[3].kvcache.pool.write_bytes = die_at_the_first_bytes
    prompts = prompts_of(300, 310, 320, 330)
    journeys = serve(local, prompts, GREEDY)
    asked = {journey.decision.node for journey in journeys}
    local.shut_down(DEADLINE_S)
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    for link in (*ends.values(), *(remote.node.mail.links[FRONT] for remote in remotes.values())):
        link.close()
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)
    assert asked == {"prfaas-1"}, "what the dead node had was given to the one that lives"
    assert any(journey.avoid for journey in journeys) and not all(journey.avoid for journey in journeys)
    assert all(journey.kv_bytes > 0 for journey in journeys)
    for engine in engines:
        engine.kvcache.check()


# ---- deadlines and errors


def test_a_request_that_finds_no_room_in_time_ends_in_a_named_error(hybrid):
    long, other = prompts_of(300, 290)
    many = SamplingParams(max_tokens=200, ignore_eos=True)
    with two_datacenters(*hybrid, threshold=1000, pool_b=36, room_deadline_s=0.0) as (local, _):
        first = local.front.submit("first", long, many)
        servings = local.decode.servings
        step_until(local, lambda: "first#1" in servings and servings["first#1"].kv is not None)
        late = local.front.submit("late", other, many)
        step_until(local, lambda: late.is_finished)
        assert late.error.kind == "no_room" and "KVCache pool" in str(late.error)
        step_until(local, lambda: not local.front.has_work)
        step_until(local, lambda: nothing_in_use(local))
    assert first.error is None and len(first.output_ids) == 200


def test_a_prompt_that_the_decode_node_can_never_hold_ends_in_a_named_error(hybrid):
    with two_datacenters(*hybrid, threshold=1000, pool_b=12) as (local, _):
        journey = local.front.submit("0", prompts_of(300)[0], GREEDY)
        step_until(local, lambda: not local.front.has_work)
    assert journey.error.kind == "too_long" and "pool" in str(journey.error)


def test_late_words_about_an_attempt_that_was_given_up_are_not_taken_for_the_next_ones(hybrid):
    """The front end loses the decode node, which does not notice: it goes on with the old attempt beside the new."""
    (prompt,) = prompts_of(300)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with two_datacenters(*hybrid, threshold=100) as (local, _):
        journey = local.front.submit("0", prompt, params)
        step_until(local, lambda: len(journey.output_ids) == 5)
        local.front.notice(PeerLost("pd-0/pdd", "link lost: test"))
        assert journey.attempt == "" and not journey.is_finished
        local.decode.upkeep.introduce()
        step_until(local, lambda: not local.front.has_work)
        step_until(local, lambda: nothing_in_use(local))
    assert (journey.attempts, journey.recoveries) == (2, 1)
    assert tokens([journey]) == reference(*hybrid, [prompt], params)


def test_the_parts_of_the_time_to_the_first_token_add_up_to_it(hybrid):
    with two_datacenters(*hybrid, threshold=100, line=LineConfig(gbps=0.01, rtt_ms=10)) as (local, _):
        journeys = serve(local, prompts_of(300, 20), GREEDY)
    for journey in journeys:
        parts = (journey.route_s, journey.queue_s, journey.prefill_s, journey.transfer_exposed_s, journey.admit_s)
        assert sum(parts) == pytest.approx(journey.ttft_s) and min(parts) >= 0, parts
    offloaded = journeys[0]
    assert 0 < offloaded.transfer_s < offloaded.finished_at_s - offloaded.arrived_at_s


def test_a_node_at_rest_hears_at_once_whatever_is_said_to_it(hybrid, monkeypatch):
    """With nothing under way it does not look at the clock: an order, and the end, come to it as news."""
    monkeypatch.setattr("minprfaas.cluster.processes.REST_S", 10 * DEADLINE_S)
    with two_datacenters(*hybrid, threshold=100) as (local, remote):
        for prompt in prompts_of(120, 130):
            serve(local, [prompt], GREEDY)
            step_until(local, lambda: not remote.prefill.has_work)


def test_a_first_token_is_told_when_its_request_has_a_place_in_the_decode_batch(hybrid):
    """Told before, it would hide that decode is short; and what waits for a place is lost with no prefill node."""
    prompts = prompts_of(300, 20)
    with two_datacenters(*hybrid, threshold=100) as (local, _):
        local.decode.engine.scheduler.max_batch = 1
        first = local.front.submit("first", prompts[1], SamplingParams(max_tokens=150, ignore_eos=True))
        step_until(local, lambda: first.output_ids)
        second = local.front.submit("second", prompts[0], GREEDY)
        step_until(local, lambda: any(one.kv and one.ready_at_s for one in local.decode.servings.values()))
        local.decode.notice(PeerLost("prfaas-0", "link lost: test"))
        assert not second.output_ids and not first.is_finished
        step_until(local, lambda: not local.front.has_work)
    assert second.first_token_at_s >= first.finished_at_s and (second.attempts, second.route) == (1, "prfaas")
    assert second.admit_s > 0 and second.route_s >= 0
    assert tokens([second]) == reference(*hybrid, [prompts[0]], GREEDY)


def test_hundreds_of_streams_leave_threads_descriptors_and_blocks_as_they_were(hybrid):
    """A thread that waited for the next stream would stay: as many as there ever were streams at once."""
    engine = Engine(*hybrid, CacheConfig(20, 16))
    prompt = engine.add(engine.request("prompt", prompts_of(50)[0], GREEDY, prefill_only=True))
    while prompt.status is not Status.HELD:
        engine.step()
    cache, sending = prompt.cache, SendingThreads("test")

    def sending_threads():
        return [thread for thread in threading.enumerate() if thread.name == "test send"]

    with connected() as (sender, receiver):
        descriptors, stats = len(os.listdir("/dev/fd")), engine.kvcache.stats()
        for number, at_once in enumerate([*[30] * 8, STREAMS_AT_ONCE + 6]):
            plans = [stream_plan(engine.layout, 100 * number + one, 0, 50) for one in range(at_once)]
            sends = []
            for plan in plans:
                receiver.expect(plan, lambda *_: None)
                engine.kvcache.hold(cache)
                sends.append(KVSend(engine.kvcache, sender, plan, cache.block_tables, sending, DEADLINE_S))
            assert len(sending_threads()) == min(at_once, STREAMS_AT_ONCE)
            for send in sends:
                send.finish()
            for send in sends:
                assert send.outcome.result(DEADLINE_S).bytes == send.plan.total_bytes
                engine.kvcache.release(cache)
        wait_until(lambda: not sending_threads())
        assert engine.kvcache.stats() == stats and len(os.listdir("/dev/fd")) <= descriptors
    engine.release(prompt)
    engine.kvcache.check()


def test_an_answer_that_the_pool_cuts_short_says_so(hybrid):
    with two_datacenters(*hybrid, threshold=1000, pool_b=25) as (local, _):
        (journey,) = serve(local, prompts_of(300), SamplingParams(max_tokens=200, ignore_eos=True))
    assert (journey.finish_reason, journey.length_limit) == ("length", "pool") and len(journey.output_ids) < 200


def test_an_id_is_used_once_and_a_prompt_has_a_token(hybrid):
    with two_datacenters(*hybrid, threshold=100) as (local, _):
        with pytest.raises(UserError, match="empty prompt"):
            local.front.submit("0", [], GREEDY)


# ---- who decides: the same plane, whoever drives it


def test_the_front_end_and_the_simulator_get_the_same_decisions_for_the_same_inputs(tmp_path):
    """20 requests, weather, a failure. The simulator's inputs reach a live front end as messages and submissions."""
    write_conversations(tmp_path / "trace.jsonl", 20, rate_rps=2.0, seed=3)
    fleet = paper_fleet()
    setup = Setup(fleet, 3, 19_400.0, cache_blocks=500, weather=((2.0, 1.0), (6.0, 100.0)),
                  failures=(("prfaas0", 3.0, 8.0),))
    simulated = RecordingControlPlane(setup.control_settings())
    Simulation(setup, from_trace(read_trace(tmp_path / "trace.jsonl")), control=simulated).run()

    now_s = [0.0]
    live = RecordingControlPlane(setup.control_settings())
    keys_of: dict[int, tuple] = {}
    front = FrontEnd(live, Mail(queue.SimpleQueue()), lambda token_ids: keys_of[token_ids[0]], 512, 60.0,
                     lambda: now_s[0])
    ids = {}
    for call in simulated.calls:
        now_s[0] = call.now_s
        drive(front, call, ids, keys_of)
    asked = [call for call in simulated.calls if call.method == "route"]
    answered = [call for call in live.calls if call.method == "route"]
    assert len(asked) >= 20 and len(answered) == len(asked)
    assert [call.answer for call in answered] == [call.answer for call in asked]
    assert any(isinstance(call.ask, control.NodeLeft) for call in live.calls)
    assert replay(simulated.calls, setup.control_settings()) == simulated.calls


class _Key(str):
    """A simulated block's key with the one method of bytes that the front end calls."""

    def hex(self):
        return self


def drive(front, call, ids, keys_of):
    """One input of a simulated plane, as the live front end gets it: from a node's message, a lost peer, a client."""
    decode_node = {id: journey.decision.decode_node for id, journey in front.journeys.items() if journey.decision}
    attempt = {id: journey.attempt for id, journey in front.journeys.items()}
    match call.ask:
        case None:
            front.step()
        case control.NodeJoined(node, role):
            front.hear(node, messages.NodeReady(role.value, "simulated", 1))
        case control.NodeLeft(node):
            front.notice(PeerLost(node, "it failed"))
        case CacheChanged(node, sequence, entries, inventory):
            front.hear(node, messages.CacheNews(
                sequence, [str(key) for key, _ in entries], [tokens for _, tokens in entries], inventory))
        case control.LinkMeasured(node, sample):
            front.hear(node, sample)
        case control.PrefillEnded(id, uncached, seconds):
            front.hear(decode_node[ids[id]], messages.Prefilled(attempt[ids[id]], uncached, seconds, 0))
        case control.DecodeStarted(id):
            front.hear(decode_node[ids[id]], messages.Started(attempt[ids[id]], 0, 0, 0.0, 0.0, 0.0, 0.0))
        case control.RequestEnded(id, output_tokens):
            for _ in range(output_tokens - 1):
                front.hear(decode_node[ids[id]], messages.TokenDrawn(attempt[ids[id]], 1, "", "", ""))
            front.hear(decode_node[ids[id]], messages.TokenDrawn(attempt[ids[id]], 1, "", "length", "max_tokens"))
        case _ if call.method == "route":
            request = call.ask
            if request.id in ids:  # again, after a failure
                journey = front.journeys[ids[request.id]]
                front.hear(journey.decision.decode_node, messages.Failed(journey.attempt, "its node failed", "lost"))
                return
            ids[request.id] = f"r{len(ids)}"
            number = len(ids)
            keys_of[number] = [_Key(str(key)) for key in request.keys]
            front.submit(ids[request.id], [number] * request.prompt_tokens, GREEDY)
            front.step()
