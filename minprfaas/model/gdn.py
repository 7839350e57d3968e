"""Gated DeltaNet (GDN): the delta rule with one decay a head, and more value heads than key heads. Chapter 02."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, StateKind, require_sizes
from minprfaas.errors import UserError, require_number
from minprfaas.model.delta import delta_rule, delta_rule_chunked
from minprfaas.model.layers import Positions, RMSNorm
from minprfaas.model.recurrent import CHUNK_TOKENS, ShortConvolution, state_or_fresh, store_memory, unit_length
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec


@dataclass(frozen=True)
class GDNConfig:
    """Gated DeltaNet as Qwen3-Next and Qwen3.5 have it. Consecutive value heads share one head of keys and queries.

    `by_key_head`: the checkpoint keeps a key head's rows together, in one matrix each for q, k, v, z and for b, a
    (Qwen3-Next), instead of a matrix for q, k, v and one each for z, b, a (Qwen3.5).
    """

    num_k_heads: int
    num_v_heads: int
    k_dim: int
    v_dim: int
    conv_kernel: int = 4
    by_key_head: bool = False

    def __post_init__(self) -> None:
        require_sizes(self, "num_k_heads", "num_v_heads", "k_dim", "v_dim", most=MAX_HEAD_SIZE)
        require_number("linear_conv_kernel_dim", self.conv_kernel, least=2, most=1024, whole=True)
        if self.num_v_heads % self.num_k_heads:
            raise UserError(f"linear_num_value_heads {self.num_v_heads} is not a multiple of "
                            f"linear_num_key_heads {self.num_k_heads}")

    @property
    def qkv_sizes(self) -> list[int]:
        """Channels of all queries, keys and values."""
        return [self.num_k_heads * self.k_dim] * 2 + [self.num_v_heads * self.v_dim]

    def state_spec(self, dtype: str) -> StateSpec:
        """A matrix a value head, and the last inputs of the convolution."""
        return StateSpec(StateKind.REQUEST, (
            TensorSpec("memory", (self.num_v_heads, self.k_dim, self.v_dim), "float32"),  # long sums
            TensorSpec("conv", (sum(self.qkv_sizes), self.conv_kernel - 1), dtype)), CHUNK_TOKENS)

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return GDN(self, hidden_size, norm_eps)


class GDN(nn.Module):
    """The whole mixer: projections, one short convolution, decay and beta gates, the delta rule, gated output norm."""

    def __init__(self, config: GDNConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        qkv, values = sum(config.qkv_sizes), config.num_v_heads * config.v_dim
        sizes = dict(qkv=qkv, z=values, b=config.num_v_heads, a=config.num_v_heads)
        if config.by_key_head:
            sizes = dict(qkvz=qkv + values, ba=2 * config.num_v_heads)
        for name, size in sizes.items():
            self.add_module(f"in_proj_{name}", nn.Linear(hidden_size, size, bias=False))
        self.conv1d = ShortConvolution(qkv, config.conv_kernel)
        self.dt_bias = nn.Parameter(torch.ones(config.num_v_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_v_heads).uniform_(0.01, 16).log())
        self.norm = RMSNorm(config.v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that nothing came before `x`."""
        config = self.config
        state = state_or_fresh(state, config.state_spec("float32"), x)
        memory, tail = state.load()
        qkv, z, b, a = self._projections(x)
        (convolved,), inputs = self.conv1d(tail, qkv)
        q, k, v = convolved.float().split(config.qkv_sizes, dim=-1)
        q, k = (unit_length(part.unflatten(-1, (-1, config.k_dim))) for part in (q, k))
        v = v.unflatten(-1, (-1, config.v_dim))
        sharing = config.num_v_heads // config.num_k_heads
        q, k = q.repeat_interleave(sharing, dim=2), k.repeat_interleave(sharing, dim=2)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        out, memory, before = delta_rule(q * config.k_dim**-0.5, k, v, g[..., None], b.float().sigmoid(), memory,
                                         positions.is_token, self.chunked)
        store_memory(state, positions, memory, before, inputs)
        gate = F.silu(z.unflatten(-1, (-1, config.v_dim)).float())
        return self.o_proj((self.norm(out) * gate).to(x.dtype).flatten(2))

    def chunked(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The delta rule for many tokens."""
        return delta_rule_chunked(*arguments)

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v together, z (gate of the output), b (of beta), a (of the decay), each `[batch, new, channels]`."""
        config = self.config
        if not config.by_key_head:
            return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
        a_head = config.num_v_heads // config.num_k_heads
        sizes = [config.k_dim, config.k_dim, a_head * config.v_dim, a_head * config.v_dim]
        of_heads = self.in_proj_qkvz(x).unflatten(-1, (config.num_k_heads, -1))
        q, k, v, z = (part.flatten(2) for part in of_heads.split(sizes, dim=-1))
        b, a = self.in_proj_ba(x).unflatten(-1, (config.num_k_heads, 2, a_head)).unbind(-2)
        return torch.cat([q, k, v], dim=-1), z, b.flatten(2), a.flatten(2)
