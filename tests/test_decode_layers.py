"""The two pieces of a decode step's layer: the eager layer's logits, compiled or not. Chapters 04, 05."""

from collections import Counter

import pytest
import torch
from step_support import PARITY, decoding, rows_of, step_logits

from minprfaas.config import RopeConfig
from minprfaas.engine import decode_layers
from minprfaas.engine.decode_layers import in_two_pieces
from minprfaas.engine.pieces import choose_by_kernels, compile_pieces
from minprfaas.engine.prefill_graphs import compiled_segments
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import Positions, Projecting, heads_at_once


@pytest.mark.parametrize("name, whole", [("qwen3", 0), ("qwen3_next", 3), ("mimo_v2_flash", 2), ("minimax", 4)])
def test_layers_with_attention_to_pages_run_in_two_pieces_and_the_others_whole(name, whole):
    """A window, a state of one size, or a residual sum that wants more than a layer's result is beyond the pieces."""
    engine, requests = decoding(name, True, torch.float32, "cpu")
    layers, called = engine.model.model.layers, []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: called.append(1))
    step_logits(engine, requests)
    assert len(called) == whole == sum(not in_two_pieces(layer) for layer in layers)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-scaled_biased_tied", "qwen3", "qwen3_5_text"])
def test_a_captured_step_in_two_pieces_gives_the_eager_runners_logits(name, is_compiled):
    """In bfloat16, in which the flash kernel reads the pages; the same tokens in both, whatever was drawn."""
    eager, fast = (decoding(name, is_fast, torch.bfloat16, "cuda") for is_fast in (False, True))
    if is_compiled:
        compile_pieces(fast[0].model)
    for count in (3, 3, 1, 1):
        expected, found = (step_logits(engine, requests[:count]).float() for engine, requests in (eager, fast))
        assert ((found - expected).norm() / expected.norm()).item() < 5e-2


@pytest.mark.parametrize("name, is_joined", [("qwen3", True), ("llama-scaled_biased_tied", False)])
def test_a_compiled_step_of_one_request_sums_its_norms_beside_its_products(name, is_joined, traced, monkeypatch):
    """Each layer's first where its projections are one weight, its MLP's beside two, and the logits'; the norms of more
    requests come before their products."""
    beside, inner = [], decode_layers.normed_products

    def counted(*given):
        beside.append(len(given) - 2)
        return inner(*given)

    monkeypatch.setattr(decode_layers, "normed_products", counted)
    eager, fast = (decoding(name, is_fast, torch.float32, "cpu") for is_fast in (False, True))
    for module in fast[0].model.modules():
        if isinstance(module, Projecting):
            module.join()
    compile_pieces(fast[0].model)
    layers = len(fast[0].model.model.layers)
    for count in (3, 1, 1):
        expected, found = (step_logits(engine, requests[:count]) for engine, requests in (eager, fast))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert Counter(beside) == ({1: layers * is_joined + 1, 2: layers} if count == 1 else {})
        beside.clear()
    fast[0].runner.settle()
    torch.testing.assert_close(*(torch.cat(rows_of(*each)) for each in (eager, fast)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_all_heads_at_once_are_those_of_the_three_projections(qk_norm):
    """The values to the last bit, because nothing is done to them."""
    torch.manual_seed(0)
    config = GQAConfig(num_heads=6, num_kv_heads=2, head_dim=16, rope=RopeConfig(fraction=0.5), qk_norm=qk_norm)
    mixer = config.build(32, 1e-6)
    norms = None if qk_norm is None else (mixer.q_norm, mixer.k_norm)
    for norm in norms or ():
        norm.weight.data.uniform_(0.5, 1.5)
    cos, sin = Positions(torch.tensor([7, 0]), 5).rotary(config.rope, 16, torch.float32)
    product = torch.randn(2, 5, 10 * 16)
    q, rows, _ = mixer.heads(*mixer.apart(product), cos, sin)
    found_q, found_rows = heads_at_once(product, 6, 16, norms, cos, sin)
    torch.testing.assert_close(found_q, q)
    torch.testing.assert_close(found_rows, rows)
    assert torch.equal(found_rows[..., 32:], product[..., 128:])


@torch.inference_mode()
def test_a_compiled_pass_takes_all_heads_at_once(traced, monkeypatch):
    """And it gives the logits of one that does not."""
    taken = []
    monkeypatch.setattr("minprfaas.model.gqa.heads_at_once", lambda *given: taken.append(1) or heads_at_once(*given))
    model = load_checkpoint(PARITY / "qwen3", read_config(PARITY / "qwen3"), torch.float32, "cpu")
    token_ids = torch.arange(1, 20)[None]
    expected = model(token_ids)
    for module in model.modules():
        if isinstance(module, Projecting):
            module.join()
    compile_pieces(model)
    torch.testing.assert_close(model(token_ids), expected, atol=1e-5, rtol=0)
    assert taken


@pytest.mark.parametrize("asked_by", [choose_by_kernels, lambda: compiled_segments().keywords["compiled"](lambda x: x)],
                         ids=["a model", "a delta rule without a model"])
def test_before_a_kernel_is_timed_a_gpu_fills_more_than_it_has_done_before_the_launch(asked_by):
    """As the installed inductor reads it; by another name it would be overlooked without a word."""
    from torch._inductor.runtime.benchmarking import InductorBenchmarker, benchmarker

    if not isinstance(benchmarker, InductorBenchmarker):
        pytest.skip("this inductor has another way to time kernels where there is no GPU")
    asked_by()
    try:
        # torch 2.13 asks its method, 2.11 the attribute
        filled = getattr(benchmarker, "get_device_cache_size", lambda: benchmarker.L2_cache_size)()
        assert filled == 2**28
    finally:
        vars(benchmarker).pop("L2_cache_size", None)
