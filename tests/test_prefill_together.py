"""Short prompts that share a prefill pass leave what they would have left one by one. Chapter 05."""

import random
from pathlib import Path

import pytest
import torch

from minprfaas import SamplingParams
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config

PARITY = Path(__file__).parent / "fixtures" / "parity"
FIXTURES = sorted(path.parent.name for path in PARITY.glob("*/config.json"))
LENGTHS = (5, 40, 17, 33)


def prefilled(model, shared_tokens: int) -> dict:
    """Four prompts and one that goes on from a cached prefix, which arrive at once."""
    engine = Engine(model, None, pool_for(model, [80] * 8, block_tokens=8), prefill_chunk=512)
    engine.scheduler.shared_tokens = shared_tokens
    rng, params, passes, heard = random.Random(0), SamplingParams(max_tokens=1), [], []
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda chunks, on_kv: passes.append(len(chunks)) or prefill(chunks, on_kv)
    earlier, *prompts = [[rng.randrange(1, model.config.vocab_size) for _ in range(n)] for n in (70, *LENGTHS)]
    requests = []
    for id, prompt in [("earlier", earlier), *zip("abcd", prompts), ("goes on", earlier[:64] + [3] * 9)]:
        requests.append(engine.add(engine.request(id, prompt, params, prefill_only=True)))
        while id == "earlier" and engine.has_work:
            engine.step()
    while engine.has_work:
        engine.step(lambda request, layer, start, end: heard.append((request.id, layer, start, end)))
        engine.kvcache.check()
    pool, state = engine.kvcache.pool, []
    for request in requests:
        for layer, group in enumerate(engine.layout.group_of_layer):
            table = request.cache.block_tables[group.index]
            state.append(pool.read_bytes(layer, table, 0, request.cache.num_tokens).flatten().view(torch.float32))
    assert not pool.bytes[pool.null_block].any()
    return {"passes": passes, "heard": sorted(heard), "state": torch.cat(state),
            "tokens": [request.token_ids[-1] for request in requests], "cached": requests[-1].cached_tokens,
            "snapshots": sorted(engine.kvcache.ledger.snapshots)}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_shared_pass_leaves_every_familys_state_tokens_and_snapshots(name):
    directory = PARITY / name
    model = load_checkpoint(directory, read_config(directory), torch.float32, "cpu")
    alone, together = prefilled(model, 0), prefilled(model, 512)
    assert max(alone["passes"]) == 1 and together["passes"][1] == 5 and together["cached"] == 64
    torch.testing.assert_close(together["state"], alone["state"], atol=1e-4, rtol=1e-4)
    for same in ("tokens", "heard", "cached", "snapshots"):
        assert together[same] == alone[same], same


@pytest.mark.parametrize("shared, passes", [(0, [1, 1, 1, 1]), (40, [1, 1, 1, 1]), (80, [2, 2]), (119, [2, 2]),
                                            (120, [3, 1]), (160, [4])])
def test_prompts_share_a_pass_as_long_as_it_is_no_larger_with_its_padding(models, shared, passes):
    engine = Engine(*models["qwen3"], CacheConfig(40, 8), prefill_chunk=160)
    engine.scheduler.shared_tokens = shared
    for number, length in enumerate(LENGTHS):
        engine.add(engine.request(str(number), [number + 1] * length, SamplingParams(1), prefill_only=True))
    seen, prefill = [], engine.runner.prefill
    engine.runner.prefill = lambda chunks, on_kv: seen.append(len(chunks)) or prefill(chunks, on_kv)
    while engine.has_work:
        engine.step()
    assert seen == passes


def test_a_prompt_that_needs_several_passes_shares_only_its_last_and_nobody_overtakes_it(models):
    engine, seen = Engine(*models["qwen3"], CacheConfig(60, 8), prefill_chunk=32), []
    engine.scheduler.shared_tokens = 32
    for id, length in (("long", 70), ("short", 5), ("next", 6)):
        engine.add(engine.request(id, [1] * length, SamplingParams(1), prefill_only=True))
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda chunks, on_kv: (
        seen.append([(chunk.request.id, chunk.start, chunk.end) for chunk in chunks]) or prefill(chunks, on_kv))
    while engine.has_work:
        engine.step()
    assert seen == [[("long", 0, 32)], [("long", 32, 64)], [("long", 64, 70), ("short", 0, 5), ("next", 0, 6)]]
