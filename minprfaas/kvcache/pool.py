"""The block pool: one byte tensor, and each layer's way of reading and writing its part of a block. Chapter 03 (3.2).

The pool keeps no books: which block belongs to whom is the ledger's business. So a thread that receives KVCache may
write into reserved blocks while the model runs on others.
"""

from collections.abc import Sequence

import torch

from minprfaas.kvcache.layout import Layout
from minprfaas.model.spec import TensorSpec


class BlockPool:
    """`num_blocks` blocks of `layout.block_bytes` bytes on `device`.

    One more block, number `num_blocks`, is the null block: always zero, never handed out. Block tables of a batch are
    padded with it, so that what a forward pass reads past a short request's end is finite.
    """

    def __init__(self, layout: Layout, num_blocks: int, device: torch.device | str):
        self.layout = layout
        self.num_blocks = num_blocks
        self.null_block = num_blocks
        self.device = torch.device(device)
        self.bytes = torch.empty(num_blocks + 1, layout.block_bytes, dtype=torch.uint8, device=device)
        self.bytes[self.null_block] = 0

    # --- token state -------------------------------------------------------------------------------------------------

    def token_view(self, layer: int) -> torch.Tensor:
        """A layer's rows in every block, `[num_blocks + 1, block_tokens, width]`: a strided view, no copy."""
        group = self.layout.group_of_layer[layer]
        tensor = group.spec.tensors[0]
        (offset,) = group.offsets[group.layers.index(layer)]
        blocks = self.bytes.view(tensor.torch_dtype)
        width, item = tensor.shape[0], blocks.element_size()
        return blocks.as_strided((self.num_blocks + 1, self.layout.block_tokens, width), (blocks.stride(0), width, 1),
                                 offset // item)

    def write_tokens(self, layer: int, block_table: Sequence[int], start: int, rows: torch.Tensor) -> None:
        """Store `rows` `[tokens, width]` at positions from `start` on. ValueError if they do not fit the table."""
        view = self.token_view(layer)
        if rows.dim() != 2 or rows.shape[1] != view.shape[2] or rows.dtype != view.dtype:
            raise ValueError(f"rows of layer {layer} are {rows.dtype} {list(rows.shape)}; "
                             f"they must be {view.dtype} [tokens, {view.shape[2]}]")
        blocks, positions = self._token_index(block_table, start, start + len(rows))
        view[blocks[positions // self.layout.block_tokens], positions % self.layout.block_tokens] = rows.to(self.device)

    def read_tokens(self, layer: int, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """The rows of positions `start` to `end`, `[end - start, width]`, copied out of their blocks."""
        blocks, positions = self._token_index(block_table, start, end)
        rows = self.token_view(layer).index_select(0, blocks).flatten(0, 1)
        first = start % self.layout.block_tokens
        return rows[first:first + len(positions)]

    def _token_index(self, block_table: Sequence[int], start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that hold positions `start` to `end`, and those positions counted from the first such block."""
        size = self.layout.block_tokens
        if not 0 <= start <= end <= len(block_table) * size:
            raise ValueError(f"tokens {start} to {end} are outside the block table's 0 to {len(block_table) * size}")
        first = start // size
        blocks = self._block_index(block_table[first:-(-end // size)])
        return blocks, torch.arange(start - first * size, end - first * size, device=self.device)

    # --- request state -----------------------------------------------------------------------------------------------

    def read_state(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A request-level layer's tensors, each `[batch, *shape]`; `blocks` is `[batch, state_blocks]` int64."""
        return tuple(self._read_tensor(tensor, offset, blocks) for tensor, offset in self._state_places(layer))

    def write_state(self, layer: int, blocks: torch.Tensor, *tensors: torch.Tensor) -> None:
        """Replace what `read_state` returns; touches only this layer's bytes."""
        for (tensor, offset), value in zip(self._state_places(layer), tensors, strict=True):
            self._write_tensor(tensor, offset, blocks, value)

    def _state_places(self, layer: int) -> list[tuple[TensorSpec, int]]:
        group = self.layout.group_of_layer[layer]
        return list(zip(group.spec.tensors, group.offsets[group.layers.index(layer)]))

    def _read_tensor(self, tensor: TensorSpec, offset: int, blocks: torch.Tensor) -> torch.Tensor:
        view = self.bytes.view(tensor.torch_dtype)
        first, last, column, length = self._span(tensor, offset)
        if first == last:
            values = view[:, column:column + length].index_select(0, blocks[:, first])
        else:  # gathering whole blocks copies the state once; joining its pieces would copy it twice
            whole = view.index_select(0, blocks[:, first:last + 1].reshape(-1)).view(len(blocks), -1)
            values = whole[:, column:column + length]
        return values.view(len(blocks), *tensor.shape)

    def _write_tensor(self, tensor: TensorSpec, offset: int, blocks: torch.Tensor, value: torch.Tensor) -> None:
        view = self.bytes.view(tensor.torch_dtype)
        first, last, column, length = self._span(tensor, offset)
        flat = value.to(view.dtype).reshape(len(blocks), length)
        done = 0
        for piece in range(first, last + 1):
            size = min(view.shape[1] - column, length - done)
            view[:, column:column + size].index_copy_(0, blocks[:, piece], flat[:, done:done + size])
            done, column = done + size, 0

    def _span(self, tensor: TensorSpec, offset: int) -> tuple[int, int, int, int]:
        """Where a state tensor lies: first and last of the state's blocks, column in the first, length in elements."""
        first, byte = divmod(offset, self.layout.block_bytes)
        last = (offset + tensor.nbytes - 1) // self.layout.block_bytes
        item = tensor.torch_dtype.itemsize
        return first, last, byte // item, tensor.nbytes // item

    # --- the wire ----------------------------------------------------------------------------------------------------

    def read_bytes(self, layer: int, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """What the wire carries: uint8 `[end - start, row_bytes]` of a token layer; of a request-level layer the whole
        state, `[state_bytes]`, whatever the range (its tensors in the spec's order, without padding)."""
        if self.layout.specs[layer].per_token:
            return self.read_tokens(layer, block_table, start, end).view(torch.uint8)
        tensors = self.read_state(layer, self._block_index(block_table).unsqueeze(0))
        return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])

    def write_bytes(self, layer: int, block_table: Sequence[int], start: int, end: int, data: torch.Tensor) -> None:
        """Store what `read_bytes` of the same range returned, on whatever pool. ValueError on a wrong size or range."""
        spec = self.layout.specs[layer]
        size = spec.nbytes * (end - start) if spec.per_token else spec.nbytes
        if data.dtype != torch.uint8 or data.numel() != size:
            raise ValueError(f"layer {layer}, tokens {start} to {end}: {data.numel()} elements of {data.dtype}; "
                             f"expected {size} bytes")
        data = data.reshape(-1)
        if spec.per_token:
            tensor = spec.tensors[0]
            self.write_tokens(layer, block_table, start, _typed(data, tensor).view(-1, *tensor.shape))
            return
        parts = data.to(self.device).split([tensor.nbytes for tensor in spec.tensors])
        self.write_state(layer, self._block_index(block_table).unsqueeze(0),
                         *(_typed(part, tensor) for part, tensor in zip(parts, spec.tensors)))

    # --- whole blocks ------------------------------------------------------------------------------------------------

    def zero(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros: a fresh token block is read beyond its last row, and old bytes may read as NaN."""
        if blocks:
            self.bytes.index_fill_(0, self._block_index(blocks), 0)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole blocks, pairwise."""
        self.bytes.index_copy_(0, self._block_index(target), self.bytes.index_select(0, self._block_index(source)))

    def _block_index(self, blocks: Sequence[int]) -> torch.Tensor:
        if len(blocks) and not (0 <= min(blocks) and max(blocks) < self.num_blocks):
            raise ValueError(f"block table {list(blocks)} names a block outside 0 to {self.num_blocks - 1}")
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)


def _typed(data: torch.Tensor, tensor: TensorSpec) -> torch.Tensor:
    """Bytes as elements; a slice of a message may begin anywhere, so a misaligned one is copied first."""
    if data.storage_offset() % tensor.torch_dtype.itemsize:
        data = data.clone()
    return data.contiguous().view(tensor.torch_dtype)
