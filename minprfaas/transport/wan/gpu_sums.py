"""Bytes on a GPU are summed there: sums of rows are exact, and the same whoever makes them. Chapter 07.

A core digests 9 GB/s alone. But on 16 cores, two processes of eight lanes each, that share an H100, carry 9.5 GB/s from
GPU memory to GPU memory in chunks of 16 MiB when cores sum, 12.0 when the GPU does and 14.2 without digests; 15 in
chunks of 32 MiB, digested (docs/measurements.md).
"""

import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import torch

from minprfaas.transport.base import StreamAborted
from minprfaas.transport.streams import wait_for_gpu
from minprfaas.transport.wan.digest import ROW_BYTES, RowSums

LEAST_ROWS = 17  # that a GPU multiplies by bytes; fewer are soon summed by a core
ALIGNED_BYTES = 16  # where data has to begin for that
AT_ONCE = 8  # pieces that are landing on a GPU, of all links of a process: each takes memory there while it does
WITHIN_S = 30.0  # a sink that works for longer has stopped, or the GPU has
SUMMERS = 2  # threads that sum: cuBLAS keeps 32 MiB on an H100 for each thread with each CUDA stream that calls it

_streams: dict[torch.device, queue.LifoQueue[torch.cuda.Stream]] = {}
_summers, _of_this_thread = futures.ThreadPoolExecutor(SUMMERS, "gpu sums"), threading.local()
_keys: dict[tuple[RowSums, torch.device], torch.Tensor] = {}


@contextmanager
def landing(device: torch.device | None) -> Iterator[None]:
    """What the calling thread does within is done by a CUDA stream of its own, as soon as there is one: it waits for
    nothing that others do on this GPU, the model least of all. Memory comes back to the stream that it is of, so a GPU
    lends AT_ONCE pieces' and no more, however many lanes there are. Raises StreamAborted when none comes back."""
    if device is None:
        yield
        return
    if device not in _streams:
        streams = queue.LifoQueue()
        for _ in range(AT_ONCE):
            streams.put(torch.cuda.Stream(device, priority=-1))
        _streams.setdefault(device, streams)
    try:
        stream = _streams[device].get(timeout=WITHIN_S)
    except queue.Empty:
        raise StreamAborted(f"{device}: none of {AT_ONCE} places to land came free in {WITHIN_S:g} s") from None
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        _streams[device].put(stream)


def queue_sums(data: torch.Tensor, row_sums: RowSums) -> torch.Tensor | None:
    """The sums by bytes of `data`, uint8 [bytes], in pinned memory once the current CUDA stream has come here. None
    where a core has to make them: of few rows, of data that begins anywhere, on a GPU that cannot or has no room."""
    rows = row_sums.rows_of(data.numel())
    if not row_sums.by_bytes or rows < LEAST_ROWS or data.data_ptr() % ALIGNED_BYTES:
        return None
    matrix = data[:rows * ROW_BYTES].view(torch.int8).view(rows, ROW_BYTES)
    if not data.is_cuda:
        return torch._int_mm(matrix, _keys_on(data.device, row_sums))
    here = torch.cuda.current_stream(data.device)
    try:
        sums, summed = _summers.submit(_sum, matrix, row_sums, here.record_event()).result(WITHIN_S)
    except (RuntimeError, futures.TimeoutError):
        return None
    here.wait_event(summed)
    return sums


def _sum(matrix: torch.Tensor, row_sums: RowSums, ready: torch.cuda.Event) -> tuple[torch.Tensor, torch.cuda.Event]:
    """In a thread of `_summers`: the sums, and when they are there."""
    streams = _of_this_thread.__dict__
    if matrix.device not in streams:
        streams[matrix.device] = torch.cuda.Stream(matrix.device, priority=-1)
    stream = streams[matrix.device]
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        sums = torch._int_mm(matrix, _keys_on(matrix.device, row_sums))
        sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        return sums, stream.record_event()


class SumsOfPieces:
    """Of what leaves together: made by one call for all pieces that begin with a row."""

    def __init__(self, data: torch.Tensor, row_sums: RowSums):
        self._data, self._row_sums, self._sums = data, row_sums, queue_sums(data, row_sums)

    def of(self, piece: torch.Tensor) -> torch.Tensor | None:
        """What `queue_sums` gives for a part of the data."""
        row, beside = divmod(piece.storage_offset() - self._data.storage_offset(), ROW_BYTES)
        if beside or self._sums is None:
            return queue_sums(piece, self._row_sums)
        return self._sums[row:row + self._row_sums.rows_of(piece.numel())]


def land(data: torch.Tensor, device: torch.device, row_sums: RowSums) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Received bytes, brought to a GPU by its current CUDA stream, and their sums as above: those are there already.
    Where there is no room, the bytes as they are."""
    try:
        landed = torch.empty(data.shape, dtype=data.dtype, device=device).copy_(data, non_blocking=True)
    except torch.OutOfMemoryError:
        return data, None
    sums = queue_sums(landed, row_sums)
    if sums is not None:
        wait_for_gpu(device)
    return landed, sums


def _keys_on(device: torch.device, row_sums: RowSums) -> torch.Tensor:
    keys = _keys.get((row_sums, device))
    if keys is None:  # a column's one after another, as a GPU wants them; the copy is there when `to` returns
        keys = _keys[row_sums, device] = row_sums.keys.t().contiguous().to(device).t()
    return keys
