"""What every node says of itself beside its role: figures, cache news, its lines, goodbye; and how it changes its role.

Chapters 11 and 13.
"""

import queue
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from cluster_support import DEADLINE_S, FAST
from desk import HERE, PEER, PROMPT, SAMPLING, Desk, ordered, serving
from transport_support import IDENTITY, wait_until
from world import End

from minprfaas import SamplingParams
from minprfaas.cluster import messages
from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.envelope import Envelope, encode
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.node import PeerLost, PeerReturned
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.processes import process, worker
from minprfaas.cluster.topology import Topology
from minprfaas.cluster.upkeep import FIGURES_S, TIMELINE_PART, Upkeep
from minprfaas.config import FRONT, CacheConfig, Encoding, LinkSample, Role
from minprfaas.engine.engine import Engine
from minprfaas.engine.paced import Pace
from minprfaas.errors import UserError
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import LinkDown, LinkRefused
from minprfaas.transport.encoding import Wire
from minprfaas.transport.events import LinkLost, MessageReceived
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.link import Link


def heard_by(desk, message, sender=FRONT):
    desk.upkeep.hear(sender, message)
    return [envelope.message for envelope in desk.mail.take_local()]


def test_a_node_says_now_and_then_how_things_stand_and_at_the_end_whether_its_books_are_right(hybrid):
    desk = Desk(hybrid, Role.PDD)
    engine, upkeep = desk.engine, desk.upkeep
    request = engine.add(engine.request("r", PROMPT[:20], SamplingParams(**SAMPLING)))
    engine.step(), engine.step()
    engine.computed_s = 2.5
    stats = engine.kvcache.stats()
    desk.now_s += 7.0
    upkeep.step()
    figures = messages.NodeFigures(7.0, 2.5, 20, 1, stats.free, stats.cached, stats.in_use)
    assert stats.cached + stats.in_use > 0 and desk.said(messages.CacheNews) == [figures]
    desk.now_s += FIGURES_S - 0.1
    upkeep.step()
    assert desk.said(messages.CacheNews) == []
    desk.now_s += 0.1
    upkeep.step()
    assert [type(word) for word in desk.said(messages.CacheNews)] == [messages.NodeFigures]

    upkeep.say_goodbye()
    figures, goodbye = desk.said(messages.CacheNews)
    assert figures.in_use_blocks == stats.in_use and goodbye.peak_bytes > 50 * 2**20
    assert (goodbye.wrong, goodbye.allowed_s) == (f"{stats.in_use} blocks are held for nobody", 0.0)
    engine.abort(request)
    engine.runner.pace = Pace(float, float, 3.0, 2.0, 1.0)
    upkeep.say_goodbye()
    goodbye = desk.said()[-1]
    assert (goodbye.wrong, goodbye.allowed_s, goodbye.needed_s, goodbye.late_s) == ("", 3.0, 2.0, 1.0)
    engine.kvcache.ledger.free.pop()
    upkeep.say_goodbye()
    assert desk.said()[-1].wrong == "of 60 blocks, 1 leaked"


def test_a_node_tells_what_its_cache_gains_and_loses_and_all_of_it_when_asked(hybrid):
    desk = Desk(hybrid, Role.PDD)
    engine, ledger = desk.engine, desk.engine.kvcache.ledger

    def answer(prompt):
        engine.add(engine.request("r", prompt, SamplingParams(max_tokens=1)))
        while engine.has_work:
            engine.step()

    def news():
        desk.upkeep.tell_news()
        return [envelope.message for envelope in desk.mail.take_local()]

    assert news() == []
    answer(PROMPT[:33])
    (first,) = news()
    (key,) = [key.hex() for key in engine.kvcache.keys(PROMPT[:33])[1:]]
    assert first == messages.CacheNews(1, [key], [32], False)
    answer(PROMPT[:49])  # not told yet: it is part of the inventory
    assert heard_by(desk, messages.SendInventory(), PEER) == [], "only the front end asks"
    (inventory,) = heard_by(desk, messages.SendInventory())
    held = {one.key.hex(): one.tokens for one in ledger.inventory()}
    assert inventory.inventory and dict(zip(inventory.keys, inventory.tokens)) == held and 48 in held.values()
    assert news() == []
    ledger.give_back(ledger.allocate(60))
    (lost,) = news()
    assert lost.sequence == inventory.sequence + 1 and set(lost.tokens) == {0} and {*lost.keys} == {*held}
    (empty,) = heard_by(desk, messages.SendInventory())
    assert (empty.sequence, empty.keys) == (lost.sequence + len(lost.keys) - 1, [])


def test_a_node_tells_of_its_lines_what_carries_something_and_of_others_now_and_then(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)

    def told(at_s, utilization=0.0, queued=0, inflight=0):
        old, now = LinkSample(0.0, 9.0, 1.0, 0), LinkSample(at_s, 1.0, utilization, queued, inflight)
        desk.line.samples = (old, old, now)
        desk.upkeep.tell_news()
        return [(sample.at_s, sample.link) for sample in desk.said()]

    desk.upkeep.tell_news()
    assert desk.said() == [], "there is no sample yet"
    assert told(1.0) == [(1.0, "line")]
    assert told(1.0, utilization=0.5) == [], "it was told"
    assert told(1.25) == [] and told(1.0 + FIGURES_S) == [(1.0 + FIGURES_S, "line")]
    for at_s, change in ((2.25, dict(utilization=0.1)), (2.5, {}), (2.75, dict(queued=1)), (3.0, {}),
                           (3.25, dict(inflight=1)), (3.5, {})):
        assert told(at_s, **change) == [(at_s, "line")], "it carries something, or did when it was told last"
    assert told(3.75) == []
    desk.upkeep.tells_of_links = False
    assert told(4.0, utilization=1.0) == [], "the other role of this process tells of the line"


def test_the_front_end_ends_a_node_and_its_loss_is_noted_until_it_returns(hybrid):
    desk = Desk(hybrid, Role.PDD, timeline=Timeline("pd-0"))
    upkeep = desk.upkeep
    assert heard_by(desk, messages.Shutdown(), PEER) == [] and not upkeep.is_stopping
    heard_by(desk, messages.Shutdown())
    assert upkeep.is_stopping
    upkeep.notice(PeerLost(PEER, "gone"))
    assert upkeep.front_gone_at_s is None
    upkeep.notice(PeerLost(FRONT, "gone"))
    assert upkeep.front_gone_at_s == desk.now_s
    upkeep.notice(PeerReturned(PEER))
    assert desk.said() == [] and upkeep.front_gone_at_s is not None and upkeep.is_stopping
    upkeep.notice(PeerReturned(FRONT))
    assert desk.said() == [messages.NodeReady("pdd", "cpu", 60)]
    assert upkeep.front_gone_at_s is None and not upkeep.is_stopping
    upkeep.mark_stream(9, "r")
    (mark,) = [event for event in desk.engine.timeline.events() if event["ph"] == "i"]
    assert (mark["name"], mark["ts"]) == ("stream opened", desk.now_s * 1e6)
    assert mark["args"] == {"stream": 9, "request": "r"}


def test_work_for_the_role_that_a_node_does_not_play_is_given_back_and_a_change_waits_until_it_has_none(hybrid):
    desk = Desk(hybrid, Role.PDD)
    one = worker(HERE, Role.PDD, desk.engine, desk.mail, 60.0, 5.0)
    one.hear(PEER, ordered())
    assert desk.told() == [messages.Failed("a#1", "pd-0 decodes now", "lost")]
    one.hear(FRONT, serving())
    for sender, role in ((PEER, "pdp"), (FRONT, "prfaas")):  # who may say so, and what a PD node can become
        one.hear(sender, messages.ChangeRole(role))
    one.hear(FRONT, messages.ChangeRole("pdp"))
    one.step()
    assert one.upkeep.role is Role.PDD and isinstance(one.playing, DecodeRole) and one.has_work
    one.hear(FRONT, messages.Abort("a#1"))
    desk.said()
    one.step()
    assert one.upkeep.role is Role.PDP and isinstance(one.playing, PrefillRole) and not one.has_work
    assert [word for word in desk.said() if isinstance(word, messages.NodeReady)] == [
        messages.NodeReady("pdp", "cpu", 60)]
    one.hear(FRONT, serving(id="b#1"))
    assert desk.said() == [messages.Failed("b#1", "pd-0 prefills now", "lost")]
    one.hear(PEER, ordered(id="b#1"))
    assert one.has_work and one.is_ready
    one.step()
    assert desk.said() == [], "it changed once"


def test_a_process_serves_until_it_is_dismissed_and_has_no_work_or_was_alone_for_too_long(hybrid):
    for ends in ("dismissed", "alone"):
        desk = Desk(hybrid, Role.PDD)
        mail = Mail(desk.events)
        mail.add_link(desk.line, [FRONT, PEER])
        made = process(mail, None, [worker(HERE, Role.PDD, desk.engine, mail, 60.0, 1e9)])

        def front_says(message):
            desk.events.put(MessageReceived(encode(Envelope(HERE, FRONT, message)), "line"))

        front_says(serving(deadline_s=1e9))
        serves = threading.Thread(target=made.serve, args=(5.0,), daemon=True)
        serves.start()
        if ends == "dismissed":
            front_says(messages.Shutdown())
            serves.join(0.1)
            assert serves.is_alive(), "there is a request"
            front_says(messages.Abort("a#1"))
        else:
            desk.events.put(LinkLost("gone", "line"))
            wait_until(lambda: made.workers[0].upkeep.front_gone_at_s is not None)
            for seconds in (4.9, 0.1):
                serves.join(0.1)
                assert serves.is_alive(), "the front end may come back"
                desk.now_s += seconds
        serves.join(60)
        assert not serves.is_alive() and isinstance(desk.told()[-1], messages.Goodbye)


def test_a_process_steps_until_something_holds_or_the_time_is_up(hybrid):
    desk = Desk(hybrid, Role.PDD)
    mail = Mail(desk.events)
    mail.add_link(desk.line, [FRONT])
    made, seen = process(mail, None, [worker(HERE, Role.PDD, desk.engine, mail, 60.0)]), []
    assert made.run_until(lambda: seen.append(1) or len(seen) > 3, 60.0) and len(seen) >= 4
    assert not made.run_until(lambda: False, 0.01)


class Ear:
    """Stands where the front end does."""

    name, is_ready = FRONT, False

    def __init__(self):
        self.heard = []

    def hear(self, sender, message):
        self.heard.append((sender, type(message)))

    def notice(self, happening):
        pass

    def step(self):
        pass


def test_workers_beside_the_front_end_say_that_they_are_there_and_who_decodes_steps_before_who_prefills(hybrid):
    desk, ear, mail = Desk(hybrid, Role.PDD), Ear(), Mail(queue.SimpleQueue())
    workers = [worker(name, role, desk.engine, mail, 60.0) for name, role in (("p", Role.PDP), ("d", Role.PDD))]
    made = process(mail, ear, workers)
    assert list(made.node.parts) == [FRONT, "d", "p"] and made.front is ear and made.workers == workers
    assert sum(one.upkeep.tells_of_links for one in workers) == 1, "of the lines of this process one tells"
    made.node.step()
    assert ear.heard[:2] == [("p", messages.NodeReady), ("d", messages.NodeReady)]
    mail = Mail(queue.SimpleQueue())
    process(mail, None, [worker("d", Role.PDD, desk.engine, mail, 60.0)])
    assert mail.take_local() == [], "to one elsewhere they do when it is met"


# Whom a process meets, and what it says then


@pytest.fixture
def upkeep(hybrid):
    """Of a decode node whose front end lives in the same process, and a way to take what it has said."""
    engine = Engine(*hybrid, CacheConfig(20, 16), timeline=Timeline("pd-0"))
    mail = Mail(queue.SimpleQueue())
    mail.add_local(FRONT)
    one = Upkeep("pd-0", Role.PDD, engine, mail, DEADLINE_S)
    return one, lambda: [envelope.message for envelope in mail.take_local()]


def test_a_long_timeline_leaves_in_parts_and_comes_whole(upkeep):
    one, said = upkeep
    for number in range(TIMELINE_PART + 3):
        one.engine.timeline.instant("streams", f"event {number}", 0.0)
    one.say_goodbye()
    parts = [message.events for message in said() if isinstance(message, messages.TimelinePart)]
    assert len(parts) == 2 and [event for part in parts for event in part] == one.engine.timeline.events()


def test_two_processes_meet_and_each_knows_whom_it_has_met():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    places, events = Topology(1, 1).two_places(), [queue.SimpleQueue(), queue.SimpleQueue()]

    def at(rank):
        return Neighbours(places[rank], [places[1 - rank]], mail=Mail(events[rank]), make_link=lambda _: Link(
            "a-b", store, rank, FAST, IDENTITY, events=events[rank]))

    both = [at(0), at(1)]
    for rank, one in enumerate(both):
        one.wait_for_all(DEADLINE_S)
        assert one.met == {places[1 - rank].name} and not one.refused
        assert {events[rank].get(timeout=DEADLINE_S) for _ in places[1 - rank].parts} == {
            PeerReturned(part) for part in places[1 - rank].parts}
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("meeting "))
    for one in both:
        one.close()
    wait_until(lambda: not any(thread.name.startswith("meeting ") for thread in threading.enumerate()))


def test_a_process_that_comes_late_is_met_and_one_that_was_refused_is_named_until_then(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.neighbours.PAUSE_S", 0.01)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    (there, here), events = Topology(1, 1).two_places(), queue.SimpleQueue()
    made = []

    def make_link(_):
        made.append(Link("a-b", store, 1, FAST, IDENTITY, events=events))
        return made[-1]

    one = Neighbours(here, [there], make_link, Mail(events))
    one.wait_for_all(0.05)
    assert not one.met and not one.refused
    stranger = Link("a-b", store, 0, FAST, replace(IDENTITY, dtype="int3"))
    with pytest.raises(LinkRefused):
        stranger.connect(DEADLINE_S)
    stranger.close()
    wait_until(lambda: "dtype is float32 here and int3 there" in one.refused.get(there.name, ""))
    friend = Link("a-b", store, 0, FAST, IDENTITY)
    friend.connect(DEADLINE_S)
    one.wait_for_all(DEADLINE_S)
    assert one.met == {there.name} and not one.refused and len(made) > 1
    assert made[0] is not made[-1]
    friend.close()
    one.close()


def test_a_process_that_cannot_be_met_for_want_of_ports_is_named_until_there_are_some(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.neighbours.PAUSE_S", 0.01)
    monkeypatch.setattr("minprfaas.transport.wan.rendezvous.LANE_TIMEOUT_S", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    (there, here), has_ports = Topology(1, 1).two_places(), threading.Event()

    def lane(*arguments):
        if not has_ports.is_set():
            raise UserError("too many open files")
        return Lane(*arguments)

    friend = Link("a-b", store, 0, FAST, IDENTITY)
    threading.Thread(target=friend.connect, args=(DEADLINE_S,), daemon=True).start()
    one = Neighbours(here, [there], lambda _: Link("a-b", store, 1, FAST, IDENTITY, lane_type=lane),
                     Mail(queue.SimpleQueue()))
    wait_until(lambda: one.refused.get(there.name) == "too many open files")
    has_ports.set()
    one.wait_for_all(DEADLINE_S)
    assert one.met == {there.name} and not one.refused
    friend.close()
    one.close()


def test_two_links_that_are_made_at_the_same_moment_are_both_known():
    mail, ends = Mail(queue.SimpleQueue()), [End(name, queue.SimpleQueue()) for name in ("one", "other")]
    other = threading.Thread(target=mail.add_link, args=(ends[1], ["pd-1"]))

    def names():  # in the middle of the first one's book-keeping the second one comes
        other.start()
        other.join(0.1)
        yield "pd-0"

    mail.add_link(ends[0], names())
    other.join(DEADLINE_S)
    assert mail.links == {"pd-0": ends[0], "pd-1": ends[1]} and len(mail.links_between_sites) == 2


def test_a_switchboard_knows_who_is_where_and_which_way_crosses_to_another_datacenter():
    mail = Mail(queue.SimpleQueue(), Wire(Encoding.INT8))
    far, near = End("far", queue.SimpleQueue()), End("near", queue.SimpleQueue())
    mail.add_local("pd-0/pdd")
    assert mail.is_here("pd-0/pdd") and not mail.is_here("pd-1")
    mail.add_local(FRONT)
    mail.add_link(far, ["prfaas-0", "prfaas-1"])
    mail.add_link(near, ["pd-1"], crosses_sites=False)
    assert [mail.wire_to(name).encoding for name in ("prfaas-1", "pd-1", "pd-0/pdd", "nobody")] == [
        Encoding.INT8, Encoding.EXACT, Encoding.EXACT, Encoding.EXACT]
    assert mail.links == {"prfaas-0": far, "prfaas-1": far, "pd-1": near} and mail.links_between_sites == [far]
    assert mail.names_behind("far") == ["prfaas-0", "prfaas-1"] and mail.names_behind("none") == []
    assert mail.transport("pd-1") is near and mail.transport(FRONT) is mail.transport("pd-0/pdd") is not near
    with pytest.raises(LinkDown, match="there is no way to 'nobody'"):
        mail.transport("nobody")
    mail.send("pd-0/pdd", FRONT, messages.Shutdown())
    mail.send("pd-0/pdd", "nobody", messages.Shutdown())
    far.is_up = False
    mail.send("pd-0/pdd", "prfaas-0", messages.Shutdown())  # whoever waits for an answer hears that it is gone
    assert mail.take_local() == [Envelope(FRONT, "pd-0/pdd", messages.Shutdown())] and mail.take_local() == []
