"""Multi-head latent attention (MLA): one small latent a token that all heads expand. Chapter 02; paper table 2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, RopeConfig, StateKind, require_sizes
from minprfaas.errors import UserError, require_number
from minprfaas.model.attention import attend
from minprfaas.model.layers import Positions, RMSNorm, apply_rotary
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec

LATENT_NORM_EPS = 1e-6  # every published MLA has this, whatever its other norms have


@dataclass(frozen=True)
class MLAConfig:
    """All heads share `qk_shared_dim` key channels: without positions in Kimi Linear (`rope` None), rotated in others.

    `q_lora_rank`: the query, too, goes through a latent. `head_gate`: each head's output has a gate (Ling 3).
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_dim: int
    qk_shared_dim: int
    v_dim: int
    rope: RopeConfig | None = None
    q_lora_rank: int | None = None
    head_gate: bool = False
    bias: bool = False
    score_scale: float = 1.0  # beside 1 / sqrt(the width of a query)

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "kv_lora_rank", "qk_nope_dim", "v_dim", most=MAX_HEAD_SIZE)
        require_number("qk_rope_head_dim", self.qk_shared_dim, least=0, most=MAX_HEAD_SIZE, whole=True)
        if self.q_lora_rank is not None:
            require_sizes(self, "q_lora_rank", most=MAX_HEAD_SIZE)
        if self.rope is not None and self.qk_shared_dim % 2:
            raise UserError(f"qk_rope_head_dim {self.qk_shared_dim} is odd; RoPE rotates pairs")

    def state_spec(self, dtype: str) -> StateSpec:
        """One row a token: the normalized latent, then the key channels that all heads share (rotated)."""
        return StateSpec(StateKind.TOKEN, (TensorSpec("latent", (self.kv_lora_rank + self.qk_shared_dim,), dtype),))

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return MLA(self, hidden_size)


class MLA(nn.Module):
    """Prefill expands the latents to keys and values; decode folds the expansion into the query instead ("absorbed"),
    so that one step reads the latents only. Both are the same product, bracketed differently."""

    PIECES = ("project", "output", "_absorbed", "_expand")

    def __init__(self, config: MLAConfig, hidden_size: int):
        super().__init__()
        self.config = config
        heads, rank, shared = config.num_heads, config.kv_lora_rank, config.qk_shared_dim
        self.scale = config.score_scale * (config.qk_nope_dim + shared) ** -0.5
        q_size = heads * (config.qk_nope_dim + shared)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=config.bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, rank + shared, bias=config.bias)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, heads * (config.qk_nope_dim + config.v_dim), bias=False)
        if config.head_gate:
            self.g_proj = nn.Linear(hidden_size, heads, bias=False)
        self.o_proj = nn.Linear(heads * config.v_dim, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that `x` is the whole context."""
        config, rotary = self.config, ()
        if config.rope is not None:
            rotary = positions.rotary(config.rope, config.qk_shared_dim, x.dtype)
        q, rows = self.project(x, *rotary)
        if state is not None:
            rows = state.append(rows).rows()
        if state is not None and x.shape[1] == 1:
            return self.output(self._absorbed(q, rows, positions.index), x)
        k, v = self._expand(rows)
        return self.output(attend(q, k, v, positions, self.scale), x)

    def project(self, x: Tensor, *rotary: Tensor) -> tuple[Tensor, Tensor]:
        """The queries `[batch, new, heads, nope + shared]`, and the rows to store."""
        config = self.config
        q = self._queries(x).unflatten(-1, (config.num_heads, -1))
        latent, shared = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_shared_dim], dim=-1)
        if config.rope is not None:
            q_nope, q_shared = q.split([config.qk_nope_dim, config.qk_shared_dim], dim=-1)
            q = torch.cat([q_nope, _rotated(q_shared, *rotary)], dim=-1)
            shared = _rotated(shared[:, :, None], *rotary)[:, :, 0]
        return q, torch.cat([self.kv_a_layernorm(latent), shared], dim=-1)

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """The heads' outputs `[batch, new, heads, v_dim]` -> `[batch, new, hidden]`."""
        if self.config.head_gate:
            out = out * self.g_proj(x).float().sigmoid().to(out.dtype)[..., None]
        return self.o_proj(out.flatten(2))

    def _queries(self, x: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys and values."""
        config = self.config
        latent, shared = rows.split([config.kv_lora_rank, config.qk_shared_dim], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (config.num_heads, -1))
        k_nope, v = expanded.split([config.qk_nope_dim, config.v_dim], dim=-1)
        k = torch.cat([k_nope, shared[:, :, None].expand(-1, -1, config.num_heads, -1)], dim=-1)
        return k, v

    def _absorbed(self, q: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """One query token a request, as `num_heads` queries on a single KV head of width rank + shared."""
        config = self.config
        weight = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))  # [heads, nope + v, rank]
        expand_k, expand_v = weight.split([config.qk_nope_dim, config.v_dim], dim=1)
        q_nope, q_shared = q[:, 0].split([config.qk_nope_dim, config.qk_shared_dim], dim=-1)
        q_latent = torch.einsum("bhn,hnr->bhr", q_nope, expand_k)
        queries = torch.cat([q_latent, q_shared], dim=-1)  # [batch, heads, rank + shared]
        # Plain products read the latents once for all heads; the fused kernels read them once a head (on a CPU
        # some times slower), and none of them is made for keys as wide as this.
        scores = torch.bmm(queries, rows.transpose(1, 2)).float() * self.scale
        beyond = torch.arange(rows.shape[1], device=rows.device) > index  # [batch, context]
        weights = scores.masked_fill(beyond[:, None], float("-inf")).softmax(dim=-1).to(rows.dtype)
        out = torch.bmm(weights, rows[..., : config.kv_lora_rank])
        return torch.einsum("bhr,hvr->bhv", out, expand_v)[:, None]


def _rotated(shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring channels, `[batch, tokens, heads, qk_shared_dim]`. The pairs are drawn apart first, in
    queries and keys alike, which changes no product."""
    return apply_rotary(shared.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)
