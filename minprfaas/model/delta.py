"""The delta rule: a memory of one size, whatever the context. Chapter 02; paper 2.2.

Each head keeps a memory matrix S `[key_dim, value_dim]`. A token first lets every key channel decay, then replaces
what S stores under its key k by its value v, as far as its gate beta asks (the delta rule), and reads with its query q:

    S_t = diag(exp(g_t)) S_(t-1);   S_t += beta_t k_t (v_t - k_t^T S_t)^T;   o_t = S_t^T q_t

KDA has a decay g for every key channel, GDN one for the head. `delta_rule_recurrent` is that, token by token: the
reference. `delta_rule_step` computes the same for one token with fewer passes over S: the decode form.
`delta_rule_chunked` computes it for whole chunks with matrix products: the prefill form.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.model.recurrent import CHUNK_TOKENS

# exp(-20) is below float32's resolution; without the bound, sums of strong decays would lose the weak ones' digits, and
# the exponents inside a sub-chunk would have none.
STRONGEST_DECAY = -20.0


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
               is_token: Tensor | None = None, chunked: Callable | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The quicker of the forms below: outputs, memory after, and memory before each chunk (None for one token). Where
    `is_token` `[batch, tokens]` is false stands padding, which neither writes nor decays. `chunked` may be another
    way to compute `delta_rule_chunked`."""
    if is_token is not None:
        g, beta = g * is_token[..., None, None], beta * is_token[..., None]
    with torch.autocast(q.device.type, enabled=False):  # the memory's sums need float32
        if q.shape[1] == 1:  # decode: one token crosses no chunk's boundary
            return *delta_rule_step(q, k, v, g, beta, memory), None
        return (chunked or delta_rule_chunked)(q, k, v, g, beta, memory)


def delta_rule_recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                         memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as written above, one token at a time.

    `q`, `k` `[batch, tokens, heads, key_dim]`, `g` the same or `[batch, tokens, heads, 1]` (log decay, at most 0), `v`
    `[batch, tokens, heads, value_dim]`, `beta` `[batch, tokens, heads]`, `memory` `[batch, heads, key_dim, value_dim]`;
    all float32.
    Returns the outputs (shaped like `v`) and the memory after the last token.
    """
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * g[:, t, :, :, None].exp()
        stored = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        delta = (v[:, t] - stored) * beta[:, t, :, None]
        memory = memory + k[:, t, :, :, None] * delta[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, dim=1), memory


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The same function as `delta_rule_recurrent` of one token. Both products are with the memory S as it was, because
    `(diag(exp(g)) S)^T x = S^T (exp(g) x)`: nothing waits for the new memory, which is written once, and in the old
    one's place unless a gradient is wanted."""
    q, k, v, kept = q[:, 0], k[:, 0], v[:, 0], g[:, 0].exp()
    delta = (v - _read(memory, kept * k)) * beta[:, 0, :, None]
    out = _read(memory, kept * q) + (q * k).sum(dim=-1, keepdim=True) * delta
    if any(tensor.requires_grad for tensor in (q, k, v, kept, delta, memory)):
        return out[:, None], torch.addcmul(kept[..., None] * memory, k[..., None], delta[:, :, None])
    return out[:, None], memory.mul_(kept[..., None]).addcmul_(k[..., None], delta[:, :, None])


def _read(memory: Tensor, x: Tensor) -> Tensor:
    """`S^T x` of each head, `[batch, heads, value_dim]`. A compiler is given the sum, which it can make one kernel of
    with what else goes over S; else that would be a copy of S."""
    if torch.compiler.is_compiling() and memory.is_cuda:
        return (memory * x[..., None]).sum(dim=-2)
    return torch.einsum("bhkv,bhk->bhv", memory, x)


def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
                       chunk: int = CHUNK_TOKENS, sub_chunk: int = 8, parts_of: Callable | None = None
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """The same function as `delta_rule_recurrent` (same arguments), `chunk` tokens at a time; `parts_of` may be
    `chunk_parts` compiled.

    Returns the outputs, the memory after the last token, and the memory before each chunk
    `[chunks, batch, heads, key_dim, value_dim]`. `chunk` is `sub_chunk` times a power of two.

    Inside a chunk the delta rule is a unit lower-triangular system. Its inverse is made for all chunks at once, so that
    the one loop, from chunk to chunk, is two matrix products long.
    """
    q, k, v, g = q.float(), k.float(), v.float(), g.float()
    parts = (parts_of or chunk_parts)(q, k, v, g, beta, chunk, sub_chunk)
    before, values, after = _carry_through(parts, memory)
    return chunk_outputs(parts, before, values)[:, :q.shape[1]], after, before.movedim(2, 0)


class ChunkParts(NamedTuple):
    """What a chunk is as long as nothing is known of the memory S before it; `[batch, heads, chunks, …]` each."""

    queries: Tensor  # [chunk, key_dim], decayed from the chunk's beginning: reads S
    q_by_k: Tensor  # [chunk, chunk]: how each token reads what the tokens up to it have written
    new_values: Tensor  # [chunk, value_dim]: what the tokens write is `new_values - reads @ S`
    reads: Tensor  # [chunk, key_dim]
    keys: Tensor  # [key_dim, chunk], decayed to the chunk's end: writes into S
    kept: Tensor  # [key_dim or 1, 1]: what the chunk leaves of S


def chunk_parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int, sub_chunk: int) -> ChunkParts:
    """Everything that needs no memory, for all chunks at once."""
    q, k, v, g, beta = (by_chunks(x, chunk) for x in (q, k, v, g, beta[..., None]))
    decay = g.clamp(min=STRONGEST_DECAY).cumsum(dim=-2)  # from the chunk's beginning through each token
    total, from_start = decay[..., -1:, :], decay.exp()
    inverse, q_by_k = _solve(q, k, decay, beta, sub_chunk)
    solved = inverse @ (torch.cat([v, k * from_start], dim=-1) * beta)
    new_values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    keys = (k * (total - decay).exp()).transpose(-1, -2)
    return ChunkParts(q * from_start, q_by_k, new_values, reads, keys, total.exp().transpose(-1, -2))


def by_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[batch, tokens, heads, dim]` -> `[batch, heads, chunks, chunk, dim]`, copied once into the order in which it is
    multiplied: each product would copy it anew. Padding has k = 0, beta = 0, g = 0: it neither writes nor decays."""
    padding = -x.shape[1] % chunk
    return F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _carry_through(parts: ChunkParts, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The memory before each chunk, the values that each chunk's tokens write, and the memory after the last one."""
    if not any(tensor.requires_grad for tensor in (*parts, memory)):
        return _carry_in_place(parts, memory)
    befores, values, after = [], [], memory.flatten(0, 1)
    chunks = (part.flatten(0, 1).unbind(1) for part in (parts.new_values, parts.reads, parts.keys, parts.kept))
    for new_values, reads, keys, kept in zip(*chunks):
        befores.append(after)
        values.append(torch.baddbmm(new_values, reads, after, alpha=-1))
        after = torch.baddbmm(kept * after, keys, values[-1])
    heads = memory.shape[:2]
    return (torch.stack(befores, dim=1).unflatten(0, heads), torch.stack(values, dim=1).unflatten(0, heads),
            after.unflatten(0, heads))


def _carry_in_place(parts: ChunkParts, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_carry_through` where no gradient is wanted: every product lands in its place, with no copy before or after.
    The values take that of `parts.new_values`."""
    values = parts.new_values.flatten(0, 1)
    reads, keys, kept = (part.flatten(0, 1).unbind(1) for part in (parts.reads, parts.keys, parts.kept))
    befores = memory.new_empty(len(values), len(keys), *memory.shape[2:])
    memories = [*befores.unbind(1), torch.empty_like(befores[:, 0])]
    memories[0].copy_(memory.flatten(0, 1))
    for chunk, (value, before, after) in enumerate(zip(values.unbind(1), memories, memories[1:])):
        value.baddbmm_(reads[chunk], before, alpha=-1)
        torch.mul(kept[chunk], before, out=after)
        after.baddbmm_(keys[chunk], value)
    befores, values, after = (x.unflatten(0, memory.shape[:2]) for x in (befores, values, memories[-1]))
    return befores, values, after


def chunk_outputs(parts: ChunkParts, before: Tensor, values: Tensor) -> Tensor:
    """What the tokens read, of the memory before their chunk and of each other: `[batch, tokens, heads, value_dim]`."""
    out = parts.queries @ before
    out.flatten(0, 2).baddbmm_(parts.q_by_k.flatten(0, 2), values.flatten(0, 2))
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _solve(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`(I + A)^-1` and Q, `[…, chunk, chunk]`. With `x_by_k[i, j] = sum_d x_i[d] k_j[d] exp(decay_i[d] - decay_j[d])`
    for j <= i, and 0 for j > i, Q is q_by_k and A is beta_i k_by_k below its diagonal."""
    products = _products_of_heads(q, k, decay) if decay.shape[-1] == 1 else _products_of_channels(q, k, decay, size)
    k_by_k, q_by_k = products
    return inverse_of_lower((k_by_k * beta).tril(-1), size), q_by_k


def inverse_of_lower(below: Tensor, size: int = 8) -> Tensor:
    """`(I + below)^-1`, grown upward from blocks of `size` tokens, two neighbours becoming one. Powers are taken in the
    smallest blocks only, because with keys that resemble each other those of a whole chunk would overflow."""
    power = -_blocks(below, size)
    inverse = torch.eye(size, device=below.device) + power
    for _ in range((size - 1).bit_length() - 1):  # (I - A)(I + A^2)(I + A^4) …, and A^size is zero
        power = power @ power
        inverse = inverse + inverse @ power
    while size < below.shape[-1]:
        across = _blocks(below, size, row=1)[..., ::2, :, :]
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        inverse = lower_triangle(first, -(second @ across @ first), second)
        size *= 2
    return inverse.squeeze(-3)


def _blocks(matrix: Tensor, size: int, row: int = 0) -> Tensor:
    """The blocks of `size` on the diagonal, or so many `row`s of blocks below it: `[…, blocks, size, size]`."""
    return matrix.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(-row, -4, -2).movedim(-1, -3)


def _products_of_heads(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """k_by_k and q_by_k where all channels of a head decay alike: the decay is a factor of the whole product."""
    kept = (decay - decay.transpose(-1, -2)).tril().exp().tril()
    return (k @ k.transpose(-1, -2)) * kept, (q @ k.transpose(-1, -2)) * kept


def _products_of_channels(q: Tensor, k: Tensor, decay: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """k_by_k and q_by_k where each channel has a decay of its own, grown upward from blocks of `size` tokens: a block's
    decays refer to a moment between the tokens that meet in it, so that no exponent is large."""
    grown = [products.tril() for products in _products_inside(q, k, decay, size)]
    while size < q.shape[-2]:
        pairs = (products.unflatten(-3, (-1, 2)).unbind(-3) for products in grown)
        across = _products_across(q, k, decay, size)
        grown = [lower_triangle(first, between, second) for (first, second), between in zip(pairs, across)]
        size *= 2
    k_by_k, q_by_k = grown
    return k_by_k.squeeze(-3), q_by_k.squeeze(-3)


def _products_inside(q: Tensor, k: Tensor, decay: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """k_by_k and q_by_k inside each block of `size` tokens, right for j <= i: the decays refer to the block's middle,
    so that with 8 tokens every exponent is within 4 x 20 = 80, and exp(80) is a float32."""
    q, k, decay = (x.unflatten(-2, (-1, size)) for x in (q, k, decay))
    from_middle = decay - decay[..., (size - 1) // 2:, :][..., :1, :]
    left, right = from_middle.exp(), (k * (-from_middle).exp()).transpose(-1, -2)
    return (k * left) @ right, (q * left) @ right


def _products_across(q: Tensor, k: Tensor, decay: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """k_by_k and q_by_k of every second block's tokens with the block before: the decays refer to the border."""
    (_, q), (earlier, k), (decay_before, decay) = (
        x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, decay))
    border = decay_before[..., -1:, :]
    left, right = (decay - border).exp(), (earlier * (border - decay_before).exp()).transpose(-1, -2)
    return (k * left) @ right, (q * left) @ right


def lower_triangle(first: Tensor, across: Tensor, second: Tensor) -> Tensor:
    """`[[first, 0], [across, second]]`"""
    return torch.cat([F.pad(first, (0, first.shape[-1])), torch.cat([across, second], dim=-1)], dim=-2)
