"""Kimi Linear: three layers of Kimi delta attention to one of multi-head latent attention. Chapter 01."""

from minprfaas.config import MLPConfig, ModelConfig
from minprfaas.errors import UserError
from minprfaas.model.families.shared import each_layer, first_of, layer_count, model_config, require_plain
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.moe import MoEConfig

KINDS = LINEAR, FULL = "linear_attention", "full_attention"


def kimi_linear(raw: dict) -> ModelConfig:
    """`model_type` "kimi_linear". Its authors number the layers of each kind from 1, the library names each layer's.
    Without an expert it is the project's own hybrid."""
    require_plain(raw, mla_use_nope=True, moe_layer_freq=1, moe_router_activation_func="sigmoid")
    linear, kinds = raw.get("linear_attn_config") or {}, each_layer(raw, "layer_types", KINDS)
    if kinds is None:
        numbers = sorted([*linear["full_attn_layers"], *linear["kda_layers"]])
        if numbers != list(range(1, layer_count(raw) + 1)):
            raise UserError(f"full_attn_layers and kda_layers name layers {str(numbers)[:80]}; "
                            f"they must cover 1 to {layer_count(raw)} once each")
        kinds = [FULL if number in linear["full_attn_layers"] else LINEAR for number in numbers]
    sizes = {"linear_num_heads": linear.get("num_heads"), "linear_head_dim": linear.get("head_dim"),
             "linear_conv_kernel_dim": linear.get("short_conv_kernel_size")}
    sizes = {name: raw[name] if value is None else value for name, value in sizes.items()}
    mixers = {LINEAR: KDAConfig(*sizes.values()), FULL: mla(raw)}
    return model_config(raw, [mixers[kind] for kind in kinds], deepseek_mlps(raw, dense_layers=1),
                        max_context_tokens=first_of(raw, "model_max_length", "max_position_embeddings"))


def mla(raw: dict, **options: object) -> MLAConfig:
    """Latent attention, spelled as DeepSeek does."""
    return MLAConfig(raw["num_attention_heads"], raw["kv_lora_rank"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"],
                     raw["v_head_dim"], q_lora_rank=raw.get("q_lora_rank"), bias=bool(raw.get("attention_bias", False)),
                     **options)


def deepseek_mlps(raw: dict, dense_layers: int) -> list[MLPConfig]:
    """An MLP a layer: a few dense ones (`dense_layers` where the file does not say), then experts as DeepSeek-V3's."""
    dense_layers, count = raw.get("first_k_dense_replace", dense_layers), layer_count(raw)
    kinds = each_layer(raw, "mlp_layer_types", ("dense", "sparse"))
    kinds = kinds or ["dense" if layer < dense_layers else "sparse" for layer in range(count)]
    if "sparse" not in kinds:
        return [DenseConfig(raw["intermediate_size"])] * count
    size = raw["moe_intermediate_size"]
    shared = first_of({"num_shared_experts": 0, **raw}, "num_shared_experts", "n_shared_experts")
    moe = MoEConfig(
        first_of(raw, "num_experts", "num_local_experts"),
        first_of(raw, "num_experts_per_token", "num_experts_per_tok"),
        size, "sigmoid", bool(raw.get("moe_renormalize", raw.get("norm_topk_prob", True))),
        raw.get("num_expert_group", raw.get("n_group")) or 1, raw.get("topk_group") or 1,
        raw.get("routed_scaling_factor", 1.0), size * shared)
    return [moe if kind == "sparse" else DenseConfig(raw["intermediate_size"]) for kind in kinds]
