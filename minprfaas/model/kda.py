"""Kimi delta attention (KDA): the delta rule with a decay for every key channel. Chapter 02; paper 2.2."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, StateKind, require_sizes
from minprfaas.errors import require_number
from minprfaas.model.delta import CHUNK_TOKENS, delta_rule_chunked, delta_rule_recurrent
from minprfaas.model.layers import Positions, RMSNorm
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec
from minprfaas.model.state import ContiguousLayerState


@dataclass(frozen=True)
class KDAConfig:
    """Kimi delta attention: short causal convolutions, per-channel decay, beta gate, gated output norm."""

    num_heads: int
    head_dim: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "head_dim", most=MAX_HEAD_SIZE)
        require_number("short_conv_kernel_size", self.conv_kernel, least=2, most=1024, whole=True)

    def state_spec(self, dtype: str) -> StateSpec:
        """A matrix a head, and the last inputs of the three convolutions."""
        return StateSpec(StateKind.REQUEST, (
            TensorSpec("memory", (self.num_heads, self.head_dim, self.head_dim), "float32"),  # long sums
            TensorSpec("conv", (3 * self.num_heads * self.head_dim, self.conv_kernel - 1), dtype)), CHUNK_TOKENS)

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return KDA(self, hidden_size, norm_eps)


class KDA(nn.Module):
    """The whole mixer: projections, short convolutions, decay and beta gates, the delta rule, gated output norm."""

    def __init__(self, config: KDAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        channels, kernel = config.num_heads * config.head_dim, config.conv_kernel
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, channels, bias=False))
            taps = torch.randn(channels, 1, kernel) * kernel**-0.5  # a depthwise convolution's, as checkpoints have it
            self.add_module(f"{name}_conv1d", nn.ParameterDict({"weight": taps}))
        self.A_log = nn.Parameter(torch.empty(1, 1, config.num_heads, 1).uniform_(1, 16).log())
        # Biases whose softplus is spread evenly in logarithm over [1e-3, 1e-1]: heads that forget fast and slowly.
        step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())
        self.f_a_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.f_b_proj = nn.Linear(config.head_dim, channels, bias=False)
        self.b_proj = nn.Linear(hidden_size, config.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.g_b_proj = nn.Linear(config.head_dim, channels, bias=False)
        self.o_norm = RMSNorm(config.head_dim, norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that nothing came before `x`."""
        heads = (self.config.num_heads, self.config.head_dim)
        if state is None:
            state = ContiguousLayerState(self.config.state_spec("float32"), len(x), x.device)
        memory, tail = state.load()
        projected = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        conv_input = torch.cat([tail.transpose(1, 2).to(x.dtype), projected], dim=1)
        q, k, v = (part.unflatten(-1, heads) for part in self._short_convolutions(conv_input).float().chunk(3, dim=-1))
        q, k = _unit_length(q) * self.config.head_dim**-0.5, _unit_length(k)
        step = F.softplus((self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias.float()).unflatten(-1, heads))
        g = -self.A_log.float().exp() * step
        beta = self.b_proj(x).float().sigmoid()
        with torch.autocast(x.device.type, enabled=False):  # the memory's sums need float32
            if x.shape[1] == 1:  # decode: the recurrence is the shorter way, and crosses no chunk's boundary
                out, memory = delta_rule_recurrent(q, k, v, g, beta, memory)
                before = None
            else:
                out, memory, before = delta_rule_chunked(q, k, v, g, beta, memory)
        self._store(state, conv_input, before, memory)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, heads).float().sigmoid()
        return self.o_proj((self.o_norm(out) * gate).to(x.dtype).flatten(2))

    def _store(self, state: LayerState, conv_input: Tensor, before: Tensor | None, memory: Tensor) -> None:
        """The state after the pass, and at the wanted offsets inside it: the chunked rule went through them all.

        `conv_input` `[batch, width + new, channels]` begins with the tail that the pass began with, so the `width` rows
        from `offset` on are the tail after `offset` tokens.
        """
        width = self.config.conv_kernel - 1
        new = conv_input.shape[1] - width
        for offset in state.snapshot_offsets:
            memory_there = memory if offset == new else before[:, :, offset // CHUNK_TOKENS]
            state.store_snapshot(offset, memory_there, conv_input[:, offset : offset + width].transpose(1, 2))
        state.store(memory, conv_input[:, new:].transpose(1, 2))

    def _short_convolutions(self, conv_input: Tensor) -> Tensor:
        """Depthwise convolutions, then SiLU: `[batch, kernel - 1 + new, channels]` -> `[batch, new, channels]`."""
        weight = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]).squeeze(1)
        kernel = self.config.conv_kernel
        new = conv_input.shape[1] - kernel + 1
        # A sum over the kernel's few taps: cuDNN's depthwise convolution wants another layout, and copies twice.
        return F.silu(sum(conv_input[:, tap : tap + new] * weight[:, tap] for tap in range(kernel)))


def _unit_length(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
