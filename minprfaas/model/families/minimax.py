"""MiniMax-M2: grouped-query attention and experts in every layer. Chapter 01."""

from minprfaas.config import ModelConfig
from minprfaas.model.families.shared import first_of, layer_count, model_config, require_plain, rope_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.moe import MoEConfig


def minimax_m2(raw: dict) -> ModelConfig:
    """`model_type` "minimax_m2". Its authors give the rotated channels (`rotary_dim`), the library their share."""
    require_plain(raw, scoring_func="sigmoid", use_routing_bias=True, use_qk_norm=True, qk_norm_type="per_layer",
                  shared_intermediate_size=0)
    if any(kind != 1 for kind in raw.get("attn_type_list") or []):
        require_plain(raw, attn_type_list="1 in every layer")
    head_dim = raw.get("head_dim") or 128
    rope = rope_config(raw, theta=5_000_000.0, fraction=(raw.get("rotary_dim") or head_dim) / head_dim)
    mixer = GQAConfig(raw["num_attention_heads"], raw["num_key_value_heads"], head_dim, rope, qk_norm="projection")
    moe = MoEConfig(first_of(raw, "num_local_experts", "num_experts"), raw["num_experts_per_tok"],
                    raw["intermediate_size"], "sigmoid")
    count = layer_count(raw)
    return model_config(raw, [mixer] * count, [moe] * count)
