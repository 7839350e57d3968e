"""The delta rule of a prefill chunk as captured CUDA graphs. Chapters 02 and 04.

From each chunk to the next go two or three small products or sums, for a pass of 8,192 tokens hundreds in every layer:
launched one by one they take two or three times as long as they run.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from minprfaas.engine.decode_graphs import captured
from minprfaas.engine.pieces import is_compiled
from minprfaas.model.delta_segments import SEGMENT_TOKENS, advance_memory, chunk_maps, delta_rule_in_segments
from minprfaas.model.gdn import GDN
from minprfaas.model.kda import KDA

STEP_TOKENS = SEGMENT_TOKENS  # a graph for each multiple: what a pass lacks is padding, which neither writes nor decays


def graph_delta_rules(model: nn.Module) -> None:
    """Let the model's delta rules run by graphs, which layers that are alike share. Harmless when repeated."""
    graphs: dict[tuple, DeltaGraph] = {}
    memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    for module in model.modules():
        if isinstance(module, (KDA, GDN)) and not isinstance(module.chunked, GraphedDeltaRule):
            in_segments = isinstance(module, KDA) and is_compiled(module)
            module.chunked = GraphedDeltaRule(module.chunked, compiled_segments() if in_segments else module.chunked,
                                              graphs, memory)


@cache
def compiled_segments() -> Callable:
    """`delta_rule_in_segments` compiled, for the one length that all segments have. The products inside the blocks of
    16 tokens are 32 sums of the same factors: one kernel, if it may have so many parts."""
    return partial(delta_rule_in_segments, advance=torch.compile(advance_memory, dynamic=False),
                   maps_of=torch.compile(chunk_maps, dynamic=False, options={"max_fusion_size": 256}))


class GraphedDeltaRule:
    """A layer's `delta_rule_chunked`: by a graph of `in_graph`, or as it was where a pass is short, or shared, or wants
    gradients."""

    def __init__(self, function: Callable, in_graph: Callable, graphs: dict[tuple, "DeltaGraph"],
                 memory: tuple[int, int] | None):
        self._function, self.in_graph, self._graphs, self._memory = function, in_graph, graphs, memory

    def __call__(self, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        requests, tokens = q.shape[:2]
        if requests > 1 or 2 * tokens < STEP_TOKENS or not torch.is_inference_mode_enabled():
            return self._function(q, *others)
        room = -(-tokens // STEP_TOKENS) * STEP_TOKENS
        shape = (q.device, room, *(tensor.shape[2:] for tensor in (q, *others)))
        if shape not in self._graphs:
            self._graphs[shape] = DeltaGraph(self.in_graph, room, (q, *others), self._memory)
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
