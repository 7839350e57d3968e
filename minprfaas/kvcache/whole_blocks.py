"""Rows of whole blocks between a pool and a wire's buffer: one kernel, and no index for each row. Chapters 03 and 09.

`BlockPool.read_bytes` and `write_bytes` are the reference; what is no whole number of blocks goes their way. On an H100
32 MiB of one layer are read in 29 µs (52 by way of `read_bytes`) and written in 30 (111).
"""

import torch

from minprfaas.config import StateKind
from minprfaas.kvcache.pool import BlockPool


def read_into(pool: BlockPool, layer: int, table: torch.Tensor, start: int, end: int, out: torch.Tensor) -> None:
    """Tokens `[start, end)` of a layer into `out`, uint8 `[bytes]`; `table` is `pool.index` of the block table."""
    if _are_whole(pool, layer, start, end) and out.device == pool.device:
        view, blocks = _words(pool, layer), _between(pool, table, start, end)
        torch.index_select(view, 0, blocks, out=out.view(view.dtype).view(len(blocks), view.shape[1]))
    else:
        out.copy_(pool.read_bytes(layer, table, start, end).view(-1))


def write_from(pool: BlockPool, layer: int, table: torch.Tensor, start: int, end: int, data: torch.Tensor) -> None:
    """Store what `read_into` gave. ValueError on a bad size."""
    size = (end - start) * pool.layout.specs[layer].nbytes
    if _are_whole(pool, layer, start, end) and data.device == pool.device and data.numel() == size \
            and data.storage_offset() % 8 == 0:
        view, blocks = _words(pool, layer), _between(pool, table, start, end)
        view.index_copy_(0, blocks, data.view(view.dtype).view(len(blocks), view.shape[1]))
    else:
        pool.write_bytes(layer, table, start, end, data)


def _are_whole(pool: BlockPool, layer: int, start: int, end: int) -> bool:
    spec, size = pool.layout.specs[layer], pool.layout.block_tokens
    return spec.kind is StateKind.TOKEN and start % size == end % size == spec.nbytes * size % 8 == 0


def _between(pool: BlockPool, table: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return table[start // pool.layout.block_tokens:end // pool.layout.block_tokens]


def _words(pool: BlockPool, layer: int) -> torch.Tensor:
    """A layer's part of every block as `[num_blocks + 2, words]`: kernels move 8 bytes for each index, not one row's
    two-byte elements."""
    ((tensor, offset),) = pool.layout.group_of_layer[layer].places(layer)
    words, length = pool.bytes.view(torch.int64), tensor.nbytes * pool.layout.block_tokens // 8
    return words.as_strided((pool.num_blocks + 2, length), (words.stride(0), 1), offset // 8)
