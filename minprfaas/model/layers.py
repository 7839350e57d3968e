"""The pieces every layer shares: normalization, the MLP, and where tokens stand. Chapter 01."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_WIDTH, ResidualConfig, RopeConfig, require_sizes


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis (in float32), then scale by a learned weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` with any `weight` that fits `x`."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


@dataclass(frozen=True)
class DenseConfig:
    """A SwiGLU MLP of `intermediate_size`."""

    intermediate_size: int

    def __post_init__(self) -> None:
        require_sizes(self, "intermediate_size", most=MAX_WIDTH)

    def build(self, hidden_size: int) -> nn.Module:
        """The MLP's module, with fresh weights."""
        return MLP(hidden_size, self.intermediate_size)


class Projecting(nn.Module):
    """A module with several projections of one input, JOINED. On a GPU a decode step's products are too small to fill
    it: with their weights end to end (`join`) they are one. The projections' own weights are then views of the whole.
    """

    JOINED: tuple[str, ...]
    joined: Tensor | None = None

    def join(self) -> None:
        """Lay the projections' weights end to end, unless they lie so or have biases. Harmless when repeated."""
        layers = [self.get_submodule(name) for name in self.JOINED]
        if any(layer.bias is not None for layer in layers):
            return
        if self.joined is None or self.joined.data_ptr() != layers[0].weight.data_ptr():
            whole = torch.cat([layer.weight.detach() for layer in layers])
            for layer, view in zip(layers, whole.split([layer.out_features for layer in layers])):
                layer.weight.data = view
            self.joined = whole

    def projected(self, x: Tensor) -> Sequence[Tensor]:
        """What each of the projections makes of `x`."""
        if self.joined is None or self.joined.device != x.device or torch.is_grad_enabled():
            return [self.get_submodule(name)(x) for name in self.JOINED]
        return self.apart(F.linear(x, self.joined))

    def apart(self, product: Tensor) -> Sequence[Tensor]:
        """Of what the joined weights make of an input, each projection's part."""
        return product.split([self.get_submodule(name).out_features for name in self.JOINED], dim=-1)


class MLP(Projecting):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    JOINED = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` -> the same shape."""
        gate, up = self.projected(x)
        return self.down_proj(F.silu(gate) * up)


def join(stream: Tensor, normed: Tensor, given: Tensor, residual: ResidualConfig | None) -> Tensor:
    """The stream after a mixer or an MLP has `given` something, which it made of `normed`; all of one shape."""
    return stream + given if residual is None else residual.alpha * normed + residual.beta * given


class Positions:
    """Where the new tokens of a forward pass stand: `index` `[batch, new]`, `start` `[batch]` tokens came before. Where
    only the first `new` `[batch]` tokens of each row are, and the others padding, `is_token` `[batch, new]` says so."""

    only_last = False  # whether of a mixer's output only the last token's is wanted: it may give that alone

    def __init__(self, start: Tensor, new_tokens: int, new: Tensor | None = None):
        offsets = torch.arange(new_tokens, device=start.device)
        self.index, self.new = start[:, None] + offsets, new
        self.is_token = None if new is None else offsets < new[:, None]
        self._tables: dict = {}

    def rotary(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables `[batch, new, 1, channels]` of the channels that are rotated, computed once for all
        layers that share a RoPE. A pair's first channel turns the other way, so that its sine has a minus."""
        if (rope, head_dim) not in self._tables:
            frequencies = frequencies_on(self.index.device, rope, head_dim)
            self._tables[rope, head_dim] = rotary_tables(self.index, frequencies, rope.amplitude, dtype)
        return self._tables[rope, head_dim]


def rotary_tables(index: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`Positions.rotary` of the positions `index` `[batch, new]`."""
    angles = index[..., None, None].float() * frequencies
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def rows_from(rows: Tensor, first: int | Tensor, count: int) -> Tensor:
    """`count` of `rows` `[batch, all, width]` from number `first` on, one for all requests or `[batch]`."""
    if isinstance(first, int):
        return rows[:, first:first + count]
    index = first[:, None] + torch.arange(count, device=rows.device)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


@cache
def frequencies_on(device: torch.device, rope: RopeConfig, head_dim: int) -> Tensor:
    """Each rotated channel's, copied to a device once: a copy from the host would make a pass wait, and a captured one
    fail."""
    with torch.inference_mode(False):  # what is kept must serve passes with gradients too
        frequencies = rope_frequencies(rope, head_dim)
        return torch.cat([-frequencies, frequencies]).to(device)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each rotated pair of channels, `[channels / 2]`. Rounded as published code rounds
    them: an angle has its frequency's error as often as its position says."""
    dim = int(head_dim * rope.fraction)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":  # linear in the turns that a pair makes over the original context
        turns = rope.context_tokens * frequencies / (2 * math.pi)
        keep = ((turns - rope.low_turns) / (rope.high_turns - rope.low_turns)).clamp(0, 1)
    else:
        keep = _yarn_kept(rope, dim)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor  # 1: short wavelength, 0: long


def _yarn_kept(rope: RopeConfig, dim: int) -> Tensor:
    """How far YaRN (arXiv:2309.00071) keeps each pair's frequency: linear in the pair's number, between those that make
    `high_turns` and `low_turns` over the original context."""
    def pair_of(turns: float) -> float:
        return dim * math.log(rope.context_tokens / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.high_turns), pair_of(rope.low_turns)
    if rope.whole_channels:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange((dim + 1) // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + n/2 among the first n of `x` `[batch, tokens, heads, dim]`, n as `cos` has."""
    rotated, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    # The two halves of a pair are swapped by an index: a compiler would write what is put together (`cat`) to memory.
    others = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    rotated = rotated * cos + others * sin
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def heads_at_once(product: Tensor, queries: int, dim: int, norms: tuple[RMSNorm, RMSNorm] | None, cos: Tensor,
                  sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of `product` `[batch, tokens, width]`, the heads of queries, of keys and of as many values side by side: queries
    `[batch, tokens, queries, dim]`, and rows of keys and values, with queries and keys normalized and rotated. One
    kernel to a compiler (8,192 tokens on an H200: 43 us, 55 in parts), in which values pass as they are: what is put
    together (`cat`) is written and read once more.
    """
    heads = product.unflatten(-1, (-1, dim))
    number, turned = torch.arange(heads.shape[2], device=product.device)[:, None], heads
    if norms is not None:
        turned = rms_norm(heads, torch.where(number < queries, norms[0].weight, norms[1].weight), norms[0].eps)
    is_value = number >= (heads.shape[2] + queries) // 2
    heads = torch.where(is_value, heads, apply_rotary(turned, cos, sin))
    return heads[:, :, :queries], heads[:, :, queries:].flatten(2)
