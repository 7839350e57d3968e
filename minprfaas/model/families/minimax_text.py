"""MiniMax-Text-01: seven layers of Lightning attention to one of grouped-query attention. Chapter 01."""

from dataclasses import replace

from minprfaas.config import ModelConfig, ResidualConfig
from minprfaas.model.families.kimi import FULL, KINDS, LINEAR
from minprfaas.model.families.shared import each_layer, layer_count, model_config, require_plain, rope_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.lightning import LightningConfig
from minprfaas.model.moe import MoEConfig


def minimax(raw: dict) -> ModelConfig:
    """`model_type` "minimax" (the library's) or "minimax_text_01" (its authors', who number the kinds of layers). The
    stream goes on from what the norms make of it, and it and what is added to it have their own weights."""
    require_plain(raw, postnorm=True, shared_intermediate_size=0)
    heads, count = raw["num_attention_heads"], layer_count(raw)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    rope = rope_config(raw, theta=1e6, fraction=(raw.get("rotary_dim") or head_dim) / head_dim)
    gqa = GQAConfig(heads, raw.get("num_key_value_heads") or heads, head_dim, rope, window=raw.get("sliding_window"))
    slopes = tuple(2.0 ** (-8 * (head + 1) / heads) for head in range(heads))
    lightning = LightningConfig(head_dim, slopes, silu=True, by_head=True, norm_eps=1e-6)
    kinds = each_layer(raw, "layer_types", KINDS)
    kinds = kinds or [KINDS[number] for number in each_layer(raw, "attn_type_list", (0, 1))]
    mixers = []
    for layer, kind in enumerate(kinds):
        mixers.append(gqa if kind == FULL else lightning.in_layer(1 - layer / (count - 1 + 1e-5) + 1e-5))
    moe = MoEConfig(raw["num_local_experts"], raw["num_experts_per_tok"], raw["intermediate_size"], "softmax")
    config = model_config(raw, mixers, [moe] * count)
    residuals = {FULL: _residual(raw, "full_attn", "full_attention"),
                 LINEAR: _residual(raw, "linear_attn", "linear_attention")}
    of_mlp = _residual(raw, "mlp", "mlp")
    return replace(config, layers=tuple(replace(layer, mixer_residual=residuals[kind], mlp_residual=of_mlp)
                                        for layer, kind in zip(config.layers, kinds)))


def _residual(raw: dict, library_name: str, author_name: str) -> ResidualConfig:
    weights = [raw.get(f"{library_name}_{weight}_factor", raw.get(f"layernorm_{author_name}_{weight}", 1.0))
               for weight in ("alpha", "beta")]
    return ResidualConfig(*weights)
