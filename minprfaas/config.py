"""What a model, a cache and a link are made of: frozen dataclasses, no tensors. Chapter 00.

`ModelConfig.from_directory` reads a Hugging Face `config.json`. A model is a stack of layers, each a mixer plus an
MLP; a new architecture is a new reader in `FAMILIES` that lays out the same pieces.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from minprfaas.errors import UserError, require_number
from minprfaas.files import read_json


class StateKind(Enum):
    """How a layer's state relates to the tokens of a request (paper 3.2)."""

    TOKEN = "token"  # a row for each token: grows with the context, partial prefixes can be reused
    REQUEST = "request"  # one size whatever the context: reusable only at exactly the length it was taken at


class Role(str, Enum):
    """What a node does for requests at present. A PD node can change between PDP and PDD."""

    PRFAAS = "prfaas"  # prefill only, in a datacenter of its own
    PDP = "pdp"  # prefill in the local PD cluster
    PDD = "pdd"  # decode, in the local PD cluster


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `scaling` is None or llama3's (factor, low_freq_factor, high_freq_factor, context)."""

    theta: float = 10_000.0
    scaling: tuple[float, float, float, int] | None = None


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention with RoPE; `qk_norm` normalizes each head's q and k (Qwen3)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qk_norm: bool = False
    bias: bool = False

    def __post_init__(self):
        _positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention without positional encoding; `qk_shared_dim` key channels are shared by all heads."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_dim: int
    qk_shared_dim: int
    v_dim: int

    def __post_init__(self):
        _positive(self, "num_heads", "kv_lora_rank", "qk_nope_dim", "v_dim")
        if not isinstance(self.qk_shared_dim, int) or self.qk_shared_dim < 0:
            raise UserError(f"qk_rope_head_dim is {self.qk_shared_dim!r}; it must be a whole number of at least 0")


@dataclass(frozen=True)
class KDAConfig:
    """Kimi delta attention: short causal convolutions, per-channel decay, beta gate, gated output norm."""

    num_heads: int
    head_dim: int
    conv_kernel: int = 4

    def __post_init__(self):
        _positive(self, "num_heads", "head_dim", "conv_kernel")
        if self.conv_kernel < 2:
            raise UserError(f"short_conv_kernel_size {self.conv_kernel} is below 2")


MixerConfig = GQAConfig | MLAConfig | KDAConfig


@dataclass(frozen=True)
class LayerConfig:
    """One layer: a mixer, then a SwiGLU MLP of `intermediate_size`."""

    mixer: MixerConfig
    intermediate_size: int

    def __post_init__(self):
        _positive(self, "intermediate_size")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: embeddings, `layers`, a final norm and a head."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_embeddings: bool
    max_context_tokens: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _positive(self, "vocab_size", "hidden_size", "max_context_tokens")
        if not self.layers:
            raise UserError("num_hidden_layers is 0; a model needs at least one layer")

    @staticmethod
    def from_directory(directory: str | Path) -> "ModelConfig":
        """Read `config.json` (and `generation_config.json`'s end-of-text ids, if there). Raises UserError."""
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; a checkpoint is a directory with config.json")
        raw = read_json(directory / "config.json", "a checkpoint directory has one")
        generation_path = directory / "generation_config.json"
        if generation_path.exists():
            generation = read_json(generation_path, "")
            if generation.get("eos_token_id") is not None:
                raw["eos_token_id"] = generation["eos_token_id"]
        return ModelConfig.from_hf(raw)

    @staticmethod
    def from_hf(raw: dict) -> "ModelConfig":
        """Build from the contents of a Hugging Face `config.json`. Raises UserError naming the field at fault."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise UserError(f"architecture {family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
        try:
            return FAMILIES[family](raw)
        except KeyError as error:
            raise UserError(f"config.json of architecture {family!r} lacks {error.args[0]!r}") from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of the wrong kind, or a zero
            raise UserError(f"config.json of architecture {family!r} is malformed: {error}") from None


def _positive(config, *names: str) -> None:
    for name in names:
        require_number(name, getattr(config, name), least=1, whole=True)


def _stack(raw: dict, mixers: list[MixerConfig], **overrides) -> ModelConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    eos = raw.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    fields = dict(
        family=raw["model_type"], vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        layers=tuple(LayerConfig(mixer, raw["intermediate_size"]) for mixer in mixers),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)), tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_context_tokens=raw.get("max_position_embeddings", 2048), eos_token_ids=eos_ids)
    return ModelConfig(**{**fields, **overrides})


def _rope(raw: dict) -> RopeConfig:
    """RoPE from `rope_parameters` (newer files) or `rope_theta` with `rope_scaling` (older ones)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "llama3":
        return RopeConfig(theta, (float(parameters["factor"]), float(parameters["low_freq_factor"]),
                                  float(parameters["high_freq_factor"]),
                                  int(parameters["original_max_position_embeddings"])))
    raise UserError(f"rope_type {kind!r} is not supported; supported: default, llama3")


def _llama(raw: dict) -> ModelConfig:
    if raw.get("mlp_bias"):
        raise UserError("mlp_bias true is not supported; supported: false")
    heads = raw["num_attention_heads"]
    mixer = GQAConfig(heads, raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads,
                      _rope(raw), bias=bool(raw.get("attention_bias", False)))
    return _stack(raw, [mixer] * raw["num_hidden_layers"])


def _qwen3(raw: dict) -> ModelConfig:
    if raw.get("use_sliding_window"):
        raise UserError("use_sliding_window true is not supported; supported: false")
    mixer = GQAConfig(raw["num_attention_heads"], raw["num_key_value_heads"], raw.get("head_dim", 128),
                      _rope(raw), qk_norm=True, bias=bool(raw.get("attention_bias", False)))
    return _stack(raw, [mixer] * raw["num_hidden_layers"])


def _kimi_linear(raw: dict) -> ModelConfig:
    """The project's own hybrid is a Kimi Linear with dense MLPs; layer numbers in the file count from 1."""
    count = raw["num_hidden_layers"]
    if raw.get("first_k_dense_replace", 1) < count:
        raise UserError(f"mixture-of-experts layers are not supported: first_k_dense_replace "
                        f"{raw.get('first_k_dense_replace', 1)} is below num_hidden_layers {count}")
    if raw.get("q_lora_rank"):
        raise UserError(f"q_lora_rank {raw['q_lora_rank']} is not supported; supported: null")
    linear = raw["linear_attn_config"]
    full = MLAConfig(raw["num_attention_heads"], raw["kv_lora_rank"], raw["qk_nope_head_dim"],
                     raw["qk_rope_head_dim"], raw["v_head_dim"])
    kda = KDAConfig(linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"])
    numbers = sorted([*linear["full_attn_layers"], *linear["kda_layers"]])
    if numbers != list(range(1, count + 1)):
        raise UserError(f"full_attn_layers and kda_layers name layers {numbers}; they must cover 1 to {count} once each")
    mixers = [full if number in linear["full_attn_layers"] else kda for number in numbers]
    return _stack(raw, mixers, max_context_tokens=raw.get("model_max_length") or raw["max_position_embeddings"])


FAMILIES = {"llama": _llama, "qwen3": _qwen3, "kimi_linear": _kimi_linear}


@dataclass(frozen=True)
class CacheConfig:
    """The KVCache pool: `num_blocks` equal blocks, each `block_tokens` tokens of a full-attention group."""

    num_blocks: int
    block_tokens: int = 64
    prefix_cache: bool = True
    snapshot_every: int = 16  # blocks between two snapshots of request-level state

    def __post_init__(self):
        _positive(self, "num_blocks", "block_tokens", "snapshot_every")


@dataclass(frozen=True)
class WeatherChange:
    """From `at_s` (seconds after the line first came up) on: what is None stays as it was. A stall passes nothing."""

    at_s: float
    gbps: float | None = None
    rtt_ms: float | None = None
    stall_s: float = 0.0


@dataclass(frozen=True)
class LineConfig:
    """The emulated line between two datacenters, in one direction. `gbps` None is a line without a limit of its own."""

    gbps: float | None = None
    rtt_ms: float = 0.0
    weather: tuple[WeatherChange, ...] = ()

    def __post_init__(self):
        _check_line(self.gbps, self.rtt_ms)

    @property
    def is_emulated(self) -> bool:
        """Whether it differs from the wire below it."""
        return self.gbps is not None or self.rtt_ms > 0 or bool(self.weather)


def _check_line(gbps: float | None, rtt_ms: float) -> None:
    if gbps is not None and not 1e-6 <= gbps <= 1e5:
        raise UserError(f"link bandwidth {gbps} Gbps is out of range; it must be from 0.000001 to 100000")
    if not 0 <= rtt_ms <= 60_000:
        raise UserError(f"round-trip time {rtt_ms} ms is out of range; it must be from 0 to 60000")


@dataclass(frozen=True)
class LinkConfig:
    """One link between two processes of two datacenters; what it crosses is a `LineConfig`."""

    lanes: int = 1
    chunk_bytes: int = 256 * 1024
    max_inflight_bytes: int = 16 * 2**20
    timeout_s: float = 30.0  # a link that is away for longer is lost
    silence_s: float = 5.0  # a lane that brings nothing, not even a heartbeat, for this long is dead

    def __post_init__(self):
        if not isinstance(self.lanes, int) or not 1 <= self.lanes <= 64:
            raise UserError(f"lane count {self.lanes} is out of range; it must be from 1 to 64")
        _positive(self, "chunk_bytes", "max_inflight_bytes")
        if not self.timeout_s > 0 or not self.silence_s > 0:
            raise UserError(f"link timeout {self.timeout_s} s or silence {self.silence_s} s is out of range; "
                            "both must be above 0")


@dataclass(frozen=True)
class LinkSample:
    """One direction of a link over the interval that ends at `time_s`. `utilization` is the share of the time in which it
    was busy (or of its known rate), so `gbps` over it is the capacity; `queued_bytes` wait to leave."""

    time_s: float
    gbps: float
    utilization: float
    queued_bytes: float
    inflight_bytes: float = 0.0
    ack_delay_s: float = 0.0
