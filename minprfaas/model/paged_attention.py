"""Decode attention straight over pages: no copy of the context, nothing planned anew a step. Chapter 03.

Split-KV ("flash decoding") in plain PyTorch. Every page is a sequence of its own to a flash kernel, which returns each
page's output and the logarithm of its softmax denominator, and with those the pages of a request are one weighted sum.
So however long a context is, its pages are read side by side, and each of them once.

On a GPU the kernel for sequences of unequal length is told where in the pool each page begins and how many of its rows
are filled. On a CPU the kernel wants pages at equal distances: pages that are neighbours in the pool are, so one call
takes each run of neighbours, with a mask for rows that are not filled. Where a compiler makes loops of plain sums
(`--compile`), those take any pages.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minprfaas.model.spec import Pages


PROCESSORS = 128  # of a GPU, about: as many pieces of pages and KV heads fill it
LEAST_ROWS = 64  # of a piece: what a kernel's processor reads at a time


class PageIndex(NamedTuple):
    """Where pages lie, or pieces of them, as the flash kernel wants it; the layers of a KVCache group share it."""

    first_rows: Tensor  # [batch * pages + 1] int32: the page's first row; the last entry is never read
    row_counts: Tensor  # [batch, pages] int32: how many of its rows are part of the context, 0 for padding
    first_queries: Tensor  # [batch * pages + 1] int32: the query heads that share a KV head are a page's queries


class PageOutputs(NamedTuple):
    """What each page gives; `merge_pages` makes one attention of it."""

    out: Tensor  # [batch, pages, groups, kv_heads, v_dim]: softmax over the page alone; anything for an empty one
    log_sum: Tensor  # [batch, pages, groups, kv_heads]: logarithm of its denominator
    row_counts: Tensor


def page_index(pages: Pages, groups: int, pieces: int = 1) -> PageIndex:
    """The index of `pages`, each in so many equal `pieces`, for mixers with `groups` query heads for each KV head."""
    batch, count = pages.block_table.shape
    rows, device = pages.view.shape[1] // pieces, pages.view.device
    before = torch.arange(0, count * pieces * rows, rows, device=device)
    inside = torch.arange(0, pieces * rows, rows, device=device)
    blocks = pages.block_table[..., None]  # a block's first row is as far from the next one's as blocks are apart
    first_rows = inside.add(blocks, alpha=pages.view.stride(0) // pages.view.stride(1)).flatten().int()
    row_counts = (pages.lengths[:, None] - before).clamp(0, rows).int()
    first_queries = torch.arange(0, (batch * count * pieces + 1) * groups, groups, device=device, dtype=torch.int32)
    return PageIndex(torch.cat([first_rows, first_rows[-1:]]), row_counts, first_queries)


def pieces_of_pages(pages: Pages, kv_heads: int) -> int:
    """In how many pieces to read each page, so that few pages fill a GPU too: in two, four, … equal ones."""
    count, rows, pieces = pages.block_table.numel() * kv_heads, pages.view.shape[1], 1
    while 2 * pieces * count <= PROCESSORS and rows % (2 * pieces) == 0 and rows >= 2 * pieces * LEAST_ROWS:
        pieces *= 2
    return pieces


def flash_can_read(view: Tensor, head_dim: int, kv_heads: int) -> bool:
    """Whether the flash kernel can follow pages of `view` `[blocks, block_tokens, width]`: on a GPU, in 16 bits, with
    values as wide as keys, and where a block is a whole number of rows, so that every page begins at a row."""
    return (view.is_cuda and view.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
            and view.shape[2] == 2 * kv_heads * head_dim and view.stride(0) % view.stride(1) == 0)


def attend_to_pages(q: Tensor, view: Tensor, index: PageIndex, scale: float) -> PageOutputs:
    """`q` `[batch, 1, heads, dim]` over every page by itself, without a copy of any."""
    kv_heads = view.shape[2] // (2 * q.shape[3])
    return flash_over_pages(queries_of_pages(q, kv_heads, index.row_counts.shape[1]), view, index, scale)


def queries_of_pages(q: Tensor, kv_heads: int, pages: int) -> Tensor:
    """`q` `[batch, 1, heads, dim]` once for each of a request's `pages`, `[batch * pages * groups, kv_heads, dim]`: the
    heads that share a KV head are its queries, one after another."""
    by_kv_head = q.unflatten(2, (kv_heads, -1)).transpose(2, 3)
    return by_kv_head.expand(-1, pages, -1, -1, -1).flatten(0, 2)


def flash_over_pages(queries: Tensor, view: Tensor, index: PageIndex, scale: float) -> PageOutputs:
    """The `queries_of_pages` over every page by itself."""
    batch, count = index.row_counts.shape
    _, kv_heads, dim = queries.shape
    groups = len(queries) // (batch * count)
    length = (view.shape[0] - 1) * (view.stride(0) // view.stride(1)) + view.shape[1]
    rows = view.as_strided((length, view.shape[2]), (view.stride(1), 1), view.storage_offset())  # all from here on
    k, v = rows.unflatten(-1, (2, kv_heads, dim)).unbind(1)
    out, log_sum = torch.ops.aten._flash_attention_forward(
        queries, k, v, index.first_queries, index.first_rows, groups, view.shape[1], 0.0, False, False, scale=scale,
        seqused_k=index.row_counts.view(-1))[:2]
    log_sum = log_sum.view(kv_heads, batch, count, groups).permute(1, 2, 3, 0)
    return PageOutputs(out.view(batch, count, groups, kv_heads, dim), log_sum, index.row_counts)


class PageRuns(NamedTuple):
    """The pages of a batch in the order in which they lie in the pool; the layers of a KVCache group share it."""

    runs: list[tuple[int, int]]  # first block and number of blocks of each run of neighbours
    blocks: Tensor  # [pages] int64
    owners: Tensor  # [pages] int64: the request of each page
    mask: Tensor  # [pages, 1, 1, block_tokens] float32: minus infinity for a row that is not filled, else 0
    places: Tensor  # [batch * blocks] int64: which page each entry of the block table is; any for padding
    row_counts: Tensor  # [batch, blocks] int64: as in `PageIndex`


def page_runs(pages: Pages) -> PageRuns:
    """The runs of `pages`, on a CPU. A block that requests share is a page of each of them."""
    size, round_blocks = pages.view.shape[1], 2 * len(pages.view)
    row_counts = (pages.lengths[:, None] - torch.arange(0, pages.block_table.shape[1] * size, size)).clamp(0, size)
    filled = row_counts.flatten().nonzero()[:, 0]  # entries of the block table
    blocks, order = pages.block_table.flatten()[filled].sort(stable=True)
    numbers = torch.arange(len(blocks))
    # A shared block is met in one round through the pool after another, and rounds are no neighbours.
    rounds = numbers - torch.searchsorted(blocks, blocks)
    path, by_path = (blocks + rounds * round_blocks).sort()
    entries = filled[order[by_path]]
    bounds = [0, *((path.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(path)]
    runs = [(int(path[begin]) % round_blocks, end - begin) for begin, end in pairwise(bounds)]
    is_filled = torch.arange(size) < row_counts.flatten()[entries, None]
    mask = torch.zeros(is_filled.shape).masked_fill(~is_filled, float("-inf"))
    places = torch.zeros_like(row_counts).flatten().index_copy(0, entries, numbers)
    return PageRuns(runs, path % round_blocks, entries // row_counts.shape[1], mask[:, None, None], places, row_counts)


def attend_to_runs(q: Tensor, view: Tensor, pages: PageRuns, scale: float, by_page: Callable | None = None) -> Tensor:
    """The attention of `q` `[batch, 1, heads, dim]` to all pages, merged, on a CPU; values are as wide as keys. By the
    flash kernel, or by `by_page`, which is `attend_to_each_page` compiled."""
    batch, dim = q.shape[0], q.shape[3]
    queries = q.view(batch, view.shape[2] // (2 * dim), -1, dim).index_select(0, pages.owners)
    if by_page is None:
        of_pages = _flash_over_runs(queries, view, pages, scale)
    else:
        of_pages = by_page(queries * scale, view, pages.blocks, pages.mask[:, 0])
    out, log_sum = (part.flatten(1, 2).index_select(0, pages.places).unflatten(0, (batch, -1))
                    for part in of_pages)  # [batch, blocks, heads, dim], [batch, blocks, heads]
    weights = log_sum.masked_fill((pages.row_counts == 0)[..., None], float("-inf")).softmax(dim=1)
    return torch.einsum("bph,bphd->bhd", weights.to(out.dtype), out)[:, None]


def _flash_over_runs(queries: Tensor, view: Tensor, pages: PageRuns, scale: float) -> Iterator[Tensor]:
    """What `attend_to_each_page` returns."""
    kv_heads, dim = queries.shape[1], queries.shape[3]
    k, v = view.unflatten(-1, (2, kv_heads, dim)).permute(2, 0, 3, 1, 4).unbind()  # [blocks, kv_heads, rows, dim]
    counts, parts = [count for _, count in pages.runs], []
    for (first, count), own, mask in zip(pages.runs, queries.split(counts), pages.mask.split(counts)):
        parts.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            own, k[first:first + count], v[first:first + count], attn_mask=mask, scale=scale))
    return (torch.cat(part) for part in zip(*parts))


def attend_to_each_page(queries: Tensor, view: Tensor, blocks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled `queries` `[pages, kv_heads, groups, dim]` over every page of `blocks` by itself: the outputs, alike, and
    the logarithms of the denominators `[pages, kv_heads, groups]`. `mask` is `[pages, 1, rows]`.

    Written for a compiler, whose loops fit the registers of a CPU's core: sums of one extent become one loop, so that
    those of four rows (or four parts of a value) and of all heads that share a KV head read it once, head by head.
    """
    kv_heads, dim = queries.shape[1], queries.shape[3]
    k, v = view[blocks].unflatten(-1, (2, kv_heads, dim)).transpose(1, 3).unbind(2)  # [pages, kv_heads, rows, dim]
    outs, log_sums = [], []
    for query in queries.unbind(2):
        scores = torch.cat([(rows * query[:, :, None]).sum(dim=-1) for rows in k.chunk(4, dim=2)], dim=-1) + mask
        most = scores.amax(dim=-1, keepdim=True)
        weights = (scores - most).exp()[..., None]
        total = weights.sum(dim=2)  # [pages, kv_heads, 1]
        outs.append(torch.cat([(weights * part).sum(dim=2) for part in v.chunk(4, dim=3)], dim=-1) / total)
        log_sums.append((most + total.log()).squeeze(-1))
    return torch.stack(outs, dim=2), torch.stack(log_sums, dim=2)


def attend_to_copied_pages(q: Tensor, pages: Pages, row_counts: Tensor, scale: float, kv_heads: int) -> PageOutputs:
    """The same by gathering the pages: the reference, and the way of those that flash cannot read."""
    batch, count = pages.block_table.shape
    rows = pages.view.index_select(0, pages.block_table.flatten()).unflatten(0, (batch, count))
    keys = kv_heads * q.shape[3]
    k, v = (part.unflatten(-1, (kv_heads, -1)) for part in rows.split([keys, rows.shape[3] - keys], dim=-1))
    queries = q.view(batch, kv_heads, -1, q.shape[3])  # [batch, kv_heads, groups, dim]
    scores = torch.einsum("bkgd,bptkd->bkgpt", queries, k).float() * scale
    beyond = torch.arange(k.shape[2], device=q.device) >= row_counts[..., None]
    scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    log_sum = scores.logsumexp(dim=-1)
    out = torch.einsum("bkgpt,bptkd->bpgkd", scores.softmax(dim=-1).to(v.dtype), v)
    return PageOutputs(out, log_sum.permute(0, 3, 2, 1), row_counts)


def merge_pages(out: Tensor, log_sum: Tensor, row_counts: Tensor) -> Tensor:
    """One attention over all pages, of `PageOutputs`: `[batch, 1, heads, v_dim]`."""
    empty = (row_counts == 0)[:, :, None, None, None]
    log_sums = log_sum[..., None].masked_fill(empty, float("-inf"))
    if len(out) == 1:  # for each channel anew: so the greatest, both sums and their quotient are one kernel
        log_sums = log_sums.expand_as(out)
    weights = (log_sums - log_sums.amax(dim=1, keepdim=True)).exp()
    # What stands in the output of an empty page is nobody's business, NaN included.
    merged = (out.float().masked_fill(empty, 0) * weights).sum(dim=1) / weights.sum(dim=1)
    return merged.transpose(1, 2).flatten(1, 2)[:, None].to(out.dtype)
