"""Llama and Qwen3: grouped-query attention and a dense MLP in every layer. Chapter 01."""

from minprfaas.config import ModelConfig
from minprfaas.model.families.shared import each_layer, layer_count, model_config, require_plain, rope_config
from minprfaas.model.gqa import GQAConfig


def llama(raw: dict) -> ModelConfig:
    """`model_type` "llama"."""
    require_plain(raw, mlp_bias=False)
    return model_config(raw, [gqa(raw, raw["hidden_size"] // raw["num_attention_heads"])] * layer_count(raw))


def qwen3(raw: dict) -> ModelConfig:
    """`model_type` "qwen3"; the published models use no sliding window."""
    require_plain(raw, use_sliding_window=False)
    each_layer(raw, "layer_types", ("full_attention",))
    return model_config(raw, [gqa(raw, 128, qk_norm="head")] * layer_count(raw))


def gqa(raw: dict, head_dim: int, qk_norm: str | None = None) -> GQAConfig:
    """The mixer of both; `head_dim` is what the family takes where the file names none."""
    heads, bias = raw["num_attention_heads"], bool(raw.get("attention_bias", False))
    return GQAConfig(heads, raw.get("num_key_value_heads") or heads, raw.get("head_dim") or head_dim, rope_config(raw),
                     qk_norm, bias, out_bias=bias)
