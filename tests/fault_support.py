"""Two datacenters that serve whole requests while their link, peers and clients fail on a seeded plan. Chapter 14.

`run_fault(kind, seed, ...)` builds a local PD node and a prefill node over a real Gloo link, breaks what `kind` names
at a seeded frame of a request, serves one more request afterwards, and raises AssertionError unless all of this holds:
every request ended in the reference's tokens or was aborted by its client; every byte that reached a block is one that
the prefill node sent for that place; both pools' `check()` pass with nothing in use; nothing ran past its deadline.
"""

import collections
import contextlib
import functools
import itertools
import queue
import random
import threading
import time
from dataclasses import replace
from datetime import timedelta

import torch
from cluster_support import kill, pd_process, prfaas_process, step_until
from fault_lanes import DECODE, PREFILL, ImpostorLane, NodeLane
from test_transport_recovery import Fault
from torch.distributed import TCPStore

from minprfaas import SamplingParams, generate, load
from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.processes import control_settings
from minprfaas.config import CacheConfig, LineConfig, LinkConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.scheduling.control import ControlPlane
from minprfaas.transport.base import LinkDown
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

DEADLINE_S = 60.0
HEALED = ("cut", "stall", "silence", "duplicate", "reorder", "flip payload", "flip header", "truncate", "garbage",
          "absurd", "replay")  # the link gets over it by itself
ENDURED = ("absurd messages", "client gone")  # the link is well; the request may not be
IMPOSTORS = ("wrong secret", "wrong model", "replayed handshake")
FINAL = ("cut for good", "node dies", "killed", *IMPOSTORS)  # the link is lost
KINDS = (*HEALED, *ENDURED, *FINAL, "node restarts")
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


class Site:
    """Both datacenters. The prefill node runs in a thread (in a process, if it is to be killed), the local one in the
    caller."""

    def __init__(self, model, tokenizer, draw: random.Random, config: LinkConfig, secret: bytes | None,
                 line: LineConfig | None = None):
        self.model, self.tokenizer, self.draw, self.config, self.line = model, tokenizer, draw, config, line
        self.store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=DEADLINE_S), wait_for_workers=False)
        self.fault: Fault | None = None
        self.side = PREFILL
        self.links: dict[int, Link] = {}
        self.words = collections.defaultdict(list)  # what was said in handshakes, by lane
        self.chunks: list[torch.Tensor] = []  # frames that carried KV
        self.sent: set[tuple[int, int, bytes]] = set()  # (layer, token or -1, bytes) that the prefill node put
        self.states_arrived = collections.Counter()  # layers' request-level states as of so many tokens
        self.arrived: set[tuple[int, int]] = set()  # (layer, token or -1) that the local node's blocks received
        self.stream_id = self.writes = 0
        self.writes_before_impostor: int | None = None
        self.client_gone = threading.Event()
        self.engines: list[Engine] = []
        self.identity = replace(link_identity(model, self.new_engine().layout), secret=secret)
        self.engines.clear()
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []
        self.victim = None
        self.line_is_cut = False

    def new_engine(self) -> Engine:
        self.engines.append(Engine(self.model, self.tokenizer, CacheConfig(160, 16), prefill_chunk=48))
        return self.engines[-1]

    def new_link(self, rank: int, events: queue.SimpleQueue) -> Link:
        line = EmulatedLine(self.line) if self.line is not None else None
        self.links[rank] = Link("site", self.store, rank, self.config, self.identity, line=line, events=events,
                                lane_type=self.new_lane)
        return self.links[rank]

    def new_lane(self, *arguments) -> NodeLane:
        if self.line_is_cut:
            raise LinkDown("the line is cut")
        return NodeLane(self, *arguments)

    def start_prefill_node(self) -> None:
        events, engine = queue.SimpleQueue(), self.new_engine()
        self.prefill_node = prfaas_process(engine, self.new_link(PREFILL, events), events, DEADLINE_S)
        self._record_puts(engine.kvcache.pool)
        self._in_thread(self._serve_prefill, self.prefill_node)

    def _serve_prefill(self, process) -> None:
        process.node.mail.links["front"].connect(DEADLINE_S)
        process.serve()

    def start_local_node(self) -> None:
        events, engines = queue.SimpleQueue(), (self.new_engine(), self.new_engine())
        link = self.new_link(DECODE, events)
        link.connect(DEADLINE_S)
        plane = ControlPlane(control_settings(64, None, engines[0].layout))
        self.local = pd_process(*engines, {"prfaas-0": link}, events, plane, DEADLINE_S / 4)
        self._record_puts(engines[0].kvcache.pool)
        self._record_puts(engines[1].kvcache.pool)
        self._compare_writes(engines[1].kvcache.pool)
        step_until(self.local, lambda: "prfaas-0" in self.local.front.ready)

    def start_impostor(self, identity, words) -> None:
        def knock():
            link = Link("site", self.store, PREFILL, self.config, identity,
                        lane_type=functools.partial(ImpostorLane, self, words))
            with contextlib.suppress(LinkDown):
                link.connect(5.0)
                raise AssertionError("an impostor was let in")

        self._in_thread(knock)

    def _in_thread(self, run, *arguments) -> None:
        def guarded():
            try:
                run(*arguments)
            except BaseException as error:  # shown by the test, not lost in the thread
                self.failures.append(error)

        self.threads.append(threading.Thread(target=guarded, daemon=True))
        self.threads[-1].start()

    def kill_prefill_node(self) -> None:
        """As the other side sees a killed process: no goodbye, every connection reset."""
        kill(self.links[PREFILL])

    def _record_puts(self, pool) -> None:
        read_bytes = pool.read_bytes

        def recorded(layer, table, start, end):
            data = read_bytes(layer, table, start, end)
            self.sent |= self._pieces(layer, start, end, data)
            return data

        pool.read_bytes = recorded

    def _compare_writes(self, pool) -> None:
        write_bytes = pool.write_bytes

        def compared(layer, table, start, end, data):
            pieces = self._pieces(layer, start, end, data)
            if not threading.current_thread().name.startswith("pd-0"):  # over the link, not from this process's PD-P
                self.writes += 1
                self.arrived |= {piece[:2] for piece in pieces}
                self.states_arrived[end] += self.engines[0].layout.specs[layer].kind is not StateKind.TOKEN
            if self.victim is None and not pieces <= self.sent:
                self.failures.append(AssertionError(f"layer {layer}, tokens {start}-{end}: foreign bytes in a block"))
            write_bytes(layer, table, start, end, data)

        pool.write_bytes = compared

    def _pieces(self, layer, start, end, data) -> set[tuple[int, int, bytes]]:
        data = data.reshape(-1).clone()
        if self.engines[0].layout.specs[layer].kind is not StateKind.TOKEN:
            return {(layer, -1, bytes(data.tolist()))}
        rows = data.view(end - start, -1)
        return {(layer, token, bytes(row.tolist())) for token, row in zip(range(start, end), rows)}

    def arrived_end(self, layer: int) -> int:
        """Every token before it has reached the layer's blocks (in sites that serve one request)."""
        return next(token for token in itertools.count() if (layer, token) not in self.arrived)

    def prompt(self, length: int) -> list[int]:
        return [self.draw.randrange(1, 257) for _ in range(length)]

    def serve(self, *prompts: list[int]) -> list:
        """Submit the prompts and run until all have ended, as they do or because the first one's client goes away."""
        front, number = self.local.front, len(self.local.front.journeys)
        journeys = [front.submit(str(number + i), prompt, PARAMS) for i, prompt in enumerate(prompts)]
        until = time.monotonic() + DEADLINE_S
        while front.has_work:
            assert time.monotonic() < until, "a request did not end by its deadline"
            self.local.node.step()
            serving = self.local.decode.servings.get(journeys[0].attempt)
            if serving is not None and serving.kv is not None:
                self.stream_id = serving.kv.plan.stream_id
            if self.client_gone.is_set():
                self.client_gone.clear()
                front.abort(journeys[0].id)
        self.settle()
        for journey, wanted in zip(journeys, generate(self.model, self.tokenizer, list(prompts), PARAMS)):
            assert journey.finish_reason == "aborted" or journey.output_ids == wanted.token_ids, journey
        return journeys

    def settle(self) -> None:
        """Wait until neither node holds anything for a request. A node whose link is lost has ended by itself."""
        until = time.monotonic() + DEADLINE_S
        while self._holds_something():
            assert time.monotonic() < until, f"the prefill node still holds {[*self.prefill_node.prefill.prefills]}"
            self.local.node.step()

    def _holds_something(self) -> bool:
        here = self.local.prefill.has_work or self.local.decode.has_work
        return here or (self.victim is None and self.prefill_node.prefill.has_work)

    def close(self) -> None:
        """End everything, and audit the books of every engine that ever served here."""
        if DECODE in self.links:
            self.local.shut_down(DEADLINE_S)
        until = time.monotonic() + DEADLINE_S
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
            assert not thread.is_alive(), "a node did not end by its deadline"
        for link in self.links.values():
            link.close()
        assert not self.failures, self.failures
        for engine in self.engines:
            engine.kvcache.check()
            assert engine.kvcache.stats().in_use == 0, engine.kvcache.stats()
        assert self.writes_before_impostor in (None, self.writes), "a block was written after an impostor came"


def run_fault(kind: str, seed: int, model, tokenizer, directory, processes) -> str:
    """One fault; returns how the request that it hit has ended. AssertionError as the module's docstring says."""
    draw = random.Random(f"{kind} {seed}")
    config = LinkConfig(lanes=2, chunk_bytes=2048, timeout_s=1.0 if kind in FINAL else 20.0,
                        silence_s=0.5 if kind == "silence" else 5.0)
    line = LineConfig(gbps=0.004) if kind == "killed" else None
    keyed = kind not in HEALED or seed % 3 < 2
    site = Site(model, tokenizer, draw, config, b"a shared secret" if keyed else None, line)
    if kind == "killed":
        return _run_killed(site, seed, directory, processes)
    site.start_prefill_node()
    site.start_local_node()
    site.side = (PREFILL, DECODE)[seed % 2] if kind in (*HEALED, *ENDURED) and kind != "absurd" else PREFILL
    fault = site.fault = seeded_fault(kind, draw)
    while not fault.happened:  # a short request may have ended before it was due
        hit, _ = site.serve(site.prompt(draw.randrange(100, 350)), site.prompt(20))
    site.fault = None
    if kind != "node restarts" and kind not in FINAL and hit.finish_reason != "aborted" and keyed:
        assert hit.fallback is None or kind in ENDURED, f"{kind} {seed}: {hit.fallback}"
    if kind in IMPOSTORS:  # the request that it was to hit may have ended before it came
        step_until(site.local, lambda: site.writes_before_impostor is not None)
    if kind == "node restarts":  # the new one takes work as soon as it has introduced itself
        step_until(site.local, lambda: "prfaas-0" in site.local.front.ready)
    (after,) = site.serve(site.prompt(200))
    assert after.route == ("pdp" if kind in FINAL else "prfaas"), f"{kind} {seed}: {after.reason}, {after.fallback}"
    site.close()
    return outcome(hit)


def seeded_fault(kind: str, draw: random.Random) -> Fault:
    fault = Fault(kind.replace(" ", "_"), draw)
    fault.at = draw.randrange(12)
    return fault


def outcome(journey) -> str:
    if journey.finish_reason == "aborted":
        return "aborted"
    if journey.fallback is None:
        return "streamed"
    return "prefilled here" + (", arrived blocks kept" if journey.cached_tokens else "")


# ---- nodes in processes of their own, to be killed


def _run_killed(site: Site, seed: int, directory, processes) -> str:
    rank = (PREFILL, DECODE)[seed % 2]
    site.side, site.fault = 1 - rank, seeded_fault("killed", site.draw)
    site.victim = processes.Process(target=_victim, daemon=True, args=(
        rank, site.store.port, directory, site.config, site.line, site.identity.secret, site.prompt(320)))
    site.victim.start()
    try:
        if rank == DECODE:
            site.start_prefill_node()
            site.threads[0].join(DEADLINE_S)
            site.close()
            assert site.fault.happened
            return "nobody left to answer"
        site.start_local_node()
        hit, _ = site.serve(site.prompt(320), site.prompt(20))
        assert site.fault.happened and hit.fallback is not None
        site.close()
        return outcome(hit)
    finally:
        site.victim.kill()


def _victim(rank: int, port: int, directory, config, line, secret, prompt) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load(directory)
    engines = [Engine(model, tokenizer, CacheConfig(160, 16), prefill_chunk=48) for _ in range(2)]
    events = queue.SimpleQueue()
    link = Link("site", TCPStore("127.0.0.1", port, None, False), rank, config,
                replace(link_identity(model, engines[0].layout), secret=secret), line=EmulatedLine(line), events=events)
    link.connect(DEADLINE_S)
    if rank == PREFILL:
        return prfaas_process(engines[0], link, events, DEADLINE_S).serve()
    plane = ControlPlane(control_settings(64, None, engines[0].layout))
    process = pd_process(*engines, {"prfaas-0": link}, events, plane, DEADLINE_S)
    step_until(process, lambda: "prfaas-0" in process.front.ready)
    process.front.submit("0", prompt, PARAMS)
    step_until(process, lambda: not process.front.has_work)
    threading.Event().wait(DEADLINE_S)
