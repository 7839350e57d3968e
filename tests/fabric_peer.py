"""The other node of a pair, a process of its own: `fabric_peer.py PORT DEVICE` sends each stream it is asked for."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore
from transport_support import DEADLINE_S, Cargo, event, new_fabric

from minprfaas.config import LinkConfig
from minprfaas.transport import LinkDown, MessageReceived, StreamAborted

# Of both ends: a heartbeat leaves every fifth of `silence_s`, so an end that allows less than the other one sends would
# take a peer that has nothing to say for dead.
LINK = LinkConfig(silence_s=2.0)


class Peer:
    """Starts the process, which is rank 1; `tell` it through a fabric, `stop`, `go_on`, `kill`."""

    def __init__(self, store: TCPStore, device: str = "cpu"):
        self._process = subprocess.Popen([sys.executable, str(Path(__file__)), str(store.port), device],
                                         env={**os.environ, "OMP_NUM_THREADS": "1"})

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)


def main(port: str, device: str) -> None:
    store = TCPStore("127.0.0.1", int(port), None, False, timedelta(seconds=DEADLINE_S))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(*sys.argv[1:])
    except (AssertionError, LinkDown):  # whoever asks has gone
        pass
