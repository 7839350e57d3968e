"""Lightning attention: linear attention whose memory decays at a fixed rate a head. Chapter 02; paper table 1.

A head keeps a memory S `[head_dim, head_dim]` and adds each token's key and value to it, without looking at what is
there (the delta rule does): S_t = exp(-slope) S_(t-1) + k_t v_t^T; o_t = S_t^T q_t. `lightning_recurrent` is that, the
decode step; `lightning_chunked` computes the same for whole chunks with matrix products, the prefill form.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_HEAD_SIZE, RopeConfig, StateKind, require_sizes
from minprfaas.errors import UserError, require_number
from minprfaas.model.layers import Positions, RMSNorm, apply_rotary
from minprfaas.model.recurrent import CHUNK_TOKENS, state_or_fresh, store_memory
from minprfaas.model.spec import LayerState, StateSpec, TensorSpec


@dataclass(frozen=True)
class LightningConfig:
    """Lightning attention as MiniMax-Text-01 has it (SiLU on q, k and v, one norm over all heads), or as Ring 2.5
    (norms of q and k, RoPE, a scale, the output norm in groups).

    `slopes`: how fast each head decays in this layer. `by_head`: a checkpoint keeps a head's rows of q, k, v together.
    """

    head_dim: int
    slopes: tuple[float, ...]
    silu: bool = False
    by_head: bool = False
    qk_norm: bool = False
    rope: RopeConfig | None = None
    scale: float = 1.0
    norm_groups: int = 1
    norm_eps: float | None = None  # None: as every other norm of the model

    def __post_init__(self) -> None:
        require_sizes(self, "head_dim", "norm_groups", most=MAX_HEAD_SIZE)
        for slope in self.slopes:
            require_number("the decay of a head", slope, least=0)
        if len(self.slopes) * self.head_dim % self.norm_groups:
            raise UserError(f"group_norm_size {self.norm_groups} does not divide the width of all heads, "
                            f"{len(self.slopes) * self.head_dim}")

    def in_layer(self, depth: float) -> "LightningConfig":
        """The same for a layer whose heads decay `depth` times as fast."""
        return replace(self, slopes=tuple(depth * slope for slope in self.slopes))

    def state_spec(self, dtype: str) -> StateSpec:
        """A matrix a head, in float32 because of the long sums."""
        shape = (len(self.slopes), self.head_dim, self.head_dim)
        return StateSpec(StateKind.REQUEST, (TensorSpec("memory", shape, "float32"),), CHUNK_TOKENS)

    def build(self, hidden_size: int, norm_eps: float) -> nn.Module:
        """The mixer's module, with fresh weights."""
        return Lightning(self, hidden_size, norm_eps)


def lightning_recurrent(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as written above, one token at a time.

    `q`, `k`, `v` `[batch, tokens, heads, head_dim]`, `slopes` `[heads]`, `memory` `[batch, heads, head_dim, head_dim]`,
    all float32. Returns the outputs (shaped like `v`) and the memory after the last token.
    """
    outputs, keep = [], (-slopes).exp()[:, None, None]
    for t in range(q.shape[1]):
        memory = keep * memory + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, dim=1), memory


def lightning_chunked(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, memory: Tensor,
                      new: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same function as `lightning_recurrent` (same arguments), `CHUNK_TOKENS` at a time. Where there is `new`
    `[batch]`, only so many tokens of each row are, and the others padding, which neither writes nor decays.

    Returns the outputs, the memory after the last token, and the memory before each chunk
    `[chunks, batch, heads, head_dim, head_dim]`.
    """
    tokens = q.shape[1]
    padding = -tokens % CHUNK_TOKENS
    number = torch.arange(1, tokens + padding + 1, device=q.device)  # of tokens, that one included
    if new is None:
        new = number.new_full((1,), tokens)
    k = k * (number[:tokens] <= new[:, None])[..., None, None]
    # Copied once into the order in which they are multiplied: each product would copy them anew.
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, CHUNK_TOKENS)).permute(0, 3, 1, 2, 4).contiguous()
               for x in (q, k, v))
    steps = number.minimum(new[:, None]).unflatten(1, (-1, CHUNK_TOKENS))  # [batch or 1, chunks, chunk]
    steps = (steps - number.view(-1, CHUNK_TOKENS)[:, :1] + 1).clamp(min=0)  # since its chunk began
    decay = -slopes[:, None, None, None] * steps[:, None, ..., None]  # [batch or 1, heads, chunks, chunk, 1]
    total = decay[..., -1:, :]

    added = (k * (total - decay).exp()).transpose(-1, -2) @ v
    befores, after = [], memory
    for keep_n, added_n in zip(total.exp().unbind(2), added.unbind(2)):
        befores.append(after)
        after = keep_n * after + added_n
    before = torch.stack(befores, dim=2)

    between = (decay - decay.transpose(-1, -2)).clamp(max=0).exp()
    out = (q * decay.exp()) @ before + (q @ k.transpose(-1, -2) * between).tril() @ v
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], after, before.movedim(2, 0)


class Lightning(nn.Module):
    """The whole mixer: one projection for q, k and v, the recurrence, output norm, output gate."""

    def __init__(self, config: LightningConfig, hidden_size: int, norm_eps: float):
        super().__init__()
        self.config = config
        width = len(config.slopes) * config.head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * width, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config.head_dim, norm_eps), RMSNorm(config.head_dim, norm_eps)
        self.norm = RMSNorm(width, norm_eps if config.norm_eps is None else config.norm_eps)
        self.g_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Positions, state: LayerState | None) -> Tensor:
        """`x` `[batch, new, hidden]` -> the same shape; `state` None means that nothing came before `x`."""
        config = self.config
        state = state_or_fresh(state, config.state_spec("float32"), x)
        (memory,) = state.load()
        q, k, v = self._heads(x, positions)
        slopes = _slopes_on(x.device, config.slopes)
        with torch.autocast(x.device.type, enabled=False):  # the memory's sums need float32
            if x.shape[1] == 1:
                out, memory = lightning_recurrent(q, k, v, slopes, memory)
                before = None
            else:
                out, memory, before = lightning_chunked(q, k, v, slopes, memory, positions.new)
        store_memory(state, positions, memory, before)
        out = out.flatten(2).unflatten(-1, (config.norm_groups, -1)).to(x.dtype)
        normed = F.rms_norm(out.float(), out.shape[-1:], eps=self.norm.eps).flatten(2).to(x.dtype) * self.norm.weight
        return self.o_proj(self.g_proj(x).sigmoid() * normed)

    def _heads(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each `[batch, new, heads, head_dim]`, float32."""
        config, qkv = self.config, self.qkv_proj(x)
        if config.silu:
            qkv = F.silu(qkv)
        if config.by_head:
            q, k, v = qkv.unflatten(-1, (len(config.slopes), 3, -1)).unbind(-2)
        else:
            q, k, v = qkv.unflatten(-1, (3, len(config.slopes), -1)).unbind(-3)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope is not None:
            cos, sin = positions.rotary(config.rope, config.head_dim, x.dtype)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q.float() * config.scale, k.float(), v.float()


@cache
def _slopes_on(device: torch.device, slopes: tuple[float, ...]) -> Tensor:
    """Copied to a device once: a copy from the host would make a pass wait, and a captured one fail."""
    with torch.inference_mode(False):  # what is kept must serve passes with gradients too
        return torch.tensor(slopes, device=device)
