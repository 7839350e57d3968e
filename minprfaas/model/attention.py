"""Causal attention over a context, as every full-attention mixer uses it. Chapter 01."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minprfaas.model.layers import Positions

PLANNED_TOKENS = 1024
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions, scale: float) -> Tensor:
    """Causal attention of new tokens over the whole context.

    `q` `[batch, new, heads, dim]`, `k` and `v` `[batch, context, kv_heads, dim]` -> `[batch, new, heads, v_dim]`.
    Request b's new token t stands at `positions.index[b, t]` and sees the context up to there. Where only the last is
    wanted, one request gets only that, `[1, 1, heads, v_dim]`.
    """
    # This is what a prefill's last layer needs of its attention.
    if positions.only_last and len(q) == 1 and positions.new is None:
        q = q[:, -1:]
    batch, new, heads = q.shape[:3]
    context, v_dim = k.shape[1], v.shape[-1]
    if q.is_cuda:
        k, v = _aligned(k), _aligned(v)
    if batch == 1 and new > 1 and _kernels_can_take(q):
        return _attend_by_kernels(q, k, v, scale)
    if batch == 1 and 1 < new < context and v_dim <= q.shape[-1] and q.device.type == "cpu":
        return _attend_in_two(q, k, v, scale)
    if v_dim < q.shape[-1]:  # the fused kernels want one width; the others build the whole score matrix
        v = F.pad(v, (0, q.shape[-1] - v_dim))
    # A mask that is given as a tensor rules the fused kernels out too, so one is built only where requests of unequal
    # lengths leave no other way to say which rows are padding.
    mask, is_causal = None, False
    # Where there is one token, the heads that share keys and values are rows of one product: otherwise the kernels
    # would read the context once a head, or a copy of it for each.
    queries = q.transpose(1, 2) if new > 1 else q.reshape(batch, k.shape[2], -1, q.shape[3])
    if new == context:
        is_causal = new > 1
    elif batch == 1:
        mask = None if new == 1 else _lower_right(new, context)
    else:
        mask = (torch.arange(context, device=q.device) <= positions.index[..., None])[:, None]
    out = fused(queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal, scale=scale,
                enable_gqa=queries.shape[1] != k.shape[2])
    return out.reshape(batch, heads, new, -1).transpose(1, 2)[..., :v_dim]


def fused(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`; on a GPU not by cuDNN, which plans every shape anew, for 50 ms and
    more, and fails on some masks."""
    with sdpa_kernel(NOT_CUDNN) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def _lower_right(new: int, context: int) -> Tensor:
    """A causal mask, aligned to the last new token, that names itself to the fused kernels. Its import brings PyTorch's
    compiler, which takes as long as PyTorch itself, and most runs never come here."""
    from torch.nn.attention.bias import causal_lower_right
    return causal_lower_right(new, context)


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied where its rows do not all begin at a multiple of 16 bytes: a GPU's kernels read so many at once."""
    steps = (*x.stride()[:-1], x.storage_offset())
    return x.contiguous() if any(step * x.element_size() % 16 for step in steps) else x


def _kernels_can_take(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] <= 256 and q.shape[3] % 8 == 0


def _attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One prompt's chunk on a GPU, by two kernels called by name, because the dispatcher builds a whole mask for new
    tokens that follow others.

    Read on an H100 (16 heads on 8, 128 wide, 8K new tokens): cuDNN 520 to 630 TFLOP/s, flash 270 to 340. But cuDNN
    plans every shape anew, for 50 ms and more, so it gets those that come again: whole multiples of `PLANNED_TOKENS`.
    """
    new, v_dim, before = q.shape[1], v.shape[3], k.shape[1] - q.shape[1]
    if new % PLANNED_TOKENS or before % PLANNED_TOKENS:
        v = F.pad(v, (0, q.shape[3] - v_dim))  # flash wants one width
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, new, k.shape[1], 0.0, True, False, scale=scale)[0][..., :v_dim]
    out, log_sum = _planned(q, k[:, before:], v[:, before:], True, scale)
    if before:  # its causal mask begins at the first key, so what came before is an attention of its own
        earlier, log_sum_earlier = _planned(q, k[:, :before], v[:, :before], False, scale)
        out = torch.lerp(earlier, out, (log_sum - log_sum_earlier).sigmoid().to(out.dtype))
    return out.transpose(1, 2)


def _attend_in_two(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One prompt's chunk on a CPU: what came before, which needs no mask, and the chunk itself, causal. The dispatcher
    would build a whole mask, and its kernel compute all that the mask hides."""
    v_dim, before, kv_heads = v.shape[3], k.shape[1] - q.shape[1], k.shape[2]
    v = F.pad(v, (0, q.shape[3] - v_dim)) if v_dim < q.shape[3] else v
    # To the kernel, each KV head is a batch of its own, whose heads have the same keys.
    queries = q[0].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, groups, new, dim]
    k, v = (x[0].transpose(0, 1)[:, None].expand(-1, queries.shape[1], -1, -1) for x in (k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = kernel(queries, k[:, :, before:], v[:, :, before:], 0.0, True, scale=scale)
    earlier, log_sum_earlier = kernel(queries, k[:, :, :before], v[:, :, :before], scale=scale)
    out = torch.lerp(earlier, out, (log_sum - log_sum_earlier).sigmoid().to(out.dtype)[..., None])
    return out[..., :v_dim].permute(2, 0, 1, 3).flatten(1, 2)[None]


def _planned(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's output `[1, heads, new, v_dim]`, and the logarithm of each softmax's denominator `[1, heads, new, 1]`."""
    out, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, is_causal, scale=scale)[:2]
    return out, log_sum.view(*out.shape[:3], 1)
