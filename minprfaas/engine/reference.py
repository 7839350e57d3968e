"""The single-process reference: prompts in, answers out. Everything distributed is held against this. Chapter 04."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minprfaas.config import CacheConfig, SamplingParams, block_tokens_for
from minprfaas.engine.engine import Engine, model_layout, token_ids_of
from minprfaas.engine.prompts import Prompt
from minprfaas.engine.request import Request, TokenUpdate
from minprfaas.errors import UserError
from minprfaas.model.state import ContiguousState
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer

OnToken = Callable[[TokenUpdate], None]


@dataclass(frozen=True)
class RequestOutput:
    """A finished answer (see `Request`); `token_ids` includes the ending token."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    length_limit: str | None
    ttft_s: float
    decode_tokens_per_s: float

    @staticmethod
    def of(request: Request) -> "RequestOutput":
        """The output of a finished request."""
        token_ids, decode_s = request.output_ids, request.finished_at_s - request.first_token_at_s
        return RequestOutput(
            request.id, request.prompt_tokens, request.cached_tokens, token_ids, request.text, request.finish_reason,
            request.length_limit, ttft_s=request.first_token_at_s - request.arrived_at_s,
            decode_tokens_per_s=(len(token_ids) - 1) / decode_s if decode_s > 0 else 0.0)


def generate(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str | list[int]],
             params: SamplingParams | Sequence[SamplingParams] | None = None, cache: CacheConfig | None = None,
             prefill_chunk: int | None = None, progress: bool = False,
             on_token: OnToken | None = None) -> list[RequestOutput]:
    """Answers to `prompts` (texts or token ids), in their order. Raises UserError before any is computed. `params` is
    one for all or one for each; `cache` None sizes the pool for the prompts; `on_token` sees each token when drawn."""
    params = SamplingParams() if params is None else params
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
    lines = [Prompt(str(number), prompt, one) for number, (prompt, one) in enumerate(zip(prompts, each))]
    return answer_prompts(model, tokenizer, lines, cache, prefill_chunk, progress, on_token)


def answer_prompts(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt],
                   cache: CacheConfig | None = None, prefill_chunk: int | None = None, progress: bool = False,
                   on_token: OnToken | None = None) -> list[RequestOutput]:
    """Answers to the lines of a prompts file, in their order; one that comes "after" another continues it, so it begins
    when that has ended. Raises UserError before any is computed. Options as in `generate`; a pool that `cache` makes
    too small for a whole answer ends it early (`length`, by the limit `pool`)."""
    longest = longest_prompts(prompts, tokenizer, model.config.max_context_tokens)
    lengths = [longest[prompt.id] + prompt.params.max_tokens for prompt in prompts]
    engine = Engine(model, tokenizer, cache or pool_for(model, lengths), prefill_chunk)
    for prompt in prompts:
        engine.check_length(prompt.id, longest[prompt.id])
    requests: dict[str, Request] = {}  # by id; one that continues another is made only when its history is known

    def submit_after(before: Request | None) -> None:
        for prompt in prompts:
            if prompt.after == (before.id if before else None):
                history = before.token_ids if before else []
                request = engine.request(prompt.id, history + token_ids_of(prompt.text, tokenizer), prompt.params)
                requests[prompt.id] = engine.add(request)

    submit_after(None)
    with tqdm(total=len(prompts), unit="answer", disable=None if progress else True, leave=False) as bar:
        while engine.has_work:
            for update in engine.step():
                if on_token is not None:
                    on_token(update)
                if update.finish_reason is not None:
                    bar.update()
                    submit_after(update.request)
    return [RequestOutput.of(requests[prompt.id]) for prompt in prompts]


def longest_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer, most: int) -> dict[str, int]:
    """Tokens of each prompt with all that it comes after, by id, if every answer before it becomes as long as it may;
    none grows beyond `most` tokens (the context)."""
    tokens: dict[str, int] = {}
    after_answer = {None: 0}
    for prompt in prompts:
        tokens[prompt.id] = after_answer[prompt.after] + len(token_ids_of(prompt.text, tokenizer))
        after_answer[prompt.id] = min(tokens[prompt.id] + prompt.params.max_tokens, most)
    return tokens


@torch.inference_mode()
def logit_gap(model: Transformer, token_ids: list[int], first: int, second: int, chunk: int = 1024) -> float:
    """How far apart the logits of two tokens are after `token_ids`. Two answers that part at a gap near zero part at a
    tie, which another order of the same sums decides; at a wide gap, one of them is wrong. Whole tensors and no pool,
    so that nothing which may have done damage takes part in judging it."""
    state = ContiguousState(model.config, str(model.dtype).removeprefix("torch."), device=model.device)
    for start in range(0, len(token_ids), chunk):
        chunk_ids = torch.tensor([token_ids[start:start + chunk]], device=model.device)
        logits = model(chunk_ids, state, last_only=True)[0, -1]
        state.advance(chunk_ids.shape[1])
    return abs(float(logits[first]) - float(logits[second]))


def pool_for(model: Transformer, lengths: list[int], block_tokens: int | None = None,
             limit_bytes: int | None = None) -> CacheConfig:
    """A pool in which requests of these lengths fit side by side, each with room for two snapshots of its request-level
    state; past `limit_bytes` (None: 2 GiB, on a GPU 40% of what is free), one in which the longest fits at least."""
    if limit_bytes is None:
        on_gpu = model.device.type == "cuda"
        limit_bytes = torch.cuda.mem_get_info(model.device)[0] * 2 // 5 if on_gpu else 2 * 2**30
    if block_tokens is None:
        block_tokens = block_tokens_for(model.device.type)
    layout = model_layout(model, block_tokens)
    context = model.config.max_context_tokens
    needs = [layout.blocks_for(min(length, context)) + 2 * layout.state_blocks for length in lengths or [1]]
    most = max(limit_bytes // layout.block_bytes, max(needs))  # past the limit requests queue; the longest must fit
    return CacheConfig(num_blocks=min(sum(needs), most), block_tokens=block_tokens)
