"""Full attention: grouped-query (GQA) and multi-head latent (MLA) mixers. Chapter 01; paper 2.1 and table 2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from minprfaas.config import GQAConfig, MLAConfig
from minprfaas.model.layers import Positions, RMSNorm, apply_rotary
from minprfaas.model.spec import LayerState


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions, scale: float) -> Tensor:
    """Causal attention of new tokens over the whole context.

    `q` `[batch, new, heads, dim]`, `k` and `v` `[batch, context, kv_heads, dim]` -> `[batch, new, heads, v_dim]`.
    Request b's new token t stands at `positions.index[b, t]` and sees the context up to there.
    """
    batch, new, heads = q.shape[:3]
    context, v_dim = k.shape[1], v.shape[-1]
    # The fused kernels want one width; the others build the whole score matrix.
    v = F.pad(v, (0, max(q.shape[-1] - v_dim, 0)))
    mask, is_causal = None, False
    if new == context:
        is_causal = True
    elif batch == 1:
        mask = None if new == 1 else causal_lower_right(new, context)
    else:
        mask = (torch.arange(context, device=q.device) <= positions.index[..., None])[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal, scale=scale,
        enable_gqa=heads != k.shape[2])
    return out.transpose(1, 2)[..., :v_dim]


class GQA(nn.Module):
    """Grouped-query attention. Its state is one row a token: every KV head's key (rotated), then its value."""

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
            rows = state.append(torch.cat([k.flatten(2), v.flatten(2)], dim=-1))
            k, v = rows.unflatten(-1, (2, config.num_kv_heads, config.head_dim)).unbind(2)
        out = attend(q, k, v, positions, config.head_dim**-0.5)
        return self.o_proj(out.flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention without positional encoding (Kimi Linear's full-attention layers).

    Its state is one row a token: a normalized latent that all heads expand, and a key part that they share as it is.
    Prefill expands the latents to keys and values; decode folds the expansion into the query instead ("absorbed"),
    so that one step reads the latents only. Both are the same product, bracketed differently.
    """

    def __init__(self, config: MLAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        self.scale = (config.qk_nope_dim + config.qk_shared_dim) ** -0.5
        self.q_proj = nn.Linear(hidden_size, config.num_heads * (config.qk_nope_dim + config.qk_shared_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, config.kv_lora_rank + config.qk_shared_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, config.num_heads * (config.qk_nope_dim + config.v_dim), bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.v_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that `x` is the whole context."""
        config = self.config
        q = self.q_proj(x).unflatten(-1, (config.num_heads, -1))
        latent, shared = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_shared_dim], dim=-1)
        rows = torch.cat([self.kv_a_layernorm(latent), shared], dim=-1)
        if state is not None:
            rows = state.append(rows)
        one_step = state is not None and x.shape[1] == 1
        out = self._absorbed(q, rows, positions) if one_step else self._expanded(q, rows, positions)
        return self.o_proj(out.flatten(2))

    def _expanded(self, q: Tensor, rows: Tensor, positions: Positions) -> Tensor:
        config = self.config
        latent, shared = rows.split([config.kv_lora_rank, config.qk_shared_dim], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (config.num_heads, -1))
        k_nope, v = expanded.split([config.qk_nope_dim, config.v_dim], dim=-1)
        k = torch.cat([k_nope, shared[:, :, None].expand(-1, -1, config.num_heads, -1)], dim=-1)
        return attend(q, k, v, positions, self.scale)

    def _absorbed(self, q: Tensor, rows: Tensor, positions: Positions) -> Tensor:
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
        beyond = torch.arange(rows.shape[1], device=rows.device) > positions.index  # [batch, context]
        weights = scores.masked_fill(beyond[:, None], float("-inf")).softmax(dim=-1).to(rows.dtype)
        out = torch.bmm(weights, rows[..., : config.kv_lora_rank])
        return torch.einsum("bhr,hvr->bhv", out, expand_v)[:, None]
