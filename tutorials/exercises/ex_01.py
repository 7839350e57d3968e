"""The exercises of chapter 01. Fill in: python tutorials/01_a_transformer_from_a_checkpoint.py --check 1"""

import torch
from exercises.checking import first_wrong
from torch import Tensor

from minprfaas.config import RopeConfig
from minprfaas.model.layers import Positions, apply_rotary
from minprfaas.model.moe import ExpertRouter, MoEConfig
from minprfaas.model.window import attend_window


def attend_to_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of one head: q, k, v `[tokens, dim]` -> `[tokens, dim]`. A token sees the last `window` tokens, itself
    included, and nothing else. The scores are q · k / sqrt(dim). (Begin with `attention` of section 3.)"""
    raise NotImplementedError


def rotate(x: Tensor, place: int, theta: float) -> Tensor:
    """RoPE: turn the vector `x` `[dim]` of the token at `place`. Channel i and channel i + dim / 2 are a pair, and are
    turned by `place * theta ** (-2 i / dim)` radians: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    raise NotImplementedError


def choose_experts(scores: Tensor, top_k: int) -> dict[int, float]:
    """The router's choice for one token: `scores` `[experts]` -> {expert: its share}. The `top_k` experts with the
    highest softmax are chosen, and their shares are made to add up to 1."""
    raise NotImplementedError


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_1() -> str | None:
    """Against the package's sliding window."""
    cases = []
    for seed, (tokens, window) in enumerate([(5, 5), (9, 1), (40, 7)]):
        q, k, v = _random(3, tokens, 8, seed=seed)
        positions = Positions(torch.zeros(1, dtype=torch.int64), tokens)
        expected = attend_window(*(x[None, :, None] for x in (q, k, v)), positions, 8**-0.5, window, None)[0, :, 0]
        cases.append(((q, k, v, window), expected))
    return first_wrong(attend_to_window, cases, tolerance=1e-5)


def check_2() -> str | None:
    """Against the package's tables of cosines and sines."""
    cases = []
    for seed, (dim, place, theta) in enumerate([(2, 1, 10_000.0), (8, 0, 10_000.0), (16, 300, 1e6), (8, 5, 100.0)]):
        x, rope = _random(dim, seed=seed), RopeConfig(theta=theta)
        cos_and_sin = Positions(torch.tensor([place]), 1).rotary(rope, dim, torch.float32)
        cases.append(((x, place, theta), apply_rotary(x.view(1, 1, 1, dim), *cos_and_sin).flatten()))
    return first_wrong(rotate, cases, tolerance=1e-4)


def check_3() -> str | None:
    """Against the package's router."""
    cases = []
    for seed, (experts, top_k) in enumerate([(4, 1), (8, 2), (6, 6)]):
        scores = 2 * _random(experts, seed=seed)
        router = ExpertRouter(MoEConfig(experts, top_k, 16, scoring="softmax"), hidden_size=1)
        with torch.no_grad():
            router.weight.copy_(scores[:, None])
            chosen, shares = router(torch.ones(1, 1))
        cases.append(((scores, top_k), dict(sorted(zip(chosen[0].tolist(), shares[0].tolist())))))
    for (scores, top_k), expected in cases:
        got = choose_experts(scores, top_k)
        if set(got) != set(expected):
            return f"choose_experts({scores.tolist()}, {top_k}): expected the experts {set(expected)}, got {set(got)}"
        for expert, share in expected.items():
            if abs(float(got[expert]) - share) > 1e-5:
                return (f"choose_experts({scores.tolist()}, {top_k}): expected a share of {share:.4f} for expert "
                        f"{expert}, got {float(got[expert]):.4f}")
    return None
