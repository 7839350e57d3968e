"""Mixture-of-experts MLP: a router gives each token a few of many small MLPs. Chapter 01; paper table 1.

All six of the paper's models have them. Only the MLP differs from a dense layer's: what a layer remembers, and so what
crosses between datacenters, is its mixer's alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.config import MAX_WIDTH, require_sizes
from minprfaas.errors import UserError, require_number
from minprfaas.model.layers import MLP

MAX_EXPERTS = 2**16


@dataclass(frozen=True)
class MoEConfig:
    """`top_k` of `num_experts` SwiGLU MLPs of `intermediate_size`, beside a shared one of `shared_size` (0: none).

    `scoring` "softmax" chooses the highest probabilities (Qwen3). "sigmoid" scores each expert by itself and adds a
    learned correction to the choice alone, not to the weight; where there are `num_groups` of experts it first keeps
    the `top_groups` whose two best experts score highest (DeepSeek-V3, Kimi, MiMo, MiniMax-M2).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: str
    renormalize: bool = True  # the chosen experts' weights add up to `routed_scale`
    num_groups: int = 1
    top_groups: int = 1
    routed_scale: float = 1.0
    shared_size: int = 0
    shared_gate: bool = False  # a sigmoid gate a token on what the shared MLP gives

    def __post_init__(self) -> None:
        require_sizes(self, "num_experts", "top_k", "num_groups", "top_groups", most=MAX_EXPERTS)
        require_sizes(self, "intermediate_size", most=MAX_WIDTH)
        require_number("shared expert size", self.shared_size, least=0, most=MAX_WIDTH, whole=True)
        if self.scoring not in ("softmax", "sigmoid"):
            raise UserError(f"scoring_func {self.scoring!r} is not supported; supported: softmax, sigmoid")
        group_size, rest = divmod(self.num_experts, self.num_groups)
        is_right = not rest and self.top_groups <= self.num_groups and self.top_k <= self.top_groups * group_size
        if not is_right or (self.num_groups > 1 and group_size < 2):  # a group is judged by its two best
            raise UserError(f"{self.top_k} experts a token cannot be chosen from {self.top_groups} of "
                            f"{self.num_groups} groups of {self.num_experts} experts")

    def build(self, hidden_size: int) -> nn.Module:
        """The MLP's module, with fresh weights."""
        return MoE(self, hidden_size)


class MoE(nn.Module):
    """Router, experts, and the shared MLP, under the names of Hugging Face checkpoints."""

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        self.gate = ExpertRouter(config, hidden_size)
        self.experts = Experts(config.num_experts, hidden_size, config.intermediate_size)
        self.shared_experts = MLP(hidden_size, config.shared_size) if config.shared_size else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` -> the same shape."""
        tokens = x.flatten(0, 1)
        out = self.experts(tokens, *self.gate(tokens)).view_as(x)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(x)
        return out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)


class ExpertRouter(nn.Module):
    """Which experts each token goes to, and how much each counts. In float32 whatever the model's number format: a
    rounded correction bias would choose other experts."""

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.num_experts, hidden_size) * hidden_size**-0.5)
        if config.scoring == "sigmoid":
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`[tokens, hidden]` -> the chosen experts and their weights, both `[tokens, top_k]`."""
        config, logits = self.config, F.linear(tokens.float(), self.weight.float())
        if config.scoring == "softmax":
            weights, chosen = logits.softmax(dim=-1).topk(config.top_k, dim=-1)
        else:
            scores = logits.sigmoid()
            chosen = self._without_lesser_groups(scores + self.e_score_correction_bias).topk(config.top_k, dim=-1)[1]
            weights = scores.gather(1, chosen)
        if config.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        return chosen, weights * config.routed_scale

    def _without_lesser_groups(self, scores: Tensor) -> Tensor:
        """`[tokens, experts]` with minus infinity outside each token's best groups."""
        if self.config.num_groups == 1:
            return scores
        grouped = scores.unflatten(1, (self.config.num_groups, -1))
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1).topk(self.config.top_groups, dim=-1)[1]
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


class Experts(nn.Module):
    """All experts' weights in two tensors, so that one of the experts is a slice."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        up, down = hidden_size**-0.5, intermediate_size**-0.5
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * intermediate_size, hidden_size) * up)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden_size, intermediate_size) * down)

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint may hold in place of the parameter `name`, and where it belongs: each expert's tensors by
        themselves, as authors publish them."""
        for expert, weight in enumerate(self.get_parameter(name)):
            names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            for part, view in zip(names, weight.chunk(len(names))):
                yield f"{expert}.{part}.weight", view

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`tokens` `[tokens, hidden]` through the experts `chosen` `[tokens, top_k]`, summed by `weights`.

        The pairs of token and expert are sorted by expert, so that each expert's rows lie together.
        """
        experts, order = chosen.flatten().sort(stable=True)
        rows = tokens[order // chosen.shape[1]]
        outputs = self.all_at_once(rows, experts) if self.can_go_at_once else self.one_by_one(rows, experts)
        # Back to each token's own order before they are added: adding by index has no fixed order on a GPU.
        by_token = torch.empty_like(outputs).index_copy_(0, order, outputs)
        return (by_token.view(*chosen.shape, -1) * weights[..., None].to(tokens.dtype)).sum(dim=1)

    def one_by_one(self, rows: Tensor, experts: Tensor) -> Tensor:
        """`rows` `[pairs, hidden]` through their `experts` `[pairs]`, two matrix products for each that has any."""
        outputs = []
        for expert, of_expert in enumerate(rows.split(experts.bincount(minlength=len(self.gate_up_proj)).tolist())):
            if len(of_expert):
                gate, up = F.linear(of_expert, self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(outputs)

    def all_at_once(self, rows: Tensor, experts: Tensor) -> Tensor:
        """The same in two products of groups. The host does not ask how many rows an expert has, so that a decode step
        can be captured."""
        numbers = torch.arange(len(self.gate_up_proj), device=rows.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)

    @property
    def can_go_at_once(self) -> bool:
        """Whether PyTorch has a kernel for it: on a GPU, in bfloat16, where a row is a multiple of 16 bytes."""
        _, widths, hidden = self.gate_up_proj.shape
        fits = hidden % 8 == 0 and widths // 2 % 8 == 0
        return fits and self.gate_up_proj.is_cuda and self.gate_up_proj.dtype == torch.bfloat16
