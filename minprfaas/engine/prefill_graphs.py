"""The delta rule of a prefill chunk as captured CUDA graphs. Chapters 02 and 04.

From each 64 tokens to the next go three small products, for a chunk of 8,192 tokens 384 in every layer: launched one by
one they take two or three times as long as they run.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minprfaas.engine.decode_graphs import captured
from minprfaas.model.gdn import GDN
from minprfaas.model.kda import KDA

STEP_TOKENS = 2048  # a graph for each multiple: what a pass has less is padding, which neither writes nor decays


def graph_delta_rules(model: nn.Module) -> None:
    """Let the model's delta rules run by graphs, which layers that are alike share. Harmless when repeated."""
    graphs: dict[tuple, DeltaGraph] = {}
    memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    for module in model.modules():
        if isinstance(module, (KDA, GDN)) and not isinstance(module.chunked, GraphedDeltaRule):
            module.chunked = GraphedDeltaRule(module.chunked, graphs, memory)


class GraphedDeltaRule:
    """A layer's `delta_rule_chunked`: by a graph, or as it was where a pass is short, or shared, or wants gradients."""

    def __init__(self, function: Callable, graphs: dict[tuple, "DeltaGraph"],
                 memory: tuple[int, int] | None):
        self._function, self._graphs, self._memory = function, graphs, memory

    def __call__(self, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        requests, tokens = q.shape[:2]
        if requests > 1 or 2 * tokens < STEP_TOKENS or not torch.is_inference_mode_enabled():
            return self._function(q, *others)
        room = -(-tokens // STEP_TOKENS) * STEP_TOKENS
        shape = (q.device, room, *(tensor.shape[2:] for tensor in (q, *others)))
        if shape not in self._graphs:
            self._graphs[shape] = DeltaGraph(self._function, room, (q, *others), self._memory)
        return self._graphs[shape](q, *others)


class DeltaGraph:
    """The delta rule of up to `room` tokens. The outputs and the memories inside the pass are valid until the next
    call. Without CUDA it is computed each time."""

    def __init__(self, function: Callable, room: int, arguments: tuple[Tensor, ...],
                 memory: tuple[int, int] | None):
        *of_tokens, before = arguments
        self._function = function
        self._inputs = [tensor.new_zeros(1, room, *tensor.shape[2:]) for tensor in of_tokens] + [before.clone()]
        self._graph = captured(self._compute, before.device, memory) if before.is_cuda else None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = arguments[0].shape[1]
        for held, given in zip(self._inputs[:-1], arguments):
            held[:, :tokens] = given
            held[:, tokens:] = 0
        self._inputs[-1].copy_(arguments[-1])
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        outputs, after, before = self._outputs
        return outputs[:, :tokens], after.clone(), before

    def _compute(self) -> None:
        self._outputs = self._function(*self._inputs)
