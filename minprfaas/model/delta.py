"""The delta rule: a memory of one size, whatever the context. Chapter 02; paper 2.2.

Each head keeps a memory matrix S `[key_dim, value_dim]`. A token first lets every key channel decay, then replaces
what S stores under its key k by its value v, as far as its gate beta asks (the delta rule), and reads with its query q:

    S_t = diag(exp(g_t)) S_(t-1);   S_t += beta_t k_t (v_t - k_t^T S_t)^T;   o_t = S_t^T q_t

KDA has a decay g for every key channel, GDN one for the head. `delta_rule_recurrent` is that, token by token: the reference, and the decode step. `delta_rule_chunked` computes the
same for whole chunks with matrix products: the prefill form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64  # the prefill form holds the memory at every multiple of this, and nowhere else


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
               memory: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The quicker of the two forms below: outputs, memory after, and memory before each chunk (None for one token)."""
    with torch.autocast(q.device.type, enabled=False):  # the memory's sums need float32
        if q.shape[1] == 1:  # decode: the recurrence is the shorter way, and crosses no chunk's boundary
            return *delta_rule_recurrent(q, k, v, g, beta, memory), None
        return delta_rule_chunked(q, k, v, g, beta, memory)


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


def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
                       chunk: int = CHUNK_TOKENS, sub_chunk: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The same function as `delta_rule_recurrent` (same arguments), `chunk` tokens at a time.

    Returns the outputs, the memory after the last token, and the memory before each chunk
    `[batch, heads, chunks, key_dim, value_dim]`.

    Inside a chunk the delta rule is a unit lower-triangular system, solved once for all of the chunk's tokens; between
    chunks only the memory is carried, by one matrix product a chunk. Every exponent is a difference of cumulative
    decays from an earlier to a later token, so it is at most 0 and nothing overflows however strong the decay.
    """
    tokens = q.shape[1]
    padding = -tokens % chunk  # padding has k = 0, beta = 0, g = 0: it neither writes nor decays
    q, k, v, g, beta = (  # [batch, heads, chunks, chunk, dim]
        F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for x in (q, k, v, g, beta[..., None]))
    # exp(-20) is below float32's resolution; without the bound, sums of strong decays would lose the weak ones' digits.
    decay = g.clamp(min=-20.0).cumsum(dim=-2)  # from the chunk's beginning through each token
    total = decay[..., -1:, :]

    if decay.shape[-1] == 1:
        k_by_k, q_by_k = _evenly_decayed_products(q, k, decay)
    else:
        k_by_k, q_by_k = _decayed_products(q, k, decay, sub_chunk)
    system = (k_by_k * beta).tril(-1)
    right = torch.cat([v, k * decay.exp()], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # new values = new_values - reads @ memory

    keys_at_end = (k * (total - decay).exp()).transpose(-1, -2)
    carry = torch.eye(k.shape[-1], device=k.device) * total.exp() - keys_at_end @ reads
    added = keys_at_end @ new_values
    # The one loop of the prefill form: a product a chunk, which is why everything above runs for all chunks at once.
    befores, after = [], memory.flatten(0, 1)
    for carry_n, added_n in zip(carry.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1)):
        befores.append(after)
        after = torch.baddbmm(added_n, carry_n, after)  # memory after chunk n = carry_n @ memory before it + added_n
    before = torch.stack(befores, dim=1).unflatten(0, memory.shape[:2])

    out = (q * decay.exp()) @ before + q_by_k.tril() @ (new_values - reads @ before)
    out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return out, after.unflatten(0, memory.shape[:2]), before


def _evenly_decayed_products(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """As `_decayed_products`, where all channels of a head decay alike: the decay stands outside the sum over them."""
    between = (decay - decay.transpose(-1, -2)).clamp(max=0).exp()
    return k @ k.transpose(-1, -2) * between, q @ k.transpose(-1, -2) * between


def _decayed_products(q: Tensor, k: Tensor, decay: Tensor, sub_chunk: int) -> tuple[Tensor, Tensor]:
    """`sum_d x_i[d] k_j[d] exp(decay_i[d] - decay_j[d])` for x = k and x = q, right for j <= i inside each chunk.

    One product of `x exp(decay)` with `k exp(-decay)` would overflow. So the chunk is cut into sub-chunks (secondary
    chunking): a later against the earlier ones goes through the decay at its own beginning, which lies between the two
    and makes both exponents at most 0; inside a sub-chunk the differences are formed one by one.
    """
    chunk = q.shape[-2]
    left = torch.stack([k, q])  # [2, batch, heads, chunks, chunk, key_dim]
    ahead = torch.ones(sub_chunk, sub_chunk, dtype=torch.bool, device=q.device).triu(1)[..., None]
    rows = []
    for start in range(0, chunk, sub_chunk):
        now = slice(start, start + sub_chunk)
        reference = decay[..., start : start + 1, :]
        earlier = k[..., :start, :] * (reference - decay[..., :start, :]).exp()
        off_diagonal = (left[..., now, :] * (decay[..., now, :] - reference).exp()) @ earlier.transpose(-1, -2)
        difference = decay[..., now, None, :] - decay[..., None, now, :]
        pair_decay = difference.masked_fill(ahead, float("-inf")).exp() * k[..., None, now, :]
        diagonal = (pair_decay @ left[..., now, :, None]).squeeze(-1)
        rows.append(F.pad(torch.cat([off_diagonal, diagonal], dim=-1), (0, chunk - start - sub_chunk)))
    return torch.cat(rows, dim=-2).unbind(0)
