"""From logits to a token: greedy, temperature, top-k, top-p, the same draw wherever the request runs. Chapter 05."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from minprfaas.config import SamplingParams


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token drawn from `logits` `[vocab]` as the request's output number `position`. The noise depends on the seed,
    the position and the token alone (Gumbel-max: argmax of logits / T + noise is a draw from the softmax), so batching,
    routing and preemption cannot change it."""
    return int(logits.argmax() if params.temperature == 0 else _draw(logits, params, position))


def sample_batch(logits: Tensor, greedy: Tensor, each: Sequence[tuple[SamplingParams, int]]) -> list[int]:
    """`sample` of every row of `logits` `[batch, vocab]`, whose params and position are given, with one transfer from
    the device for all of them. `greedy` `[batch]` is `logits.argmax(dim=-1)`."""
    drawn = {row: _draw(logits[row], params, position)
             for row, (params, position) in enumerate(each) if params.temperature > 0}
    if drawn:
        rows = torch.tensor(list(drawn)).to(greedy.device)
        greedy = greedy.index_copy(0, rows, torch.stack(list(drawn.values())))
    on_host = greedy.to("cpu", non_blocking=True)
    if greedy.is_cuda:
        # Into pinned memory, and waited for here: a copy into other memory holds CUDA's lock until the step has run, so
        # that each call of the threads to which KVCache arrives would take a step.
        torch.cuda.current_stream(greedy.device).synchronize()
    return on_host.tolist()


def _draw(logits: Tensor, params: SamplingParams, position: int) -> Tensor:
    """On the logits' device. The CPU makes the noise, because it is to be the same beside every device; where a GPU
    computes the logits, that happens meanwhile."""
    noise = _gumbel_noise(params.seed, position, logits.shape[0]).to(logits.device, non_blocking=True)
    scores = logits.detach().float() / params.temperature
    return (_keep_top_p(_keep_top_k(scores, params.top_k), params.top_p) + noise).argmax()


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
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # a seed has 63 bits
    # In float64, where 0 hardly ever comes up, and never as 0: its logarithm would be minus infinity.
    uniform = torch.rand(vocab, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log().float()
