"""Causal attention over a context, as every full-attention mixer uses it. Chapter 01."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from minprfaas.model.layers import Positions


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions, scale: float) -> Tensor:
    """Causal attention of new tokens over the whole context.

    `q` `[batch, new, heads, dim]`, `k` and `v` `[batch, context, kv_heads, dim]` -> `[batch, new, heads, v_dim]`.
    Request b's new token t stands at `positions.index[b, t]` and sees the context up to there.
    """
    batch, new, heads = q.shape[:3]
    context, v_dim = k.shape[1], v.shape[-1]
    # The fused kernels want one width; the others build the whole score matrix.
    v = F.pad(v, (0, max(q.shape[-1] - v_dim, 0)))
    # A mask that is given as a tensor rules the fused kernels out too, so one is built only where requests of unequal
    # lengths leave no other way to say which rows are padding.
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
