"""The delta rule's prefill for a GPU: products of 16 bits, and a loop that nobody waits for. Chapter 02.

A chunk of 128 tokens changes the memory S before it by an affine map, and reads it by one product:

    S' = kept * S + moves @ S + writes;    out = own + readers @ S

All but S is made for a whole segment of chunks at once. What remains from chunk to chunk, a product and a sum, is too
small to fill a GPU: it runs beside what makes the next segment's maps.

What is multiplied has the number format of the queries. In float16 that is as many digits as TF32 has, and half the
bytes; decays, sums over channels and the memory itself are float32 in any case.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.model.delta import STRONGEST_DECAY, by_chunks, delta_rule_chunked, inverse_of_lower, lower_triangle
from minprfaas.model.recurrent import CHUNK_TOKENS

CHUNK = 128  # a multiple of CHUNK_TOKENS
SEGMENT_TOKENS = 2048
BLOCK = 16


class ChunkMaps(NamedTuple):
    """`[1, heads, chunks, …]` each."""

    own: Tensor  # [chunk, value_dim]: what the tokens read where S is 0
    readers: Tensor  # [chunk, key_dim]
    writes: Tensor  # [key_dim, value_dim]
    moves: Tensor  # [key_dim, key_dim]: what the delta rule takes away of S
    kept: Tensor  # [key_dim, 1]: what the decays leave of S; float32


def delta_rule_in_segments(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
                           maps_of: Callable | None = None, advance: Callable | None = None
                           ) -> tuple[Tensor, Tensor, "MemoriesInside"]:
    """The same function as `delta_rule_chunked` for one request, a decay for every channel and no gradients. q, k and v
    may have 16 bits. `maps_of` and `advance` may be `chunk_maps` and `advance_memory` compiled."""
    heads, *shape = memory.shape[1:]
    segments = [tuple(x[:, start:start + SEGMENT_TOKENS] for x in (q, k, v, g, beta))
                for start in range(0, q.shape[1], SEGMENT_TOKENS)]
    counts = [-(-segment[0].shape[1] // CHUNK) for segment in segments]
    memories = memory.new_empty(sum(counts) + 1, heads, *shape)  # chunks first: no stride depends on their number
    factors = [q.new_empty(heads, count, *shape) for count in (*counts, 1)]  # the memories as they are multiplied
    memories[0], factors[0][:, 0] = memory[0], memory[0]
    of_chunks = [factor for of_segment in factors for factor in of_segment.unbind(1)]
    side = torch.cuda.Stream(q.device, priority=-1) if q.is_cuda else None
    outputs, first, last = [], 0, None
    for segment, count, before in zip(segments, counts, factors):
        maps = (maps_of or chunk_maps)(*segment)
        near = slice(first, first + count + 1)
        done = _carry_through(maps, memories[near], of_chunks[near], advance or advance_memory, side)
        if last is not None:  # by now its loop is over, or there is no more to do meanwhile
            outputs.append(_outputs(*last))
        last, first = (maps, before, done), first + count
    outputs.append(_outputs(*last))
    return (torch.cat(outputs, dim=1).transpose(0, 1)[None, :q.shape[1]], memories[-1][None],
            MemoriesInside(memories, (q, k, v, g, beta)))


class MemoriesInside:
    """The memory before each `CHUNK_TOKENS` of a pass. One before a `CHUNK` is there, one inside is computed when it is
    asked for."""

    def __init__(self, memories: Tensor, of_tokens: tuple[Tensor, ...]):
        self._memories, self._of_tokens = memories, of_tokens

    def __getitem__(self, number: int) -> Tensor:
        """`[1, heads, key_dim, value_dim]`"""
        end = number * CHUNK_TOKENS
        begin = end - end % CHUNK
        memory = self._memories[begin // CHUNK][None]
        if begin == end:
            return memory
        return delta_rule_chunked(*(x[:, begin:end] for x in self._of_tokens), memory)[1]


def _carry_through(maps: ChunkMaps, memories: Tensor, factors: Sequence[Tensor], advance: Callable,
                   side: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """From the memory before the segment to those before each later chunk, on the stream `side`; returns its end."""
    if side is None:
        return _loop(maps, memories, factors, advance)
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        _loop(maps, memories, factors, advance)
        return side.record_event()


def _loop(maps: ChunkMaps, memories: Tensor, factors: Sequence[Tensor], advance: Callable) -> None:
    chunks = zip(*(part[0].unbind(1) for part in (maps.kept, maps.writes, maps.moves)))
    for number, (kept, writes, moves) in enumerate(chunks):
        advance(kept, writes, moves @ factors[number], memories[number], memories[number + 1], factors[number + 1])


def advance_memory(kept: Tensor, writes: Tensor, moved: Tensor, before: Tensor, after: Tensor, factor: Tensor) -> None:
    """One chunk's step, but for its product: `after` and the `factor` of the next product are written."""
    memory = kept * before + writes + moved
    after.copy_(memory)
    factor.copy_(memory)


def _outputs(maps: ChunkMaps, factors: Tensor, done: torch.cuda.Event | None) -> Tensor:
    """`[heads, tokens, value_dim]`; takes the place of `maps.own`. From here on the maps' memory may serve another."""
    if done is not None:
        torch.cuda.current_stream(factors.device).wait_event(done)
    out = maps.own.flatten(0, 2).baddbmm_(maps.readers.flatten(0, 2), factors.flatten(0, 1))
    return out.unflatten(0, factors.shape[:2]).flatten(1, 2)


def chunk_maps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> ChunkMaps:
    """The maps of all chunks of a segment. No exponent is above 0: none overflows however strong a decay is."""
    q, k, v, g, beta = (by_chunks(x, CHUNK) for x in (q, k, v, g, beta[..., None]))
    dtype, decay = q.dtype, (g.clamp(min=STRONGEST_DECAY) / math.log(2)).cumsum(dim=-2)  # in powers of two
    total, from_start = decay[..., -1:, :], decay.exp2()
    inverse, q_by_k = _solve(q.float(), k.float(), decay, beta, dtype)
    values = inverse @ (v * beta).to(dtype)
    minus_reads = inverse @ (k * from_start * -beta).to(dtype)
    keys = (k * (total - decay).exp2()).to(dtype).transpose(-1, -2)
    readers = ((q * from_start) + q_by_k @ minus_reads).to(dtype)
    return ChunkMaps(q_by_k @ values, readers, keys @ values, keys @ minus_reads, total.exp2().transpose(-1, -2))


def _solve(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(I + A)^-1` and Q of `delta_rule_chunked`'s triangular system, `[…, chunk, chunk]`. Inside a block of 16 tokens
    decays are taken pair by pair, beyond it from the border of two neighbours, which grow into one."""
    size = BLOCK
    k_by_k, q_by_k = _products_inside(*(x.unflatten(-2, (-1, size)) for x in (q, k, decay)))
    inverse = inverse_of_lower((k_by_k * beta.unflatten(-2, (-1, size))).tril(-1)).to(dtype)
    q_by_k = q_by_k.tril().to(dtype)
    while size < q.shape[-2]:
        keys, queries = _factors_at_borders(*(x.unflatten(-2, (-1, 2, size)) for x in (q, k, decay, beta)), dtype)
        (earlier, later), (_, queries) = keys.unbind(-3), queries.unbind(-3)
        earlier = earlier.transpose(-1, -2)
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        inverse = lower_triangle(first, -(second @ (later @ earlier) @ first), second)
        first, second = q_by_k.unflatten(-3, (-1, 2)).unbind(-3)
        q_by_k = lower_triangle(first, queries @ earlier, second)
        size *= 2
    return inverse.squeeze(-3), q_by_k.squeeze(-3)


def _products_inside(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """k_by_k and q_by_k inside each block, right for j <= i: sums over channels, all one kernel if compiled."""
    columns = []
    for key, at in zip(k.unbind(-2), decay.unbind(-2)):
        kept = key[..., None, :] * (decay - at[..., None, :]).clamp(max=0.0).exp2()
        columns.append(((k * kept).sum(dim=-1), (q * kept).sum(dim=-1)))
    k_by_k, q_by_k = (torch.stack(column, dim=-1) for column in zip(*columns))
    return k_by_k, q_by_k


def _factors_at_borders(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and queries `[…, 2, size, key_dim]`, decayed from the border between two neighbours, or up to it; later keys
    times their beta."""
    kept = (-(decay - decay[..., :1, -1:, :]).abs()).exp2()
    is_later = torch.arange(2, device=k.device).view(2, 1, 1) > 0
    return (k * kept * torch.where(is_later, beta, 1.0)).to(dtype).contiguous(), (q * kept).to(dtype).contiguous()
