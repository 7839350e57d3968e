"""A whole cluster in one thread: every node with its own loop, and lines in memory between them that can be cut.

The nodes run by turns, so that a test can stop the world at any moment, kill a node there and look at what is left.
What is real: the roles, the front end, the control plane, the engines, the messages as JSON. A killed node is gone with
its cache; a stopped one hears nothing until it is resumed, and then first what was said before its lines were cut.
"""

import itertools
import json
import queue
import threading
import time
from collections import deque

import pytest
from kv_oracle import KVOracle

from minprfaas import generate
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Node
from minprfaas.cluster.processes import control_settings, worker
from minprfaas.config import FRONT, CacheConfig, Role
from minprfaas.engine.engine import Engine
from minprfaas.scheduling.control import ControlPlane
from minprfaas.scheduling.roles import RoleChange
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import LinkLost, LinkRestored, MessageReceived
from minprfaas.transport.loopback import LoopbackStream
from minprfaas.transport.streams import ExpectedStreams
from minprfaas.transport.wan.monitor import LinkStats

DEADLINE_S = 60


class End:
    """One end of a line between two nodes: a KVTransport and a MessageChannel into the other node's queue."""

    def __init__(self, name, events):
        self.name, self.events, self.peer, self.is_up = name, events, None, True
        self.expected = ExpectedStreams(events)
        self.room = threading.Event()  # cleared, the line stands still: `put` waits
        self.room.set()
        self.samples = ()

    def send_message(self, message):
        self._check()
        self.peer.events.put(MessageReceived(json.loads(json.dumps(message)), self.name))

    def expect(self, plan, sink, device=None):
        self._check()
        self.expected.expect(plan, sink)

    def forget(self, stream_id):
        return self.expected.forget(stream_id)

    def open(self, plan):
        self._check()
        return _Stream(plan, self)

    def stats(self):
        return LinkStats(0, 0, 0, self.samples)

    def lose(self, reason):
        self.is_up = False
        self.room.set()
        self.expected.fail_all(reason)
        self.events.put(LinkLost(reason, self.name))

    def _check(self):
        if not self.is_up:
            raise LinkDown(f"line {self.name} is cut")


class _Stream(LoopbackStream):
    def __init__(self, plan, end):
        super().__init__(plan, end.peer.expected)
        self._end = end

    def put(self, layer, start, end, data):
        while not self._end.room.wait(0.05) and self._failure is None:
            pass
        self._end._check()
        super().put(layer, start, end, data)


class Machine:
    """One node's process."""

    def __init__(self, name, events, part, node):
        self.name, self.events, self.part, self.node = name, events, part, node
        self.ends = {}  # by the name of the node at the other end
        self.is_stopped = False


class World:
    """`prfaas` PrfaaS nodes, `pd` PD nodes of which the first `split` begin as PD-P, and a front end on its own."""

    def __init__(self, model, tokenizer, prfaas=1, pd=2, split=1, threshold=100, pool=120, prefill_chunk=48,
                 deadline_s=DEADLINE_S, plane=None, clock=time.monotonic, relay=False):
        self.model, self.tokenizer, self.pool, self.prefill_chunk = model, tokenizer, pool, prefill_chunk
        self.deadline_s, self.machines, self.dead, self.relay = deadline_s, {}, [], relay
        self._line_numbers = itertools.count()
        self.oracle = KVOracle(model)
        settings = control_settings(threshold, None, self._engine().layout)
        self.front = self._add_front(plane or ControlPlane(settings), clock)
        self.roles = {**{f"prfaas-{i}": Role.PRFAAS for i in range(prfaas)},
                      **{f"pd-{i}": Role.PDP if i < split else Role.PDD for i in range(pd)}}
        for name in self.roles:
            self.start(name)
        self.step_until(lambda: len(self.front.ready) == len(self.roles))

    def _engine(self):
        engine = Engine(self.model, self.tokenizer, CacheConfig(self.pool, 16), self.prefill_chunk)
        self.oracle.watch(engine.kvcache)
        return engine

    def _add_front(self, plane, clock):
        events, engine = queue.SimpleQueue(), self._engine()
        mail = Mail(events)
        front = FrontEnd(plane, mail, engine.kvcache.keys, 16, self.deadline_s, clock)
        self.machines[FRONT] = Machine(FRONT, events, front, Node(mail, [front]))
        return front

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed is None:
            for name in self.machines.keys() - {FRONT}:
                self.part(name).engine.kvcache.check()
            assert not self.oracle.wrong, self.oracle.wrong[:3]
        for machine in [*self.machines.values(), *self.dead]:
            self._cut(machine)
        for machine in [*self.machines.values(), *self.dead]:
            if machine.name != FRONT:
                self._wind_up(machine)

    def _wind_up(self, machine):
        """Let a node's streams end, which in a killed process would have ended with it."""
        until_s = time.monotonic() + DEADLINE_S
        machine.node.step()
        while machine.part.has_work and time.monotonic() < until_s:
            machine.node.step()

    # Nodes come and go

    def start(self, name):
        """A new process of that name, with an empty cache."""
        events, engine, role = queue.SimpleQueue(), self._engine(), self.roles[name]
        mail = Mail(events)
        part = worker(name, role, engine, mail, self.deadline_s, self.deadline_s, relay=self.relay)
        machine = Machine(name, events, part, Node(mail, [part]))
        for other in list(self.machines):
            if not self.machines[other].is_stopped:
                self._connect(machine, self.machines[other])
        self.machines[name] = machine
        part.upkeep.introduce()

    def kill(self, name):
        """kill -9."""
        machine = self.machines.pop(name)
        self.dead.append(machine)
        self._cut(machine)

    def stop(self, name):
        """SIGSTOP, for longer than the others' link deadline."""
        self.machines[name].is_stopped = True
        self._cut(self.machines[name])

    def resume(self, name):
        """SIGCONT: it hears what it missed, then meets every other node anew."""
        machine = self.machines[name]
        machine.is_stopped = False
        machine.node.step()
        for other in self.machines.values():
            if other is not machine and not other.is_stopped:
                self._connect(machine, other, met_before=True)

    def cut_line(self, one, other):
        """The line between two nodes is lost for good."""
        for end in (self.machines[one].ends[other], self.machines[other].ends[one]):
            end.lose("it was cut")

    def mend_line(self, one, other):
        """The two meet anew."""
        self._connect(self.machines[one], self.machines[other], met_before=True)

    def _cut(self, machine):
        for other, end in machine.ends.items():
            if end.is_up:
                end.lose(f"{machine.name} does not answer")
                end.peer.lose(f"{machine.name} does not answer")

    def _connect(self, one, other, met_before=False):
        name = f"{one.name}~{other.name}.{next(self._line_numbers)}"
        ends = [End(name, machine.events) for machine in (one, other)]
        for end, peer, machine, far in ((*ends, one, other), (*reversed(ends), other, one)):
            end.peer = peer
            machine.ends[far.name] = end
            machine.node.mail.add_link(end, [far.name])
            if met_before:
                machine.events.put(LinkRestored(1, True, name))

    def convert(self, name, role):
        """What the long-term loop does when it wants this node to play `role`: one conversion at a time."""
        plane = self.front.plane
        if plane._conversion is None:
            plane._begin_conversion(RoleChange(name, role, "asked for"))

    def roles_now(self):
        """What each PD node plays."""
        return {name: machine.part.upkeep.role for name, machine in self.machines.items() if name.startswith("pd-")}

    # Time goes on

    def step(self):
        """Each node that runs takes a step."""
        for machine in list(self.machines.values()):
            if not machine.is_stopped:
                machine.node.step()

    def step_until(self, condition, deadline_s=2 * DEADLINE_S):
        """Step until `condition()` holds."""
        until_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < until_s, "the condition did not come to hold by its deadline"
            self.step()

    def submit(self, prompts, params):
        """The journeys, in order."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        first = len(self.front.journeys)
        return [self.front.submit(f"{first + i}", prompt, one) for i, (prompt, one) in enumerate(zip(prompts, each))]

    def serve(self, prompts, params):
        """Submit, and step until all have ended."""
        journeys = self.submit(prompts, params)
        self.step_until(lambda: not self.front.has_work)
        return journeys

    # What a test looks at

    def part(self, name):
        """What the node plays now: a prefill or a decode role."""
        return self.machines[name].part.playing

    @property
    def is_empty(self):
        """Whether no node holds a block for a request, or a stream."""
        parts = [self.part(name) for name in self.machines if name != FRONT and not self.machines[name].is_stopped]
        return not any(part.has_work or part.engine.kvcache.stats().in_use for part in parts)

    def check(self, journeys):
        """Every answer is that of one process, nothing is held, all books are right."""
        params = [journey.params for journey in journeys]
        prompts = [journey.token_ids[:journey.prompt_tokens] for journey in journeys]
        wanted = generate(self.model, self.tokenizer, prompts, params)
        for journey, output in zip(journeys, wanted):
            assert journey.error is None, (journey.id, journey.error, journey.reason)
            assert journey.output_ids == output.token_ids, (journey.id, journey.recoveries, journey.attempts)
            assert (journey.text, journey.finish_reason) == (output.text, output.finish_reason)
            parts = (journey.route_s, journey.queue_s, journey.prefill_s, journey.transfer_exposed_s, journey.admit_s)
            assert sum(parts) == pytest.approx(journey.ttft_s) and min(parts) >= 0, parts
        self.step_until(lambda: self.is_empty)
        for name in self.machines.keys() - {FRONT}:
            self.part(name).engine.kvcache.check()
            assert not open_books(self.part(name)), name
        if not self.front.has_work:
            assert not {**self.front._attempts, **self.front.plane._books._bookings}


def open_books(part):
    """Of a node that has nothing to do: where a request or a stream that has ended is still written down, and what."""
    upkeep, engine = part.upkeep, part.engine
    owners = (part, getattr(part, "_snapshots", None), upkeep.prefixes, engine, engine.scheduler, engine.kvcache,
              engine.kvcache.snapshots)
    books = {f"{type(owner).__name__}.{name}": book for owner in owners if owner is not None
             for name, book in vars(owner).items() if isinstance(book, dict | set | deque)}
    assert len(books) >= 6
    return {name: book for name, book in books.items() if book}
