"""Kimi Linear: three layers of Kimi delta attention to one of multi-head latent attention. Chapters 01 and 02."""

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError
from minprfaas.model.families.shared import layer_count, model_config, require_plain
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig


def kimi_linear(raw: dict) -> ModelConfig:
    """The project's own hybrid is a Kimi Linear with dense MLPs; layer numbers in the file count from 1."""
    count, dense = layer_count(raw), raw.get("first_k_dense_replace", 1)
    if dense < count:
        raise UserError(f"mixture-of-experts layers are not supported: first_k_dense_replace {dense} is below "
                        f"num_hidden_layers {count}")
    require_plain(raw, q_lora_rank=None)
    linear = raw["linear_attn_config"]
    full = MLAConfig(raw["num_attention_heads"], raw["kv_lora_rank"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"],
                     raw["v_head_dim"])
    kda = KDAConfig(linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"])
    numbers = sorted([*linear["full_attn_layers"], *linear["kda_layers"]])
    if numbers != list(range(1, count + 1)):
        raise UserError(f"full_attn_layers and kda_layers name layers {str(numbers)[:80]}; "
                        f"they must cover 1 to {count} once each")
    mixers = [full if number in linear["full_attn_layers"] else kda for number in numbers]
    return model_config(raw, mixers,
                        max_context_tokens=raw.get("model_max_length") or raw["max_position_embeddings"])
