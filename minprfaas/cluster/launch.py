"""Starting processes: what torchrun says of this one, its device, store and line; who outlives whom. Chapter 13."""

import ctypes
import os
import resource
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch.distributed as dist

from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.cluster.topology import Place
from minprfaas.config import LineConfig, Role
from minprfaas.errors import UserError, exit_on_user_error, one_line, require_host
from minprfaas.kvcache.layout import Layout
from minprfaas.model.checkpoint import checked_device
from minprfaas.model.transformer import Transformer
from minprfaas.transport.encoding import Wire
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.lanes import in_time
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.shared_words import remove_abandoned

STORE_DEADLINE_S = 60.0  # until a store answers
AGENT_DEADLINE_S = 10.0  # until torchrun's agent answers, which serves its store before it starts anybody
WATCH_EVERY_S = 0.25
M_ARENA_MAX, ARENAS = -8, 2  # glibc's mallopt
ENDING = (signal.SIGTERM, signal.SIGINT)  # signals that end a run
ENDING_S = 5.0  # for the other processes, once the front end's has ended


@dataclass(frozen=True)
class StoreAddress:
    """Where links are agreed, and who serves that: torchrun's agent, or else the front end's process."""

    host: str
    port: int
    said_by: str  # for a mistake
    agent_serves: bool = False

    def __post_init__(self) -> None:
        require_host(f"the host of {self.said_by}", self.host)

    @staticmethod
    def parse(text: str) -> "StoreAddress":
        """`HOST:PORT`. UserError when it is anything else."""
        host, _, port = text.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 1 <= int(port[:12]) <= 65_535):
            raise UserError(f"--store is {text[:80]!r}; it must be HOST:PORT with a port from 1 to 65535")
        return StoreAddress(host.strip("[]"), int(port), f"--store {text}")

    def open(self, serves: bool = False, wait_s: float | None = None) -> dist.Store:
        """The store, which this process may have to serve, or to wait for until another has started. UserError when
        nobody serves it, or its port is taken."""
        timeout = timedelta(seconds=AGENT_DEADLINE_S if self.agent_serves else STORE_DEADLINE_S)
        serves = serves and not self.agent_serves
        options = {}
        where = f"no store at {self.said_by}"
        if serves:  # on a socket of our own: left to itself, the store would listen on every interface
            try:
                family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
                options["master_listen_fd"] = socket.create_server((self.host, self.port), family=family).detach()
            except OSError as error:
                raise UserError(f"{where}: {error.strerror}, so this process cannot serve it") from None
        else:
            self._wait_for_it(where, wait_s or timeout.total_seconds())
        try:
            return in_time(lambda: dist.TCPStore(self.host, self.port, is_master=serves, wait_for_workers=False,
                                                 timeout=timeout, **options), timeout.total_seconds())
        except TimeoutError:
            raise UserError(f"{where}: what listens there does not answer as one") from None
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise UserError(f"{where}: {one_line(error)}") from None

    def _wait_for_it(self, where: str, deadline_s: float) -> None:
        """Until somebody listens there: a store's client that waits for that itself prints a C++ stack."""
        give_up_at_s = time.monotonic() + deadline_s
        while True:
            try:
                return socket.create_connection((self.host, self.port), timeout=deadline_s).close()
            except OSError:
                if self.agent_serves:
                    raise UserError(f"{where}: nobody answers there; torchrun (TORCHELASTIC_USE_AGENT_STORE is set) "
                                    "should serve it") from None
                if time.monotonic() >= give_up_at_s:
                    raise UserError(f"{where}: nobody answers there within {deadline_s:g} s; the front end's process "
                                    "should serve it") from None
                time.sleep(WATCH_EVERY_S)


@dataclass(frozen=True)
class Launch:
    """This process among its peers, from torchrun's environment."""

    rank: int
    local_rank: int
    address: StoreAddress

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
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        said_by = f"MASTER_ADDR {host} MASTER_PORT {port}"
        return Launch(rank, local_rank, StoreAddress(host, port, said_by, agent_serves))


def watch_parent() -> None:
    """End this process as soon as the one that started it is gone: nobody waits for its answers any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY_S)
        os._exit(1)  # from any state: what the other threads hold is nobody's concern now

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def share_arenas() -> None:
    """glibc's allocator gives each thread an arena of its own, up to eight a core, and an arena keeps what was freed in
    it. A node's many short threads share two: then what its streams took at their peak goes back to the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, ARENAS)


def require_open_files(needed: int) -> None:
    """Raise this process's limit of open files, connections among them, to `needed`. UserError where that may not be:
    without a file for each connection Gloo ends the process, or waits."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return
    if most != resource.RLIM_INFINITY and needed > most:
        raise UserError(f"this process opens up to {needed} files, connections included; its limit is {most} "
                        "(ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def own_device(kind: str, local_rank: int) -> torch.device:
    """A process's own GPU of those that are there (shared, if there are fewer), or the device as named."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return checked_device(kind)


def threads_of(places: Sequence[Place], cores: int) -> dict[str, int]:
    """Threads for the products of each of these nodes of one host: its cores in equal parts, at least one each. What
    remains goes to nodes that prefill, one each: that is bound by arithmetic, a decode step by memory."""
    nodes = sorted((place for place in places if place.roles), key=lambda place: Role.PDD in place.roles.values())
    each, over = divmod(cores, len(nodes))
    return {place.name: max(each + (number < over), 1) for number, place in enumerate(nodes)}


def start_processes(names: list[str], front: str | None, main: Callable[[list[str]], int], argv: list[str],
                    restart: str = "", front_ends_all: bool = False, restarts: bool = False) -> int:
    """Run `main(argv)` in a process for each name, as torchrun would; returns the front end's exit status, or without
    one here the worst of all. `restart` is how a person starts one of them again, with {name} and {port} to be filled
    in.

    They are forked, so that PyTorch is imported once and not by each of them; this process only waits, and never
    computes or touches a GPU. torchrun exits with 1 whatever its workers say; this keeps the status 2 of a user's
    mistake. It ends every process when one dies; here the others go on, and with `restarts` one that was killed is
    started again. Ended by a signal, this ends its processes first; with `front_ends_all` a signal is handed to the
    front end, which then dismisses the others.
    """
    port = _free_port()
    workers: dict[str, ForkProcess] = {}

    def start(name: str) -> None:
        rank = str(names.index(name))
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(len(names)), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        worker = ForkProcess(target=_run_as, args=(environment, main, argv), name=name)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until each of the two knows what to do with one
        worker.start()
        workers[name] = worker
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def on_signal(number: int, frame: object) -> None:
        if not front_ends_all or front not in workers or workers[front].exitcode is not None:
            sys.exit(128 + number)
        os.kill(workers[front].pid, number)

    for number in ENDING if front_ends_all else [signal.SIGTERM]:
        signal.signal(number, on_signal)
    try:
        for name in names:
            start(name)
        awaited = [workers[front]] if front is not None else [*workers.values()]
        return _wait_for(awaited, workers, restart.replace("{port}", str(port)), start if restarts else None)
    finally:
        for worker in workers.values():
            worker.kill()
        for worker in workers.values():
            worker.join()


def _run_as(environment: dict[str, str], main: Callable[[list[str]], int], argv: list[str]) -> None:
    """In a process of its own. Also a group of its own: an interrupt from the keyboard is for the process that started
    it, which ends the others."""
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ.update(environment)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: they share the cores
    sys.exit(exit_on_user_error(main)(argv))


def _wait_for(awaited: list[ForkProcess], workers: dict[str, ForkProcess], restart: str,
              start: Callable[[str], None] | None) -> int:
    """The worst exit status of those that are awaited; or 2, as soon as any process has refused a user's mistake and
    said so. What else ends before that is told, and with `start` begins anew if a signal has ended it."""
    gone: set[str] = set()
    while True:
        # Those that are awaited first: where they have ended, whoever failed before them is seen to have, too.
        looked_at = [*awaited, *(worker for worker in workers.values() if worker not in awaited)]
        statuses = {worker.name: worker.exitcode for worker in looked_at}
        if 2 in statuses.values():
            return 2
        done = all(statuses[worker.name] is not None for worker in awaited)
        for name in [name for name, status in statuses.items() if status and name not in gone]:
            if done and workers[name] in awaited:
                continue  # its status is the answer
            if start is not None and statuses[name] < 0 and not done:
                start(name)
                print(f"{name} has ended with status {statuses[name]}; it is process {workers[name].pid} now",
                      file=sys.stderr, flush=True)
                statuses[name] = None
                continue
            gone.add(name)
            again = f"; {restart.replace('{name}', name)} starts it again" if restart else ""
            print(f"{name} has ended with status {statuses[name]}{again}", file=sys.stderr)
        if done:
            _give_time(workers)
            return max(worker.exitcode % 256 for worker in awaited)
        wait([worker.sentinel for name, worker in workers.items() if statuses[name] is None])


def _give_time(workers: dict[str, ForkProcess]) -> None:
    """The others have heard the same last word as those that have ended; they may clean up after themselves."""
    give_up_at_s = time.monotonic() + ENDING_S
    for worker in workers.values():
        worker.join(max(0.0, give_up_at_s - time.monotonic()))


def _free_port() -> int:
    """A port that nobody listens on at present, chosen by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def emulated_line(config: LineConfig, store: dist.Store, here: str, there: str) -> EmulatedLine | None:
    """The line from datacenter `here` to datacenter `there`, shared by all processes of this run on this machine.
    None when there is nothing to emulate."""
    if config.gbps is None and not config.rtt_ms and not config.weather:
        return None
    directory = Path(tempfile.gettempdir())
    remove_abandoned(directory.glob("minprfaas-*.line"))
    run_id = store.compare_set("run id", "", secrets.token_hex(8)).decode()
    return EmulatedLine(config, share=directory / f"minprfaas-{run_id}-{here}-{there}.line")


def link_identity(model: Transformer, layout: Layout, wire: Wire = Wire()) -> LinkIdentity:
    """What both ends of a link must agree on before any KVCache crosses: model, number format, layers and what of each
    crosses, how rows are encoded, secret. Where the formats differ, they agree on weights and on which two it is."""
    secret, fingerprint, dtype = os.environ.get("MINPRFAAS_SECRET"), model.fingerprint, str(model.dtype)
    sizes = {group.index: group.spec.nbytes for group in layout.groups}
    if wire.recast:
        fingerprint, dtype = model.weights, wire.recast
        sizes = {entry.group: entry.row_bytes for entry in stream_plan(layout, 0, 0, 1, wire).entries}
    shape = ";".join(f"{group.index}:{group.layers}:{sizes[group.index]}:{group.spec.kind.value}"
                     for group in layout.groups)
    return LinkIdentity(fingerprint, dtype, shape, os.fsencode(secret) if secret else None, wire.name)


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
