"""Reading `config.json`: what is understood, and what is refused in one line. Chapters 00 and 01."""

import copy
import json

import pytest
import torch
from conftest import FAMILIES, TINY

from minprfaas.config import CacheConfig, LineConfig, LinkConfig, RopeConfig
from minprfaas.errors import UserError
from minprfaas.model.families import config_from_hf, read_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.transformer import Transformer

LLAMA = {"vocab_size": 257, **TINY["llama"]}
KIMI = {"vocab_size": 257, **TINY["kimi_linear"]}
LINEAR = KIMI["linear_attn_config"]


def test_a_llama_config_becomes_a_stack_of_gqa_layers():
    config = config_from_hf({**LLAMA, "rope_theta": 5e5, "attention_bias": True})
    mixer = GQAConfig(4, 2, 8, RopeConfig(5e5), bias=True, out_bias=True)
    assert [layer.mixer for layer in config.layers] == [mixer] * 2
    assert (config.max_context_tokens, config.eos_token_ids, config.tie_embeddings) == (512, (0,), False)


def test_a_kimi_config_lays_out_linear_and_full_layers_by_number():
    config = config_from_hf(KIMI)
    assert [type(layer.mixer) for layer in config.layers] == [KDAConfig, KDAConfig, KDAConfig, MLAConfig]
    assert config.layers[3].mixer == MLAConfig(4, 16, 8, 4, 8)


def test_old_and_new_spellings_of_rope_mean_the_same():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    old = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}})
    new = config_from_hf({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new and old.layers[0].mixer.rope == RopeConfig(5e5, 1.0, "llama3", 8.0, 1.0, 4.0, 64)


def test_generation_config_adds_the_end_of_text_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert read_config(tmp_path).eos_token_ids == (3, 5)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="gpt2"), ["'gpt2'", "supported: bailing_hybrid, bailing_moe_v2_5, kimi_linear, llama, m"]),
    (dict(model_type=None), ["None", "supported"]),
    (dict(hidden_act="gelu"), ["hidden_act", "'gelu'", "silu"]),
    (dict(mlp_bias=True), ["mlp_bias"]),
    (dict(num_key_value_heads=3), ["num_attention_heads 4", "num_key_value_heads 3"]),
    (dict(head_dim=7), ["head_dim 7"]),
    (dict(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ["'dynamic'", "default, linear, llama3, yarn"]),
    (dict(rope_scaling={"rope_type": "llama3"}), ["'factor'"]),
])
def test_a_llama_config_that_cannot_be_run_is_refused(change, words):
    _refused({**LLAMA, **change}, words)


@pytest.mark.parametrize("change, words", [
    (dict(first_k_dense_replace=1), ["moe_intermediate_size"]),
    (dict(q_lora_rank=-1), ["q_lora_rank is -1"]),
    (dict(mlp_layer_types=["dense", "wide"] * 2), ["mlp_layer_types", "'wide'", "dense, sparse"]),
    (dict(layer_types=["full_attention"]), ["layer_types", "num_hidden_layers 4"]),
    (dict(linear_attn_config=None), []),
    (dict(linear_attn_config={**LINEAR, "kda_layers": [1, 2]}), ["[1, 2, 4]", "1 to 4"]),
    (dict(linear_attn_config={**LINEAR, "kda_layers": [1, 2, 3, 4]}), ["[1, 2, 3, 4, 4]"]),
    (dict(linear_attn_config={**LINEAR, "short_conv_kernel_size": 1}), ["short_conv_kernel_size is 1"]),
])
def test_a_kimi_config_that_cannot_be_run_is_refused(change, words):
    _refused({**KIMI, **change}, words)


def test_sliding_windows_are_refused_rather_than_ignored():
    _refused({"vocab_size": 257, **TINY["qwen3"], "use_sliding_window": True}, ["use_sliding_window"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_field_is_named(family):
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        raw = {"vocab_size": 257, **TINY[family]}
        del raw[name]
        _refused(raw, [repr(name), repr(family)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "many", [], {}, [1], True])
def test_a_nonsense_value_never_gives_a_traceback(family, value):
    """Every field of every family in turn, nested ones too: either it is understood or it is one line."""
    raw = {"vocab_size": 257, "rope_scaling": {"rope_type": "default"}, **TINY[family]}
    fields = [(name,) for name in raw]
    fields += [(name, inner) for name in raw if isinstance(raw[name], dict) for inner in raw[name]]
    for path in fields:
        damaged = copy.deepcopy(raw)
        place = damaged
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        try:
            with torch.device("meta"):
                Transformer(config_from_hf(damaged))
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("text, words", [
    (None, ["config.json", "is missing"]),
    ("{", ["config.json", "cannot be read as JSON"]),
    ("[1]", ["config.json", "list, not an object"]),
    (b"\xff\xfe", ["config.json", "cannot be read as JSON"]),
])
def test_a_config_file_that_cannot_be_read_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("make, words", [
    (lambda: CacheConfig(0), ["num_blocks is 0"]),
    (lambda: CacheConfig(4, block_tokens=0), ["block_tokens is 0"]),
    (lambda: LineConfig(gbps=0), ["bandwidth in Gbps is 0"]),
    (lambda: LineConfig(gbps=-1), ["bandwidth in Gbps is -1"]),
    (lambda: LineConfig(gbps=1e6), ["100,000"]),
    (lambda: LineConfig(gbps=float("nan")), ["bandwidth in Gbps is nan"]),
    (lambda: LineConfig(rtt_ms=-1), ["round-trip time in ms is -1"]),
    (lambda: LinkConfig(lanes=0), ["lanes is 0", "1 and of at most 64"]),
    (lambda: LinkConfig(lanes=65), ["lanes is 65", "1 and of at most 64"]),
    (lambda: LinkConfig(timeout_s=0), ["timeout in seconds is 0"]),
])
def test_caches_and_links_out_of_range_say_the_value_and_the_limit(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def _refused(raw: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_from_hf(raw)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
