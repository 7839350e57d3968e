"""What a model, a request, a cache and a link are made of: frozen dataclasses, no tensors, no files. Chapter 00."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from minprfaas.errors import UserError, require_number, require_unicode, shown

# Far beyond every model there is, and small enough that no tensor's size overflows: a config.json that asks for more is
# a mistake, which is better said at once than found by running out of memory.
MAX_LAYERS = 10_000
MAX_WIDTH = 2**20  # of the hidden state and of an MLP
MAX_HEAD_SIZE = 2**16  # heads of a layer, and the width of one
MAX_VOCAB_SIZE = 2**24
MAX_OUTPUT_TOKENS = 2**20  # far beyond any context; a larger number is a slip of the finger, and is better said so

FRONT = "front"  # the front end's name, among those of the nodes
UNTHROTTLED_GBPS = 100.0  # the paper's link; a first guess that the monitor corrects from what it observes


def require_sizes(config: object, *names: str, most: int | None = None) -> None:
    """Raise UserError unless each of these attributes is a whole number from 1 to `most`."""
    for name in names:
        require_number(name, getattr(config, name), least=1, most=most, whole=True)


class StateKind(Enum):
    """How a layer's state relates to the tokens of a request (paper 3.2)."""

    TOKEN = "token"  # a row for each token: grows with the context, partial prefixes can be reused
    WINDOW = "window"  # rows of the last few tokens: otherwise as request-level state
    REQUEST = "request"  # one size whatever the context: reusable only at exactly the length it was taken at


class Role(str, Enum):
    """What a node does for requests at present. A PD node can change between PDP and PDD."""

    PRFAAS = "prfaas"  # prefill only, in a datacenter of its own
    PDP = "pdp"  # prefill in the local PD cluster
    PDD = "pdd"  # decode, in the local PD cluster


class Encoding(str, Enum):
    """How the rows of token state cross a link."""

    EXACT = "exact"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `fraction` of a head's channels.

    `kind` says how the wavelengths of a model that was trained on `context_tokens` are stretched by `factor`: "llama3"
    and "yarn" do it by the turns that a pair of channels makes over that context, wholly up to `low_turns` and not at
    all from `high_turns` on. `amplitude` scales what is rotated.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    context_tokens: int = 1
    amplitude: float = 1.0
    whole_channels: bool = True  # yarn: the turns' limits are rounded to whole channels

    def __post_init__(self) -> None:
        require_number("rope_theta", self.theta, above=1 if self.kind == "yarn" else 0)  # whose logarithm is divided by
        require_number("partial_rotary_factor", self.fraction, above=0, most=1)
        require_number("the factor of rope scaling", self.factor, above=0)
        require_number("the lower limit of rope scaling, in turns", self.low_turns, above=0)
        # Their difference is divided by.
        require_number("the upper limit of rope scaling, in turns", self.high_turns, above=self.low_turns)
        require_number("original_max_position_embeddings", self.context_tokens, least=1, whole=True)
        require_number("the attention_factor of rope scaling", self.amplitude, above=0)


class MixerConfig(Protocol):
    """A frozen dataclass in the mixer's own file (`model/gqa.py`, …). `state_spec` is the `model.spec.StateSpec` of a
    layer when the model runs in `dtype`, `build` the `torch.nn.Module` with fresh weights: not typed here, because
    planning and simulation read this file and start without torch."""

    def state_spec(self, dtype: str) -> Any: ...
    def build(self, hidden_size: int, norm_eps: float) -> Any: ...


class MLPConfig(Protocol):
    """A frozen dataclass beside the MLP's module: `model.layers.DenseConfig`, `model.moe.MoEConfig`."""

    def build(self, hidden_size: int) -> Any: ...


@dataclass(frozen=True)
class ResidualConfig:
    """How what a mixer or an MLP gives joins the stream in MiniMax-Text-01: alpha times what its norm made of the
    stream, plus beta times what it gave. Everywhere else it is added to the stream as that was before the norm."""

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        require_number("the weight of the stream", self.alpha)
        require_number("the weight of what is added to the stream", self.beta)


@dataclass(frozen=True)
class LayerConfig:
    """One layer: a mixer, then an MLP."""

    mixer: MixerConfig
    mlp: MLPConfig
    mixer_residual: ResidualConfig | None = None
    mlp_residual: ResidualConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: embeddings, `layers`, a final norm and a head (read by `model/families.py`)."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_embeddings: bool
    max_context_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    norms_around_zero: bool = False  # the checkpoint holds what is added to a norm's weight of 1
    further_layers: int = 0  # layers of the checkpoint after these, which guess further tokens: they are not read

    def __post_init__(self) -> None:
        require_sizes(self, "vocab_size", most=MAX_VOCAB_SIZE)
        require_sizes(self, "hidden_size", most=MAX_WIDTH)
        require_sizes(self, "max_context_tokens", most=2**40)
        require_number("rms_norm_eps", self.norm_eps, least=0)
        require_number("num_nextn_predict_layers", self.further_layers, least=0, most=MAX_LAYERS, whole=True)
        for token_id in self.eos_token_ids:
            require_number("eos_token_id", token_id, least=0, whole=True)
        require_number("num_hidden_layers", len(self.layers), least=1, most=MAX_LAYERS, whole=True)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        require_number("max_tokens", self.max_tokens, least=1, most=MAX_OUTPUT_TOKENS, whole=True)
        require_number("temperature", self.temperature, least=0, most=100)
        require_number("top_k", self.top_k, least=0, whole=True)
        require_number("top_p", self.top_p, above=0, most=1)
        require_number("seed", self.seed, above=-2**63, most=2**63 - 1, whole=True)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {shown(stop)}; it must be one or more non-empty strings")
        for text in stop:
            require_unicode("stop", text)
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos is {shown(self.ignore_eos)}; it must be true or false")


@dataclass(frozen=True)
class CacheConfig:
    """The KVCache pool: `num_blocks` equal blocks, each `block_tokens` tokens of a full-attention group."""

    num_blocks: int
    block_tokens: int = 64
    prefix_cache: bool = True
    snapshot_every: int = 16  # blocks between two snapshots of request-level state

    def __post_init__(self) -> None:
        require_sizes(self, "num_blocks", "block_tokens", "snapshot_every")


def block_tokens_for(device: str) -> int:
    """Tokens of a KVCache block on a device, where nobody says how many: attention to pages of 256 tokens reads them at
    2.0 TB/s, to pages of 64 at 1.3 (H100, 64 requests)."""
    return 256 if device.partition(":")[0] == "cuda" else 64


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

    def __post_init__(self) -> None:
        if self.gbps is not None:
            require_number("link bandwidth in Gbps", self.gbps, least=1e-6, most=100_000)
        require_number("round-trip time in ms", self.rtt_ms, least=0, most=60_000)


@dataclass(frozen=True)
class LinkConfig:
    """One link between two processes of two datacenters; what it crosses is a `LineConfig`."""

    lanes: int = 1
    chunk_bytes: int = 256 * 1024  # at most; a slow line gets smaller ones
    max_inflight_bytes: int = 16 * 2**20
    timeout_s: float = 30.0  # a link that is away for longer is lost
    silence_s: float = 5.0  # a lane that brings nothing, not even a heartbeat, for this long is dead

    def __post_init__(self) -> None:
        require_sizes(self, "lanes", most=64)
        require_sizes(self, "chunk_bytes", "max_inflight_bytes")
        require_number("link timeout in seconds", self.timeout_s, above=0)
        require_number("silence of a lane in seconds", self.silence_s, above=0)


@dataclass(frozen=True)
class LinkSample:
    """One direction of a link over the interval that ends at `at_s`. `utilization` is the share of the time in which
    it was busy (or of its known rate), so `gbps` over it is the capacity; `queued_bytes` wait to leave. `link` names it
    where there may be several."""

    at_s: float
    gbps: float
    utilization: float
    queued_bytes: float
    inflight_bytes: float = 0.0
    ack_delay_s: float = 0.0
    link: str = ""
