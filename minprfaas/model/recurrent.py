"""What mixers share whose state has one size: a short convolution before it, and where it is kept. Chapter 02."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.model.layers import Positions, rows_from
from minprfaas.model.spec import LayerState, StateSpec
from minprfaas.model.state import ContiguousLayerState

CHUNK_TOKENS = 64  # the prefill forms hold the memory at every multiple of this, and nowhere else


def state_or_fresh(state: LayerState | None, spec: StateSpec, x: Tensor) -> LayerState:
    """`state`, or an empty one where `x` `[batch, new, hidden]` is the whole context."""
    return ContiguousLayerState(spec, len(x), x.device) if state is None else state


class ShortConvolution(nn.Module):
    """A depthwise convolution over each token and the few before it, then SiLU. `parts_of`: a checkpoint may hold it in
    as many equal parts, one for each of these letters."""

    def __init__(self, channels: int, kernel: int, parts_of: tuple[str, ...] = ()):
        super().__init__()
        weight = torch.randn(channels, 1, kernel) * kernel**-0.5
        self.weight = nn.Parameter(weight.movedim(-1, 0).contiguous().movedim(0, -1))  # a tap's channels lie together
        self._parts_of = parts_of

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint may hold in place of the parameter `name`, and where it belongs."""
        if not self._parts_of:
            yield name, self.weight
        for letter, view in zip(self._parts_of, self.weight.chunk(len(self._parts_of) or 1)):
            yield f"{letter}.{name}", view

    def forward(self, tail: Tensor, *projected: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """`tail` `[batch, channels, kernel - 1]` are the inputs before these, `projected` `[batch, new, …]` those of
        the channels in one part or several. Returns as many parts, and of each tail and inputs
        `[batch, kernel - 1 + new, …]`."""
        tails = tail.transpose(1, 2).to(projected[0].dtype).split([part.shape[-1] for part in projected], dim=-1)
        inputs = [torch.cat(part, dim=1) for part in zip(tails, projected)]
        return self.over(*inputs), inputs

    def over(self, *inputs: Tensor) -> list[Tensor]:
        """`[batch, new, …]` of each part's `[batch, kernel - 1 + new, …]`."""
        weights = self.weight[:, 0].split([part.shape[-1] for part in inputs])
        return [F.silu(_convolved(*part)) for part in zip(inputs, weights)]


def _convolved(inputs: Tensor, weight: Tensor) -> Tensor:
    """A sum over the kernel's few taps: cuDNN's depthwise convolution wants another layout, and copies twice."""
    first, *taps = weight.unbind(1)
    new = inputs.shape[1] - len(taps)
    convolved = inputs[:, :new] * first
    for place, tap in enumerate(taps, 1):
        convolved = torch.addcmul(convolved, inputs[:, place : place + new], tap)
    return convolved


def store_memory(state: LayerState, positions: Positions, memory: Tensor, before: Sequence[Tensor] | None,
                 inputs: Sequence[Tensor] = ()) -> None:
    """The state after a pass, and at the wanted offsets inside it.

    `memory` is the one after the pass, `before` `[chunks, batch, heads, …]` the one before each `CHUNK_TOKENS`. The
    `inputs` of a short convolution, all parts of them, begin with the tail that the pass began with, so the kernel - 1
    rows from `offset` on are the tail after `offset` tokens.
    """
    new = positions.index.shape[1]
    for offset in sorted({*state.snapshot_offsets, new}):
        tensors = (memory if offset == new else before[offset // CHUNK_TOKENS],)
        if inputs:
            after = positions.new if offset == new and positions.new is not None else offset
            rows = [rows_from(part, after, part.shape[1] - new) for part in inputs]
            tensors += ((rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)).transpose(1, 2),)
        if offset in state.snapshot_offsets:
            state.store_snapshot(offset, *tensors)
    state.store(*tensors)


def unit_length(x: Tensor) -> Tensor:
    """`x` over its length along the last axis."""
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()  # a division for each channel takes longer
