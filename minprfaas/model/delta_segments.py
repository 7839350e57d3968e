"""The delta rule's prefill for a GPU: products of 16 bits, and as little as possible in the loop. Chapter 02.

A chunk of 128 tokens maps the memory S before it to S' after it, and to what its tokens read. Both maps are affine:

    S' = kept * S + moves @ S + writes;    out = queries @ S + q_by_k @ (values + reads @ S)

All but S is computed for a whole segment of chunks at once. A loop over the chunks makes each S of the one before. Its
steps are too small to fill a GPU, and so is much of what makes the maps: the loop, the maps' products, their factors
and what tokens read go on streams of their own, one segment behind another.

What is multiplied has the number format of the queries and keys; decays, sums over channels and the memory itself are
float32. Float16 has as many digits as TF32 in half the bytes, but it ends at 65,504. The rule is linear in values and
memory together, so both are divided by a power of two for each head, which leaves them below 1/4. With queries and keys
no longer than 1 and betas of at most 1, a token makes no column of S longer by more than its value: after n tokens none
is longer than (sqrt(key_dim) + n) / 4, and no element of a product is more than twice that: a pass of 131,000 tokens
could overflow, no shorter one. At the other end, float16 holds nothing below 2^-22 of a head's largest value.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minprfaas.model.delta import STRONGEST_DECAY, delta_rule_chunked
from minprfaas.model.recurrent import CHUNK_TOKENS

CHUNK = 128  # a multiple of CHUNK_TOKENS
SEGMENT_TOKENS = 2048
BLOCK = 8  # tokens whose decays are taken pair by pair
SOLVED_BLOCK = 16  # tokens whose triangular system is solved row by row


class ChunkMaps(NamedTuple):
    """`[chunks, heads, …]` each. A chunk's tokens write `values + reads @ S` under their keys. A token reads S by
    its query, and what tokens up to itself write by its row of `q_by_k`."""

    queries: Tensor  # [chunk, key_dim], decayed from the chunk's beginning
    q_by_k: Tensor  # [chunk, chunk]
    values: Tensor  # [chunk, value_dim]
    reads: Tensor  # [chunk, key_dim]
    writes: Tensor  # [key_dim, value_dim]: what of the values is in S at the chunk's end
    moves: Tensor  # [key_dim, key_dim]: what the reads take away of S
    kept: Tensor  # [key_dim, 1]: what the decays leave of S; float32


def zero_matrices(first: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For `count` matrices the `products` and `inverse` that `chunk_maps` fills. Each pass writes the same places of
    them, and the others stay zero: they may be kept for the segment that begins with chunk `first` in the next pass."""
    return tuple(torch.zeros(count, rows * CHUNK + 1, CHUNK, dtype=dtype, device=device) for rows in (2, 1))


def for_segments(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What `delta_rule_in_segments` takes of one request's whole chunks of tokens: q, k, v, beta and the largest
    magnitude among each token's values `[chunks, CHUNK, heads, …]`, and g in the order in which it is multiplied, of
    bounded decays. Who makes these can have them written by the same kernels."""
    largest, bounded = v.float().abs().amax(dim=-1), g.clamp(min=STRONGEST_DECAY)
    q, k, v, g, beta, largest = (x[0].unflatten(0, (-1, CHUNK)) for x in (q, k, v, bounded, beta, largest))
    return q, k, v, g.transpose(1, 2), beta, largest


def delta_rule_in_segments(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, largest: Tensor, memory: Tensor,
                           compiled: Callable = lambda piece: piece, matrices_of: Callable = zero_matrices
                           ) -> tuple[Tensor, Tensor, "MemoriesInside"]:
    """The same function as `delta_rule_chunked` for one request, a decay for every channel and no gradients, but for
    the outputs, `[chunks, heads, CHUNK, value_dim]` in q's number format: see `by_tokens`. It is given what
    `for_segments` gives; q, k, v and g may have 16 bits.
    `compiled` may make another function of each piece between two products (`begin_memory`, `of_tokens` and
    `inverse_inside`) and of `advance_memory`. `matrices_of` may be a `zero_matrices` that keeps them."""
    chunks, heads = g.shape[:2]
    # A tensor each: where a step writes one of two views of the same tensor, a compiler works on the whole.
    memories = [torch.empty_like(memory[0]) for _ in range(chunks + 1)]
    rounded = q.new_empty(chunks + 1, *memory.shape[1:])  # the memories as they are multiplied
    scale = compiled(begin_memory)(largest.amax(dim=0), memory[0], memories[0], rounded[0])
    outputs = q.new_empty(chunks, heads, CHUNK, v.shape[-1])
    here = torch.cuda.current_stream(q.device) if q.is_cuda else None
    streams = loop, reading, factoring, *multiplying = streams_for(q.device, chunks)
    used = []  # until the end: the memory of what another stream reads must not be given out again
    at_once = SEGMENT_TOKENS // CHUNK
    for number, first in enumerate(range(0, chunks, at_once)):
        near, stream = slice(first, first + at_once), multiplying[number % len(multiplying)]
        segment = [x[near] for x in (q, k, v, g, beta)]
        with _on(factoring, here):
            products, inverse = matrices_of(first, heads * len(segment[0]), q.dtype, q.device)
            factors = chunk_factors(*segment, scale, products, compiled)
        with _on(stream, factoring):
            maps = chunk_maps(factors, products, inverse, compiled)
        with _on(loop, stream):
            _carry_through(maps, memories[first:], rounded[first:], compiled(advance_memory))
        with _on(reading, loop):
            _read(maps, rounded[:-1][near], outputs[near])
        used += [inverse, factors, maps]
    with _on(here, *streams):
        return outputs, (memories[-1] * scale)[None], MemoriesInside(memories, scale, (q, k, v, g, beta))


def by_tokens(outputs: Tensor, scale: Tensor, tokens: int) -> Tensor:
    """`[1, tokens, heads, value_dim]` of what `delta_rule_in_segments` gives; `scale` is its `MemoriesInside`'s. By an
    index: this and the norm that follows a compiler makes one kernel of, with a view two."""
    number = torch.arange(tokens, device=outputs.device)
    return (outputs[number // CHUNK, :, number % CHUNK] * scale[:, 0])[None]


def begin_memory(largest: Tensor, memory: Tensor, first: Tensor, rounded: Tensor) -> Tensor:
    """The scale `[heads, 1, 1]`: a power of two, more than four times and at most eight times the `largest` value
    `[CHUNK, heads]` or element of the memory. The memory over it goes to `first`, and to `rounded` as it is
    multiplied."""
    largest = torch.maximum(largest.amax(dim=0), torch.linalg.vector_norm(memory, math.inf, dim=-1).amax(dim=-1))
    exponent = largest.clamp(min=2.0**-100).view(torch.int32) & 0x7F800000  # of float32's bits
    scale = 8.0 * exponent.view(torch.float32)[:, None, None]
    memory = memory / scale
    first.copy_(memory)
    rounded.copy_(memory)
    return scale


class MemoriesInside:
    """The memory before each `CHUNK_TOKENS` of a pass. One before a `CHUNK` is there, one inside is computed when it is
    asked for."""

    def __init__(self, memories: Sequence[Tensor], scale: Tensor, of_tokens: tuple[Tensor, ...]):
        self._memories, self.scale, self._of_tokens = memories, scale, of_tokens

    def __getitem__(self, number: int) -> Tensor:
        """`[1, heads, key_dim, value_dim]`"""
        chunk, inside = divmod(number * CHUNK_TOKENS, CHUNK)
        memory = (self._memories[chunk] * self.scale)[None]
        if inside == 0:
            return memory
        q, k, v, g, beta = (x[chunk] for x in self._of_tokens)
        of_tokens = (x[None, :inside] for x in (q, k, v, g.transpose(0, 1), beta))
        return delta_rule_chunked(*of_tokens, memory)[1]


def streams_for(device: torch.device, chunks: int) -> list[Any]:
    """The streams of a pass over so many chunks: the loop's, that of what tokens read, that of the factors, and one or
    two of the maps' products, by turns. None each on a CPU."""
    return [_stream(device, number) for number in range(5 if chunks * CHUNK > SEGMENT_TOKENS else 4)]


@cache
def _stream(device: torch.device, number: int) -> Any:
    """The loop, and the products that it waits for, go before what later segments' factors take of a GPU: with a stream
    for each segment all but the first reach the loop at the same time, late, and it runs alone.

    The streams stay the same, because libraries keep 32 MiB for each that they have met. PyTorch hands out 32 of a
    priority by turns, and one that is captured must be nobody else's: nothing else in the package has these."""
    return torch.cuda.Stream(device, priority=(-3, -2, -2, -3, -3)[number]) if device.type == "cuda" else None


@contextmanager
def _on(stream: Any, *after: Any) -> Iterator[None]:
    """The block's work goes on `stream`, after all that the streams `after` have been given so far."""
    if stream is None:
        yield
        return
    for other in after:
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        yield


def _carry_through(maps: ChunkMaps, memories: Sequence[Tensor], rounded: Tensor, advance: Callable) -> None:
    """From the memory before the segment to those before each later chunk."""
    for number, (kept, writes, moves) in enumerate(zip(maps.kept, maps.writes, maps.moves)):
        advance(kept, writes, moves, memories[number], memories[number + 1], rounded[number + 1])


def _read(maps: ChunkMaps, rounded: Tensor, outputs: Tensor) -> None:
    """What the segment's tokens read of the memories before their chunks and of each other goes to `outputs`."""
    queries, q_by_k, values, reads, before, out = (x.flatten(0, 1) for x in (*maps[:4], rounded, outputs))
    values.baddbmm_(reads, before)
    torch.bmm(queries, before, out=out)
    out.baddbmm_(q_by_k, values)


def advance_memory(kept: Tensor, writes: Tensor, moves: Tensor, before: Tensor, after: Tensor, rounded: Tensor) -> None:
    """One chunk's step: the memory `after` it is written, and `rounded` as it is multiplied. A compiler makes it one
    kernel, which needs no loop where a product sums no more than 64 channels."""
    at_once = math.gcd(before.shape[-2], 64)
    columns = before.to(moves.dtype).split(at_once, dim=-2)
    memory = kept * before + writes
    for part, rows in zip(moves.split(at_once, dim=-1), columns):
        memory = memory + part @ rows
    after.copy_(memory)
    rounded.copy_(memory)


class ChunkFactors(NamedTuple):
    """What the maps of a segment's chunks are products of: see `of_tokens`."""

    across: list[Tensor]  # `_factors_across` of every size
    unsolved: Tensor  # [chunks, heads, chunk, value_dim + key_dim]
    keys: Tensor
    queries: Tensor
    kept: Tensor


def chunk_factors(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Tensor, products: Tensor,
                  compiled: Callable) -> ChunkFactors:
    """Those for memories and values divided by the `scale` `[heads, 1, 1]`. What is inside blocks of `products` is
    written."""
    return ChunkFactors(*compiled(of_tokens)(q, k, v, decays_through(g), beta, scale, _blocks(products, BLOCK)))


def chunk_maps(factors: ChunkFactors, products: Tensor, inverse: Tensor, compiled: Callable) -> ChunkMaps:
    """The maps of all chunks of a segment.

    The triangular system is `delta_rule_chunked`'s. `products`, `[matrices, 2 * chunk + 1, chunk]`, become A and Q: of
    each token a row of A, then one of Q. `inverse`, `[matrices, chunk + 1, chunk]`, becomes (I + A)^-1. A library can
    write a batch of blocks straight into their places if these are equally far apart; a compiler would write them
    elsewhere and copy. Blocks on a diagonal are. The row that nobody uses at each matrix's end makes it as far from its
    last block to the next matrix's first."""
    across, unsolved, keys, queries, kept = factors
    _multiply_across(across, products)
    _blocks(inverse, SOLVED_BLOCK)[:, :, 0] = compiled(inverse_inside)(_blocks(products, SOLVED_BLOCK)[:, :, 0])
    _grow(inverse, products)
    q_by_k = products[:, :-1].unflatten(1, (CHUNK, 2))[:, :, 1]
    inverse, q_by_k = (x.unflatten(0, unsolved.shape[:2]) for x in (inverse[:, :-1], q_by_k))
    solved, key_dim = inverse @ unsolved, queries.shape[-1]
    written, widths = keys.transpose(-1, -2) @ solved, (unsolved.shape[-1] - key_dim, key_dim)
    return ChunkMaps(queries, q_by_k, *solved.split(widths, dim=-1), *written.split(widths, dim=-1), kept)


def decays_through(g: Tensor) -> Tensor:
    """Of log decays the sums from a chunk's beginning through each token, as exponents of 2, whose powers are cheaper;
    both `[chunks, heads, CHUNK, key_dim]`, the sums float32. A product with ones: a compiler's scan goes along tokens
    where memory goes along channels, and takes twice as long."""
    sums = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    ones, of_two = _ones_through(g.dtype, g.device).expand(*g.shape[:2], -1, -1), 1 / math.log(2)
    ones, g, out = (x.flatten(0, 1) for x in (ones, g, sums))
    if g.is_cuda and g.dtype != torch.float32:
        torch.baddbmm(out, ones, g, torch.float32, beta=0, alpha=of_two, out=out)
    else:
        torch.baddbmm(out, ones.float(), g.float(), beta=0, alpha=of_two, out=out)
    return sums


@cache
def _ones_through(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=dtype, device=device).tril()


def of_tokens(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, scale: Tensor, inside: Tensor) -> tuple:
    """What needs no product of matrices: the factors across blocks of every size, values and reads before they are
    solved, keys, queries, and what the decays leave of S. The products `inside` blocks are written. No exponent is
    above 0: none overflows, however strong a decay is.

    If compiled, all but the values and the last decays is one kernel, which reads q, k and decays once. A compiler
    joins loops over as many elements: each part of a `cat` or `stack` must be one, not the whole. PyTorch 2.11 does so
    if a part reads the result of a reduction: hence `amin`, which is the last of the decays, for they fall (of fewer
    than nine it would be no reduction to the compiler)."""
    dtype = q.dtype
    q, k, v, beta = (x.float().transpose(1, 2).contiguous() for x in (q, k, v, beta[..., None]))
    total = decay[..., -2 * BLOCK:, :].amin(dim=-2, keepdim=True)
    from_start, to_end = decay.exp2(), total - decay
    factors = [_factors_across(q, k, to_end, beta, size, dtype) for size in _sizes()]
    inside.copy_(_products_inside(q, k, decay, beta))
    parts = v * (beta / scale), k * from_start * -beta, k * to_end.exp2(), q * from_start
    # Values and reads are columns of one product from here on.
    unsolved, keys, queries = torch.cat([part.to(dtype) for part in parts], dim=-1).split(
        (v.shape[-1] + k.shape[-1], k.shape[-1], q.shape[-1]), dim=-1)
    return factors, unsolved, keys, queries, total.exp2().transpose(-1, -2)


def _sizes() -> list[int]:
    """Tokens of the blocks that are joined two by two: 8, 16, … up to half a chunk."""
    return [BLOCK << doubled for doubled in range((CHUNK // BLOCK).bit_length() - 1)]


def _factors_across(q: Tensor, k: Tensor, to_end: Tensor, beta: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The factors of the products of two neighbours of `size` tokens, `[matrices, chunk, 2, key_dim]`: keys, in the
    later block times beta, and queries. The decays refer to the border between the two."""
    at_border = to_end[..., size - 1::2 * size, :].repeat_interleave(2 * size, dim=-2)
    kept = (-(to_end - at_border).abs()).exp2()
    is_later = (torch.arange(CHUNK, device=k.device)[:, None] & size) > 0
    parts = k * kept * torch.where(is_later, beta, 1.0), q * kept
    return torch.stack([part.to(dtype) for part in parts], dim=-2).flatten(0, -4)


def _products_inside(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """A and Q inside each block, `[blocks, BLOCK, 2, BLOCK]`: sums over channels, all one kernel if compiled. It needs
    no loop, which would have to keep 16 sums, if they are of at most 64 channels at a time."""
    q, k, decay, beta = (x.unflatten(-2, (-1, BLOCK)) for x in (q, k, decay, beta))
    of_keys, of_queries, at_once = [], [], math.gcd(k.shape[-1], 64)
    for key, at in zip(k.unbind(-2), decay.unbind(-2)):
        kept = key[..., None, :] * (-(decay - at[..., None, :]).abs()).exp2()  # right up to the token
        for sums, x in ((of_keys, k), (of_queries, q)):
            sums.append((x * kept).unflatten(-1, (-1, at_once)).sum(dim=-1))
    # Queries read up to their own token, keys before it: [..., token, 2, key].
    products = torch.stack(of_keys + of_queries, dim=-2).sum(dim=-1).unflatten(-1, (2, BLOCK))
    token, is_query, key = torch.meshgrid(*(torch.arange(n, device=q.device) for n in (BLOCK, 2, BLOCK)), indexing="ij")
    products = products * torch.where(is_query > 0, 1.0, beta[..., None])
    return torch.where(key < token + is_query, products, 0.0).flatten(0, -4)


def inverse_inside(of_a: Tensor) -> Tensor:
    """`(I + A)^-1` of each `[blocks, SOLVED_BLOCK, SOLVED_BLOCK]` block of A: a row of it is the same row of I, minus
    that of A times the rows before. If compiled it is one kernel, in which a thread computes a column."""
    rows: list[Tensor] = []  # of the inverse, but for the ones on its diagonal
    for row_of_a in of_a.float().unbind(1):
        row = -row_of_a
        for place, earlier in enumerate(rows):
            row = row - row_of_a[:, place, None] * earlier
        rows.append(row)
    ones = torch.eye(SOLVED_BLOCK, device=of_a.device)
    return torch.stack([(row + one).to(of_a.dtype) for row, one in zip(rows, ones)], dim=1)


def _multiply_across(factors: list[Tensor], products: Tensor) -> None:
    """A and Q between blocks of every size: the later neighbour's keys and queries by the earlier's keys."""
    for size, factor in zip(_sizes(), factors):
        earlier, later = factor.view(-1, 2, size, 2, factor.shape[-1]).unbind(1)
        place = _blocks(products, size, below=1)[::2].flatten(1, 2)
        torch.bmm(later.flatten(1, 2), earlier[:, :, 0].transpose(1, 2), out=place)


def _grow(inverse: Tensor, products: Tensor) -> None:
    """From the inverses of two neighbours to that of both, until there is a chunk's."""
    for size in _sizes():
        if size >= SOLVED_BLOCK:
            first, second = _blocks(inverse, size)[:, :, 0].unflatten(0, (-1, 2)).unbind(1)
            between, place = (_blocks(x, size, below=1)[::2, :, 0] for x in (products, inverse))
            place.baddbmm_(second, between @ first, beta=0, alpha=-1)


def _blocks(matrices: Tensor, size: int, below: int = 0) -> Tensor:
    """All on the matrices' diagonals, or so many blocks `below`: `[blocks, size, rows of a token, size]`."""
    per_token = matrices.shape[1] // CHUNK
    row = per_token * CHUNK
    return matrices.as_strided((len(matrices) * CHUNK // size - below, size, per_token, size),
                               (size * (row + 1), row, CHUNK, 1), below * size * row)
