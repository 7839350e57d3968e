"""Ling 3 (delta attention and latent attention) and Ring 2.5 (Lightning and latent attention). Chapter 01."""

import math
from dataclasses import replace

from minprfaas.config import ModelConfig, RopeConfig
from minprfaas.model.families.kimi import FULL, KINDS, LINEAR, deepseek_mlps, mla
from minprfaas.model.families.shared import (each_layer, first_of, layer_count, model_config, require_plain,
                                             rope_config, yarn_gain)
from minprfaas.model.kda import KDAConfig
from minprfaas.model.lightning import LightningConfig
from minprfaas.model.mla import MLAConfig


def bailing_hybrid(raw: dict) -> ModelConfig:
    """`model_type` "bailing_hybrid": Ling 3, which bounds the decay and gates each latent head, 5:1. Ring 2.5 has the
    same `model_type`, and another architecture."""
    if "BailingMoeV2_5ForCausalLM" in (raw.get("architectures") or []):
        return bailing_moe_v2_5(raw)
    bound = raw.get("kda_lower_bound", -5.0) if raw.get("kda_safe_gate", True) else None
    mixers = {LINEAR: KDAConfig(raw["num_attention_heads"], first_of(raw, "linear_head_dim", "head_dim"),
                                raw.get("short_conv_kernel_size", 4), one_step_gates=True, lower_bound=bound),
              FULL: _rotated_mla(raw, rope_config(raw, theta=6e6), head_gate=True)}
    group, count = raw.get("layer_group_size", 6), layer_count(raw)
    kinds = each_layer(raw, "layer_types", KINDS)
    kinds = kinds or [LINEAR if number % group else FULL for number in range(1, count + 1)]
    config = model_config(raw, [mixers[kind] for kind in kinds], deepseek_mlps(raw, dense_layers=2),
                          max_context_tokens=first_of(raw, "model_max_length", "max_position_embeddings"))
    return replace(config, further_layers=raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 1)))


def bailing_moe_v2_5(raw: dict) -> ModelConfig:
    """Ring 2.5, 7:1: Lightning attention with RoPE on a part of each head. What is left after whole groups is latent
    attention too. Written from its authors' code and held against that; the Transformers library has no such family."""
    require_plain(raw, use_bias=False, use_qkv_bias=False, linear_silu=False, rope_interleave=True, norm_head=False,
                  score_function="sigmoid", norm_topk_prob=True, moe_router_enable_expert_bias=True)
    heads, count, group = raw["num_attention_heads"], layer_count(raw), raw["layer_group_size"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    rope = rope_config(raw, theta=600_000.0, fraction=0.5)
    full = _rotated_mla(raw, rope)  # first, because it checks the number of heads
    lightning = LightningConfig(head_dim, alibi_slopes(heads), qk_norm=raw.get("use_qk_norm", True), rope=rope,
                                scale=head_dim**-0.5, norm_groups=raw["group_norm_size"])
    mixers = []
    for layer in range(count):
        if (layer + 1) % group == 0 or layer >= count // group * group:
            mixers.append(full)
        else:
            mixers.append(lightning.in_layer(1 - (layer - 1) / (count - 1) + 1e-5))
    mlps = deepseek_mlps({**raw, "norm_topk_prob": raw["num_experts_per_tok"] > 1}, dense_layers=1)
    config = model_config(raw, mixers, mlps)
    return replace(config, further_layers=raw.get("num_nextn_predict_layers", 0))


def _rotated_mla(raw: dict, rope: RopeConfig, **options: object) -> MLAConfig:
    """All of the shared channels are rotated; a model for longer texts (YaRN) may score louder, too."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    gain = yarn_gain(scaling.get("mscale_all_dim") or 0.0, scaling.get("factor", 1.0))
    return mla(raw, rope=replace(rope, fraction=1.0), score_scale=gain**2, **options)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """A decay a head, falling from head to head (arXiv:2108.12409): a geometric series for a power of two heads; those
    beyond take every second of the series of twice as many."""
    whole = 2 ** int(math.log2(heads))
    slopes = tuple(2.0 ** (-8 * (head + 1) / whole) for head in range(whole))
    return slopes + alibi_slopes(2 * whole)[::2][:heads - whole] if heads > whole else slopes
