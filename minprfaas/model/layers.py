"""The pieces every layer shares: normalization, the MLP, and where tokens stand. Chapter 01."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import RopeConfig


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis (in float32), then scale by a learned weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> the same shape."""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Positions:
    """Where the new tokens of a forward pass stand: `index` `[batch, new]`, `start` `[batch]` tokens came before."""

    def __init__(self, start: Tensor, new_tokens: int):
        self.index = start[:, None] + torch.arange(new_tokens, device=start.device)
        self._tables: dict = {}

    def rotary(self, rope: RopeConfig, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables `[batch, new, 1, dim]`, computed once for all layers that share a RoPE."""
        if (rope, dim) not in self._tables:
            angles = self.index[..., None].float() * rope_frequencies(rope, dim).to(self.index.device)
            angles = torch.cat([angles, angles], dim=-1)[:, :, None]
            self._tables[rope, dim] = (angles.cos().to(dtype), angles.sin().to(dtype))
        return self._tables[rope, dim]


def rope_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """Radians per position for each channel pair, `[dim / 2]`; llama3 scaling slows the long wavelengths down."""
    frequencies = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.scaling is None:
        return frequencies
    factor, low, high, context = rope.scaling
    turns = context * frequencies / (2 * math.pi)  # turns of each pair over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, untouched; 0: long, divided by factor
    return keep * frequencies + (1 - keep) * frequencies / factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i with channel i + dim/2 of `x` `[batch, tokens, heads, dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
