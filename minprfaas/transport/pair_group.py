"""What carries a fabric's bytes for one epoch: two process groups, one a direction, and staging buffers. Chapter 09.

One operation moves one staging buffer, which holds as many pieces of streams as were ready. NCCL matches operations
by their order alone and queues those of a communicator behind each other, so each direction has a group of its own,
in which one thread sends and one receives: neither direction can wait for the other.
"""

import os
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minprfaas.errors import UserError
from minprfaas.transport.streams import Piece
from minprfaas.transport.wan.binding import Binding, GlooDevice
from minprfaas.transport.wan.lanes import PatientStore, connect_pair

ALIGN_BYTES = 4096  # of what one operation moves; also the rows that a digest sums
PIECE_ALIGN_BYTES = 16  # so that a piece can be viewed in its dtype where it landed
OUT_BUFFERS, IN_BUFFERS = 3, 2  # one fills while two are on their way; one lands while another is written
STAGING_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}  # of one buffer: its transfer outlasts what the host does for it
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


@dataclass(eq=False)
class Batch:
    """A staging buffer that fills, or is on its way; `pieces` are (whose, what, where in the buffer)."""

    buffer: torch.Tensor
    end: int = 0
    pieces: list[tuple[Any, Piece, int]] = field(default_factory=list)
    copied: list[torch.cuda.Event] = field(default_factory=list)

    def add(self, stream: Any, piece: Piece, data: torch.Tensor) -> None:
        """Copy `data` behind what is there, in the order of the caller's CUDA stream."""
        self.buffer[self.end:self.end + piece.nbytes].copy_(data)
        self.pieces.append((stream, piece, self.end))
        self.end += -(-piece.nbytes // PIECE_ALIGN_BYTES) * PIECE_ALIGN_BYTES
        if self.buffer.is_cuda:
            self.copied.append(torch.cuda.current_stream(self.buffer.device).record_event())

    @property
    def sent(self) -> torch.Tensor:
        """What crosses: whole rows of the digest."""
        return self.buffer[:-(-self.end // ALIGN_BYTES) * ALIGN_BYTES]


@dataclass(eq=False)
class Transfer:
    """One operation that was posted at `began_at_s`, and the bytes that it sends or has received."""

    work: dist.Work
    data: torch.Tensor
    began_at_s: float = field(default_factory=time.monotonic)


class PairGroup:
    """One side of a pair, from when both sides have joined `epoch` until `abort`. Its owner sets `is_over` first."""

    def __init__(self, store: dist.Store, epoch: int, rank: int, device: torch.device, staging_bytes: int,
                 binding: Binding):
        """Blocks until the peer does the same. KVCache is on `device`; it is staged there too, and goes by NCCL, if the
        peer's is on another GPU. On the same one, or on CPUs, it is staged in CPU memory and goes by Gloo. Raises
        RuntimeError."""
        store = dist.PrefixStore(str(epoch), store)
        self.epoch = epoch
        self.device = device if _is_between_gpus(store, rank, device) else torch.device("cpu")
        self.is_over = False
        self._rank, self._staging_bytes = rank, staging_bytes
        self._transfers: dict[Transfer, None] = {}
        self._free = deque([None] * OUT_BUFFERS)  # buffers are made when they are first used
        self._landing: list[torch.Tensor] = []
        self._received = 0
        self._filling: Batch | None = None
        self._full: deque[Batch] = deque()
        self._devices = [binding.gloo_device(sender) for sender in (0, 1)]  # shared with the links of this process
        groups = [_connect(dist.PrefixStore(f"from {sender}", store), rank, self.device, listening)
                  for sender, listening in enumerate(self._devices)]
        self._out, self._in = groups[rank], groups[1 - rank]

    # Batches: the caller holds the fabric's lock

    def room(self, nbytes: int) -> Batch | None:
        """The batch that takes the next `nbytes`; None while every buffer is full or on its way."""
        if self._filling is not None and self._filling.end + nbytes > self._staging_bytes:
            self._full.append(self._filling)
            self._filling = None
        if self._filling is None and self._free:
            buffer = self._free.popleft()
            self._filling = Batch(self._new_buffer() if buffer is None else buffer)
        return self._filling

    def take(self) -> Batch | None:
        """The batch to send next, full or not; None when there is none."""
        if self._full:
            return self._full.popleft()
        batch, self._filling = self._filling, None
        return batch

    def release(self, batch: Batch) -> None:
        """It has left: its buffer may fill again."""
        self._free.append(batch.buffer)

    # Operations

    def send(self, data: torch.Tensor) -> Transfer:
        """Start to send; `data` must stay as it is until `wait` has returned."""
        return self._posted(self._out.send([data], 1 - self._rank, 0), data)

    def receive(self, nbytes: int) -> Transfer:
        """Start to receive as many bytes as the peer sends, into the buffer that the last but IN_BUFFERS used."""
        if len(self._landing) < IN_BUFFERS:
            self._landing.append(self._new_buffer())
        data = self._landing[self._received % IN_BUFFERS][:nbytes]
        self._received += 1
        return self._posted(self._in.recv([data], 1 - self._rank, 0), data)

    def _new_buffer(self) -> torch.Tensor:
        return torch.empty(self._staging_bytes, dtype=torch.uint8, device=self.device)

    def _posted(self, work: dist.Work, data: torch.Tensor) -> Transfer:
        transfer = Transfer(work, data)
        self._transfers[transfer] = None
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Block until the operation has ended, by completion or by `abort`. Raises RuntimeError when Gloo noticed a
        failure; NCCL's operations end without a word, and what has arrived is known by its digest alone."""
        if self.device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream(self.device, priority=-1)):  # `work.wait` holds up a stream only
                transfer.work.wait()
                torch.cuda.current_stream(self.device).synchronize()
        else:
            transfer.work.wait(_FOREVER)
        self._transfers.pop(transfer, None)

    def oldest_s(self, now: float) -> float:
        """How long the oldest operation that has not ended has taken; 0 without one."""
        return max([now - transfer.began_at_s for transfer in list(self._transfers)], default=0.0)

    def abort(self) -> None:
        """Break every operation of this group, here and at the peer."""
        for group in (self._out, self._in):
            try:
                if self.device.type == "cuda":
                    group.abort()
                else:  # Gloo's abort leaves operations pending; one whose deadline passes takes the others with it
                    scrap = torch.empty(1, dtype=torch.uint8)
                    group.recv([scrap], 1 - self._rank, _CUT_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError:
                pass  # it was broken already, or it is now


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
    group.eager_connect_single_device(device)  # or the first send would connect, and fail where nobody expects it
    return group
