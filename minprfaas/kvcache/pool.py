"""The block pool: one byte tensor, and each layer's way to its part of a block. Chapter 03 (paper 3.2).

The pool keeps no books: which block belongs to whom is the ledger's business. So a thread that receives KVCache may
write into reserved blocks while the model runs on others.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from minprfaas.config import StateKind
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import KVGroup, Layout
from minprfaas.model.spec import TensorSpec


class BlockPool:
    """`num_blocks` blocks of `layout.block_bytes` bytes on `device`; UserError when it cannot hold them.

    Two more are never handed out. The null block, number `num_blocks`, is always zero: block tables of a batch are
    padded with it, so that what a pass reads past a short request's end is finite. The scratch block takes the writes
    of those rows of a batch that stand for no request.
    """

    def __init__(self, layout: Layout, num_blocks: int, device: torch.device | str):
        self.layout, self.num_blocks = layout, num_blocks
        self.null_block, self.scratch_block = num_blocks, num_blocks + 1
        try:
            self.bytes = torch.empty(num_blocks + 2, layout.block_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise UserError(f"a KVCache pool of {num_blocks:,} blocks of {layout.block_bytes:,} bytes does not fit on "
                            f"{device}: {str(error).splitlines()[0]}") from None
        self.device = self.bytes.device  # "cuda" has a number now: what is compared with a tensor's must
        self._words = self.bytes.view(torch.int64)  # a kernel that follows an index takes as long for every element
        self.bytes[num_blocks:] = 0  # the others hold whatever was there: `zero` cleans one when it is handed out

    # Token state

    def token_view(self, layer: int) -> torch.Tensor:
        """A layer's rows in every block, `[num_blocks + 2, block_tokens, width]`: a strided view, no copy."""
        ((tensor, offset),) = self.layout.group_of_layer[layer].places[layer]
        # Blocks have BLOCK_ALIGN bytes and offsets TENSOR_ALIGN, so that both are whole numbers of elements.
        blocks, width = self.bytes.view(tensor.torch_dtype), tensor.shape[0]
        return blocks.as_strided((self.num_blocks + 2, self.layout.block_tokens, width), (blocks.stride(0), width, 1),
                                 offset // blocks.element_size())

    def write_tokens(self, layer: int, block_table: Sequence[int], start: int, rows: torch.Tensor) -> None:
        """Store `rows` `[tokens, width]` at positions from `start` on. ValueError if they do not fit."""
        view = self.token_view(layer)
        if rows.dim() != 2 or rows.shape[1] != view.shape[2] or rows.dtype != view.dtype:
            raise ValueError(f"rows of layer {layer} are {rows.dtype} {list(rows.shape)}; "
                             f"they must be {view.dtype} [tokens, {view.shape[2]}]")
        blocks, first = self._blocks_between(block_table, start, start + len(rows))
        positions, size = torch.arange(first, first + len(rows), device=self.device), self.layout.block_tokens
        put_rows(view, blocks[positions // size], positions % size, rows.to(self.device))

    def read_tokens(self, layer: int, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """The rows of positions `start` to `end`, `[end - start, width]`, copied out of their blocks."""
        blocks, first = self._blocks_between(block_table, start, end)
        return self.token_view(layer).index_select(0, blocks).flatten(0, 1)[first:first + end - start]

    def _blocks_between(self, block_table: Sequence[int], start: int, end: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold positions `start` to `end`, and where in the first of them `start` is."""
        size = self.layout.block_tokens
        if not 0 <= start <= end <= len(block_table) * size:
            raise ValueError(f"tokens {start} to {end} are outside the block table's 0 to {len(block_table) * size}")
        return self.index(block_table[start // size:-(-end // size)]), start % size

    # Request state

    def state_rows(self, group: KVGroup, blocks: torch.Tensor) -> torch.Tensor:
        """The pool as rows of `group.row_bytes` bytes: the numbers of those that hold each request's state, in order,
        `[batch, rows]`. `blocks` is `[batch, state_blocks]` int64."""
        of_block = self.layout.block_bytes // group.row_bytes
        return (blocks[..., None] * of_block + torch.arange(of_block, device=blocks.device)).flatten(1)

    def read_state(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A request-level layer's tensors, each `[batch, *shape]`, copied from the `state_rows` of its group."""
        return tuple(pool_rows.index_select(0, own).view(tensor.torch_dtype).view(len(rows), *tensor.shape)
                     for tensor, pool_rows, own in self._state_places(layer, rows))

    def write_state(self, layer: int, rows: torch.Tensor, *tensors: torch.Tensor) -> None:
        """Replace what `read_state` returns; touches only this layer's bytes."""
        for (tensor, pool_rows, own), value in zip(self._state_places(layer, rows), tensors, strict=True):
            value = value.to(tensor.torch_dtype).contiguous().view(-1).view(pool_rows.dtype)
            pool_rows.index_copy_(0, own, value.view(-1, pool_rows.shape[1]))

    def _state_places(self, layer: int, rows: torch.Tensor) -> Iterator[tuple[TensorSpec, torch.Tensor, torch.Tensor]]:
        """Each tensor of the layer, the whole pool as rows, and the numbers of the tensor's own `[batch * rows]`."""
        group = self.layout.group_of_layer[layer]
        size = group.row_bytes
        pool_rows = self.bytes.view(-1, size).view(torch.uint8 if size % 8 else torch.int64)  # long words copy faster
        for tensor, offset in group.places[layer]:
            yield tensor, pool_rows, rows[:, offset // size:(offset + tensor.nbytes) // size].flatten()

    # The wire

    def read_bytes(self, layer: int, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """What the wire carries: uint8 `[end - start, row_bytes]` of a token layer; of a request-level layer the whole
        state as of `end` (its tensors in the spec's order, unpadded), of a window its last `end` rows at most."""
        if self.layout.specs[layer].kind is StateKind.TOKEN:
            return self.read_tokens(layer, block_table, start, end).view(torch.uint8)
        rows = self.state_rows(self.layout.group_of_layer[layer], self.index(block_table)[None])
        data = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in self.read_state(layer, rows)])
        return data[data.numel() - self.layout.specs[layer].bytes_at(end):]

    def write_bytes(self, layer: int, block_table: Sequence[int], start: int, end: int, data: torch.Tensor) -> None:
        """Store what `read_bytes` of the same range returned, here or elsewhere. ValueError on a bad size or range."""
        spec = self.layout.specs[layer]
        size = spec.nbytes * (end - start) if spec.kind is StateKind.TOKEN else spec.bytes_at(end)
        if data.dtype != torch.uint8 or data.numel() != size:
            raise ValueError(f"layer {layer}, tokens {start} to {end}: {data.numel()} elements of {data.dtype}; "
                             f"they must be {size} bytes")
        data = data.reshape(-1).to(self.device)
        if spec.kind is StateKind.TOKEN:
            self.write_tokens(layer, block_table, start, _typed(data, spec.tensors[0]).view(end - start, -1))
        else:
            data = F.pad(data, (spec.nbytes - size, 0))  # a window that is not full yet begins with rows of zeros
            parts = zip(data.split([tensor.nbytes for tensor in spec.tensors]), spec.tensors)
            rows = self.state_rows(self.layout.group_of_layer[layer], self.index(block_table)[None])
            self.write_state(layer, rows, *(_typed(part, tensor) for part, tensor in parts))

    # Whole blocks

    def zero(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros: a fresh token block is read beyond its last row, and old bytes may read as NaN."""
        for block in blocks:  # they are few, and an index would first be copied to the device
            self._words[block].zero_()

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole blocks, pairwise."""
        self._words.index_copy_(0, self.index(target), self._words.index_select(0, self.index(source)))

    def index(self, blocks: Sequence[int]) -> torch.Tensor:
        """A block table on the device."""
        if blocks and not (0 <= min(blocks) and max(blocks) < self.num_blocks):
            raise ValueError(f"block table {list(blocks)} names a block outside 0 to {self.num_blocks - 1}")
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)


def put_rows(view: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
    """`view[blocks, offsets] = rows`, by words of eight bytes where rows are whole words (32 MiB on an H100: 34 us, and
    111 by elements of bfloat16)."""
    if rows.stride(-1) == 1 and all(number * rows.element_size() % 8 == 0 for tensor in (view, rows) for number in (
            tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])):
        view, rows = view.view(torch.int64), rows.view(torch.int64)
    view[blocks, offsets] = rows


def _typed(data: torch.Tensor, tensor: TensorSpec) -> torch.Tensor:
    """Bytes as elements; a slice of a message may begin anywhere, so a misaligned one is copied first."""
    dtype = tensor.torch_dtype
    return (data.clone() if data.storage_offset() % dtype.itemsize else data.contiguous()).view(dtype)
