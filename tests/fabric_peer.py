"""The other node of a pair, a process of its own: sends each stream it is asked for."""

import contextlib
import os
import signal
from datetime import timedelta

import torch
from programs import process_starter
from torch.distributed import TCPStore
from transport_support import DEADLINE_S, Cargo, event, new_fabric

from minprfaas.config import LinkConfig
from minprfaas.transport.base import LinkDown, StreamAborted
from minprfaas.transport.events import MessageReceived

# Of both ends: a heartbeat leaves every fifth of `silence_s`, so an end that allows less than the other one sends would
# take a peer that has nothing to say for dead.
LINK = LinkConfig(silence_s=2.0)


class Peer:
    """Starts the process, which is rank 1; `tell` it through a fabric, `stop`, `go_on`, `kill`."""

    def __init__(self, store: TCPStore, device: str = "cpu"):
        self._process = process_starter().Process(target=_peer, args=(store.port, device), daemon=True)
        self._process.start()

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(DEADLINE_S)


def _peer(port: int, device: str) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(AssertionError, LinkDown):  # whoever asks has gone
        _send_what_is_asked_for(port, device)


def _send_what_is_asked_for(port: int, device: str) -> None:
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=DEADLINE_S))
    fabric = new_fabric(store, 1, device, LINK)
    fabric.connect(DEADLINE_S)
    while True:
        wanted = event(fabric, MessageReceived, 4 * DEADLINE_S).message
        cargo = Cargo(wanted["stream"], wanted["tokens"], seed=wanted["stream"], device=device)
        try:
            stream = fabric.open(cargo.plan)
            cargo.put_all(stream)
            stream.finish(DEADLINE_S)
        except StreamAborted as error:
            fabric.send_message({"aborted": str(error)})
