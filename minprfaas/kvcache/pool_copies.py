"""A stream's bytes between the blocks of a pool and one buffer, on a GPU several layers by one kernel.

Chapters 03 and 09. `BlockPool.read_bytes` and `write_bytes` are the reference, and what is no whole number of blocks
goes their way. On an H100 32 MiB of one layer are read in 29 µs (by way of `read_bytes` in 52) and written in 30 (111).
"""

from collections.abc import Iterable, Sequence

import torch

from minprfaas.config import StateKind
from minprfaas.kvcache.layout import KVGroup
from minprfaas.kvcache.pool import BlockPool


class WholeBlocks:
    """The bytes of one stream. `tables` are its block tables per group, which may grow."""

    def __init__(self, pool: BlockPool, tables: Sequence[Sequence[int]], is_fast: bool | None = None):
        self._pool, self._tables, self._groups = pool, tables, pool.layout.group_of_layer
        self._size = pool.layout.block_tokens
        self._on_device: dict[int, torch.Tensor] = {}  # the tables, by group: each crosses once, too
        self._is_fast = pool.device.type == "cuda" if is_fast is None else is_fast  # a CPU gains nothing by it
        self._words: dict[int, torch.Tensor | None] = {}  # by group

    def prepare(self) -> None:
        """Bring block tables to the device, for what follows on this CUDA stream: the first `read` is then short."""
        for group in self._pool.layout.token_groups if self._is_fast else []:
            self._blocks(group.layers[0], 0, 0)

    def read(self, layer: int, start: int, end: int, out: torch.Tensor | None) -> torch.Tensor:
        """What `read_bytes` gives, uint8 `[bytes]`, in `out` if there is one; of as many layers as it has room for,
        `layer` and those behind it in its group. The block table crosses to a GPU once, and not for each layer."""
        table, spec = self._tables[self._groups[layer].index], self._groups[layer].spec
        if out is None:
            if not self._is_fast or spec.kind is not StateKind.TOKEN:
                return self._pool.read_bytes(layer, table, start, end).reshape(-1)
            out = torch.empty((end - start) * spec.nbytes, dtype=torch.uint8, device=self._pool.device)
        words, rows, whole_end = self._whole_blocks(layer, start, end, out)
        if whole_end > start:
            torch.index_select(words, 1, self._blocks(layer, start, whole_end), out=rows)
        if whole_end < end:
            for number, part in self._rest(layer, start, whole_end, end, out):
                part.copy_(self._pool.read_bytes(number, table, whole_end, end).view(-1))
        return out

    def write(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """Store what `read` gave."""
        words, rows, whole_end = self._whole_blocks(layer, start, end, data)
        if whole_end > start:
            words.index_copy_(1, self._blocks(layer, start, whole_end), rows)
        if whole_end < end:
            table = self._tables[self._groups[layer].index]
            for number, part in self._rest(layer, start, whole_end, end, data):
                self._pool.write_bytes(number, table, whole_end, end, part)

    def _whole_blocks(self, layer: int, start: int, end: int, data: torch.Tensor) -> tuple[
            torch.Tensor | None, torch.Tensor | None, int]:
        """What one kernel may copy: the layers' part of the pool and that of `data`, both int64 `[layers, blocks,
        words]`, and the token before which whole blocks end; `start` when there is nothing for it."""
        group = self._groups[layer]
        if self._is_fast and group.index not in self._words:
            self._words[group.index] = _words(self._pool, group)
        words, nbytes = self._words.get(group.index), (end - start) * group.spec.nbytes
        whole_end = max(start, end - end % self._size)
        if words is None or whole_end == start or start % self._size or data.numel() % nbytes or nbytes % 8 \
                or data.device != self._pool.device or data.storage_offset() % 8:
            return None, None, start
        first, count = group.layers.index(layer), data.numel() // nbytes
        words = words[first:first + count]
        rows = data.view(count, nbytes)[:, :(whole_end - start) * group.spec.nbytes]
        return words, rows.view(torch.int64).unflatten(1, (-1, words.shape[2])), whole_end

    def _rest(self, layer: int, start: int, whole_end: int, end: int,
              data: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
        """Of each layer its number and its bytes in `data` behind `whole_end`. Before it there is nothing but rows."""
        group = self._groups[layer]
        if group.spec.kind is not StateKind.TOKEN or data.numel() % ((end - start) * group.spec.nbytes):
            return [(layer, data)]  # the pool says what is wrong with it, if anything is
        parts = data.view(-1, end - start, group.spec.nbytes)[:, whole_end - start:].flatten(1)
        return zip(group.layers[group.layers.index(layer):], parts)

    def _blocks(self, layer: int, start: int, end: int) -> torch.Tensor:
        group = self._groups[layer].index
        blocks = self._on_device.get(group)
        if blocks is None or len(blocks) < len(self._tables[group]):
            blocks = self._on_device[group] = self._pool.index(self._tables[group])
        if end > len(blocks) * self._size:
            raise ValueError(f"tokens {start} to {end} are outside the block table's 0 to {len(blocks) * self._size}")
        return blocks[start // self._size:end // self._size]


def _words(pool: BlockPool, group: KVGroup) -> torch.Tensor | None:
    """A group's part of every block, int64 `[layers, blocks, words]`: kernels move 8 bytes for each index, not an
    element of two. None when there is no such part."""
    length = group.spec.nbytes * pool.layout.block_tokens // 8
    if group.spec.kind is not StateKind.TOKEN or group.spec.nbytes * pool.layout.block_tokens % 8:
        return None
    offsets = [group.places[layer][0][1] // 8 for layer in group.layers]  # of each layer's only tensor: one distance
    apart = offsets[1] - offsets[0] if len(offsets) > 1 else length
    words = pool.bytes.view(torch.int64)
    return words.as_strided((len(offsets), len(words), length), (apart, words.stride(0), 1), offsets[0])
