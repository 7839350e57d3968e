"""Kimi delta attention (KDA): the delta rule with a decay for every key channel. Chapter 02; paper 2.2."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, StateKind, require_sizes
from minprfaas.errors import require_number
from minprfaas.model.delta import ChunkParts, chunk_parts, delta_rule, delta_rule_chunked
from minprfaas.model.layers import Positions, Projecting, RMSNorm
from minprfaas.model.recurrent import CHUNK_TOKENS, ShortConvolution, state_or_fresh, store_memory, unit_length
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec


@dataclass(frozen=True)
class KDAConfig:
    """Kimi delta attention: short causal convolutions, per-channel decay, beta gate, gated output norm.

    Kimi Linear makes decay and output gate by a pair of projections through `head_dim`; with `one_step_gates` (Ling 3)
    by one each. `lower_bound` bounds the decay of a token: exp(lower_bound) remains at least.
    """

    num_heads: int
    head_dim: int
    conv_kernel: int = 4
    one_step_gates: bool = False
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "head_dim", most=MAX_HEAD_SIZE)
        require_number("short_conv_kernel_size", self.conv_kernel, least=2, most=1024, whole=True)
        if self.lower_bound is not None:
            require_number("kda_lower_bound", self.lower_bound, most=0)

    def state_spec(self, dtype: str) -> StateSpec:
        """A matrix a head, and the last inputs of the three convolutions."""
        return StateSpec(StateKind.REQUEST, (
            TensorSpec("memory", (self.num_heads, self.head_dim, self.head_dim), "float32"),  # long sums
            TensorSpec("conv", (3 * self.num_heads * self.head_dim, self.conv_kernel - 1), dtype)), CHUNK_TOKENS)

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return KDA(self, hidden_size, norm_eps)


class KDA(Projecting):
    """The whole mixer: projections, short convolutions, decay and beta gates, the delta rule, gated output norm."""

    PIECES = ("project", "step", "output")
    GPU_PIECES = ("parts",)  # for a CPU, PyTorch 2.13 takes longer to compile it than a demo has

    def __init__(self, config: KDAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        gates = ("f_proj", "g_proj") if config.one_step_gates else ("f_a_proj", "g_a_proj")  # of the decay, the output
        self.JOINED = ("q_proj", "k_proj", "v_proj", *gates, "b_proj")
        channels = config.num_heads * config.head_dim
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, channels, bias=False))
        self.conv1d = ShortConvolution(3 * channels, config.conv_kernel, parts_of=("q", "k", "v"))
        log_rate = torch.empty(config.num_heads).uniform_(1, 16).log()
        self.A_log = nn.Parameter(log_rate if config.one_step_gates else log_rate.view(1, 1, -1, 1))
        # Biases whose softplus is spread evenly in logarithm over [1e-3, 1e-1]: heads that forget fast and slowly.
        step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())
        self.b_proj = nn.Linear(hidden_size, config.num_heads, bias=False)
        for gate in ("f", "g"):  # of the decay (forget), of the output
            if config.one_step_gates:
                self.add_module(f"{gate}_proj", nn.Linear(hidden_size, channels, bias=False))
            else:
                self.add_module(f"{gate}_a_proj", nn.Linear(hidden_size, config.head_dim, bias=False))
                self.add_module(f"{gate}_b_proj", nn.Linear(config.head_dim, channels, bias=False))
        self.o_norm = RMSNorm(config.head_dim, norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that nothing came before `x`."""
        state = state_or_fresh(state, self.config.state_spec("float32"), x)
        memory, tail = state.load()
        out, memory, before, inputs = self.mixed(x, memory, tail, positions.is_token)
        store_memory(state, positions, memory, before, inputs)
        return out

    def mixed(self, x: Tensor, memory: Tensor, tail: Tensor, is_token: Tensor | None) -> tuple:
        """Output, memory after and inside the pass, and the convolutions' inputs."""
        *arguments, gate, inputs = self.project(x, tail)
        if x.shape[1] == 1:
            out, memory, before = self.step(*arguments, memory)
        else:
            out, memory, before = delta_rule(*arguments, memory, is_token, self.chunked)
        return self.output(out, gate), memory, before, inputs

    def project(self, x: Tensor, tail: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g and beta of the delta rule, the output's gate, and the convolutions' inputs, which begin with
        `tail`."""
        q, k, v, decay, gate, beta = self.projected(x)
        # Of one token the parts are put together, which is fewer kernels; of many that is a pass over all of them.
        parts = (q, k, v) if x.shape[1] > 1 else (torch.cat([q, k, v], dim=-1),)
        convolved, inputs = self.conv1d(tail, *parts)
        return *self.arguments(convolved, decay, beta), self.second_step("g", gate), inputs

    def arguments(self, convolved: Sequence[Tensor], decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g and beta of the delta rule."""
        heads = (self.config.num_heads, self.config.head_dim)
        q, k, v = (part.unflatten(-1, heads) for whole in convolved for part in whole.split(math.prod(heads), -1))
        q, k, g = unit_length(q.float()) * self.config.head_dim**-0.5, unit_length(k.float()), self._log_decay(decay)
        if v.is_cuda and v.dtype != torch.float32 and v.shape[1] > 1:  # as many digits as TF32 has, in half the bytes
            q, k, g = q.half(), k.half(), g.half()
        return q, k, v, g, beta.float().sigmoid()

    def step(self, *arguments: Tensor) -> tuple[Tensor, Tensor, None]:
        """The delta rule for one token."""
        return delta_rule(*arguments)

    def chunked(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The delta rule for many tokens."""
        return delta_rule_chunked(*arguments, parts_of=self.parts)

    def parts(self, *arguments) -> ChunkParts:
        """What it computes of all chunks at once."""
        return chunk_parts(*arguments)

    def output(self, out: Tensor, gate: Tensor) -> Tensor:
        """Gated norm and projection of what the memory answered: `[batch, new, hidden]`."""
        open_by = gate.unflatten(-1, out.shape[2:]).float().sigmoid()
        return self.o_proj((self.o_norm(out) * open_by).to(gate.dtype).flatten(2))

    def _log_decay(self, decay: Tensor) -> Tensor:
        """`[batch, new, heads, head_dim]`, at most 0."""
        wanted = self.second_step("f", decay).float() + self.dt_bias.float()
        wanted = wanted.unflatten(-1, (-1, self.config.head_dim))
        rate = self.A_log.float().exp().view(-1, 1)
        if self.config.lower_bound is None:
            return -rate * F.softplus(wanted)
        return self.config.lower_bound * (rate * wanted).sigmoid()

    def second_step(self, name: str, gate: Tensor) -> Tensor:
        """The gate f (decay, forget) or g (output), if it is made by a pair of projections."""
        return gate if self.config.one_step_gates else self.get_submodule(f"{name}_b_proj")(gate)
