"""One lane: a Gloo process group of two, and what was learned about how it breaks. Chapter 07, paper 3.3.

- A message longer than the receive that waits for it ends the *process* (Gloo's own check). Both ends therefore agree
  on one slot size before any frame crosses, and never send more.
- A send completes only once the other side has posted its receive, so receives are posted ahead.
- A peer that dies fails every pending operation at once. No call ends one's own pending receive, but an operation whose
  deadline passes does: Gloo then closes the connection under all others. `cut` uses that.
- A send whose `Work` is dropped before it is done never arrives, and silences the lane.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent import futures
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from minprfaas.errors import one_line
from minprfaas.transport.base import LinkDown
from minprfaas.transport.wan.binding import LOOPBACK, Binding, GlooDevice
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, Frame, Slot

STORE_POLL_S = 0.01  # while the other side is awaited
_FRAMES_TAG, _HANDSHAKE_TAG, _CUT_TAG = 0, 1, 2
_HANDSHAKE_BYTES = 2048
_FOREVER = timedelta(days=1)  # silence is noticed by heartbeats, not by Gloo
# Threads of a lane, each with a frame of its own: while one is on its way another is sealed, or checked and written.
# More of them only wait for the interpreter.
SENDERS, RECEIVERS = 2, 2
LOOKED_AT_BYTES = 16 * 2**10  # one byte of so many, to see whether a frame is arriving
_IN_VAIN = "the peer's end of the connection did not come"
Connected = TypeVar("Connected")


def compute_alone() -> None:
    """Let torch start no OpenMP threads for the calling one. Each lane would digest with a team of its own, and the
    teams fight over the cores: on 16 of them 16 threads with teams of 8 digested half as fast as 16 threads alone."""
    torch.get_num_threads()  # a thread takes over the process's number when it first asks; from now on it may differ
    openmp = ctypes.CDLL(None)  # `torch.set_num_threads` would set the number of every later thread as well
    if hasattr(openmp, "omp_set_num_threads"):
        openmp.omp_set_num_threads(1)


class Lane:
    """One connection of a link in one epoch."""

    def __init__(self, store: dist.Store, index: int, rank: int, payload_limit: int, timeout_s: float,
                 binding: Binding = LOOPBACK):
        """Connect; blocks until the peer does the same. Raises LinkDown."""
        self.index, self.rank, self._peer = index, rank, 1 - rank
        self.codec = Codec(payload_limit)
        self.heard_at_s = time.monotonic()  # when something last arrived, or was dealt with
        self._waiting: dict[int, Slot] = {}  # by receiving thread, where what it could hear arrives
        self._seen: list[bytes] = []  # of those, when they were looked at last
        self._timeout = timedelta(seconds=timeout_s)
        self._device = binding.gloo_device(index)  # of all lanes of this process that have this number
        try:
            self._group = connect_pair(dist.PrefixStore(str(index), store), rank, self._device, timeout_s)
        except RuntimeError as error:
            raise LinkDown(f"lane {index} does not connect: {one_line(error)}") from None

    def exchange(self, data: bytes) -> bytes:
        """Send `data` and receive the peer's, once a round, before any frame crosses (the handshake)."""
        outgoing, incoming = Slot(_HANDSHAKE_BYTES), Slot(_HANDSHAKE_BYTES)
        outgoing.view[:2] = len(data).to_bytes(2, "little")
        outgoing.view[2:2 + len(data)] = data
        try:
            sent = self._group.send([outgoing.tensor], self._peer, _HANDSHAKE_TAG)
            self._group.recv([incoming.tensor], self._peer, _HANDSHAKE_TAG).wait(self._timeout)
            sent.wait(self._timeout)
        except RuntimeError as error:
            raise LinkDown(f"lane {self.index} broke in the handshake: {one_line(error)}") from None
        length = min(int.from_bytes(incoming.view[:2], "little"), _HANDSHAKE_BYTES)
        return bytes(incoming.view[2:2 + length])

    def post(self, frame: Frame) -> dist.Work:
        """Seal a frame and start sending it."""
        if frame.ready is not None:
            frame.ready.synchronize()
        sums = frame.slot.sums(frame.header.nbytes, self.codec.row_sums) if frame.sums is None else frame.sums
        self.codec.seal(frame.header, frame.slot.view, sums)
        return self.transmit(frame.slot.tensor[:frame.nbytes])

    def transmit(self, tensor: torch.Tensor) -> dist.Work:
        """Hand one frame's bytes to Gloo."""
        return self._group.send([tensor], self._peer, _FRAMES_TAG)

    def send_frames(self, next_frame: Callable[[], Frame | None],
                    sent: Callable[["Lane", Frame, float], None]) -> None:
        """Pull and send until `next_frame` returns None. Raises RuntimeError when the lane breaks."""
        while (frame := next_frame()) is not None:
            began_at_s = time.monotonic()
            self.post(frame).wait(_FOREVER)
            sent(self, frame, began_at_s)

    def receive_frames(self, handle: Callable[["Lane", Slot], None]) -> None:
        """Receive and handle, one frame at a time, until the connection breaks (RuntimeError) or `handle` raises."""
        pinned = torch.cuda.is_initialized()  # then a sink copies to the GPU, which is twice as fast from pinned memory
        slot, me = Slot(self.codec.payload_limit, pinned), threading.get_ident()
        while True:
            slot.view[:HEADER_BYTES] = bytes(HEADER_BYTES)  # a truncated frame must not be completed by the one before
            work = self._group.recv([slot.tensor], self._peer, _FRAMES_TAG)
            self.heard_at_s = time.monotonic()
            self._waiting[me] = slot
            work.wait(_FOREVER)
            self._waiting.pop(me, None)
            self.heard_at_s = time.monotonic()
            handle(self, slot)

    def silent_since(self) -> float | None:
        """When something last arrived, a part of a frame or all of it: a long frame on a slow line is no silence. None
        while nothing can, because every receiving thread is at a frame."""
        # Gloo puts each byte where it belongs as it comes. What equals the byte that lay there goes unseen.
        seen = [slot.view[::LOOKED_AT_BYTES].tobytes() for slot in list(self._waiting.values())]
        if seen != self._seen:
            self._seen, self.heard_at_s = seen, time.monotonic()
        return self.heard_at_s if seen else None

    def cut(self) -> None:
        """Break the connection under every pending operation of this lane, here and at the peer."""
        try:
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _CUT_TAG).wait(timedelta(milliseconds=1))
        except RuntimeError:
            pass  # that is the point


def connect_pair(store: dist.Store, rank: int, device: GlooDevice, timeout_s: float) -> dist.ProcessGroupGloo:
    """A group of two over one connection; blocks until the peer does the same. Whoever calls keeps `device`, which it
    may share. Raises RuntimeError after `timeout_s`.

    Gloo itself may not give up: its device would still hand the connection of a peer that comes late to a pair that is
    freed. So a thread stays behind until the peer has come or refused, and lets go of what it got."""
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [device], _FOREVER
    options._threads = 0  # they are for collective operations only
    try:
        return in_time(lambda: dist.ProcessGroupGloo(PatientStore(store, timeout_s), rank, 2, options), timeout_s)
    except TimeoutError:
        raise RuntimeError(_IN_VAIN) from None


def in_time(connect: Callable[[], Connected], timeout_s: float) -> Connected:
    """What `connect` returns or raises. TimeoutError after `timeout_s`; a thread may go on waiting in C++."""
    made: futures.Future[Connected] = futures.Future()

    def run() -> None:
        try:
            made.set_result(connect())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=run, name="connecting", daemon=True).start()
    try:
        return made.result(timeout_s)
    except futures.TimeoutError:
        raise TimeoutError from None


class PatientStore(dist.Store):
    """The store through which Gloo exchanges addresses. A TCPStore that waits in vain prints a C++ stack before it
    raises, once an attempt, for as long as a line is down; this one asks again and again, and raises one line."""

    def __init__(self, store: dist.Store, timeout_s: float):
        super().__init__()
        self._store, self._give_up_at_s = store, time.monotonic() + timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(key)  # after `wait` has seen it

    def wait(self, keys: list[str], timeout: timedelta = _FOREVER) -> None:
        """Until all of `keys` are there. Raises RuntimeError after the store's own timeout."""
        while not self._store.check(keys):
            if time.monotonic() >= self._give_up_at_s:
                raise RuntimeError(_IN_VAIN)
            time.sleep(STORE_POLL_S)
