"""Grouped-query attention (GQA): a key and a value a token and KV head. Chapter 01; paper 2.1 and table 2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, RopeConfig, StateKind, require_sizes
from minprfaas.errors import UserError
from minprfaas.model.attention import attend
from minprfaas.model.layers import Positions, RMSNorm, apply_rotary
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec


@dataclass(frozen=True)
class GQAConfig:
    """GQA with RoPE; `qk_norm` normalizes each head's q and k (Qwen3)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qk_norm: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "num_kv_heads", "head_dim", most=MAX_HEAD_SIZE)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_attention_heads {self.num_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")

    def state_spec(self, dtype: str) -> StateSpec:
        """One row a token: every KV head's key (rotated), then every KV head's value."""
        return StateSpec(StateKind.TOKEN, (TensorSpec("kv", (2 * self.num_kv_heads * self.head_dim,), dtype),))

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return GQA(self, hidden_size, norm_eps)


class GQA(nn.Module):
    """Keys are stored rotated, so that decode never touches old positions again."""

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden_size, q_size, bias=config.bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=config.bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=config.bias)
        self.o_proj = nn.Linear(q_size, hidden_size, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, norm_eps)
            self.k_norm = RMSNorm(config.head_dim, norm_eps)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that `x` is the whole context."""
        config = self.config
        q = self.q_proj(x).unflatten(-1, (-1, config.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, config.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, config.head_dim))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = positions.rotary(config.rope, config.head_dim, x.dtype)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if state is not None:
            rows = state.append(torch.cat([k.flatten(2), v.flatten(2)], dim=-1)).rows()
            k, v = rows.unflatten(-1, (2, config.num_kv_heads, config.head_dim)).unbind(2)
        out = attend(q, k, v, positions, config.head_dim**-0.5)
        return self.o_proj(out.flatten(2))
