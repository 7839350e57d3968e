"""From logits to a token: greedy, temperature, top-k, top-p, the same draw wherever the request runs. Chapter 04."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minprfaas.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        checks = (
            ("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, "a whole number of at least 1"),
            ("temperature", _is_number(self.temperature) and 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0, "a whole number of at least 0"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", _is_int(self.seed) and abs(self.seed) < 2**63, "a whole number of at most 63 bits"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "one or more non-empty strings"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"))
        for name, holds, rule in checks:
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token drawn from `logits` `[vocab]` as the request's output number `position`.

    The noise depends on the seed, the position and the token alone (Gumbel-max: argmax of logits / T + noise is a draw
    from the softmax), so batching, routing and preemption cannot change it.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    scores = logits.detach().float().cpu() / params.temperature
    scores = _keep_top_p(_keep_top_k(scores, params.top_k), params.top_p)
    return int((scores + _gumbel_noise(params.seed, position, scores.shape[0])).argmax())


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < scores.shape[0]:
        return scores
    kept = torch.full_like(scores, float("-inf"))
    values, ids = scores.topk(top_k)
    return kept.scatter(0, ids, values)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """The most likely tokens whose probabilities first sum to `top_p`; the likeliest always stays."""
    if top_p >= 1:
        return scores
    ordered, ids = scores.sort(descending=True)
    probabilities = ordered.softmax(dim=0)
    beyond = probabilities.cumsum(dim=0) - probabilities >= top_p
    return torch.full_like(scores, float("-inf")).scatter(0, ids, ordered.masked_fill(beyond, float("-inf")))


def _gumbel_noise(seed: int, position: int, vocab: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    uniform = torch.rand(vocab, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log().float()


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
