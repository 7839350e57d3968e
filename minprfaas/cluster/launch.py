"""Starting processes: what torchrun says of this one, its device, store and line; who outlives whom. Chapter 13."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from minprfaas.config import LineConfig
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import Layout
from minprfaas.model.checkpoint import checked_device
from minprfaas.model.transformer import Transformer
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.line import EmulatedLine

STORE_DEADLINE_S = 60.0  # until the process that serves the store has started
AGENT_DEADLINE_S = 10.0  # torchrun serves its store before it starts anybody
WATCH_EVERY_S = 0.25
FRONT_END_GRACE_S = 60.0  # that the front end's process gets to say a mistake which another process has seen too


@dataclass(frozen=True)
class Launch:
    """This process among its peers, from torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    agent_serves: bool  # whether torchrun's agent serves the store; else the last process, which outlives the others

    @staticmethod
    def from_environment(world_size: int) -> "Launch | None":
        """None outside torchrun. UserError when the environment is incomplete or impossible."""
        if "RANK" not in os.environ:
            return None
        found = _number("WORLD_SIZE", 1)
        if found != world_size:
            raise UserError(f"torchrun started {found} processes; this program needs {world_size} "
                            f"(--nproc-per-node {world_size})")
        rank = _number("RANK", 0, world_size - 1)
        local_rank = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else rank
        host, port = _variable("MASTER_ADDR"), _number("MASTER_PORT", 1, 65_535)
        return Launch(rank, found, local_rank, host, port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")

    def store(self) -> dist.Store:
        """The store at which links are agreed. UserError when nobody serves it, or its port is taken."""
        serves = self.rank == self.world_size - 1 and not self.agent_serves
        timeout = timedelta(seconds=AGENT_DEADLINE_S if self.agent_serves else STORE_DEADLINE_S)
        options = {}
        where = f"no store at MASTER_ADDR {self.host} MASTER_PORT {self.port}"
        if serves:  # on a socket of our own: left to itself, the store would listen on every interface
            try:
                options["master_listen_fd"] = socket.create_server((self.host, self.port)).detach()
            except OSError as error:
                raise UserError(f"{where}: {error.strerror}, so this process cannot serve it") from None
        try:
            return dist.TCPStore(self.host, self.port, is_master=serves, wait_for_workers=False, timeout=timeout,
                                 **options)
        except (RuntimeError, ValueError, dist.DistError):
            who = "torchrun (TORCHELASTIC_USE_AGENT_STORE is set)" if self.agent_serves else "the last process"
            raise UserError(f"{where}: nobody answers there; {who} should serve it") from None

    def device(self, kind: str) -> torch.device:
        """This process's own GPU of those that are there (shared, if there is only one), or the device as named."""
        if kind == "cuda" and torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return checked_device(kind)

    @staticmethod
    def watch_parent() -> None:
        """End this process as soon as the one that started it is gone: nobody waits for its answers any more."""
        parent = os.getppid()

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(WATCH_EVERY_S)
            os._exit(1)  # from any state: what the other threads hold is nobody's concern now

        threading.Thread(target=watch, name="parent watch", daemon=True).start()


def start_processes(count: int, argv: list[str]) -> int:
    """Run this program in `count` processes, as torchrun would; returns the front end's exit status.

    torchrun exits with 1 whatever its workers say; this keeps the status 2 of a user's mistake. Ended by a signal, it
    ends its processes first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    workers = []
    try:
        for rank in range(count):
            environment = {**inherited, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment.setdefault("OMP_NUM_THREADS", "1")
            workers.append(subprocess.Popen([sys.executable, *argv], env=environment))
        return _wait_for_the_last(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _wait_for_the_last(workers: list[subprocess.Popen]) -> int:
    """The exit status of the last process, which hosts the front end and outlives the others; or 2, as soon as any
    process has refused a user's mistake and said so."""
    while True:
        try:
            return workers[-1].wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            if any(worker.poll() == 2 for worker in workers):
                return 2


def wait_for_the_front_end() -> None:
    """Give the front end's process time to say the mistake that this one has seen as well: whoever ends first has the
    other one ended by the launcher, and one line is enough. What only this process has seen is said after that."""
    time.sleep(FRONT_END_GRACE_S)


def emulated_line(config: LineConfig, store: dist.Store, here: str, there: str) -> EmulatedLine | None:
    """The line from datacenter `here` to datacenter `there`, shared by all processes of this run on this machine.
    None when there is nothing to emulate."""
    if config.gbps is None and not config.rtt_ms and not config.weather:
        return None
    run_id = store.compare_set("run id", "", secrets.token_hex(8)).decode()
    return EmulatedLine(config, share=Path(tempfile.gettempdir()) / f"minprfaas-{run_id}-{here}-{there}.line")


def link_identity(model: Transformer, layout: Layout) -> LinkIdentity:
    """What both ends of a link must agree on before any KVCache crosses: model, number format, block layout, secret."""
    secret = os.environ.get("MINPRFAAS_SECRET")
    shape = ";".join(f"{group.index}:{group.layers}:{group.spec.nbytes}:{group.spec.kind.value}"
                     for group in layout.groups)
    return LinkIdentity(model.fingerprint, str(model.dtype), shape, secret.encode() if secret else None)


def _variable(name: str) -> str:
    if name not in os.environ:
        raise UserError(f"RANK is set and {name} is not; torchrun sets both, and without torchrun neither must be set")
    return os.environ[name]


def _number(name: str, least: int, most: int = 2**31) -> int:
    text = _variable(name)
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise UserError(f"environment variable {name} is {text[:80]!r}; it must be a whole number from {least} to "
                        f"{most}")
    return int(text)
