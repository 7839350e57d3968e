"""Timing one model on one device: the points that a profile is made of. Chapter 10; paper 2.1 and table 5."""

import time
from dataclasses import replace
from statistics import median

import torch
from tqdm import tqdm

from minprfaas.config import SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.errors import UserError
from minprfaas.model.spec import kv_bytes
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer


def measure_prefill(model: Transformer, tokenizer: Tokenizer, lengths: list[int], repeats: int,
                    prefill_chunk: int | None) -> list[tuple[int, int, float]]:
    """(tokens, KVCache bytes S_kv, median prefill seconds T_prefill) for each length; nothing is cached between."""
    engine = _engine(model, tokenizer, [max(lengths)], prefill_chunk, max_batch=1)
    points = []
    with tqdm(total=len(lengths) * (repeats + 1), desc="prefill", unit="run", disable=None, leave=False) as bar:
        for tokens in lengths:
            seconds = []
            for run in range(repeats + 1):  # the first one warms up
                prompt = _random_prompt(model, tokens)
                engine.add(engine.request(f"{tokens}/{run}", prompt, SamplingParams(max_tokens=1)))
                _settle(model)
                began_at_s = time.perf_counter()
                while engine.has_work:
                    engine.step()
                _settle(model)
                seconds.append(time.perf_counter() - began_at_s)
                bar.update()
            points.append((tokens, kv_bytes(engine.layout.specs, tokens), median(seconds[1:])))
    return points


def measure_decode(model: Transformer, tokenizer: Tokenizer, batch: int, context: int, steps: int) -> float:
    """Median seconds of a decode step (T_decode) with `batch` requests of about `context` tokens."""
    engine = _engine(model, tokenizer, [context + steps + 2] * batch, prefill_chunk=None, max_batch=batch)
    params = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
    for number in range(batch):
        engine.add(engine.request(str(number), _random_prompt(model, context), params))
    while engine.waiting or engine.prefilling:
        engine.step()
    seconds = []
    for _ in tqdm(range(steps), desc="decode", unit="step", disable=None, leave=False):
        if not engine.running:
            break
        began_at_s = time.perf_counter()
        engine.step()
        _settle(model)
        seconds.append(time.perf_counter() - began_at_s)
    if not seconds:
        raise UserError(f"decode of {batch} requests ended before a step could be timed; take fewer requests")
    return median(seconds)


def _engine(model: Transformer, tokenizer: Tokenizer, lengths: list[int], prefill_chunk: int | None,
            max_batch: int) -> Engine:
    """An engine that caches no prefix: every prompt is computed whole."""
    cache = replace(pool_for(model, [length + 1 for length in lengths]), prefix_cache=False)
    return Engine(model, tokenizer, cache, prefill_chunk, max_batch)


def _random_prompt(model: Transformer, tokens: int) -> list[int]:
    return torch.randint(0, model.config.vocab_size, (tokens,)).tolist()


def _settle(model: Transformer) -> None:
    """Wait for the device: a GPU's kernels run on after the call that started them has returned."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
