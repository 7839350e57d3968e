"""The warm-up of `--compile`: what requests need is compiled before the first of them. Chapters 04, 15."""

import copy
import random

import pytest
import torch

from minprfaas import SamplingParams
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.warm_up import compile_and_warm_up
from minprfaas.model.gqa import GQA
from minprfaas.model.kda import KDA
from minprfaas.model.transformer import Layer


@pytest.fixture
def graphs(traced, caplog):
    """How many graphs were traced so far."""
    caplog.set_level("CRITICAL", "torch.__trace")  # else it writes down every step for the log
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


ALL = [(family, fast, True) for family in ("qwen3", "kimi_linear") for fast in (True, None)]


@pytest.mark.parametrize("family, fast, whole", [
    ("qwen3", True, False), *(pytest.param(*case, marks=pytest.mark.heavy) for case in ALL)])
def test_after_the_warm_up_no_request_compiles_anything(models, graphs, monkeypatch, family, fast, whole):
    """Prompts of a token, of several chunks, side by side, from a cached prefix; steps of many batches and pages."""
    if not whole:  # a graph takes a third of a second
        monkeypatch.setattr(GQA, "PIECES", ())
        monkeypatch.setattr(Layer, "PIECES", ("feed", "pass_on"))
    model, tokenizer = copy.deepcopy(models[family][0]), models[family][1]
    compile_and_warm_up(model, tokenizer, block_tokens=16, fast=fast)
    engine = Engine(model, tokenizer, CacheConfig(300, 16), prefill_chunk=64, fast=fast)
    before, rng = graphs(), random.Random(0)
    for lengths in [[1], [20, 30], [64], [100, 180, 200], [1, 40], [17] * 8, [9] * 10, [300] * 2, [5, 6, 7]]:
        prompts = [[rng.randrange(1, 257) for _ in range(length)] for length in lengths]
        for tail in ([], [2] * 7):
            for number, prompt in enumerate(prompts):
                engine.add(engine.request(str(number), prompt + tail, SamplingParams(max_tokens=9, ignore_eos=True)))
            while engine.has_work:
                engine.step()
        assert graphs() == before > 5, f"prompts of {lengths} tokens compiled {graphs() - before} graphs"


def test_a_compiled_step_on_a_cpu_is_sums_alone_and_gives_the_eager_runners_logits(models, graphs):
    """Over pages that lie more and more between those of other requests."""
    seen = []
    for fast in (False, None):
        model, tokenizer = copy.deepcopy(models["llama"][0]), models["llama"][1]
        engine = Engine(model, tokenizer, CacheConfig(60, 4), fast=fast)
        for number in range(3):
            params = SamplingParams(max_tokens=10, ignore_eos=True)
            engine.add(engine.request(str(number), list(range(1, 9 * number + 2)), params))
        while engine.waiting or engine.prefilling:
            engine.step()
        if fast is None:
            compile_pieces(model)
        finish = engine.runner._finish_step
        engine.runner._finish_step = lambda batch, logits, greedy: seen.append(logits) or finish(batch, logits, greedy)
        for _ in range(6):
            engine.step()
        with torch.profiler.profile() as last_step:
            engine.step()
    called = {event.key for event in last_step.key_averages()}
    assert not called & {"aten::mm", "aten::linear", "aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert len(seen) == 14 and graphs() == 7, "layers that are alike share their graphs"
    torch.testing.assert_close(torch.stack(seen[7:]), torch.stack(seen[:7]), atol=1e-4, rtol=0)


def test_what_takes_a_cpu_minutes_to_compile_is_compiled_for_a_gpu_alone(models, graphs):
    model = copy.deepcopy(models["kimi_linear"][0])
    compile_pieces(model)
    mixers = [module for module in model.modules() if isinstance(module, KDA)]
    assert mixers and all({*KDA.PIECES} <= vars(mixer).keys() for mixer in mixers)
    assert not any(name in vars(mixer) for mixer in mixers for name in KDA.GPU_PIECES)
