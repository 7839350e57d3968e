"""Sliding-window attention: a token sees the last few only, so a layer remembers no more. Chapter 02; paper table 1.

The state is rows of keys and values as in full attention, but always the same number of them: those that the next token
will see beside its own. So it is treated as request-level state is (paper 3.2): it belongs to exactly one length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.config import StateKind
from minprfaas.model.attention import fused
from minprfaas.model.layers import Positions, rows_from
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec

QUERIES_AT_ONCE = 128  # a piece of so many tokens (or of the window's) sees the rows of two windows at most
MASK_COLUMNS = 8  # a GPU's kernels read a mask so many at a time: other widths end in a misaligned address (torch 2.11)


def window_spec(window: int, width: int, dtype: str) -> StateSpec:
    """The rows that the next token sees beside its own, oldest first, the last token's always in the last place."""
    return StateSpec(StateKind.WINDOW, (TensorSpec("kv", (max(window - 1, 1), width), dtype),))


def pass_through_window(rows: Tensor, positions: Positions, state: LayerState) -> Tensor:
    """Add `rows` `[batch, new, width]` to the window; returns them after what it held: `[batch, held + new, width]`."""
    (held,) = state.load()
    context = torch.cat([held, rows], dim=1)
    for offset in state.snapshot_offsets:
        state.store_snapshot(offset, context[:, offset:offset + held.shape[1]])
    state.store(rows_from(context, rows.shape[1] if positions.new is None else positions.new, held.shape[1]))
    return context


def attend_window(q: Tensor, k: Tensor, v: Tensor, positions: Positions, scale: float, window: int,
                  sinks: Tensor | None) -> Tensor:
    """Attention of new tokens over the last `window` tokens each, itself included.

    `q` `[batch, new, heads, dim]`; `k`, `v` `[batch, context, kv_heads, dim]` end with the new tokens' rows; those
    before the request's beginning are not seen. `sinks` `[heads]` are scores of a token that is always seen and has
    nothing to say: a head can look away. Returns `[batch, new, heads, v_dim]`.
    """
    new, heads = q.shape[1:3]
    past = k.shape[1] - new
    first = past - positions.index[:, 0]  # row of each request's first token; negative when that is long gone
    v_dim, step = v.shape[-1], max(window, QUERIES_AT_ONCE)
    narrower = max(q.shape[-1] - v_dim, 0)  # the fused kernels want one width
    outputs = []
    for begin in range(0, new, step):
        queries = q[:, begin:begin + step]
        start, end = max(past + begin - window + 1, 0), past + begin + queries.shape[1]
        row = torch.arange(start, end, device=q.device)
        query_row = torch.arange(past + begin, end, device=q.device)[:, None]
        seen = (row <= query_row) & (row > query_row - window) & (row >= first[:, None, None])
        count = end - start
        width = -(-(count + (sinks is not None)) // MASK_COLUMNS) * MASK_COLUMNS
        keys = F.pad(k[:, start:end], (0, 0, 0, 0, 0, width - count))
        values = F.pad(v[:, start:end], (0, narrower, 0, 0, 0, width - count))
        mask = torch.full((len(q), heads, queries.shape[1], width), float("-inf"), dtype=q.dtype, device=q.device)
        mask[..., :count].masked_fill_(seen[:, None], 0.0)
        if sinks is not None:  # the first key beyond is of zeros, as its value is: its score is all in the mask
            mask[..., count] = sinks.to(q.dtype)[:, None]
        outputs.append(fused(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale,
            enable_gqa=heads != k.shape[2]).transpose(1, 2)[..., :v_dim])
    return torch.cat(outputs, dim=1)
