"""Starting nodes: what torchrun says about this process, its device, its store and its link. Chapter 13."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minprfaas.errors import UserError
from minprfaas.kvcache.layout import Layout
from minprfaas.model.checkpoint import checked_device
from minprfaas.model.transformer import Transformer
from minprfaas.transport.handshake import LinkIdentity


@dataclass(frozen=True)
class Launch:
    """This process among its peers, from torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    hosts_store: bool  # whether this process must serve the store itself: the last one, which outlives the others

    @staticmethod
    def from_environment(world_size: int) -> "Launch | None":
        """None outside torchrun. UserError when it started another number of processes than `world_size`."""
        if "RANK" not in os.environ:
            return None
        found = int(os.environ["WORLD_SIZE"])
        if found != world_size:
            raise UserError(f"torchrun started {found} processes; this program needs {world_size} (--nproc-per-node {world_size})")
        rank = int(os.environ["RANK"])
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch(rank, found, int(os.environ.get("LOCAL_RANK", rank)), os.environ["MASTER_ADDR"],
                      int(os.environ["MASTER_PORT"]), rank == found - 1 and not agent_serves)

    def store(self) -> dist.Store:
        """The store at which links are agreed."""
        return dist.TCPStore(self.host, self.port, is_master=self.hosts_store, wait_for_workers=False,
                             timeout=timedelta(seconds=60))

    def device(self, kind: str) -> torch.device:
        """This process's own GPU of those that are there (shared, if there is only one), or the device as named."""
        if kind == "cuda" and torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return checked_device(kind)


def start_processes(count: int, argv: list[str]) -> int:
    """Run this program in `count` processes, as torchrun would; returns the front end's exit status.

    torchrun exits with 1 whatever its workers say; this keeps the status 2 of a user's mistake.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        workers.append(subprocess.Popen([sys.executable, *argv], env=environment))
    try:
        return _wait_for_the_last(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()


def _wait_for_the_last(workers: list[subprocess.Popen]) -> int:
    """The exit status of the last process, which hosts the front end and outlives the others; or 2, as soon as any
    process refuses a user's mistake."""
    while True:
        try:
            return workers[-1].wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            if any(worker.poll() == 2 for worker in workers):
                return 2


def link_identity(model: Transformer, layout: Layout) -> LinkIdentity:
    """What both ends of a link must agree on before any KVCache crosses: model, number format, block layout, secret."""
    secret = os.environ.get("MINPRFAAS_SECRET")
    shape = ";".join(f"{group.index}:{group.layers}:{group.spec.nbytes}:{group.spec.kind.value}" for group in layout.groups)
    return LinkIdentity(model.fingerprint, str(model.dtype), shape, secret.encode() if secret else None)
