"""The delta rule's prefill for a GPU: products of 16 bits, and a loop that nobody waits for. Chapter 02.

A chunk of 128 tokens changes the memory S before it by an affine map, and what it reads is one, too:

    S' = kept * S + moves @ S + writes;    out = queries @ S + q_by_k @ (values + reads @ S)

All but S is made for a whole segment of chunks at once. What remains from chunk to chunk is too small to fill a GPU,
and so is much of what makes the maps: each segment, and the loop, runs on a stream of its own.

What is multiplied has the number format of the queries and keys; decays, sums over channels and the memory itself are
float32. Float16 has as many digits as TF32 in half the bytes, but it ends at 65,504. The rule is linear in values and
memory together, so both are divided by a power of two for each head, which leaves them below 1/4. With queries and keys
no longer than 1 and betas of at most 1, a token makes no column of S longer by more than its value: after n tokens none
is longer than (sqrt(key_dim) + n) / 4, and no product more than twice that, which 131,000 tokens a pass would reach. At
the other end, float16 holds nothing below 2^-22 of a head's largest value.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minprfaas.model.delta import STRONGEST_DECAY, delta_rule_chunked
from minprfaas.model.recurrent import CHUNK_TOKENS

CHUNK = 128  # a multiple of CHUNK_TOKENS
SEGMENT_TOKENS = 2048
BLOCK = 8  # tokens whose decays are taken pair by pair
SOLVED_BLOCK = 16  # tokens whose triangular system is solved row by row


class ChunkMaps(NamedTuple):
    """`[chunks, heads, …]` each. A chunk's tokens write `values + reads @ S` by their keys, of which they read what
    `q_by_k` lets them, and of S what their queries ask for."""

    queries: Tensor  # [chunk, key_dim], decayed from the chunk's beginning
    q_by_k: Tensor  # [chunk, chunk]
    values: Tensor  # [chunk, value_dim]
    reads: Tensor  # [chunk, key_dim]
    writes: Tensor  # [key_dim, value_dim]: what of the values is in S at the chunk's end
    moves: Tensor  # [key_dim, key_dim]: what the reads take away of S
    kept: Tensor  # [key_dim, 1]: what the decays leave of S; float32


def zero_matrices(first: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where `chunk_maps` writes the products and inverses of the segment that begins with chunk `first`. What is zero
    in them remains so: they may be kept for the next pass."""
    return tuple(torch.zeros(count, rows * CHUNK + 1, CHUNK, dtype=dtype, device=device) for rows in (2, 1))


def delta_rule_in_segments(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
                           compiled: Callable = lambda piece: piece, matrices_of: Callable = zero_matrices
                           ) -> tuple[Tensor, Tensor, "MemoriesInside"]:
    """The same function as `delta_rule_chunked` for one request, a decay for every channel and no gradients, but for
    the outputs, `[chunks, heads, CHUNK, value_dim]` in q's number format: see `by_tokens`. q, k and v may have 16 bits.
    `compiled` may make another function of each piece between two products (`begin_memory`, `of_tokens` and
    `inverse_inside`) and of `advance_memory`. `matrices_of` may be a `zero_matrices` that keeps them."""
    heads, *shape = memory.shape[1:]
    # Without the batch, whose stride is the pass's length: a compiler would compile another for each.
    segments = [tuple(x[0, start:start + SEGMENT_TOKENS] for x in (q, k, v, g, beta))
                for start in range(0, q.shape[1], SEGMENT_TOKENS)]
    chunks = -(-q.shape[1] // CHUNK)
    # A tensor each: of views of one that is written a compiler would take the whole.
    memories = [torch.empty_like(memory[0]) for _ in range(chunks + 1)]
    factors = q.new_empty(chunks + 1, heads, *shape)  # the memories as they are multiplied
    largest = torch.linalg.vector_norm(v[0], math.inf, dim=-1, dtype=torch.float32).amax(dim=0)  # of each head
    scale = compiled(begin_memory)(largest, memory[0], memories[0], factors[0])
    outputs = q.new_empty(chunks, heads, CHUNK, v.shape[-1])
    here = torch.cuda.current_stream(q.device) if q.is_cuda else None
    loop, *streams = (_stream(q.device, number) for number in range(1 + len(segments)))
    first = 0
    for segment, stream in zip(segments, streams):
        near = slice(first, first - (-len(segment[0]) // CHUNK))
        with _on(stream, here):
            matrices = matrices_of(first, (near.stop - first) * heads, q.dtype, q.device)
            maps = chunk_maps(*segment, scale, compiled, *matrices)
        with _on(loop, stream):
            _carry_through(maps, memories[near.start:], factors[near.start:], compiled(advance_memory))
        with _on(stream, loop):
            _read(maps, factors[near], outputs[near])
        first = near.stop
    with _on(here, *streams):
        return outputs, (memories[-1] * scale)[None], MemoriesInside(memories, scale, (q, k, v, g, beta))


def by_tokens(outputs: Tensor, scale: Tensor, tokens: int) -> Tensor:
    """`[1, tokens, heads, value_dim]` of what `delta_rule_in_segments` gives; `scale` is its `MemoriesInside`'s. By an
    index, with which a compiler makes one kernel of this and a norm: of a view it made two."""
    number = torch.arange(tokens, device=outputs.device)
    return (outputs[number // CHUNK, :, number % CHUNK] * scale[:, 0])[None]


def begin_memory(largest: Tensor, memory: Tensor, first: Tensor, factor: Tensor) -> Tensor:
    """The scale `[heads, 1, 1]`: a power of two, more than four times and at most eight times the `largest` value
    `[heads]` or element of the memory. The memory over it is written, and as the `factor` of a product."""
    largest = torch.maximum(largest, torch.linalg.vector_norm(memory, math.inf, dim=-1).amax(dim=-1))
    exponent = largest.clamp(min=2.0**-100).view(torch.int32) & 0x7F800000  # of float32's bits
    scale = 8.0 * exponent.view(torch.float32)[:, None, None]
    memory = memory / scale
    first.copy_(memory)
    factor.copy_(memory)
    return scale


class MemoriesInside:
    """The memory before each `CHUNK_TOKENS` of a pass. One before a `CHUNK` is there, one inside is computed when it is
    asked for."""

    def __init__(self, memories: Sequence[Tensor], scale: Tensor, of_tokens: tuple[Tensor, ...]):
        self._memories, self.scale, self._of_tokens = memories, scale, of_tokens

    def __getitem__(self, number: int) -> Tensor:
        """`[1, heads, key_dim, value_dim]`"""
        end = number * CHUNK_TOKENS
        begin = end - end % CHUNK
        memory = (self._memories[begin // CHUNK] * self.scale)[None]
        if begin == end:
            return memory
        return delta_rule_chunked(*(x[:, begin:end] for x in self._of_tokens), memory)[1]


@cache
def _stream(device: torch.device, number: int) -> Any:
    """0: the loop's; 1, 2, …: the segments', of which the first goes first, for the loop waits for it. They stay the
    same, because libraries keep 32 MiB for each that they have met. PyTorch hands out the same 32 of a priority again
    and again, and one that is captured must be nobody else's: no other part of the process has these priorities."""
    return torch.cuda.Stream(device, priority=-2 if number > 1 else -3) if device.type == "cuda" else None


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


def _carry_through(maps: ChunkMaps, memories: Sequence[Tensor], factors: Tensor, advance: Callable) -> None:
    """From the memory before the segment to those before each later chunk."""
    for number, (kept, writes, moves) in enumerate(zip(maps.kept, maps.writes, maps.moves)):
        advance(kept, writes, moves, memories[number], memories[number + 1], factors[number + 1])


def _read(maps: ChunkMaps, factors: Tensor, outputs: Tensor) -> None:
    """What the segment's tokens read of the memories before their chunks and of each other goes to `outputs`."""
    queries, q_by_k, values, reads, before, out = (
        x.flatten(0, 1) for x in (*maps[:4], factors, outputs))
    values.baddbmm_(reads, before)
    torch.bmm(queries, before, out=out)
    out.baddbmm_(q_by_k, values)


def advance_memory(kept: Tensor, writes: Tensor, moves: Tensor, before: Tensor, after: Tensor, factor: Tensor) -> None:
    """One chunk's step: `after` and the `factor` of products are written. A product over no more than 64 channels at
    once needs no loop in the kernel that a compiler makes of it all."""
    at_once = math.gcd(before.shape[-2], 64)
    columns = before.to(moves.dtype).split(at_once, dim=-2)
    memory = kept * before + writes
    for part, rows in zip(moves.split(at_once, dim=-1), columns):
        memory = memory + part @ rows
    after.copy_(memory)
    factor.copy_(memory)


def chunk_maps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Tensor,
               compiled: Callable, products: Tensor, inverse: Tensor) -> ChunkMaps:
    """The maps of all chunks of a segment, `[tokens, heads, …]`, for memories and values divided by the `scale`
    `[heads, 1, 1]`.

    The triangular system is `delta_rule_chunked`'s: A, Q and (I + A)^-1. `products` become A and Q, a row of each token
    by turns: `[matrices, 2 * chunk + 1, chunk]`. A library writes a batch of products straight into such matrices, if
    they are equally far apart (a compiler would have them written elsewhere and copied). From one block on the diagonal
    to the next it is as many columns as rows; the row too many at a matrix's end makes it the same from there to the
    next matrix."""
    factors, solved, keys, queries, kept = compiled(of_tokens)(q, k, v, g, beta, scale, _blocks(products, BLOCK))
    _multiply_across(factors, products)
    _blocks(inverse, SOLVED_BLOCK)[:, :, 0] = compiled(inverse_inside)(_blocks(products, SOLVED_BLOCK)[:, :, 0])
    _grow(inverse, products)
    q_by_k = products[:, :-1].unflatten(1, (CHUNK, 2))[:, :, 1]
    inverse, q_by_k = (x.unflatten(0, solved.shape[:2]) for x in (inverse[:, :-1], q_by_k))
    solved, widths = inverse @ solved, (v.shape[-1], k.shape[-1])
    written = keys.transpose(-1, -2) @ solved
    return ChunkMaps(queries, q_by_k, *solved.split(widths, dim=-1), *written.split(widths, dim=-1), kept)


def of_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Tensor, inside: Tensor) -> tuple:
    """What is made of tokens one by one, before any product: the factors across blocks of every size, values and reads
    before they are solved, keys, queries, and what the decays leave of S. The products `inside` blocks are written. No
    exponent is above 0: none overflows, however strong a decay is.

    All but the values and the decays' sums is one kernel, which reads q, k and decays once. A compiler joins what has
    as many elements, so the parts of a `cat` or `stack` must be written one by one, not the whole. PyTorch 2.11 does
    that where a part reads the result of a reduction: hence `amin`, which gives exactly the last of the decays."""
    dtype = q.dtype
    q, k, v, g, beta = (_chunks_of(x.float()) for x in (q, k, v, g, beta[..., None]))
    decay = (g.clamp(min=STRONGEST_DECAY) / math.log(2)).cumsum(dim=-2)  # of 2: its powers are cheaper
    total = decay.amin(dim=-2, keepdim=True)
    from_start, to_end = decay.exp2(), total - decay
    factors = [_factors_across(q, k, to_end, beta, size, dtype) for size in _sizes()]
    inside.copy_(_products_inside(q, k, decay, beta))
    parts = v * (beta / scale), k * from_start * -beta, k * to_end.exp2(), q * from_start
    # Values and reads are columns of one product from here on.
    unsolved, keys, queries = torch.cat([part.to(dtype) for part in parts], dim=-1).split(
        (v.shape[-1] + k.shape[-1], k.shape[-1], q.shape[-1]), dim=-1)
    return factors, unsolved, keys, queries, total.exp2().transpose(-1, -2)


def _chunks_of(x: Tensor) -> Tensor:
    """`[tokens, heads, dim]` -> `[chunks, heads, CHUNK, dim]`, as `by_chunks` for another order."""
    return F.pad(x, (0, 0, 0, 0, 0, -len(x) % CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2).contiguous()


def _sizes() -> list[int]:
    """Of the blocks of which two neighbours become one, until there is a whole chunk."""
    return [BLOCK << doubled for doubled in range((CHUNK // BLOCK).bit_length() - 1)]


def _factors_across(q: Tensor, k: Tensor, to_end: Tensor, beta: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What a product of two neighbours of `size` tokens is made of, `[matrices, chunk, 2, key_dim]`: keys, the later
    block's times beta, and queries. The decays refer to the border between the two."""
    at_border = to_end[..., size - 1::2 * size, :].repeat_interleave(2 * size, dim=-2)
    kept = (-(to_end - at_border).abs()).exp2()
    is_later = (torch.arange(CHUNK, device=k.device)[:, None] & size) > 0
    parts = k * kept * torch.where(is_later, beta, 1.0), q * kept
    return torch.stack([part.to(dtype) for part in parts], dim=-2).flatten(0, -4)


def _products_inside(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """A and Q inside each block, `[blocks, BLOCK, 2, BLOCK]`: sums over channels, all one kernel if compiled. Sums of
    at most 64 at a time need no loop in it, nor the places of 16 sums from one round to the next."""
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
    """`(I + A)^-1` of each `[blocks, SOLVED_BLOCK, SOLVED_BLOCK]` block of A: a row of it is one of I minus A's by the
    rows before. All rows are one kernel if compiled, of which a thread has a column."""
    rows: list[Tensor] = []  # of the inverse, but for the ones on its diagonal
    for row_of_a in of_a.float().unbind(1):
        row = -row_of_a
        for place, earlier in enumerate(rows):
            row = row - row_of_a[:, place, None] * earlier
        rows.append(row)
    ones = torch.eye(SOLVED_BLOCK, device=of_a.device)
    return torch.stack([(row + one).to(of_a.dtype) for row, one in zip(rows, ones)], dim=1)


def _multiply_across(factors: list[Tensor], products: Tensor) -> None:
    """A and Q beyond blocks: the later of two neighbours' keys and queries by the earlier's keys, at every size."""
    for size, factor in zip(_sizes(), factors):
        earlier, later = factor.view(-1, 2, size, 2, factor.shape[-1]).unbind(1)
        place = _blocks(products, size, below=1)[::2].flatten(1, 2)
        torch.bmm(later.flatten(1, 2), earlier[:, :, 0].transpose(1, 2), out=place)


def _grow(inverse: Tensor, products: Tensor) -> None:
    """From the inverses of two neighbours to that of both, until it is a chunk's."""
    for size in _sizes():
        if size >= SOLVED_BLOCK:
            first, second = _blocks(inverse, size)[:, :, 0].unflatten(0, (-1, 2)).unbind(1)
            between, place = (_blocks(x, size, below=1)[::2, :, 0] for x in (products, inverse))
            place.baddbmm_(second, between @ first, beta=0, alpha=-1)


def _blocks(matrices: Tensor, size: int, below: int = 0) -> Tensor:
    """Those on the diagonals, or so many blocks below: `[blocks of all matrices, size, rows of a token, size]`."""
    per_token = matrices.shape[1] // CHUNK
    row = per_token * CHUNK
    return matrices.as_strided((len(matrices) * CHUNK // size - below, size, per_token, size),
                               (size * (row + 1), row, CHUNK, 1), below * size * row)
