"""The transformer against Hugging Face's numbers, and against itself: whole, in chunks, token by token, in blocks."""

import math
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file

from minprfaas.config import CacheConfig, RopeConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import Positions, RMSNorm, rope_frequencies
from minprfaas.model.mla import MLA, MLAConfig
from minprfaas.model.spec import model_state_specs
from minprfaas.model.state import ContiguousLayerState, ContiguousState

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(atol=1e-4, rtol=1e-4)


def prompt(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 257, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def through_contiguous_state(model, token_ids, chunk):
    """Logits of every token, and the state, when the prompt passes in chunks."""
    state, pieces = ContiguousState(model.config, "float32", batch=len(token_ids)), []
    for piece in token_ids.split(chunk, dim=1):
        pieces.append(model(piece, state))
        state.advance(piece.shape[1])
    return torch.cat(pieces, dim=1), state


def new_manager(model, num_blocks=64, block_tokens=8):
    layout = plan_layout(model_state_specs(model.config, "float32"), block_tokens)
    return KVCacheManager(layout, CacheConfig(num_blocks, block_tokens, prefix_cache=False), "cpu", model.fingerprint)


def through_blocks(model, manager, cache, token_ids, chunk):
    """Logits of every token when the prompt passes in chunks, its state in blocks of the pool."""
    ids, pieces = token_ids[0].tolist(), []
    while cache.num_tokens < len(ids):
        start, end = cache.num_tokens, min(cache.num_tokens + chunk, len(ids))
        assert manager.reserve(cache, end)
        pieces.append(model(token_ids[:, start:end], manager.state([cache])))
        manager.advance(cache, ids[:end])
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists()))
def test_logits_are_those_of_hugging_face_transformers(name):
    model = load_checkpoint(GOLDEN / name, read_config(GOLDEN / name), torch.float32, "cpu")
    expected = load_file(GOLDEN / f"{name}.logits.safetensors")
    torch.testing.assert_close(model(expected["token_ids"]), expected["logits"], atol=1e-4, rtol=0)


def test_every_golden_family_is_there():
    assert {read_config(path.parent).family for path in GOLDEN.glob("*/config.json")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 149])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt(models, family, chunk):
    model = models[family][0]
    token_ids = prompt(150, batch=2)
    chunked, state = through_contiguous_state(model, token_ids, chunk)
    torch.testing.assert_close(chunked, model(token_ids), **CLOSE)
    whole_state = through_contiguous_state(model, token_ids, 150)[1]
    for layer, whole_layer in zip(state.layers, whole_state.layers):
        for tensor, whole_tensor in zip(layer.tensors, whole_layer.tensors):
            torch.testing.assert_close(tensor, whole_tensor, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, 8, 50, 93])
def test_state_in_blocks_gives_the_logits_of_contiguous_state(models, family, chunk):
    model = models[family][0]
    token_ids = prompt(93, seed=1)
    manager = new_manager(model)
    manager.pool.bytes[: manager.pool.num_blocks].fill_(0x7F)  # what a block held before must not show
    stranger = manager.open([1])
    assert manager.reserve(stranger, 11)  # so that the block table does not begin at block 0
    paged = through_blocks(model, manager, manager.open(token_ids[0].tolist()), token_ids, chunk)
    torch.testing.assert_close(paged, through_contiguous_state(model, token_ids, chunk)[0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_batch_of_unequal_lengths_gives_the_logits_of_each_alone(models, family):
    model = models[family][0]
    manager, lengths = new_manager(model), [3, 40, 8, 17]
    prompts = [prompt(length + 1, seed=length) for length in lengths]
    caches = [manager.open(one[0].tolist()) for one in prompts]
    for one, cache in zip(prompts, caches):
        through_blocks(model, manager, cache, one[:, :-1], chunk=16)
        assert manager.reserve(cache, one.shape[1])
    together = model(torch.cat([one[:, -1:] for one in prompts]), manager.state(caches))
    for one, logits in zip(prompts, together):
        torch.testing.assert_close(logits[-1], model(one)[0, -1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_no_earlier_logit(models, family):
    model, token_ids = models[family][0], prompt(100)
    changed = token_ids.clone()
    changed[0, 70] = token_ids[0, 70] % 256 + 1
    before, after = model(token_ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:70], after[:70], **CLOSE)
    assert (before[-1] - after[-1]).abs().max() > 1e-2  # and the last token does see token 70


def test_last_only_gives_the_last_logits(hybrid):
    model, token_ids = hybrid[0], prompt(20)
    torch.testing.assert_close(model(token_ids, last_only=True), model(token_ids)[:, -1:], **CLOSE)


def test_on_layer_is_called_once_the_layers_state_holds_the_tokens(hybrid):
    model = hybrid[0]
    state, seen = ContiguousState(model.config, "float32"), []

    def on_layer(index):
        seen.append((index, [tensor.abs().sum().item() > 0 for layer in state.layers for tensor in layer.tensors[:1]]))

    model(prompt(20), state, on_layer=on_layer)
    assert seen == [(0, [True, False, False, False]), (1, [True, True, False, False]), (2, [True, True, True, False]),
                    (3, [True, True, True, True])]


@pytest.mark.parametrize("before", [0, 37])
def test_a_snapshot_inside_a_pass_is_the_state_of_a_pass_that_ends_there(hybrid, before):
    """Within float32 rounding: passes of other lengths multiply matrices of other shapes."""
    model, token_ids = hybrid[0], prompt(before + 200, batch=2)
    state = through_contiguous_state(model, token_ids[:, :before], 100)[1] if before else (
        ContiguousState(model.config, "float32", batch=2))
    linear = [layer for layer, spec in zip(state.layers, model_state_specs(model.config, "float32"))
              if spec.kind is StateKind.REQUEST]
    for layer in linear:
        layer.snapshot_offsets = (64, 192, 200)
    model(token_ids[:, before:], state)
    assert linear and all(set(layer.snapshots) == {64, 192, 200} for layer in linear)
    for offset in (64, 192, 200):
        ended_there = through_contiguous_state(model, token_ids[:, : before + offset], before or 1000)[1]
        for layer, expected in zip(linear, ended_there.layers):
            for tensor, expected_tensor in zip(layer.snapshots[offset], expected.tensors, strict=True):
                torch.testing.assert_close(tensor, expected_tensor, atol=2e-6, rtol=1e-5)
                assert tensor.abs().max() > 0.01


def test_contiguous_pages_hold_the_rows_of_each_request():
    state = ContiguousLayerState(GQAConfig(2, 1, 4, RopeConfig()).state_spec("float32"), 3, "cpu")
    rows = torch.randn(3, 5, 8)
    state.append(rows[:, :2])
    handle = state.append(rows[:, 2:])
    pages = handle.pages()
    assert torch.equal(handle.rows(), rows) and pages.lengths.tolist() == [5, 5, 5]
    for request, (blocks, length) in enumerate(zip(pages.block_table, pages.lengths)):
        assert torch.equal(pages.view[blocks].flatten(0, 1)[:length], rows[request])


@pytest.mark.parametrize("shared", [0, 4])
def test_absorbed_mla_equals_expanded_mla(shared):
    torch.manual_seed(0)
    config = MLAConfig(num_heads=3, kv_lora_rank=16, qk_nope_dim=8, qk_shared_dim=shared, v_dim=12)
    mla = MLA(config, hidden_size=32, norm_eps=1e-6)
    x, start = torch.randn(2, 30, 32), torch.zeros(2, dtype=torch.int64)
    expanded = mla(x, Positions(start, 30), None)
    state = ContiguousLayerState(config.state_spec("float32"), 2, "cpu")
    absorbed = torch.cat([mla(x[:, t : t + 1], Positions(start + t, 1), state) for t in range(30)], dim=1)
    torch.testing.assert_close(absorbed, expanded, **CLOSE)


def test_llama3_scaling_slows_long_wavelengths_only():
    plain = rope_frequencies(RopeConfig(500_000.0), 64)
    scaled = rope_frequencies(RopeConfig(500_000.0, (8.0, 1.0, 4.0, 8192)), 64)
    turns = 8192 * plain / (2 * math.pi)
    fast, slow = turns > 4, turns < 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    torch.testing.assert_close(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    between = ~(fast | slow)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_rope_scores_depend_on_the_distance_alone(models):
    """A dense model sees the same prompt at another place of the context: shift all positions, same logits."""
    model, token_ids = models["llama"][0], prompt(20)
    moved = ContiguousState(model.config, "float32")
    moved.start = moved.start + 300  # position 300 on, and nothing before it in the state
    torch.testing.assert_close(model(token_ids, moved), model(token_ids), atol=1e-3, rtol=1e-3)


def test_rms_norm_computes_in_float32_whatever_comes_in():
    norm = RMSNorm(8, eps=0.0).to(torch.float16)
    out = norm(torch.full((1, 8), 300.0, dtype=torch.float16))  # 300 squared is beyond float16
    torch.testing.assert_close(out, torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(checkpoints, models, family):
    directory = checkpoints[family]
    half = load_checkpoint(directory, read_config(directory), torch.bfloat16, "cpu")
    exact, rough = models[family][0](prompt(50)), half(prompt(50)).float()
    assert half.dtype == torch.bfloat16 and torch.isfinite(rough).all()
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).mean() > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_gives_the_logits_of_the_cpu(checkpoints, models, family):
    directory = checkpoints[family]
    model = load_checkpoint(directory, read_config(directory), torch.float32, "cuda")
    torch.testing.assert_close(model(prompt(150).cuda()).cpu(), models[family][0](prompt(150)), atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_cuda_is_finite_and_chunks_agree(checkpoints, family):
    directory = checkpoints[family]
    model = load_checkpoint(directory, read_config(directory), torch.bfloat16, "cuda")
    token_ids = prompt(150).cuda()
    state = ContiguousState(model.config, "bfloat16", device="cuda")
    first = model(token_ids[:, :70], state)
    state.advance(70)
    chunked = torch.cat([first, model(token_ids[:, 70:], state)], dim=1).float()
    assert torch.isfinite(chunked).all()
    assert torch.nn.functional.cosine_similarity(chunked, model(token_ids).float(), dim=-1).mean() > 0.95
