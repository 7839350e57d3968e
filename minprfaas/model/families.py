"""Checkpoint families: what each Hugging Face `config.json` means in our own pieces. Chapter 01.

A family is one reader, entered in `FAMILIES`, that lays out a mixer a layer; `_model` reads what all of them share.
"""

from pathlib import Path

from minprfaas.config import MAX_LAYERS, LayerConfig, MixerConfig, ModelConfig, RopeConfig
from minprfaas.errors import UserError, require_number
from minprfaas.files import read_json
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig


def read_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`'s end-of-text ids, if there). Raises UserError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; a checkpoint is a directory with config.json")
    raw = read_json(directory / "config.json", "a checkpoint directory has one")
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        eos = read_json(generation_path).get("eos_token_id")
        raw["eos_token_id"] = raw.get("eos_token_id") if eos is None else eos
    return config_from_hf(raw)


def config_from_hf(raw: dict) -> ModelConfig:
    """Build from the contents of a Hugging Face `config.json`. Raises UserError naming the field at fault."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"architecture {str(family)[:80]!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    try:
        return FAMILIES[family](raw)
    except KeyError as error:
        raise UserError(f"config.json of architecture {family!r} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of the wrong kind, or a zero
        raise UserError(f"config.json of architecture {family!r} is malformed: {error}") from None


def _llama(raw: dict) -> ModelConfig:
    _require_plain(raw, mlp_bias=False)
    return _dense(raw, raw["hidden_size"] // raw["num_attention_heads"], qk_norm=False)


def _qwen3(raw: dict) -> ModelConfig:
    _require_plain(raw, use_sliding_window=False)
    return _dense(raw, 128, qk_norm=True)


def _dense(raw: dict, head_dim: int, qk_norm: bool) -> ModelConfig:
    """Grouped-query attention in every layer; `head_dim` is what the family takes where the file names none."""
    heads = raw["num_attention_heads"]
    mixer = GQAConfig(heads, raw.get("num_key_value_heads") or heads, raw.get("head_dim") or head_dim, _rope(raw),
                      qk_norm, bias=bool(raw.get("attention_bias", False)))
    return _model(raw, [mixer] * _layer_count(raw))


def _kimi_linear(raw: dict) -> ModelConfig:
    """The project's own hybrid is a Kimi Linear with dense MLPs; layer numbers in the file count from 1."""
    count, dense = _layer_count(raw), raw.get("first_k_dense_replace", 1)
    if dense < count:
        raise UserError(f"mixture-of-experts layers are not supported: first_k_dense_replace {dense} is below "
                        f"num_hidden_layers {count}")
    _require_plain(raw, q_lora_rank=None)
    linear = raw["linear_attn_config"]
    full = MLAConfig(raw["num_attention_heads"], raw["kv_lora_rank"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"],
                     raw["v_head_dim"])
    kda = KDAConfig(linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"])
    numbers = sorted([*linear["full_attn_layers"], *linear["kda_layers"]])
    if numbers != list(range(1, count + 1)):
        raise UserError(f"full_attn_layers and kda_layers name layers {str(numbers)[:80]}; "
                        f"they must cover 1 to {count} once each")
    mixers = [full if number in linear["full_attn_layers"] else kda for number in numbers]
    return _model(raw, mixers, max_context_tokens=raw.get("model_max_length") or raw["max_position_embeddings"])


FAMILIES = {"llama": _llama, "qwen3": _qwen3, "kimi_linear": _kimi_linear}


def _model(raw: dict, mixers: list[MixerConfig], max_context_tokens: int | None = None) -> ModelConfig:
    """The model with one layer a mixer; the rest is spelled alike in every family."""
    _require_plain(raw, hidden_act="silu")
    eos = raw.get("eos_token_id")
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    return ModelConfig(
        family=raw["model_type"], vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        layers=tuple(LayerConfig(mixer, raw["intermediate_size"]) for mixer in mixers),
        norm_eps=raw.get("rms_norm_eps", 1e-6), tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_context_tokens=max_context_tokens or raw.get("max_position_embeddings", 2048), eos_token_ids=tuple(eos))


def _layer_count(raw: dict) -> int:
    """Checked before a list of that length is made."""
    require_number("num_hidden_layers", raw["num_hidden_layers"], least=1, most=MAX_LAYERS, whole=True)
    return raw["num_hidden_layers"]


def _require_plain(raw: dict, **supported: object) -> None:
    """Refuse what would otherwise be ignored: each field must be absent or the one value that we can run."""
    for name, value in supported.items():
        given = raw.get(name, value)
        if given != value and (given or value):  # null, false and 0 all say that a feature is not used
            raise UserError(f"{name} {given!r} is not supported; supported: {value}")


def _rope(raw: dict) -> RopeConfig:
    """RoPE from `rope_parameters` (newer files) or `rope_theta` with `rope_scaling` (older ones)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise UserError(f"rope_type {kind!r} is not supported; supported: default, llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeConfig(theta, tuple(parameters[name] for name in names))
