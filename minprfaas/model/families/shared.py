"""What the readers of all families share: fields that mean the same everywhere. Chapter 01."""

import math

from minprfaas.config import MAX_LAYERS, LayerConfig, MixerConfig, MLPConfig, ModelConfig, RopeConfig
from minprfaas.errors import UserError, require_number
from minprfaas.model.layers import DenseConfig

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def model_config(raw: dict, mixers: list[MixerConfig], mlps: list[MLPConfig] | None = None,
                 max_context_tokens: int | None = None) -> ModelConfig:
    """The model with one layer a mixer, and a dense MLP in each unless `mlps` says otherwise."""
    require_plain(raw, hidden_act="silu")
    eos = raw.get("eos_token_id")
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    if mlps is None:
        mlps = [DenseConfig(raw["intermediate_size"])] * len(mixers)
    return ModelConfig(
        family=raw["model_type"], vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        layers=tuple(LayerConfig(mixer, mlp) for mixer, mlp in zip(mixers, mlps, strict=True)),
        norm_eps=raw.get("rms_norm_eps", 1e-6), tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_context_tokens=max_context_tokens or raw.get("max_position_embeddings", 2048), eos_token_ids=tuple(eos))


def layer_count(raw: dict) -> int:
    """Checked before a list of that length is made."""
    require_number("num_hidden_layers", raw["num_hidden_layers"], least=1, most=MAX_LAYERS, whole=True)
    return raw["num_hidden_layers"]


def each_layer(raw: dict, name: str, kinds: tuple) -> list | None:
    """A list that gives each layer one of `kinds`; None where the file has none. Raises UserError."""
    given = raw.get(name)
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != layer_count(raw):
        raise UserError(f"{name} must be a list of num_hidden_layers {layer_count(raw)} entries")
    for kind in given:
        if kind not in kinds:
            raise UserError(f"{name} has {str(kind)[:80]!r}; supported: {', '.join(map(str, kinds))}")
    return given


def require_plain(raw: dict, **supported: object) -> None:
    """Refuse what would otherwise be ignored: each field must be absent or the one value that we can run."""
    for name, value in supported.items():
        given = raw.get(name, value)
        if given != value and (given or value):  # null, false and 0 all say that a feature is not used
            raise UserError(f"{name} {given!r} is not supported; supported: {value}")


def first_of(raw: dict, *names: str) -> object:
    """The field that has one of these names; KeyError, with the first of them, when none is there."""
    return next((raw[name] for name in names if raw.get(name) is not None), None) or raw[names[0]]


def rope_config(raw: dict, layer_type: str | None = None, theta: float = 10_000.0, fraction: float = 1.0) -> RopeConfig:
    """RoPE from `rope_parameters` (newer files, where they may differ by layer type) or from `rope_theta` and
    `rope_scaling` (older ones); `theta` and `fraction` are the family's where the file says nothing."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    parameters = parameters.get(layer_type, parameters)
    given = parameters.get("rope_theta", raw.get("rope_theta"))
    theta = theta if given is None else given
    fraction = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", fraction))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UserError(f"rope_type {str(kind)[:80]!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeConfig(theta, fraction)
    if kind == "linear":
        return RopeConfig(theta, fraction, kind, parameters["factor"])
    context = parameters.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    context = raw.get("original_max_position_embeddings") or context
    if kind == "llama3":
        return RopeConfig(theta, fraction, kind, parameters["factor"], parameters["low_freq_factor"],
                          parameters["high_freq_factor"], context)
    factor = parameters.get("factor") or raw["max_position_embeddings"] / context
    low, high = parameters.get("beta_slow") or 1, parameters.get("beta_fast") or 32
    return RopeConfig(theta, fraction, kind, factor, low, high, context, _yarn_amplitude(parameters, factor),
                      parameters.get("truncate", True))


def _yarn_amplitude(parameters: dict, factor: float) -> float:
    """What YaRN scales queries and keys by (arXiv:2309.00071, eq. 22), unless the file gives it."""
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return yarn_gain(parameters["mscale"], factor) / yarn_gain(parameters["mscale_all_dim"], factor)
    return yarn_gain(1.0, factor)


def yarn_gain(weight: float, factor: float) -> float:
    """How much louder queries and keys are in a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
