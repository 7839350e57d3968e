"""Grouped-query attention (GQA): one key and one value for each token and KV head. Chapter 01; paper 2.1, table 2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, RopeConfig, StateKind, require_sizes
from minprfaas.errors import UserError
from minprfaas.model.attention import attend
from minprfaas.model.layers import Positions, Projecting, RMSNorm, apply_rotary, heads_at_once, rms_norm
from minprfaas.model.paged_attention import merge_pages
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec
from minprfaas.model.window import attend_window, pass_through_window, window_spec


@dataclass(frozen=True)
class GQAConfig:
    """GQA with RoPE, and what families add to it. `qk_norm` normalizes q and k, each "head" by itself (Qwen3) or the
    whole "projection" (MiniMax-M2). With `window`, a token sees only the last `window` tokens, itself included."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qk_norm: str | None = None
    bias: bool = False
    out_bias: bool = False
    v_head_dim: int | None = None  # None: the same as `head_dim`
    v_scale: float = 1.0
    window: int | None = None
    sinks: bool = False  # each head learns a score for attending to no token at all (MiMo; with `window`)
    output_gate: bool = False  # a sigmoid gate on each channel of the output (Qwen3-Next)

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "num_kv_heads", "head_dim", "v_dim", most=MAX_HEAD_SIZE)
        if self.window is not None:
            require_sizes(self, "window", most=2**24)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_attention_heads {self.num_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_kv_heads}")
        rotated = int(self.head_dim * self.rope.fraction)
        if rotated == 0 or rotated + rotated % 2 > self.head_dim:
            raise UserError(f"head_dim {self.head_dim} cannot have {rotated} channels rotated; RoPE rotates pairs")

    @property
    def v_dim(self) -> int:
        """Channels of a head's value."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def state_spec(self, dtype: str) -> StateSpec:
        """One row a token: every KV head's key (rotated), then every KV head's value."""
        width = self.num_kv_heads * (self.head_dim + self.v_dim)
        if self.window is not None:
            return window_spec(self.window, width, dtype)
        return StateSpec(StateKind.TOKEN, (TensorSpec("kv", (width,), dtype),))

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return GQA(self, hidden_size, norm_eps)


class GQA(Projecting):
    """Keys are stored rotated, so that decode never touches old positions again."""

    PIECES = ("project", "output")
    JOINED = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        q_size, k_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        out_size, v_size = config.num_heads * config.v_dim, config.num_kv_heads * config.v_dim
        self.q_proj = nn.Linear(hidden_size, q_size + (out_size if config.output_gate else 0), bias=config.bias)
        self.k_proj = nn.Linear(hidden_size, k_size, bias=config.bias)
        self.v_proj = nn.Linear(hidden_size, v_size, bias=config.bias)
        self.o_proj = nn.Linear(out_size, hidden_size, bias=config.out_bias)
        if config.qk_norm is not None:
            self.q_norm = RMSNorm(config.head_dim if config.qk_norm == "head" else q_size, norm_eps)
            self.k_norm = RMSNorm(config.head_dim if config.qk_norm == "head" else k_size, norm_eps)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that `x` is the whole context."""
        config, scale = self.config, self.config.head_dim**-0.5
        q, rows, gate = self.project(x, *positions.rotary(config.rope, config.head_dim, x.dtype))
        if state is not None and config.window is None:
            context = state.append(rows)  # from now on the pool has them, so that a later pass can see them
            if context.attend is not None:
                return self.output(gate, *context.attend(q, scale, config.num_kv_heads))
            if context.longest > x.shape[1]:  # else the new rows are the whole context, and need no copy
                rows = context.rows()
        elif state is not None:
            rows = pass_through_window(rows, positions, state)
        k, v = rows.split([config.num_kv_heads * config.head_dim, config.num_kv_heads * config.v_dim], dim=-1)
        k, v = k.unflatten(-1, (config.num_kv_heads, -1)), v.unflatten(-1, (config.num_kv_heads, -1))
        if config.window is None:
            return self.output(gate, attend(q, k, v, positions, scale))
        return self.output(gate, attend_window(q, k, v, positions, scale, config.window, self.sinks))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The queries `[batch, new, heads, dim]`, the rows to store, and the output's gate."""
        config = self.config
        can_be_at_once = config.qk_norm != "projection" and not config.output_gate and config.v_scale == 1.0 and (
            config.v_dim == config.head_dim and self.joined is not None and not torch.is_grad_enabled())
        if can_be_at_once and x.shape[1] > 1 and torch.compiler.is_compiling():
            norms = None if config.qk_norm is None else (self.q_norm, self.k_norm)
            return *heads_at_once(F.linear(x, self.joined), config.num_heads, config.head_dim, norms, cos, sin), None
        return self.heads(*self.projected(x), cos, sin)

    def heads(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `project` returns, of the three projections."""
        config = self.config
        q, k, gate = q.unflatten(-1, (config.num_heads, -1)), k.unflatten(-1, (-1, config.head_dim)), None
        if config.output_gate:
            q, gate = q.split([config.head_dim, config.v_dim], dim=-1)
        v = v if config.v_scale == 1.0 else v * config.v_scale
        q, k = (apply_rotary(x, cos, sin) for x in self._normed(q, k))
        return q, torch.cat([k.flatten(2), v], dim=-1), gate

    def _normed(self, q: Tensor, k: Tensor) -> Sequence[Tensor]:
        if self.config.qk_norm is None:
            return q, k
        if self.config.qk_norm == "projection":
            return self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        if self.joined is None or q.shape[1] > 1:
            return self.q_norm(q), self.k_norm(k)
        both = torch.cat([q, k], dim=2)  # of one token a kernel for each would take as long to start as to run
        weights = torch.cat([self.q_norm.weight.expand_as(q[0, 0]), self.k_norm.weight.expand_as(k[0, 0])])
        return rms_norm(both, weights, self.q_norm.eps).split([q.shape[2], k.shape[2]], dim=2)

    def output(self, gate: Tensor | None, out: Tensor, *of_pages: Tensor) -> Tensor:
        """The heads' outputs `[batch, new, heads, dim]`, or what `merge_pages` merges -> `[batch, new, hidden]`."""
        out = merge_pages(out, *of_pages) if of_pages else out
        return self.o_proj((out if gate is None else out * gate.sigmoid()).flatten(2))
