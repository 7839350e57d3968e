"""One node alone, on a clock that is turned by hand: the test is the front end, and the peer at the end of a line."""

import queue
import time

from test_two_datacenters import prompts_of
from world import End, open_books

from minprfaas import SamplingParams
from minprfaas.cluster import messages
from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.envelope import decode
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.relay import RelayedDecodeRole, RelayingPrefillRole
from minprfaas.cluster.stream_plans import snapshot_plan, stream_plan
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.config import FRONT, CacheConfig, Role
from minprfaas.engine.engine import Engine
from minprfaas.transport.events import MessageReceived

HERE, PEER, DEADLINE_S = "pd-0", "prfaas-0", 30
PROMPT = prompts_of(100)[0]
SAMPLING = {"max_tokens": 3, "ignore_eos": True}


class Desk:
    """One node, its clock, and what it says: to the front end `said`, over the line `told`."""

    def __init__(self, hybrid, role, pool=60, timeline=None, relay=False):
        self.now_s, self.events, self.far = 1000.0, queue.SimpleQueue(), queue.SimpleQueue()
        self.engine = Engine(*hybrid, CacheConfig(pool, 16), 48, clock=lambda: self.now_s, timeline=timeline)
        self.mail = Mail(self.events)
        self.mail.add_local(FRONT)
        self.mail.add_local(HERE)
        self.line, self.there = End("line", self.events), End("line", self.far)
        self.line.peer, self.there.peer = self.there, self.line
        self.mail.add_link(self.line, [PEER])
        self.upkeep = Upkeep(HERE, role, self.engine, self.mail, transfer_deadline_s=60.0)
        decode, prefill = (RelayedDecodeRole, RelayingPrefillRole) if relay else (DecodeRole, PrefillRole)
        self.role = decode(self.upkeep, 5.0) if role is Role.PDD else prefill(self.upkeep)

    def said(self, *but):
        """Messages to the front end since the last call, but for (unless others are named) its upkeep's."""
        words = [envelope.message for envelope in self.mail.take_local()]
        return [word for word in words if not isinstance(word, but or (messages.CacheNews, messages.NodeFigures))]

    def told(self):
        """Messages to the peer since the last call."""
        return [decode(event.message).message for event in taken(self.far) if isinstance(event, MessageReceived)]

    def notice(self):
        """What has happened on the line reaches the role."""
        for event in taken(self.events):
            self.role.notice(event)

    @property
    def is_empty(self):
        """Whether it has nothing to do, holds no block, and keeps nothing of a request or a stream that has ended."""
        return not (self.role.has_work or self.engine.kvcache.stats().in_use or open_books(self.role))

    def after(self, seconds):
        self.now_s += seconds
        self.role.step()
        self.upkeep.step()


def taken(events):
    found = []
    while not events.empty():
        found.append(events.get())
    return found


def prefilled(hybrid, prompt=PROMPT):
    """An engine and its request whose prompt is prefilled and held."""
    engine = Engine(*hybrid, CacheConfig(60, 16), 48)
    request = engine.add(engine.request("sent", prompt, SamplingParams(**SAMPLING), prefill_only=True))
    while engine.has_work:
        engine.step()
    return engine, request


def ship(stream, source, tables, entries=None, end=None):
    """Put tokens up to `end` of these layers of the plan."""
    engine, plan = source, stream.plan
    for entry in plan.entries if entries is None else entries:
        table = tables[engine.layout.group_of_layer[entry.layer].index]
        data = engine.kvcache.pool.read_bytes(entry.layer, table, plan.start, end or plan.end)
        stream.put(entry.layer, plan.start, end or plan.end, data.reshape(-1))


def serving(**change):
    return messages.Serve(**{**dict(
        id="a#1", token_ids=PROMPT, answered_tokens=0, sampling=SAMPLING, prefill_node=PEER, deadline_s=30.0,
        prefix_source="pd-7", prefix_tokens=48), **change})


def ordered(**change):
    return messages.PrefillOrder(**{**dict(
        id="a#1", stream_id=7, token_ids=PROMPT, start=16, snapshot_stream_id=8, snapshot_at=96, prefix_source="",
        prefix_tokens=0, answered_tokens=0, sampling=SAMPLING, deadline_s=30.0), **change})


def served(hybrid, pool=60, relay=False, **change):
    """A decode role that has ordered a prefill, and the order."""
    desk = Desk(hybrid, Role.PDD, pool, relay=relay)
    desk.role.hear(FRONT, serving(**change))
    desk.after(2.0)
    return desk, desk.told()[0]


def expecting(desk, order):
    """Accept an order's streams at the far end; what arrives, by layer."""
    arrived, layout = {}, desk.engine.layout

    def sink(layer, start, end, data):
        arrived.setdefault(layer, []).append((start, end, data.clone().reshape(-1)))

    desk.there.expect(stream_plan(layout, order.stream_id, order.start, len(order.token_ids)), sink)
    if order.snapshot_at:
        desk.there.expect(snapshot_plan(layout, order.snapshot_stream_id, order.snapshot_at), sink)
    return arrived


def step_until(desk, reached):
    """Steps while the clock stands; streams leave and end in threads of their own, which may take their time."""
    until_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < until_s, "not reached by its deadline"
        desk.after(0.0)
