"""The single-process reference: prompts in, answers out. Everything distributed is held against this. Chapter 04."""

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import RequestOutput, TokenUpdate
from minprfaas.engine.sampling import SamplingParams
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.spec import model_state_specs
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer


def generate(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str | list[int]],
             params: SamplingParams | Sequence[SamplingParams] | None = None, cache: CacheConfig | None = None,
             prefill_chunk: int = 1024, progress: bool = False,
             on_token: Callable[[TokenUpdate], None] | None = None) -> list[RequestOutput]:
    """Answers to `prompts` (texts or token ids), in their order. Raises UserError before any is computed.

    `params` is one for all or one for each; `cache` None sizes the pool for the prompts; `on_token` sees every token
    as it is drawn.
    """
    params = params if params is not None else SamplingParams()
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
    token_ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    lengths = [len(ids) + one.max_tokens for ids, one in zip(token_ids, each)]
    engine = Engine(model, tokenizer, cache or pool_for(model, lengths), prefill_chunk)
    requests = [engine.request(str(number), ids, one) for number, (ids, one) in enumerate(zip(token_ids, each))]
    for request in requests:
        engine.add(request)
    with tqdm(total=len(requests), unit="answer", disable=None if progress else True, leave=False) as bar:
        while engine.has_work:
            for update in engine.step():
                bar.update(update.request.finish_reason is not None)
                if on_token is not None:
                    on_token(update)
    return [RequestOutput.of(request) for request in requests]


def pool_for(model: Transformer, lengths: list[int], block_tokens: int = 64,
             limit_bytes: int | None = None) -> CacheConfig:
    """A pool in which requests of these lengths fit side by side, each with room for two snapshots of its request-level
    state; past `limit_bytes` (None: 2 GiB, on a GPU 40% of what is free), one in which the longest fits at least."""
    if limit_bytes is None:
        limit_bytes = torch.cuda.mem_get_info(model.device)[0] * 2 // 5 if model.device.type == "cuda" else 2 * 2**30
    layout = plan_layout(model_state_specs(model.config, str(model.dtype).removeprefix("torch.")), block_tokens)
    context = model.config.max_context_tokens
    needs = [layout.blocks_for(min(length, context)) + 2 * layout.state_blocks for length in lengths or [1]]
    most = max(limit_bytes // layout.block_bytes, max(needs))
    return CacheConfig(num_blocks=min(sum(needs), most), block_tokens=block_tokens)
