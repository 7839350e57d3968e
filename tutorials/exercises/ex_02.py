"""The exercises of chapter 02. Fill in the functions, then: python tutorials/02_hybrid_attention.py --check 1"""

import torch
from exercises.checking import first_wrong
from torch import Tensor

from minprfaas.config import RopeConfig
from minprfaas.model.delta import delta_rule_recurrent
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.lightning import lightning_recurrent
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import kv_bytes


def delta_step(memory: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: float) -> Tensor:
    """One token of the delta rule, for one head: the memory `[key_dim, value_dim]` after it. First each key channel
    keeps the share `decay` `[key_dim]` of itself; then what the memory stores under `k` `[key_dim]` moves the share
    `beta` of the way towards `v` `[value_dim]`."""
    raise NotImplementedError


def lightning_by_attention(q: Tensor, k: Tensor, v: Tensor, slope: float) -> Tensor:
    """Lightning attention of one head without any memory: q, k, v `[tokens, dim]` -> `[tokens, dim]`. Token i reads of
    each token j <= i the value v_j, times q_i · k_j, times exp(-slope (i - j)). (Its prefill form, in two products.)"""
    raise NotImplementedError


def layers_to_keep(budget_bytes: int, tokens: int, layers: int, full_bytes: int, linear_bytes: int) -> int:
    """How many of `layers` layers may be full attention, so that a request of `tokens` tokens weighs at most
    `budget_bytes`. A full-attention layer weighs `full_bytes` a token, a linear one `linear_bytes` in all; here the
    former is the heavier for that many tokens. -1 if not even a model without full attention is light enough."""
    raise NotImplementedError


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_1() -> str | None:
    """Against the package's recurrence."""
    cases = []
    for seed, (key_dim, value_dim, beta) in enumerate([(2, 1, 1.0), (4, 3, 0.5), (8, 8, 0.0)]):
        memory, v = _random(key_dim, value_dim, seed=seed), _random(value_dim, seed=seed + 10)
        k = torch.nn.functional.normalize(_random(key_dim, seed=seed + 20), dim=0)
        g = -_random(key_dim, seed=seed + 30).abs()
        inputs = [x.view(1, 1, 1, -1) for x in (k, k, v, g)]
        after = delta_rule_recurrent(*inputs, torch.full((1, 1, 1), beta), memory[None, None])[1][0, 0]
        cases.append(((memory, k, v, g.exp(), beta), after))
    return first_wrong(delta_step, cases, tolerance=1e-5)


def check_2() -> str | None:
    """Against the package's recurrence."""
    cases = []
    for seed, (tokens, dim, slope) in enumerate([(1, 2, 0.1), (6, 4, 0.0), (30, 8, 0.3)]):
        q, k, v = _random(3, tokens, dim, seed=seed)
        inputs = [x[None, :, None] for x in (q, k, v)]
        out = lightning_recurrent(*inputs, torch.tensor([slope]), torch.zeros(1, 1, dim, dim))[0][0, :, 0]
        cases.append(((q, k, v, slope), out))
    return first_wrong(lightning_by_attention, cases, tolerance=1e-4)


def check_3() -> str | None:
    """Against the package's S_kv of every mixture."""
    kda = KDAConfig(num_heads=32, head_dim=128).state_spec("bfloat16")
    gqa = GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig()).state_spec("bfloat16")
    mla = MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128).state_spec("bfloat16")
    cases = []
    for budget, tokens, layers, full in [(300 * 2**20, 32_768, 27, mla), (300 * 2**20, 32_768, 27, gqa),
                                         (40 * 2**20, 8192, 27, gqa), (4 * 2**30, 131_072, 16, mla)]:
        weights = [kv_bytes((full,) * count + (kda,) * (layers - count), tokens) for count in range(layers + 1)]
        most = sum(weight <= budget for weight in weights) - 1
        cases.append(((budget, tokens, layers, full.nbytes, kda.nbytes), most))
    return first_wrong(layers_to_keep, cases)
