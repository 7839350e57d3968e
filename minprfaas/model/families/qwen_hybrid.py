"""Qwen3-Next and Qwen3.5: three layers of gated DeltaNet to one of grouped-query attention. Chapter 01."""

from dataclasses import replace

from minprfaas.config import ModelConfig
from minprfaas.model.families.kimi import FULL, KINDS, LINEAR
from minprfaas.model.families.qwen_moe import qwen_mlps
from minprfaas.model.families.shared import each_layer, layer_count, model_config, require_plain, rope_config
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.gqa import GQAConfig


def qwen3_next(raw: dict) -> ModelConfig:
    """`model_type` "qwen3_next"."""
    return _gated(raw, by_key_head=True)


def qwen3_5(raw: dict) -> ModelConfig:
    """`model_type` "qwen3_5", "qwen3_5_moe" (with a part that sees, of which the text part is read) and both of these
    with "_text". Text alone has one position a token, so RoPE in sections is plain RoPE."""
    if "text_config" in raw:
        names = ("model_type", "tie_word_embeddings", "eos_token_id")
        raw = {**raw["text_config"], **{name: raw[name] for name in names if raw.get(name) is not None}}
    require_plain(raw, attn_output_gate=True, norm_topk_prob=True)
    return _gated(raw, by_key_head=False)


def _gated(raw: dict, by_key_head: bool) -> ModelConfig:
    rope, bias = rope_config(raw, fraction=0.25), bool(raw.get("attention_bias", False))
    mixers = {
        FULL: GQAConfig(raw["num_attention_heads"], raw["num_key_value_heads"], raw.get("head_dim") or 256, rope,
                        "head", bias, out_bias=bias, output_gate=True),
        LINEAR: GDNConfig(raw["linear_num_key_heads"], raw["linear_num_value_heads"], raw["linear_key_head_dim"],
                          raw["linear_value_head_dim"], raw.get("linear_conv_kernel_dim", 4), by_key_head)}
    every, mlps = raw.get("full_attention_interval", 4), None
    kinds = each_layer(raw, "layer_types", KINDS)
    kinds = kinds or [LINEAR if number % every else FULL for number in range(1, layer_count(raw) + 1)]
    if raw.get("num_experts"):
        mlps = qwen_mlps(raw, bool(raw.get("norm_topk_prob", True)), shared_gate=True,
                         shared_size=raw["shared_expert_intermediate_size"])
    return replace(model_config(raw, [mixers[kind] for kind in kinds], mlps), norms_around_zero=True)
