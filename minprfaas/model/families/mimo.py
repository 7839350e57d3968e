"""MiMo-V2-Flash: five layers that see a short window only to one that sees everything. Chapter 01."""

from minprfaas.config import ModelConfig
from minprfaas.model.families.shared import (each_layer, first_of, layer_count, model_config, require_plain,
                                             rope_config)
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.moe import MoEConfig

SWA, FULL = "sliding_attention", "full_attention"


def mimo_v2_flash(raw: dict) -> ModelConfig:
    """`model_type` "mimo_v2_flash". Its authors number the kinds of layers, the library names them."""
    require_plain(raw, n_shared_experts=None, scoring_func="sigmoid", topk_method="noaux_tc",
                  add_full_attention_sink_bias=False)
    layers = range(layer_count(raw))
    numbered = each_layer(raw, "hybrid_layer_pattern", (0, 1)) or [int(0 < i and (i + 1) % 6 > 0) for i in layers]
    kinds = each_layer(raw, "layer_types", (FULL, SWA)) or [SWA if number else FULL for number in numbered]
    moe_layers = each_layer(raw, "moe_layer_freq", (0, 1)) or [int(i > 0) for i in layers]
    mlp_kinds = each_layer(raw, "mlp_layer_types", ("dense", "sparse"))
    if mlp_kinds is not None:
        moe_layers = [int(kind == "sparse") for kind in mlp_kinds]
    moe = MoEConfig(first_of(raw, "n_routed_experts", "num_local_experts"), raw["num_experts_per_tok"],
                    raw["moe_intermediate_size"], "sigmoid", bool(raw.get("norm_topk_prob", True)),
                    raw.get("n_group", 1), raw.get("topk_group", 1), raw.get("routed_scaling_factor") or 1.0)
    mixers = {kind: _attention(raw, kind) for kind in set(kinds)}
    mlps = [moe if is_moe else DenseConfig(raw["intermediate_size"]) for is_moe in moe_layers]
    raw = {"rms_norm_eps": raw.get("layernorm_epsilon", 1e-5), **raw}
    return model_config(raw, [mixers[kind] for kind in kinds], mlps)


def _attention(raw: dict, kind: str) -> GQAConfig:
    """Layers with a window have twice as many KV heads, another RoPE base, and sinks. Their authors count the tokens
    before the one that looks, the library this one too."""
    heads, kv_heads, head_dim, v_dim = (raw[name] for name in (
        "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
    scale, bias = raw.get("attention_value_scale", 0.707), bool(raw.get("attention_bias", False))
    common = dict(bias=bias, v_scale=1.0 if scale is None else scale)
    if kind == FULL:
        return GQAConfig(heads, kv_heads, head_dim, rope_config(raw, FULL, 5e6, 0.334), v_head_dim=v_dim, **common)
    before = raw.get("sliding_window_size")
    rope = rope_config({**raw, "rope_theta": raw.get("swa_rope_theta")}, SWA, 10_000.0, 0.334)
    return GQAConfig(
        raw.get("swa_num_attention_heads", heads), raw.get("swa_num_key_value_heads", 2 * kv_heads),
        raw.get("swa_head_dim", head_dim), rope, v_head_dim=raw.get("swa_v_head_dim", v_dim),
        window=raw["sliding_window"] if before is None else before + 1,
        sinks=bool(raw.get("add_swa_attention_sink_bias", True)), **common)
