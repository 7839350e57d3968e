"""The delta rule and Kimi delta attention (KDA): a state of one size whatever the context. Chapter 02; paper 2.2.

Each head keeps a memory matrix S `[key_dim, value_dim]`. A token first lets every key channel decay, then replaces
what S stores under its key k by its value v, as far as its gate beta asks (the delta rule), and reads with its query q:

    S_t = diag(exp(g_t)) S_(t-1);   S_t += beta_t k_t (v_t - k_t^T S_t)^T;   o_t = S_t^T q_t

`delta_rule_recurrent` is that, token by token: the reference, and the decode step. `delta_rule_chunked` computes the
same for whole chunks with matrix products: the prefill form.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, StateKind, require_sizes
from minprfaas.errors import require_number
from minprfaas.model.layers import Positions, RMSNorm
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec
from minprfaas.model.state import ContiguousLayerState

CHUNK_TOKENS = 64  # the prefill form holds the memory at every multiple of this, and nowhere else


@dataclass(frozen=True)
class KDAConfig:
    """Kimi delta attention: short causal convolutions, per-channel decay, beta gate, gated output norm."""

    num_heads: int
    head_dim: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        require_sizes(self, "num_heads", "head_dim", most=MAX_HEAD_SIZE)
        require_number("short_conv_kernel_size", self.conv_kernel, least=2, most=1024, whole=True)

    def state_spec(self, dtype: str) -> StateSpec:
        """A matrix a head, and the last inputs of the three convolutions."""
        return StateSpec(StateKind.REQUEST, (
            TensorSpec("memory", (self.num_heads, self.head_dim, self.head_dim), "float32"),  # long sums
            TensorSpec("conv", (3 * self.num_heads * self.head_dim, self.conv_kernel - 1), dtype)), CHUNK_TOKENS)

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return KDA(self, hidden_size, norm_eps)


def delta_rule_recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                         memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as written above, one token at a time.

    `q`, `k`, `g` `[batch, tokens, heads, key_dim]` (g: log decay, at most 0), `v` `[batch, tokens, heads, value_dim]`,
    `beta` `[batch, tokens, heads]`, `memory` `[batch, heads, key_dim, value_dim]`; all float32.
    Returns the outputs (shaped like `v`) and the memory after the last token.
    """
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * g[:, t, :, :, None].exp()
        stored = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        delta = (v[:, t] - stored) * beta[:, t, :, None]
        memory = memory + k[:, t, :, :, None] * delta[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, dim=1), memory


def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, memory: Tensor,
                       chunk: int = CHUNK_TOKENS, sub_chunk: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The same function as `delta_rule_recurrent` (same arguments), `chunk` tokens at a time.

    Returns the outputs, the memory after the last token, and the memory before each chunk
    `[batch, heads, chunks, key_dim, value_dim]`.

    Inside a chunk the delta rule is a unit lower-triangular system, solved once for all of the chunk's tokens; between
    chunks only the memory is carried, by one matrix product a chunk. Every exponent is a difference of cumulative
    decays from an earlier to a later token, so it is at most 0 and nothing overflows however strong the decay.
    """
    tokens = q.shape[1]
    padding = -tokens % chunk  # padding has k = 0, beta = 0, g = 0: it neither writes nor decays
    q, k, v, g, beta = (  # [batch, heads, chunks, chunk, dim]
        F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
        for x in (q, k, v, g, beta[..., None]))
    # exp(-20) is below float32's resolution; without the bound, sums of strong decays would lose the weak ones' digits.
    decay = g.clamp(min=-20.0).cumsum(dim=-2)  # from the chunk's beginning through each token
    total = decay[..., -1:, :]

    k_by_k, q_by_k = _decayed_products(q, k, decay, sub_chunk)
    system = (k_by_k * beta).tril(-1)
    right = torch.cat([v, k * decay.exp()], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # new values = new_values - reads @ memory

    keys_at_end = (k * (total - decay).exp()).transpose(-1, -2)
    carry = torch.diag_embed(total.squeeze(-2).exp()) - keys_at_end @ reads
    added = keys_at_end @ new_values
    # The one loop of the prefill form: a product a chunk, which is why everything above runs for all chunks at once.
    befores, after = [], memory.flatten(0, 1)
    for carry_n, added_n in zip(carry.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1)):
        befores.append(after)
        after = torch.baddbmm(added_n, carry_n, after)  # memory after chunk n = carry_n @ memory before it + added_n
    before = torch.stack(befores, dim=1).unflatten(0, memory.shape[:2])

    out = (q * decay.exp()) @ before + q_by_k.tril() @ (new_values - reads @ before)
    out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return out, after.unflatten(0, memory.shape[:2]), before


def _decayed_products(q: Tensor, k: Tensor, decay: Tensor, sub_chunk: int) -> tuple[Tensor, Tensor]:
    """`sum_d x_i[d] k_j[d] exp(decay_i[d] - decay_j[d])` for x = k and x = q, right for j <= i inside each chunk.

    One product of `x exp(decay)` with `k exp(-decay)` would overflow. So the chunk is cut into sub-chunks (secondary
    chunking): a later against the earlier ones goes through the decay at its own beginning, which lies between the two
    and makes both exponents at most 0; inside a sub-chunk the differences are formed one by one.
    """
    chunk = q.shape[-2]
    left = torch.stack([k, q])  # [2, batch, heads, chunks, chunk, key_dim]
    ahead = torch.ones(sub_chunk, sub_chunk, dtype=torch.bool, device=q.device).triu(1)[..., None]
    rows = []
    for start in range(0, chunk, sub_chunk):
        now = slice(start, start + sub_chunk)
        reference = decay[..., start : start + 1, :]
        earlier = k[..., :start, :] * (reference - decay[..., :start, :]).exp()
        off_diagonal = (left[..., now, :] * (decay[..., now, :] - reference).exp()) @ earlier.transpose(-1, -2)
        difference = decay[..., now, None, :] - decay[..., None, now, :]
        pair_decay = difference.masked_fill(ahead, float("-inf")).exp() * k[..., None, now, :]
        diagonal = (pair_decay @ left[..., now, :, None]).squeeze(-1)
        rows.append(F.pad(torch.cat([off_diagonal, diagonal], dim=-1), (0, chunk - start - sub_chunk)))
    return torch.cat(rows, dim=-2).unbind(0)


class KDA(nn.Module):
    """The whole mixer: projections, short convolutions, decay and beta gates, the delta rule, gated output norm."""

    def __init__(self, config: KDAConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        channels, kernel = config.num_heads * config.head_dim, config.conv_kernel
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, channels, bias=False))
            taps = torch.randn(channels, 1, kernel) * kernel**-0.5  # a depthwise convolution's, as checkpoints have it
            self.add_module(f"{name}_conv1d", nn.ParameterDict({"weight": taps}))
        self.A_log = nn.Parameter(torch.empty(1, 1, config.num_heads, 1).uniform_(1, 16).log())
        # Biases whose softplus is spread evenly in logarithm over [1e-3, 1e-1]: heads that forget fast and slowly.
        step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())
        self.f_a_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.f_b_proj = nn.Linear(config.head_dim, channels, bias=False)
        self.b_proj = nn.Linear(hidden_size, config.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.g_b_proj = nn.Linear(config.head_dim, channels, bias=False)
        self.o_norm = RMSNorm(config.head_dim, norm_eps)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that nothing came before `x`."""
        heads = (self.config.num_heads, self.config.head_dim)
        if state is None:
            state = ContiguousLayerState(self.config.state_spec("float32"), len(x), x.device)
        memory, tail = state.load()
        projected = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        conv_input = torch.cat([tail.transpose(1, 2).to(x.dtype), projected], dim=1)
        q, k, v = (part.unflatten(-1, heads) for part in self._short_convolutions(conv_input).float().chunk(3, dim=-1))
        q, k = _unit_length(q) * self.config.head_dim**-0.5, _unit_length(k)
        step = F.softplus((self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias.float()).unflatten(-1, heads))
        g = -self.A_log.float().exp() * step
        beta = self.b_proj(x).float().sigmoid()
        with torch.autocast(x.device.type, enabled=False):  # the memory's sums need float32
            if x.shape[1] == 1:  # decode: the recurrence is the shorter way, and crosses no chunk's boundary
                out, memory = delta_rule_recurrent(q, k, v, g, beta, memory)
                before = None
            else:
                out, memory, before = delta_rule_chunked(q, k, v, g, beta, memory)
        self._store(state, conv_input, before, memory)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, heads).float().sigmoid()
        return self.o_proj((self.o_norm(out) * gate).to(x.dtype).flatten(2))

    def _store(self, state: LayerState, conv_input: Tensor, before: Tensor | None, memory: Tensor) -> None:
        """The state after the pass, and at the wanted offsets inside it: the chunked rule went through them all.

        `conv_input` `[batch, width + new, channels]` begins with the tail that the pass began with, so the `width` rows
        from `offset` on are the tail after `offset` tokens.
        """
        width = self.config.conv_kernel - 1
        new = conv_input.shape[1] - width
        for offset in state.snapshot_offsets:
            memory_there = memory if offset == new else before[:, :, offset // CHUNK_TOKENS]
            state.store_snapshot(offset, memory_there, conv_input[:, offset : offset + width].transpose(1, 2))
        state.store(memory, conv_input[:, new:].transpose(1, 2))

    def _short_convolutions(self, conv_input: Tensor) -> Tensor:
        """Depthwise convolutions, then SiLU: `[batch, kernel - 1 + new, channels]` -> `[batch, new, channels]`."""
        weight = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]).squeeze(1)
        kernel = self.config.conv_kernel
        new = conv_input.shape[1] - kernel + 1
        # A sum over the kernel's few taps: cuDNN's depthwise convolution wants another layout, and copies twice.
        return F.silu(sum(conv_input[:, tap : tap + new] * weight[:, tap] for tap in range(kernel)))


def _unit_length(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
