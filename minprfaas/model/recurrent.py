"""What mixers share whose state has one size: a short convolution before it, and where it is kept. Chapter 02."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.model.spec import LayerState, StateSpec
from minprfaas.model.state import ContiguousLayerState


def state_or_fresh(state: LayerState | None, spec: StateSpec, x: Tensor) -> LayerState:
    """`state`, or an empty one where `x` `[batch, new, hidden]` is the whole context."""
    return ContiguousLayerState(spec, len(x), x.device) if state is None else state


def short_convolution(tail: Tensor, projected: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over each token and the few before it, then SiLU.

    `tail` `[batch, channels, kernel - 1]` are the inputs before these, `projected` `[batch, new, channels]`, `weight`
    `[channels, 1, kernel]`. Returns `[batch, new, channels]`, and tail and inputs `[batch, kernel - 1 + new, channels]`.
    """
    inputs = torch.cat([tail.transpose(1, 2).to(projected.dtype), projected], dim=1)
    new = projected.shape[1]
    # A sum over the kernel's few taps: cuDNN's depthwise convolution wants another layout, and copies twice.
    return F.silu(sum(inputs[:, tap : tap + new] * weight[:, 0, tap] for tap in range(weight.shape[2]))), inputs


def store_memory(state: LayerState, new: int, chunk: int, memory: Tensor, before: Tensor | None,
                 inputs: Tensor | None = None) -> None:
    """The state after a pass of `new` tokens, and at the wanted offsets inside it.

    `memory` is the one after the pass, `before` `[batch, heads, chunks, …]` the one before each chunk of `chunk` tokens.
    `inputs` of a short convolution begin with the tail that the pass began with, so the kernel - 1 rows from `offset` on
    are the tail after `offset` tokens.
    """
    for offset in sorted({*state.snapshot_offsets, new}):
        tensors = (memory if offset == new else before[:, :, offset // chunk],)
        if inputs is not None:
            tensors += (inputs[:, offset : offset + inputs.shape[1] - new].transpose(1, 2),)
        if offset in state.snapshot_offsets:
            state.store_snapshot(offset, *tensors)
    state.store(*tensors)


def unit_length(x: Tensor) -> Tensor:
    """`x` over its length along the last axis."""
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
