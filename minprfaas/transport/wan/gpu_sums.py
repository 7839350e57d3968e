"""Bytes on a GPU are summed there: sums of rows are exact, and the same whoever makes them. Chapter 07.

A core digests 9 GB/s alone. But on 16 cores, two processes of eight lanes each, that share an H100, carry 9.5 GB/s from
GPU memory to GPU memory when cores sum, 12.0 when the GPU does and 14.2 without digests (docs/measurements.md).
"""

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minprfaas.transport.base import StreamAborted
from minprfaas.transport.streams import wait_for_gpu
from minprfaas.transport.wan.digest import ROW_BYTES, RowSums

LEAST_ROWS = 17  # that a GPU multiplies by bytes; fewer are soon summed by a core
ALIGNED_BYTES = 16  # where data has to begin for that
AT_ONCE = 8  # pieces that are landing on a GPU, of all links of a process: each takes memory there while it does
PLACE_WITHIN_S = 30.0  # a sink that works for longer has stopped

_streams: dict[torch.device, queue.LifoQueue[torch.cuda.Stream]] = {}
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
        stream = _streams[device].get(timeout=PLACE_WITHIN_S)
    except queue.Empty:
        raise StreamAborted(f"{device}: none of {AT_ONCE} places to land came free in {PLACE_WITHIN_S:g} s") from None
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
    try:
        sums = torch._int_mm(matrix, _keys_on(data.device, row_sums))
    except RuntimeError:
        return None
    return torch.empty(sums.shape, dtype=sums.dtype, pin_memory=data.is_cuda).copy_(sums, non_blocking=True)


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
