"""The transformer against itself: whole, in chunks, token by token, in blocks. Chapter 01."""

import math
from dataclasses import dataclass

import pytest
import torch
from conftest import FAMILIES, SIZES, TINY, write_checkpoint

from minprfaas import SamplingParams, UserError, generate, load
from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, RopeConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model import families
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config
from minprfaas.model.gqa import GQA, GQAConfig
from minprfaas.model.layers import DenseConfig, Positions, RMSNorm, rope_frequencies
from minprfaas.model.mla import MLA, MLAConfig
from minprfaas.model.spec import StateSpec, TensorSpec, model_state_specs
from minprfaas.model.state import ContiguousLayerState, ContiguousState

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


def test_last_only_gives_the_last_logits_and_feeds_the_last_mlp_nothing_else(hybrid):
    """The prompts of a pass may end in padding, too."""
    model, token_ids, fed = hybrid[0], prompt(20, batch=2), []
    expected = model(token_ids)
    manager = new_manager(model)
    caches = [manager.open(token_ids[0].tolist()), manager.open(token_ids[1, :13].tolist())]
    assert manager.reserve(caches[0], 20) and manager.reserve(caches[1], 13)
    hook = model.model.layers[-1].mlp.register_forward_hook(lambda mlp, given, out: fed.append(given[0].shape[1]))
    try:
        torch.testing.assert_close(model(token_ids, last_only=True), expected[:, -1:], **CLOSE)
        padded = model(token_ids, manager.state(caches, [20, 13]), last_only=True)
    finally:
        hook.remove()
    torch.testing.assert_close(padded[0, 0], expected[0, 19], **CLOSE)
    torch.testing.assert_close(padded[1, 0], expected[1, 12], **CLOSE)
    assert fed == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_last_layer_one_prompt_attends_for_its_last_token_alone(models, family):
    model, token_ids, widths = models[family][0], prompt(100), []
    mixers = [layer.self_attn for layer in model.model.layers]
    state, expected = ContiguousState(model.config, "float32"), model(token_ids)[:, -1:]
    hooks = [mixer.o_proj.register_forward_hook(lambda _, given, out: widths.append(given[0].shape[1]))
             for mixer in (mixers[0], mixers[-1])]
    try:
        torch.testing.assert_close(model(token_ids, last_only=True), expected, **CLOSE)
        model(token_ids[:, :70], state, last_only=True)
        state.advance(70)
        torch.testing.assert_close(model(token_ids[:, 70:], state, last_only=True), expected, **CLOSE)
    finally:
        for hook in hooks:
            hook.remove()
    attends = isinstance(mixers[-1], MLA) or isinstance(mixers[-1], GQA) and mixers[-1].config.window is None
    assert widths == [100, 1, 70, 1, 30, 1] if attends else widths[-2:] == [30, 30]


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
    """Within float32 rounding: passes of other lengths multiply matrices of other shapes, with whatever kernels this
    machine has for them. That is little beside what one token more or less changes."""
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
        ended_there, ended_before = (through_contiguous_state(model, token_ids[:, :end], before or 1000)[1].layers
                                     for end in (before + offset, before + offset - 1))
        for layer, *expected in zip(linear, ended_there, ended_before):
            for tensor, there, earlier in zip(layer.snapshots[offset], *(one.tensors for one in expected), strict=True):
                torch.testing.assert_close(tensor, there, **CLOSE)
                assert (there - earlier).abs().max() > 0.1


def test_contiguous_pages_hold_the_rows_of_each_request():
    state = ContiguousLayerState(GQAConfig(2, 1, 4, RopeConfig()).state_spec("float32"), 3, "cpu")
    rows = torch.randn(3, 5, 8)
    state.append(rows[:, :2])
    context = state.append(rows[:, 2:])
    pages = context.pages
    assert torch.equal(context.rows(), rows) and pages.lengths.tolist() == [5, 5, 5]
    for request, (blocks, length) in enumerate(zip(pages.block_table, pages.lengths)):
        assert torch.equal(pages.view[blocks].flatten(0, 1)[:length], rows[request])


@pytest.mark.parametrize("shared", [0, 4])
def test_absorbed_mla_equals_expanded_mla(shared):
    torch.manual_seed(0)
    config = MLAConfig(num_heads=3, kv_lora_rank=16, qk_nope_dim=8, qk_shared_dim=shared, v_dim=12)
    mla = MLA(config, hidden_size=32)
    x, start = torch.randn(2, 30, 32), torch.zeros(2, dtype=torch.int64)
    expanded = mla(x, Positions(start, 30), None)
    state = ContiguousLayerState(config.state_spec("float32"), 2, "cpu")
    absorbed = torch.cat([mla(x[:, t : t + 1], Positions(start + t, 1), state) for t in range(30)], dim=1)
    torch.testing.assert_close(absorbed, expanded, **CLOSE)


def test_rope_frequencies_are_those_of_the_transformers_library_to_the_last_bit():
    wanted = [1.0, 0.03760603070259094, 0.001414213445968926, 5.3182957344688475e-05]  # its Llama: 500,000, 8 channels
    assert rope_frequencies(RopeConfig(500_000.0), 8).tolist() == wanted


def test_llama3_scaling_slows_long_wavelengths_only():
    plain = rope_frequencies(RopeConfig(500_000.0), 64)
    scaled = rope_frequencies(RopeConfig(500_000.0, 1.0, "llama3", 8.0, 1.0, 4.0, 8192), 64)
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


@dataclass(frozen=True)
class DecayedMean:
    """A toy mixer: a running sum that halves at each token. Its state is one row a request."""

    width: int

    def state_spec(self, dtype: str) -> StateSpec:
        return StateSpec(StateKind.REQUEST, (TensorSpec("mean", (self.width,), dtype),))

    def build(self, hidden_size: int, norm_eps: float) -> torch.nn.Module:
        return DecayedMeanMixer(self, hidden_size)


class DecayedMeanMixer(torch.nn.Module):
    def __init__(self, config: DecayedMean, hidden_size: int):
        super().__init__()
        self.width = config.width
        self.v_proj = torch.nn.Linear(hidden_size, config.width, bias=False)
        self.o_proj = torch.nn.Linear(config.width, hidden_size, bias=False)

    def forward(self, x, positions, state):
        mean = state.load()[0] if state is not None else x.new_zeros(len(x), self.width)
        means = []
        for number, value in enumerate(self.v_proj(x).unbind(1), start=1):
            mean = mean / 2 + value
            means.append(mean)
            if state is not None and number in state.snapshot_offsets:
                state.store_snapshot(number, mean)
        if state is not None:
            state.store(mean)
        return self.o_proj(torch.stack(means, dim=1))


def toy_family(raw: dict) -> ModelConfig:
    """One toy layer, then one of grouped-query attention."""
    mixers = (DecayedMean(raw["mean_width"]), GQAConfig(2, 1, 8, RopeConfig()))
    return ModelConfig(raw["model_type"], raw["vocab_size"], raw["hidden_size"],
                       tuple(LayerConfig(mixer, DenseConfig(raw["intermediate_size"])) for mixer in mixers),
                       norm_eps=1e-6, tie_embeddings=False, max_context_tokens=512)


def test_a_family_with_a_mixer_of_its_own_is_one_reader_and_one_class(monkeypatch, tmp_path):
    """Saved, checked, loaded and decoded through pages and prefix cache, and nothing else had to hear of it."""
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family)
    monkeypatch.setitem(TINY, "toy", dict(SIZES, model_type="toy", mean_width=12))
    model, tokenizer = load(write_checkpoint(tmp_path, "toy"))
    text = "a prompt that is long enough to fill a block or two, and to be met again"
    engine = Engine(model, tokenizer, CacheConfig(64, 8, snapshot_every=2), prefill_chunk=40)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for prompt_text, cached_tokens in ((text, 0), (text + " later", 72)):
        request = engine.add(engine.request(prompt_text, prompt_text, params))
        while engine.has_work:
            engine.step()
        assert request.cached_tokens == cached_tokens
        tokens = tokenizer.encode(prompt_text)
        for expected in request.token_ids[len(tokens):]:
            assert model(torch.tensor([tokens]))[0, -1].argmax() == expected
            tokens.append(expected)
        assert tokens == request.token_ids and len(set(tokens[-9:])) > 1
    assert len(generate(model, tokenizer, [text], params)[0].token_ids) == 9
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("12", "13"))
    with pytest.raises(UserError, match=r"layers.0.self_attn.v_proj.weight has shape \[12, 32\]; .* \[13, 32\]"):
        load(tmp_path)
