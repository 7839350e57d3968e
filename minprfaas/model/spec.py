"""What a layer must remember between tokens, and how a forward pass reads and writes it. Chapters 00 and 02.

Three kinds of state (paper 3.2). *Token* state grows with the context: one row of `width` elements for each token
(GQA: every KV head's key and value; MLA: one latent). *Request* state has one size whatever the context (KDA: a matrix
per head and the tail of its convolutions), so it can be reused only at exactly the length it was taken at. A *window*
(GQA that sees a few tokens only) is rows of one size together, and reused as request state is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch

from minprfaas.config import ModelConfig, StateKind

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer's state. `shape` is per token for token state, per request for request state."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes per token for token state, bytes per request for request state."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it; the text is what crosses to other processes."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class StateSpec:
    """A layer's whole state. Token state and a window are exactly one tensor, request state any number."""

    kind: StateKind
    tensors: tuple[TensorSpec, ...]
    snapshot_stride: int = 1  # tokens: a pass can store a snapshot at each multiple of it from the pass's beginning

    @property
    def nbytes(self) -> int:
        """Bytes per token for token state, bytes per request for the others."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def bytes_at(self, tokens: int) -> int:
        """Bytes of the state of a request of `tokens` tokens: a window that is not full yet has a row each."""
        if self.kind is StateKind.REQUEST:
            return self.nbytes
        if self.kind is StateKind.TOKEN:
            return self.nbytes * tokens
        rows = self.tensors[0].shape[0]
        return self.nbytes // rows * min(tokens, rows)


def model_state_specs(config: ModelConfig, dtype: str) -> tuple[StateSpec, ...]:
    """One `StateSpec` a layer."""
    return tuple(layer.mixer.state_spec(dtype) for layer in config.layers)


def kv_bytes(specs: tuple[StateSpec, ...], tokens: int) -> int:
    """Bytes of KVCache of a request of `tokens` tokens: S_kv(l) (paper 2.1), without block alignment."""
    return sum(spec.bytes_at(tokens) for spec in specs)


class Pages(NamedTuple):
    """Token state where it lies: request b's token t is `view[block_table[b, t // block_tokens], t % block_tokens]`."""

    view: torch.Tensor  # [blocks, block_tokens, width]
    block_table: torch.Tensor  # [batch, blocks of the longest request] int64; a shorter request's row ends in any block
    lengths: torch.Tensor  # [batch] int64: tokens of each request, the new ones included


@dataclass(frozen=True)
class TokenContext:
    """The whole context of one token-state layer, new tokens included: as rows, or as the pages that hold them."""

    pages: Pages  # without a copy, for kernels that follow a block table
    longest: int  # of the lengths
    # Attention to the pages without a copy: (q `[batch, 1, heads, dim]`, scale, KV heads) -> itself (one tensor), or
    # what `merge_pages` takes. None: read `rows` instead.
    attend: Callable[[torch.Tensor, float, int], tuple[torch.Tensor, ...]] | None = None

    def rows(self) -> torch.Tensor:
        """A contiguous copy `[batch, longest, width]`: the reference. A shorter request's rows end in padding, which is
        finite, because blocks are zeroed when they are handed out."""
        gathered = self.pages.view.index_select(0, self.pages.block_table.flatten())
        return gathered.view(len(self.pages.block_table), -1, self.pages.view.shape[2])[:, :self.longest]


class LayerState(Protocol):
    """One layer's state of the requests in one forward pass; a mixer sees this and never a block.

    Token state: `append` stores `rows` `[batch, new, width]` after what is there, and returns the whole context.
    Request state: `load` gives the tensors `[batch, *shape]` in the spec's order, zeros for a request that just began,
    and `store` replaces them. `snapshot_offsets` are the tokens after this pass's beginning (multiples of the spec's
    `snapshot_stride`, or the pass's length) at which `store_snapshot` is to get what `store` would have been given if
    the pass had ended there.
    """

    snapshot_offsets: tuple[int, ...]

    def append(self, rows: torch.Tensor) -> TokenContext: ...
    def load(self) -> tuple[torch.Tensor, ...]: ...
    def store(self, *tensors: torch.Tensor) -> None: ...
    def store_snapshot(self, offset: int, *tensors: torch.Tensor) -> None: ...


class ModelState(Protocol):
    """The state of a batch of requests, for one forward pass."""

    start: torch.Tensor  # [batch] int64: tokens already in the state of each request
    new: torch.Tensor | None  # [batch] int64: those that the pass adds, where a row may end in padding; None: all

    def layer(self, index: int) -> LayerState: ...


OnLayer = Callable[[int], None]  # called with a layer's index once its state holds the new tokens
