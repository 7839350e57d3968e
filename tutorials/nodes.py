"""Other processes for chapters 07, 08, 09, 13 and 14: the far end of a line, of a fabric, and a live cluster."""

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta

from helper import DEADLINE_S, Process, Starter

import torch
from torch.distributed import TCPStore

from minprfaas import load
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.launch import StoreAddress, emulated_line, link_identity
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.processes import control_settings, front_end, process
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE, Place, Topology
from minprfaas.commands import cluster
from minprfaas.commands.live_run import link_config
from minprfaas.config import CacheConfig, LineConfig, LinkConfig, StateKind, WeatherChange
from minprfaas.engine.engine import Engine
from minprfaas.errors import exit_on_user_error
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.observe.timeline import Timeline
from minprfaas.scheduling.control import ControlPlane
from minprfaas.transport.base import LayerPlan, LinkRefused, StreamAborted, StreamPlan
from minprfaas.transport.events import EventQueue, LinkLost, MessageReceived
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

READER_S = 12 * 3600.0  # how long a process waits for a reader who goes from cell to cell; it ends with the reader's
STREAM_TOKENS, ROW_BYTES = 4096, 2048  # of what the other node of a pair sends: 8 MiB in one layer
SECRET = b"what both datacenters were given"
IDENTITY = LinkIdentity(bytes(32), "uint8", "one layer of bytes", SECRET)
PAIR = LinkConfig(timeout_s=DEADLINE_S)


def new_store() -> TCPStore:
    """Served by this process, at a port that the system chooses."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


# What crosses


def plan(stream_id: int, tokens: int = STREAM_TOKENS) -> StreamPlan:
    """One layer of token state."""
    return StreamPlan(stream_id, (LayerPlan(0, 0, StateKind.TOKEN, ROW_BYTES),), 0, tokens)


def cargo(stream_id: int, tokens: int = STREAM_TOKENS) -> torch.Tensor:
    """What stream number `stream_id` carries, uint8 [tokens, ROW_BYTES]: both ends can draw it."""
    generator = torch.Generator().manual_seed(stream_id)
    return torch.randint(0, 256, (tokens, ROW_BYTES), dtype=torch.uint8, generator=generator)


def as_bytes(rows: torch.Tensor) -> bytearray:
    """What a uint8 tensor holds."""
    memory = bytearray(rows.numel())
    torch.frombuffer(memory, dtype=torch.uint8).copy_(rows.reshape(-1))
    return memory


def hybrid_cache(tokens: int) -> tuple[KVCacheManager, RequestCache]:
    """A pool with room for one request of so many tokens, and the request: three linear layers to one of full
    attention, twice (paper table 1), rows of 1 KiB and states of about 64 KiB."""
    kda, mla = KDAConfig(num_heads=4, head_dim=60), MLAConfig(4, kv_lora_rank=240, qk_nope_dim=16, qk_shared_dim=16,
                                                              v_dim=16)
    layout = plan_layout(tuple(mixer.state_spec("float32") for mixer in (kda, kda, kda, mla) * 2), block_tokens=64)
    kvcache = KVCacheManager(layout, CacheConfig(layout.blocks_for(tokens)), "cpu", root=b"a chapter")
    request = kvcache.open([0] * tokens, to_receive=True)
    kvcache.reserve(request, tokens)
    return kvcache, request


def contents(kvcache: KVCacheManager, request: RequestCache, tokens: int) -> str:
    """A hash of all that a request's blocks hold, rows and states."""
    digest = hashlib.blake2b(digest_size=16)
    for layer, group in enumerate(kvcache.layout.group_of_layer):
        rows = kvcache.pool.read_bytes(layer, request.block_tables[group.index], 0, tokens)
        digest.update(as_bytes(rows))
    return digest.hexdigest()


# The far end of a line


class FarEnd:
    """A process in the other datacenter that meets this one on whatever line it is told, and takes what comes."""

    def __init__(self) -> None:
        self.store = new_store()
        self._meetings = 0
        self._start()

    def _start(self) -> None:
        self.process = Process(STARTER, serve_lines, self.store.port, max(self._meetings - 1, 0))

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()

    def start_again(self) -> None:
        """A new process, which takes the dead one's place at the last link and expects the same stream."""
        self._start()

    def meet(self, line: LineConfig, config: LinkConfig, tokens: int, blocks: bool = False,
             timeline: Timeline | None = None, guess: bytes | None = None, lane_type: type[Lane] = Lane) -> Link:
        """A link over `line` (emulated, in both directions) to the far end, which expects stream 1 of `tokens` tokens:
        `plan`, or with `blocks` what `hybrid_cache` holds. With a `guess` the far end has that for the secret. Raises
        LinkRefused."""
        order = {"line": asdict(line), "link": asdict(config), "tokens": tokens, "blocks": blocks,
                 "secret": (SECRET if guess is None else guess).decode()}
        number, self._meetings = self._meetings, self._meetings + 1
        self.store.set(f"order {number}", json.dumps(order))
        link = Link(f"link {number}", self.store, 0, config, IDENTITY, EmulatedLine(line), timeline=timeline,
                    lane_type=lane_type)
        link.connect(DEADLINE_S)
        next_message(link)  # "ready": the far end expects the stream
        return link


def next_message(link: Link) -> dict:
    """What the far end says next, whatever happens to the link meanwhile. Raises TimeoutError."""
    while not isinstance(event := link.receive(DEADLINE_S), MessageReceived):
        if event is None:
            raise TimeoutError(f"the far end has said nothing for {DEADLINE_S:g} s")
    return event.message


def ask(link: Link, question: str) -> tuple[dict, float]:
    """The far end's answer, and how many seconds it took to come."""
    began_s = time.monotonic()
    link.send_message({"question": question})
    return next_message(link), time.monotonic() - began_s


def serve_lines(port: int, number: int) -> None:
    """Meet, expect, answer; from order `number` on, again and again."""
    logging.disable(logging.WARNING)  # what a link would log is told by the chapter
    store = TCPStore("127.0.0.1", port, None, False)
    while True:
        store.wait([f"order {number}"], timedelta(seconds=READER_S))
        order = json.loads(store.get(f"order {number}"))
        with contextlib.suppress(LinkRefused):
            _serve_line(store, number, order)
        number += 1


def _serve_line(store: TCPStore, number: int, order: dict) -> None:
    order["line"]["weather"] = tuple(WeatherChange(**change) for change in order["line"]["weather"])
    identity = LinkIdentity(IDENTITY.fingerprint, IDENTITY.dtype, IDENTITY.block_layout, order["secret"].encode())
    line, tokens = EmulatedLine(LineConfig(**order["line"])), order["tokens"]
    link = Link(f"link {number}", store, 1, LinkConfig(**order["link"]), identity, line)
    link.connect(DEADLINE_S)
    if order["blocks"]:
        kvcache, request = hybrid_cache(tokens)
        KVReceive(kvcache, link, stream_plan(kvcache.layout, 1, 0, tokens), request.block_tables)
    else:
        memory = bytearray(tokens * ROW_BYTES)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(tokens, ROW_BYTES)
        link.expect(plan(1, tokens), lambda layer, start, end, data: rows[start:end].copy_(data.view(end - start, -1)))
    link.send_message({"ready": number})
    while not isinstance(event := link.receive(READER_S), LinkLost | None):
        if isinstance(event, MessageReceived):
            began_s, answer = time.monotonic(), ""
            if event.message["question"] == "what have you got?":
                answer = (contents(kvcache, request, tokens) if order["blocks"]
                          else hashlib.blake2b(memory, digest_size=16).hexdigest())
            link.send_message({"answer": answer, "took_s": time.monotonic() - began_s})
    link.close()


# The other node of a pair


def pair_end(store: TCPStore, rank: int, **options) -> Fabric:
    """One end of a fabric between CPUs."""
    return Fabric("pd-0:pd-1", store, rank, PAIR, IDENTITY, "cpu", **options)


def serve_streams(port: int) -> None:
    """Send each stream whose number comes in a message, in pieces of 64 tokens: all at once, or one after a pause."""
    logging.disable(logging.WARNING)
    fabric = pair_end(TCPStore("127.0.0.1", port, None, False), 1)
    fabric.connect(DEADLINE_S)
    while True:
        event = fabric.events.get(timeout=READER_S)
        if not isinstance(event, MessageReceived):
            continue
        number = event.message["stream"]
        rows, pause_s = cargo(number), event.message["pause_s"]

        def source(layer: int, start: int, end: int, out: torch.Tensor | None) -> torch.Tensor:
            data = rows[start:end].reshape(-1)
            return data if out is None else out.copy_(data)

        pieces = [(0, at, at + 64) for at in range(0, STREAM_TOKENS, 64)]
        try:
            stream = fabric.open(plan(number))
            for ready in [[piece] for piece in pieces] if pause_s else [pieces]:
                stream.put_ready(ready, source)
                time.sleep(pause_s)  # as if a layer were computed in between
            stream.finish(DEADLINE_S)
        except StreamAborted:
            pass


# A live cluster


class LiveCluster:
    """The processes of `scripts/cluster.py`: each node is one, as that program's `--node NAME` makes it; the front end
    lives in the chapter's process. `line` is emulated."""

    OPTIONS = ("--serve", "0", "--pool-blocks", "120", "--prefill-chunk", "256", "--lanes", "2")

    def __init__(self, topology: Topology, threshold: int, line: LineConfig, link_timeout_s: float = 2.0):
        self._store = new_store()  # kept: it lives as long
        self._address = StoreAddress("127.0.0.1", self._store.port, "the chapter")
        line = LineConfig(float(line.gbps), float(line.rtt_ms))  # as the nodes read them
        self._options = ["--topology", f"prfaas={topology.prfaas},pd={topology.pd}", "--split", f"{topology.split}",
                         "--store", f"127.0.0.1:{self._store.port}", "--threshold", str(threshold),
                         "--link-gbps", str(line.gbps), "--rtt-ms", str(line.rtt_ms),
                         "--link-timeout-s", str(link_timeout_s), "--wait-s", str(DEADLINE_S), *self.OPTIONS]
        self._link_timeout_s = link_timeout_s
        self._here, *self.nodes = topology.places()
        self.processes: dict[str, Process] = {}
        for node in self.nodes:
            self.start(node.name)
        self.model, self.tokenizer = load()
        engine = Engine(self.model, self.tokenizer, CacheConfig(1), prefill_chunk=256)  # for its keys and its clock
        self._identity = link_identity(self.model, engine.layout)
        self._line = emulated_line(line, self._store, PD_SITE, PRFAAS_SITE)
        mail = self._mail = Mail(EventQueue())
        plane = ControlPlane(control_settings(threshold, line.gbps, engine.layout))
        self.front: FrontEnd = front_end(plane, mail, engine, deadline_s=DEADLINE_S)
        self._process = process(mail, self.front, [])
        self._neighbours = Neighbours(self._here, self.nodes, self._link_to, mail)

    def _link_to(self, peer: Place) -> Link:
        config = link_config(LinkConfig(timeout_s=self._link_timeout_s), self._here, peer)  # as the node has it
        line = self._line if peer.site == PRFAAS_SITE else None
        return Link(f"front:{peer.name}", self._address.open(), 0, config, self._identity, line, self._mail.events)

    def start(self, name: str) -> None:
        """Start a node, for the first time or again."""
        self.processes[name] = Process(STARTER, run_node, ["--node", name, *self._options])

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].kill()

    def step(self) -> None:
        """Hear what has happened; route what waits."""
        self._process.node.step()

    def wait_for(self, *names: str) -> None:
        """Until these nodes take work. Raises RuntimeError when they do not come."""
        dead: list[str] = []

        def is_over() -> bool:
            dead[:] = [name for name in names if self.processes[name].status() is not None]
            return bool(dead) or {*names} <= {*self.front.ready}

        if not self._process.run_until(is_over, DEADLINE_S) or dead:
            ERRORS.seek(0)
            raise RuntimeError(f"of {', '.join(names)} only {', '.join(self.front.ready) or 'none'} came, and "
                               f"{', '.join(dead) or 'none'} ended:\n{ERRORS.read()}")

    def close(self) -> None:
        """Dismiss the nodes that are there."""
        self._process.shut_down(deadline_s=5.0)
        self._neighbours.close()
        for node in self.processes.values():
            node.status(patience_s=5.0)
        if self._line is not None:
            self._line.close()


def run_node(options: list[str]) -> None:
    """What `python scripts/cluster.py` does with these options, and says on stderr: that goes to `ERRORS`."""
    sys.stderr = ERRORS
    os.dup2(ERRORS.fileno(), 2)
    logging.disable(logging.NOTSET)
    sys.exit(exit_on_user_error(cluster.main)(options))


ERRORS = tempfile.TemporaryFile("w+", buffering=1)
torch.set_num_threads(1)  # here and in what is forked from here: they share the cores
STARTER = Starter()  # at the end, so that it knows what it is told to run
