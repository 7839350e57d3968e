"""The exercises of chapter 03. Fill in the functions, then: python tutorials/03_paged_kvcache.py --check 1"""

import torch
from exercises.checking import first_wrong
from torch import Tensor

from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig


def place_of(token: int, block_table: list[int], block_tokens: int) -> tuple[int, int]:
    """Where token number `token` (from 0) of a request lies: (block, row inside the block). `block_table` lists the
    request's blocks in token order; each holds `block_tokens` tokens."""
    raise NotImplementedError


def blocks_to_reserve(held_tokens: int, more_tokens: int, block_tokens: int, token_groups: int,
                      state_blocks: int) -> int:
    """How many blocks a request must get before `more_tokens` tokens can follow the `held_tokens` that it has. Each of
    `token_groups` groups needs a block for `block_tokens` tokens; a request that begins (`held_tokens` 0) also needs
    `state_blocks` blocks for its state of one size, once. What it has already it keeps."""
    raise NotImplementedError


def merge_two(out_a: Tensor, log_sum_a: float, out_b: Tensor, log_sum_b: float) -> Tensor:
    """Attention over a context in two parts: each gave its output `[dim]`, and the logarithm of its softmax's
    denominator. The output over both. (A log-sum may be 1000, or minus infinity for a part without tokens.)"""
    raise NotImplementedError


def _layout(block_tokens: int):
    kda = KDAConfig(num_heads=2, head_dim=16).state_spec("float32")
    mla = MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_dim=8, qk_shared_dim=8, v_dim=8).state_spec("float32")
    return plan_layout((kda, kda, kda, mla), block_tokens)


def check_1() -> str | None:
    """Against the package's pool: a row is written through the block table and looked for in the block."""
    pool, layer = BlockPool(_layout(16), 9, "cpu"), 3
    for token, block_table in [(0, [4]), (15, [4, 2]), (16, [4, 2]), (40, [7, 0, 5]), (33, [8, 3, 1])]:
        pool.token_view(layer).zero_()
        pool.write_tokens(layer, block_table, token, torch.ones(1, pool.token_view(layer).shape[2]))
        block, row = pool.token_view(layer)[..., 0].nonzero()[0].tolist()
        wrong = first_wrong(place_of, [((token, block_table, 16), (block, row))])
        if wrong is not None:
            return wrong
    return None


def check_2() -> str | None:
    """Against the package's count of what a request of so many tokens has."""
    cases = []
    for held, more, block_tokens in [(0, 100, 64), (100, 28, 64), (128, 1, 64), (60, 500, 64), (0, 1, 16), (7, 1, 16)]:
        layout = _layout(block_tokens)
        has = layout.blocks_for(held) if held else 0
        cases.append(((held, more, block_tokens, len(layout.token_groups), layout.state_blocks),
                      layout.blocks_for(held + more) - has))
    return first_wrong(blocks_to_reserve, cases)


def check_3() -> str | None:
    """Against one softmax over everything."""
    cases, generator = [], torch.Generator().manual_seed(0)
    for first, second, loud in [(5, 9, 1.0), (1, 30, 3.0), (4, 0, 1.0), (6, 6, 300.0)]:
        scores = loud * torch.randn(first + second, generator=generator)
        values = torch.randn(first + second, 8, generator=generator)
        parts = []
        for part, rows in ((scores[:first], values[:first]), (scores[first:], values[first:])):
            parts += [part.softmax(dim=0) @ rows, float(part.logsumexp(dim=0))]
        cases.append((tuple(parts), scores.softmax(dim=0) @ values))
    return first_wrong(merge_two, cases, tolerance=1e-4)
