"""Two datacenters inside one test: the parts of both processes in two threads, a real Gloo link between them."""

import queue
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from kv_oracle import KVOracle

from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.processes import Process, control_settings, front_end, process, worker
from minprfaas.cluster.topology import Topology
from minprfaas.config import CacheConfig, LineConfig, LinkConfig, Role
from minprfaas.engine.engine import Engine
from minprfaas.scheduling.control import ControlPlane
from minprfaas.transport.encoding import Wire
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

DEADLINE_S = 60
FAST = LinkConfig(lanes=2, chunk_bytes=4096)


class SmallProcess(Process):
    """Of the topology prfaas=1,pd=1, where a process has at most one of each role."""

    @property
    def prefill(self):
        return next(worker.playing for worker in self.workers if isinstance(worker.playing, PrefillRole))

    @property
    def decode(self):
        return next(worker.playing for worker in self.workers if isinstance(worker.playing, DecodeRole))


def prfaas_process(engine, link, events, transfer_deadline_s, overlap=True, name="prfaas-0", wire=Wire(), relay=False):
    """The PrfaaS node over a link whose events go into `events`. The link need not be connected yet."""
    mail = Mail(events, wire)
    _, pd = Topology(1, 1).two_places()
    mail.add_link(link, pd.parts)
    one = worker(name, Role.PRFAAS, engine, mail, transfer_deadline_s, overlap=overlap, relay=relay)
    one.upkeep.introduce()
    made = process(mail, None, [one])
    return SmallProcess(made.node, made.front, made.workers)


def pd_process(prefill_engine, decode_engine, links, events, plane, deadline_s, room_deadline_s=3600.0, wire=Wire(),
               relay=False):
    """The PD node and the front end over links, by PrfaaS node, whose events go into `events`. The engines share the
    model, not the pool."""
    mail = Mail(events, wire)
    for name, link in links.items():
        mail.add_link(link, [name])
    front = front_end(plane, mail, decode_engine, deadline_s)
    _, pd = Topology(1, 1).two_places()
    workers = [worker(name, role, engine, mail, deadline_s, room_deadline_s, relay=relay)
               for (name, role), engine in zip(pd.roles.items(), (prefill_engine, decode_engine))]
    made = process(mail, front, workers)
    return SmallProcess(made.node, made.front, made.workers)


@contextmanager
def two_datacenters(model, tokenizer, threshold, link=FAST, line=LineConfig(), pool_a=200, pool_b=200, block_tokens=16,
                    prefill_chunk=48, deadline_s=DEADLINE_S, room_deadline_s=DEADLINE_S, overlap=True,
                    ship_prefixes=False, wire=Wire(), relay=False, damaged=False):
    """Yields (process B, process A); both serve the same model. Process A runs in a thread of its own. At the end all
    that was held in blocks must have been right; with `damaged`, something must not."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S))
    engines = [Engine(model, tokenizer, CacheConfig(blocks, block_tokens), prefill_chunk)
               for blocks in (pool_a, pool_b, pool_b)]
    oracle = KVOracle(model)
    for engine in engines:
        oracle.watch(engine.kvcache)
    queues = [queue.SimpleQueue(), queue.SimpleQueue()]
    links = [Link("test", store, rank, link, link_identity(model, engines[0].layout, wire), events=queues[rank],
                  line=EmulatedLine(line) if line != LineConfig() else None) for rank in (0, 1)]
    remote = prfaas_process(engines[0], links[0], queues[0], DEADLINE_S, overlap, wire=wire, relay=relay)
    failures = []

    def serve_remotely():
        try:
            links[0].connect(DEADLINE_S)
            remote.serve()
        except Exception as error:  # shown by the test, not lost in the thread
            failures.append(error)

    thread = threading.Thread(target=serve_remotely, daemon=True)
    thread.start()
    try:
        links[1].connect(DEADLINE_S)
        plane = ControlPlane(control_settings(threshold, line.gbps, engines[1].layout, ship_prefixes=ship_prefixes))
        local = pd_process(engines[1], engines[2], {"prfaas-0": links[1]}, queues[1], plane, deadline_s,
                           room_deadline_s, wire, relay)
        step_until(local, lambda: "prfaas-0" in local.front.ready)
        yield local, remote
        local.shut_down(DEADLINE_S)
        last = {name: local.front.figures[name].in_use_blocks for name in local.front.goodbyes}
        assert {"pd-0/pdp", "pd-0/pdd"} <= {*last} and not any(last.values()), f"blocks in use at the end: {last}"
        assert not any(said.wrong for said in local.front.goodbyes.values())
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the prefill node did not end"
    finally:
        for each in links:
            each.close()
    assert not failures, failures
    for engine in engines:
        engine.kvcache.check()
    assert bool(oracle.wrong) == damaged, oracle.wrong[:3] or "what was damaged was not noticed"


def serve(local, prompts, params):
    """Submit every prompt, run to the end; returns the journeys in order. `params` is one for all, or one for each."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    number = len(local.front.journeys)
    journeys = [local.front.submit(str(number + i), prompt, one) for i, (prompt, one) in enumerate(zip(prompts, each))]
    step_until(local, lambda: not local.front.has_work, 2 * DEADLINE_S)
    return journeys


def step_until(local, condition, deadline_s=DEADLINE_S):
    """Step process B until `condition()` holds."""
    until_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until_s, "the condition did not come to hold by its deadline"
        local.node.step()


def kill(link):
    """As the other side sees a killed process: no goodbye, every connection reset, and it does not come back."""
    supervisor = link._supervisor
    supervisor._closing.set()
    for lane in supervisor._lanes:
        lane.cut()


def nothing_in_use(process):
    """Whether no part of a process holds a block for a request."""
    return all(worker.engine.kvcache.stats().in_use == 0 for worker in process.workers)
