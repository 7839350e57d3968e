"""What a layer must remember between tokens, and how a forward pass reads and writes it. Chapters 00 and 02.

Two kinds of state (paper 3.2). *Token* state grows with the context: one row of `width` elements for each token
(GQA: every KV head's key and value; MLA: one latent). *Request* state has one size whatever the context (KDA: a matrix
per head and the tail of its convolutions), so it can be reused only at exactly the length it was taken at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from minprfaas.config import GQAConfig, KDAConfig, MLAConfig, MixerConfig, ModelConfig, StateKind

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer's state. `shape` is per token for token state, per request for request state."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class StateSpec:
    """A layer's whole state. Token state is exactly one tensor, request state any number."""

    kind: StateKind
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes per token for token state, bytes per request for request state."""
        return sum(tensor.nbytes for tensor in self.tensors)


def state_spec(mixer: MixerConfig, dtype: str) -> StateSpec:
    """The state that `mixer` needs when the model runs in `dtype` (recurrent matrices stay float32)."""
    if isinstance(mixer, GQAConfig):
        return StateSpec(StateKind.TOKEN, (TensorSpec("kv", (2 * mixer.num_kv_heads * mixer.head_dim,), dtype),))
    if isinstance(mixer, MLAConfig):
        return StateSpec(StateKind.TOKEN, (TensorSpec("latent", (mixer.kv_lora_rank + mixer.qk_shared_dim,), dtype),))
    assert isinstance(mixer, KDAConfig)
    channels = mixer.num_heads * mixer.head_dim
    return StateSpec(StateKind.REQUEST, (
        TensorSpec("memory", (mixer.num_heads, mixer.head_dim, mixer.head_dim), "float32"),
        TensorSpec("conv", (3 * channels, mixer.conv_kernel - 1), dtype)))


def model_state_specs(config: ModelConfig, dtype: str) -> tuple[StateSpec, ...]:
    """One `StateSpec` a layer."""
    return tuple(state_spec(layer.mixer, dtype) for layer in config.layers)


def kv_bytes(specs: tuple[StateSpec, ...], tokens: int) -> int:
    """Bytes of KVCache of a request of `tokens` tokens: S_kv(l) (paper 2.1), without block alignment."""
    return sum(spec.nbytes * (tokens if spec.kind is StateKind.TOKEN else 1) for spec in specs)


class LayerState(Protocol):
    """One layer's state of the requests in one forward pass; a mixer sees this and never a block."""

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Token state: store `rows` `[batch, new, width]` after what is there, and return the whole context
        `[batch, context, width]`, where `context` is the longest; a shorter request's rows end in padding."""

    def load(self) -> tuple[torch.Tensor, ...]:
        """Request state: the tensors `[batch, *shape]` in the spec's order; zeros for a request that just began."""

    def store(self, *tensors: torch.Tensor) -> None:
        """Request state: replace what `load` returned."""


class ModelState(Protocol):
    """The state of a batch of requests, for one forward pass."""

    start: torch.Tensor  # [batch] int64: tokens already in the state of each request

    def layer(self, index: int) -> LayerState:
        """The state of layer `index`."""


OnLayer = Callable[[int], None]  # called with a layer's index once its state holds the new tokens
