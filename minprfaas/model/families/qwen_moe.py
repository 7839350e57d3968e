"""Qwen3 with mixtures of experts. Chapter 01."""

from minprfaas.config import ModelConfig
from minprfaas.model.families.dense import gqa
from minprfaas.model.families.shared import first_of, layer_count, model_config, require_plain
from minprfaas.model.layers import DenseConfig
from minprfaas.model.moe import MoEConfig


def qwen3_moe(raw: dict) -> ModelConfig:
    """`model_type` "qwen3_moe": as Qwen3, but most layers choose some of many MLPs."""
    require_plain(raw, use_sliding_window=False)
    count = layer_count(raw)
    mixer = gqa(raw, raw["hidden_size"] // raw["num_attention_heads"], qk_norm="head")
    return model_config(raw, [mixer] * count, qwen_mlps(raw, bool(raw.get("norm_topk_prob", False))))


def qwen_mlps(raw: dict, renormalize: bool, **shared: object) -> list:
    """An MLP a layer: experts in each `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    moe = MoEConfig(first_of(raw, "num_experts", "num_local_experts"), raw["num_experts_per_tok"],
                    raw["moe_intermediate_size"], "softmax", renormalize, **shared)
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    mlps = []
    for layer in range(layer_count(raw)):
        is_sparse = layer not in dense and (layer + 1) % step == 0
        mlps.append(moe if is_sparse else DenseConfig(raw["intermediate_size"]))
    return mlps
