"""The layers of a decode step in two pieces each, one on either side of attention to pages. Chapters 04, 05.

The pieces that modules name (`engine/pieces.py`) end where a module does. Here they reach from one attention to the
next one's layer, so that a compiler makes one kernel of what lies side by side: a step of Qwen3-0.6B's shape on an H100
took 5.9 ms for 64 requests instead of 6.3 by that, and 1.46 instead of 1.69 for one. One request's norms are sums
beside its products', too (`normed_products`), which brought it to 1.22. What they take now: docs/measurements.md.
`Stack.forward` is the reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.engine.decode_state import StepLayer, StepState
from minprfaas.engine.pieces import compiled_like
from minprfaas.model.gqa import GQA
from minprfaas.model.layers import MLP, Positions, RMSNorm
from minprfaas.model.paged_attention import flash_over_pages, queries_of_pages
from minprfaas.model.transformer import Layer, Transformer


def step_logits(model: Transformer, tokens: Tensor, state: StepState) -> Tensor:
    """`model(tokens, state)` of one token a request: `[batch, 1]` int64 -> `[batch, 1, vocab]`."""
    positions, x = None, model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.model.layers):
        if in_two_pieces(layer):
            x = _by_pages(layer, x, state.layer(index))
        else:
            positions = positions or Positions(state.start, 1)
            normed = layer.input_layernorm(x)
            x = layer.feed(x, normed, layer.self_attn(normed, positions, state.layer(index)))
    return compiled_like(model.model.layers[0], head)(model, x)


def in_two_pieces(layer: Layer) -> bool:
    """Whether a layer's attention is to pages, and nothing but its result and the residual stream goes on from it."""
    return (isinstance(layer.self_attn, GQA) and layer.self_attn.config.window is None
            and layer.config.mixer_residual is None)


def _by_pages(layer: Layer, x: Tensor, state: StepLayer) -> Tensor:
    config = layer.self_attn.config
    # One request's row is put into its page by the kernel that copies its queries, which would take as long alone.
    before = compiled_like(layer, before_attention, combine=len(x) == 1)
    pages, scale = state.pages(), config.head_dim**-0.5
    index = state.flash_index(pages, config.head_dim, config.num_heads, config.num_kv_heads)
    row_counts = None if index is None else index.row_counts
    cos, sin = state.state.rotary(config.rope, config.head_dim, x.dtype)
    q, gate = before(layer, x, cos, sin, pages.view, *state.slots(), row_counts)
    if index is None:
        attended = state.attend(pages, q, scale, config.num_kv_heads)
    else:
        attended = flash_over_pages(q, pages.view, index, scale)
    return compiled_like(layer, after_attention)(layer, x, gate, *attended)


def before_attention(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, view: Tensor, blocks: Tensor, offsets: Tensor,
                     row_counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Put the new rows of `x` `[batch, 1, hidden]` into their `blocks` at their `offsets`, `[batch]` each. Returns the
    queries `[batch, 1, heads, dim]`, or as `queries_of_pages` lays them for `row_counts`, and the output's gate."""
    mixer = layer.self_attn
    if alone(x) and mixer.joined is not None:
        (joined,) = normed_products(layer.input_layernorm, x, mixer.joined)
        q, rows, gate = GQA.heads(mixer, *mixer.apart(joined), cos, sin)
    else:
        q, rows, gate = GQA.project(mixer, RMSNorm.forward(layer.input_layernorm, x), cos, sin)
    view.index_put_((blocks, offsets), rows[:, 0])
    if row_counts is not None:
        q = queries_of_pages(q, mixer.config.num_kv_heads, row_counts.shape[1])
    return q, gate


def after_attention(layer: Layer, x: Tensor, gate: Tensor | None, *attended: Tensor) -> Tensor:
    """The layer's output `[batch, 1, hidden]`: what `merge_pages` takes is merged, and the rest follows."""
    mixed, mlp = GQA.output(layer.self_attn, gate, *attended), layer.mlp
    if not alone(x) or not isinstance(mlp, MLP) or layer.config.mlp_residual is not None:
        return Layer.feed(layer, x, x, mixed)
    x = x + mixed
    opened, up = normed_products(layer.post_attention_layernorm, x, mlp.gate_proj.weight, mlp.up_proj.weight)
    return x + mlp.down_proj(F.silu(opened) * up)


def head(model: Transformer, x: Tensor) -> Tensor:
    """The logits `[batch, 1, vocab]` of what the last layer gave."""
    if alone(x):
        return normed_products(model.model.norm, x, model.lm_head.weight)[0]
    return model.lm_head(RMSNorm.forward(model.model.norm, x))


def alone(x: Tensor) -> bool:
    """Whether a piece is compiled for the token of one request: its products are sums then, and take others in."""
    return len(x) == 1 and torch.compiler.is_compiling()


def normed_products(norm: RMSNorm, x: Tensor, *weights: Tensor) -> list[Tensor]:
    """What each of `weights` `[out, hidden]` makes of `norm(x)`, `x` `[1, 1, hidden]`. A kernel for the norm alone
    takes as long to start as a weight takes to be read: its root is one more sum beside each of a product's, and scales
    what comes of that."""
    wide, products = x[0].float(), []
    for weight in weights:
        root = torch.rsqrt(wide.square().expand_as(weight).mean(dim=-1) + norm.eps)
        products.append(((wide * norm.weight * weight).sum(dim=-1) * root).to(x.dtype)[None, None])
    return products
