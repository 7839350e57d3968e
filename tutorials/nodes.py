"""Nodes for chapters 09, 13 and 14: the other end of a fabric, and a live cluster, each node a process.

As a program this is the other node of a pair, for chapter 09: `python tutorials/nodes.py PORT`.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helper import DEADLINE_S, start

import torch
from torch.distributed import TCPStore

from minprfaas import load
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.launch import StoreAddress, emulated_line, link_identity
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.processes import control_settings, front_end, process
from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE, Place, Topology
from minprfaas.config import CacheConfig, LineConfig, LinkConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.scheduling.control import ControlPlane
from minprfaas.transport import (EventQueue, Fabric, LayerPlan, Link, LinkDown, LinkIdentity, MessageReceived,
                                 StreamAborted, StreamPlan)

HERE = Path(__file__).resolve().parent
STREAM_TOKENS, ROW_BYTES = 4096, 2048  # of what the other node of a pair sends: 8 MiB in one layer
IDENTITY = LinkIdentity(bytes(32), "uint8", "one layer of bytes", b"chapter nine")
PAIR = LinkConfig(timeout_s=DEADLINE_S)


def new_store() -> TCPStore:
    """Served by this process, at a port that the system chooses."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


# The other node of a pair


def plan(stream_id: int) -> StreamPlan:
    """One layer of token state."""
    return StreamPlan(stream_id, (LayerPlan(0, 0, StateKind.TOKEN, ROW_BYTES),), 0, STREAM_TOKENS)


def cargo(stream_id: int) -> torch.Tensor:
    """What stream number `stream_id` carries, uint8 [tokens, ROW_BYTES]: both nodes can draw it."""
    generator = torch.Generator().manual_seed(stream_id)
    return torch.randint(0, 256, (STREAM_TOKENS, ROW_BYTES), dtype=torch.uint8, generator=generator)


def pair_end(store: TCPStore, rank: int, **options) -> Fabric:
    """One end of a fabric between CPUs."""
    return Fabric("pd-0:pd-1", store, rank, PAIR, IDENTITY, "cpu", **options)


def serve_streams(port: int) -> None:
    """Send each stream whose number comes in a message, a slice of 64 tokens at a time."""
    fabric = pair_end(TCPStore("127.0.0.1", port, None, False), 1)
    fabric.connect(DEADLINE_S)
    while True:
        event = fabric.events.get(timeout=DEADLINE_S)
        if not isinstance(event, MessageReceived):
            continue
        number = event.message["stream"]
        rows, slowly = cargo(number), event.message["pause_s"]
        try:
            stream = fabric.open(plan(number))
            for at in range(0, STREAM_TOKENS, 64):
                stream.put(0, at, at + 64, rows[at:at + 64].reshape(-1))
                time.sleep(slowly)  # as if a layer were computed in between
            stream.finish(DEADLINE_S)
        except StreamAborted:
            pass


# A live cluster


class LiveCluster:
    """The processes of `scripts/cluster.py`: each node is one, started as that program's `--node NAME`; the front end
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
        front, *self.nodes = topology.places()
        self._errors = tempfile.TemporaryFile("w+")  # what the nodes log, too
        self.processes: dict[str, subprocess.Popen] = {}
        for node in self.nodes:
            self.start(node.name)
        torch.set_num_threads(1)
        self.model, self.tokenizer = load()
        engine = Engine(self.model, self.tokenizer, CacheConfig(1), prefill_chunk=256)  # for its keys and its clock
        self._identity = link_identity(self.model, engine.layout)
        self._line = emulated_line(line, self._store, PD_SITE, PRFAAS_SITE)
        mail = self._mail = Mail(EventQueue())
        plane = ControlPlane(control_settings(threshold, line.gbps, engine.layout))
        self.front: FrontEnd = front_end(plane, mail, engine, deadline_s=DEADLINE_S)
        self._process = process(mail, self.front, [])
        self._neighbours = Neighbours(front, self.nodes, self._link_to, mail)

    def _link_to(self, peer: Place) -> Link:
        crosses = peer.site == PRFAAS_SITE
        config = LinkConfig(lanes=2, timeout_s=self._link_timeout_s) if crosses else LinkConfig(timeout_s=2.0)
        return Link(f"front:{peer.name}", self._address.open(), 0, config, self._identity,
                    self._line if crosses else None, self._mail.events)

    def start(self, name: str) -> None:
        """Start a node, for the first time or again."""
        self.processes[name] = start(str(HERE.parent / "scripts" / "cluster.py"), "--node", name, *self._options,
                                     errors=self._errors)

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].kill()
        self.processes[name].wait()

    def step(self) -> None:
        """Hear what has happened; route what waits."""
        self._process.node.step()

    def wait_for(self, *names: str) -> None:
        """Until these nodes take work. Raises RuntimeError when they do not come."""
        dead: list[str] = []

        def is_over() -> bool:
            dead[:] = [name for name in names if self.processes[name].poll() is not None]
            return bool(dead) or {*names} <= {*self.front.ready}

        if not self._process.run_until(is_over, DEADLINE_S) or dead:
            self._errors.seek(0)
            raise RuntimeError(f"of {', '.join(names)} only {', '.join(self.front.ready) or 'none'} came, and "
                               f"{', '.join(dead) or 'none'} ended:\n{self._errors.read()}")

    def close(self) -> None:
        """Dismiss the nodes that are there."""
        self._process.shut_down(deadline_s=5.0)
        self._neighbours.close()
        for node in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(5.0)
        if self._line is not None:
            self._line.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.suppress(LinkDown):
        serve_streams(int(sys.argv[1]))
