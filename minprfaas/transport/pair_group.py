"""What carries a fabric's bytes for one epoch: a process group for each direction, and one for words. Chapter 09.

One operation moves one batch: the pieces that were ready, one after another, and behind them their digest. NCCL matches
operations by their order alone and queues those of a communicator behind each other, so each direction has a group of
its own, in which one thread at a time sends and one receives: neither direction can wait for the other. What is said of
batches goes by Gloo, from the thread that says it to the one that waits for it: a link's threads would take their turns
at the interpreter in between, and that takes longer than a batch.
"""

import json
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from minprfaas.errors import UserError
from minprfaas.transport.wan.binding import Binding, GlooDevice
from minprfaas.transport.wan.lanes import PatientStore, connect_pair

ALIGN_BYTES = 4096  # the rows that a digest sums; a batch holds whole ones
DIGEST_BYTES = 8
BATCH_BYTES = {"cuda": 256 * 2**20, "cpu": 2**20}  # of pieces in one: it moves for longer than the host works for it
WINDOW = 2  # batches in either direction: one is on its way while another is filled, or written
WORD_BYTES = 16384  # longer than any word
WORDS = 8  # of a kind on their way
ANNOUNCED, WRITTEN = 2, 3  # kinds of words
PEER_IS_GONE = "the peer is gone"
CONNECT_S = 30.0  # until both sides have joined
_FOREVER = timedelta(days=1)  # the fabric's own watchdog ends what takes too long
_CUT_TAG = 1


def require_error_handling() -> None:
    """Ask PyTorch to leave the process alive when NCCL fails. UserError when the environment says otherwise."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    value = os.environ.setdefault(name, "2")  # 2: operations of a broken communicator end, and nothing else does
    if value not in ("0", "2"):
        raise UserError(f"{name} is {value!r}; it must be 0 or 2: with any other, a dead peer ends this process too")


def digest(data: torch.Tensor) -> torch.Tensor:
    """A checksum of uint8 `[n * ALIGN_BYTES]`, as int64 on its device: the sum of each row of ALIGN_BYTES, times an odd
    number that grows with the row, modulo 2^64.

    One pass over the bytes. Notices every change of a single 8-byte word, and, but for one case in 2^64, rows that did
    not arrive or stand in another's place. Does not notice words that change places within a row, nor malice."""
    rows = data.view(torch.int64).view(-1, ALIGN_BYTES // 8).sum(1)
    return (rows * torch.arange(1, 2 * len(rows), 2, device=data.device)).sum()


def seal(batch: torch.Tensor, key: int) -> None:
    """Write the digest of a batch, plus its key, behind its pieces. The key is announced, and no other batch's: what
    the same memory held before never passes for this one. The host waits for nothing."""
    torch.add(digest(batch[:-DIGEST_BYTES]), key, out=batch[-DIGEST_BYTES:].view(torch.int64)[0])


def is_sound(batch: torch.Tensor, key: int) -> bool:
    """Whether a batch is what was sealed with this key, every byte of it."""
    return int(batch[-DIGEST_BYTES:].view(torch.int64)[0] - digest(batch[:-DIGEST_BYTES])) == key


@dataclass(eq=False)
class Transfer:
    """One operation, posted at `began_at_s`, and the batch that it sends or receives: a part of `memory`."""

    data: torch.Tensor
    memory: torch.Tensor
    began_at_s: float = field(default_factory=time.monotonic)
    work: dist.Work | None = None


class PairGroup:
    """One side of a pair, from when both sides have joined `epoch` until `abort`. Its owner sets `is_over` first."""

    def __init__(self, store: dist.Store, epoch: int, rank: int, device: torch.device, batch_bytes: int,
                 binding: Binding):
        """Blocks until the peer does the same. KVCache is on `device`; its batches are there too, and go by NCCL, if
        the peer's is on another GPU. On the same one, or on CPUs, they are in CPU memory and go by Gloo. Raises
        RuntimeError."""
        store = dist.PrefixStore(str(epoch), store)
        self.epoch = epoch
        self.device = device if _is_between_gpus(store, rank, device) else torch.device("cpu")
        self.is_over = False
        self._peer, self._memory_bytes = 1 - rank, _padded(batch_bytes) + DIGEST_BYTES
        self._filling: torch.Tensor | None = None
        self._sent: deque[Transfer] = deque()  # the last WINDOW
        self._unwritten: dict[int, Transfer] = {}  # by number
        self._landing: dict[Transfer, None] = {}
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()  # to land in; None is yet to be made
        for _ in range(WINDOW):
            self._free.put(None)
        on_gpu = self.device.type == "cuda"  # two streams for waiting: nothing else may be queued behind a dead peer
        self._leaves, self._lands = (torch.cuda.Stream(self.device, priority=-1) if on_gpu else None for _ in range(2))
        self._devices = [binding.gloo_device(sender) for sender in (0, 1)]  # shared with the links of this process
        groups = [_connect(dist.PrefixStore(f"from {sender}", store), rank, self.device, listening)
                  for sender, listening in enumerate(self._devices)]
        self._out, self._in = groups[rank], groups[1 - rank]
        self._words = _connect(dist.PrefixStore("words", store), rank, torch.device("cpu"), self._devices[0])
        self._said: dict[int, deque[tuple[dist.Work, torch.Tensor]]] = {ANNOUNCED: deque(), WRITTEN: deque()}
        try:
            for sender in (0, 1):
                self._carry_one(sender == rank)
        except RuntimeError:
            self.abort()
            raise

    def _carry_one(self, is_sender: bool) -> None:
        """A direction's first batch, while nothing else is on its way. With their first operation NCCL connects two
        GPUs, for which both sides have to call it; and to load a kernel may wait for those that run."""
        give_up_at_s = time.monotonic() + CONNECT_S
        with torch.cuda.stream(self._lands):  # None: where this thread is anyway
            batch = torch.zeros(ALIGN_BYTES + DIGEST_BYTES, dtype=torch.uint8, device=self.device)
            if is_sender:
                seal(batch, self.epoch)
            work = (self._out.send if is_sender else self._in.recv)([batch], self._peer, 0)
            while self._lands is not None and not work.is_completed():  # a stream that waits for it could not be freed
                if time.monotonic() > give_up_at_s:
                    raise RuntimeError(f"nothing crossed within {CONNECT_S:g} s")
                time.sleep(0.001)
            if self._lands is None:
                work.wait(timedelta(seconds=CONNECT_S))
            if not is_sound(batch, self.epoch):
                raise RuntimeError("the groups carry nothing")

    # Words

    def say(self, kind: int, *word) -> None:
        """Tell the peer. One thread says what is of a kind. Raises RuntimeError."""
        data = torch.frombuffer(bytearray(json.dumps(word).encode().ljust(WORD_BYTES)), dtype=torch.uint8)
        said = self._said[kind]
        if len(said) == WORDS:
            said.popleft()[0].wait(_FOREVER)  # it has left long since; Gloo forgets what is dropped
        said.append((self._words.send([data], self._peer, kind), data))

    def hear(self, kind: int) -> list:
        """Block until the peer says something of this kind. Raises RuntimeError."""
        data = bytearray(WORD_BYTES)
        try:
            self._words.recv([torch.frombuffer(data, dtype=torch.uint8)], self._peer, kind).wait(_FOREVER)
        except RuntimeError:
            raise RuntimeError(PEER_IS_GONE) from None
        return json.loads(data)

    # What leaves, by one thread at a time

    def new_batch(self, nbytes: int) -> torch.Tensor:
        """Memory for pieces of so many bytes and their digest, uint8, once there is some. Raises RuntimeError."""
        if len(self._sent) < WINDOW:
            self._filling = self._new_memory()
        else:
            oldest = self._sent.popleft()
            # Gloo's sends are completed by nothing but a wait; NCCL's by the GPU, and then a wait costs a wake-up.
            if self._leaves is None or not oldest.work.is_completed():
                self._wait_until_sent(oldest)
            self._filling = oldest.memory
        return self._filling[:_padded(nbytes) + DIGEST_BYTES]

    def _wait_until_sent(self, transfer: Transfer) -> None:
        with torch.cuda.stream(self._leaves):  # None: where this thread is anyway
            self.wait(transfer)
        if self._leaves is not None:
            self._leaves.synchronize()

    def send(self, number: int, batch: torch.Tensor) -> None:
        """Start to send what `new_batch` gave. Raises RuntimeError."""
        transfer = self._unwritten[number] = Transfer(batch, self._filling)
        transfer.work = self._out.send([batch], self._peer, 0)
        self._sent.append(transfer)

    def written(self, number: int) -> None:
        """The peer says that it is done with a batch."""
        self._unwritten.pop(number, None)

    # What arrives

    def receive(self, nbytes: int) -> Transfer:
        """Start to receive so many bytes, a batch with its digest, once there is memory. Raises RuntimeError."""
        memory = self._free.get()
        if self.is_over or not DIGEST_BYTES < nbytes <= self._memory_bytes or nbytes % DIGEST_BYTES:
            raise RuntimeError(f"the epoch is over, or {nbytes} bytes are no batch")
        memory = self._new_memory() if memory is None else memory
        transfer = Transfer(memory[:nbytes], memory)
        self._landing[transfer] = None
        transfer.work = self._in.recv([transfer.data], self._peer, 0)
        return transfer

    def has_landed(self, transfer: Transfer, key: int) -> bool:
        """Block until the operation has ended, by completion or by `abort`; then, whether the batch sealed with `key`
        is there. Raises RuntimeError when Gloo noticed a failure; NCCL's operations end without a word."""
        with torch.cuda.stream(self._lands):  # None: where this thread is anyway
            self.wait(transfer)
            is_there = is_sound(transfer.data, key)  # on a GPU the host waits here, once a batch
        self._landing.pop(transfer, None)
        return is_there

    def release(self, transfer: Transfer) -> None:
        """What has landed is written, or will not be: others may land there, behind what this CUDA stream does."""
        self._free.put(transfer.memory)

    def _new_memory(self) -> torch.Tensor:
        with torch.inference_mode(False):  # whoever fills it first; others will too
            return torch.empty(self._memory_bytes, dtype=torch.uint8, device=self.device)

    def wait(self, transfer: Transfer) -> None:
        """Let this thread, or on a GPU its CUDA stream, wait for an operation's end. Raises RuntimeError."""
        if self.device.type == "cuda":
            transfer.work.wait()
        else:
            transfer.work.wait(_FOREVER)

    def oldest_s(self, now_s: float) -> float:
        """How long the oldest operation that has not ended has taken; 0 without one."""
        transfers = [*list(self._unwritten.values()), *list(self._landing)]
        return max([now_s - transfer.began_at_s for transfer in transfers], default=0.0)

    def abort(self) -> None:
        """Break every operation of this group, here and at the peer."""
        # All at once: one after the other stood still between two GPUs, with a receive that no send would ever meet.
        breaking = [threading.Thread(target=_break, args=(group, self._peer), daemon=True)
                    for group in (self._out, self._in, self._words)]
        for thread in breaking:
            thread.start()
        for thread in breaking:
            thread.join()
        self._free.put(None)  # whoever waits for memory


def _break(group: dist.ProcessGroup, peer: int) -> None:
    try:
        if isinstance(group, dist.ProcessGroupGloo):
            # Gloo's abort leaves operations pending; one whose deadline passes takes the others with it.
            scrap = torch.empty(1, dtype=torch.uint8)
            group.recv([scrap], peer, _CUT_TAG).wait(timedelta(milliseconds=1))
        else:
            group.abort()
    except RuntimeError:
        pass  # it was broken already, or it is now


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _is_between_gpus(store: dist.Store, rank: int, device: torch.device) -> bool:
    """Whether both sides have a GPU, each its own. NCCL joins no two ranks on one."""
    here = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    store.set(f"place of {rank}", here)
    PatientStore(store, CONNECT_S).wait([f"place of {1 - rank}"])
    there = store.get(f"place of {1 - rank}").decode()
    return "cpu" not in (here, there) and here != there


def _connect(store: dist.Store, rank: int, device: torch.device, listening: GlooDevice) -> dist.ProcessGroup:
    """A group of two for one direction. Made directly, not split off another: a child would outlive its abort."""
    if device.type != "cuda":
        return connect_pair(store, rank, listening, CONNECT_S)
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True  # a peer's kernel spins while this side's waits behind the model's
    group = dist.ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)  # now, where a failure is expected
    return group
