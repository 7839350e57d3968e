"""Decode steps one by one, each with its logits, for the tests of the runners."""

import random
from pathlib import Path

import torch

from minprfaas import SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.engine.request import Request
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config

PARITY = Path(__file__).parent / "fixtures" / "parity"
FIXTURES = sorted(path.parent.name for path in PARITY.glob("*/config.json"))


def decoding(name: str, fast: bool | None, dtype: torch.dtype, device: str) -> tuple[Engine, list[Request]]:
    """A fixture's model after the prefill of three prompts."""
    directory = PARITY / name
    model = load_checkpoint(directory, read_config(directory), dtype, device)
    engine = Engine(model, None, pool_for(model, [64] * 3, block_tokens=16), prefill_chunk=64, fast=fast)
    rng, requests = random.Random(0), []
    for number, length in enumerate((5, 40, 17)):
        prompt = [rng.randrange(1, model.config.vocab_size) for _ in range(length)]
        requests.append(engine.add(engine.request(str(number), prompt, SamplingParams(1), prefill_only=True)))
    while engine.has_work:
        engine.step()
    for request in requests:
        engine.kvcache.reserve(request.cache, 64)
    return engine, requests


def rows_of(engine: Engine, requests: list[Request]) -> list[torch.Tensor]:
    """Every layer's state of every request, flat."""
    pool, layout = engine.kvcache.pool, engine.layout
    return [pool.read_bytes(layer, request.cache.block_tables[layout.group_of_layer[layer].index], 0,
                            request.cache.num_tokens).view(torch.float32).flatten()
            for request in requests for layer in range(len(layout.specs))]


def step_logits(engine: Engine, requests: list[Request]) -> torch.Tensor:
    """The logits of a decode step, `[batch, vocab]`; every request gets the same next token."""
    seen = []
    engine.runner._finish_step = lambda batch, logits, greedy: seen.append(logits.clone()) or [0] * len(batch)
    engine.runner.decode(requests)
    for request in requests:
        engine.kvcache.advance(request.cache, request.token_ids)
        request.token_ids.append(5)
    return seen[0]
