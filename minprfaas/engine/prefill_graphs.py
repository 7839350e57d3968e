"""The delta rule of a long pass: its loop from chunk to chunk a captured CUDA graph. Chapters 02 and 04.

From each 64 tokens to the next go three small products, for a pass of 8,192 tokens 384 in every layer: launched one by
one they take two or three times as long as they run. What is before the loop and after it takes `STEP_TOKENS` at a
time: all its shapes are constant, so that a compiler can make one kernel of a product and what is around it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minprfaas.engine.decode_graphs import captured
from minprfaas.engine.pieces import fused, is_compiled
from minprfaas.model.delta import ChunkParts, carry_chunk, carry_through, chunk_outputs, chunk_parts
from minprfaas.model.gdn import GDN
from minprfaas.model.kda import KDA
from minprfaas.model.recurrent import CHUNK_TOKENS

STEP_TOKENS = 2048  # a graph for each multiple: what a pass has less is padding, which neither writes nor decays


def graph_delta_rules(model: nn.Module) -> None:
    """Let the model's delta rules run by graphs, which layers that are alike share. Harmless when repeated."""
    graphs: dict[tuple, DeltaGraph] = {}
    memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    for module in model.modules():
        if isinstance(module, (KDA, GDN)) and not isinstance(module.chunked, GraphedDeltaRule):
            module.chunked = GraphedDeltaRule(module.chunked, graphs, memory, is_compiled(model))


class GraphedDeltaRule:
    """A layer's `delta_rule_chunked`: by a graph, or as it was where a pass is short, or shared, or wants gradients."""

    def __init__(self, function: Callable, graphs: dict[tuple, "DeltaGraph"],
                 memory: tuple[int, int] | None, compiled: bool = False):
        self._function, self._graphs, self._memory, self._compiled = function, graphs, memory, compiled

    def __call__(self, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        requests, tokens = q.shape[:2]
        if requests > 1 or 2 * tokens < STEP_TOKENS or not torch.is_inference_mode_enabled():
            return self._function(q, *others)
        room = -(-tokens // STEP_TOKENS) * STEP_TOKENS
        shape = (q.device, room, *(tensor.shape[2:] for tensor in (q, *others)))
        if shape not in self._graphs:
            self._graphs[shape] = DeltaGraph(room, (q, *others), self._memory, self._compiled)
        return self._graphs[shape](q, *others)


class DeltaGraph:
    """The delta rule of up to `room` tokens. The outputs and the memories inside the pass are valid until the next
    call. Without CUDA its loop is computed each time."""

    def __init__(self, room: int, arguments: tuple[Tensor, ...], memory: tuple[int, int] | None, compiled: bool):
        *of_tokens, before = arguments
        compiled &= before.is_cuda
        self._fill, self._read = (fused(function) if compiled else function for function in (fill, read))
        self._carry_chunk = fused(carry_chunk) if compiled else None
        # A chunk's part of all heads lies together, so that those of a step have the same strides whatever the room.
        self._parts = ChunkParts(*(
            part.new_empty(room // CHUNK_TOKENS, *part.shape[1:2], *part.shape[3:]).transpose(0, 1)[None]
            for part in chunk_parts(*(tensor.new_zeros(1, CHUNK_TOKENS, *tensor.shape[2:]) for tensor in of_tokens))))
        self._memory = before.clone()
        self._outputs = before.new_empty(room, *of_tokens[2].shape[2:])
        self._graph = captured(self._loop, before.device, memory) if before.is_cuda else None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *of_tokens, memory = arguments
        steps = range(0, len(self._outputs), STEP_TOKENS)
        for start in steps:
            self._fill(ChunkParts(*_chunks(self._parts, start)), *(_step(tensor, start) for tensor in of_tokens))
        self._memory.copy_(memory)
        if self._graph is None:
            self._loop()
        else:
            self._graph.replay()
        before, values, after = self._carried
        for start in steps:
            *parts, before_step, values_step = _chunks((*self._parts, before, values), start)
            self._read(self._outputs[start : start + STEP_TOKENS][None], ChunkParts(*parts), before_step, values_step)
        return self._outputs[None, :of_tokens[0].shape[1]], after.clone(), before

    def _loop(self) -> None:
        self._carried = carry_through(self._parts, self._memory, self._carry_chunk)


def _chunks(tensors: Iterable[Tensor], start: int) -> list[Tensor]:
    """The chunks `[1, heads, chunks, …]` of the step that begins with token `start`."""
    return [tensor[:, :, start // CHUNK_TOKENS : (start + STEP_TOKENS) // CHUNK_TOKENS] for tensor in tensors]


def fill(places: ChunkParts, *of_tokens: Tensor) -> None:
    """`chunk_parts`, each into its place."""
    products = products_of_blocks if torch.compiler.is_compiling() else None
    for place, part in zip(places, chunk_parts(*of_tokens, products=products)):
        place.copy_(part)


def products_of_blocks(q: Tensor, k: Tensor, decay: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`products_of_channels` as one product: each block of `size` tokens with all keys, whose decays refer to the
    block's middle, so that no exponent is large; what comes after the block is cut off. A compiler that computes the
    operands where they are multiplied needs one kernel; else the keys would be written once for every block."""
    of_blocks = [x.unflatten(-2, (-1, size)) for x in (k, q, decay)]
    middle = of_blocks[-1][..., (size - 1) // 2:, :][..., :1, :]
    keys = k[..., None, :, :] * (middle - decay[..., None, :, :]).clamp(max=80.0).exp()
    kept = (of_blocks.pop() - middle).exp()
    k_by_k, q_by_k = (((x * kept) @ keys.transpose(-1, -2)).flatten(-3, -2).tril() for x in of_blocks)
    return k_by_k, q_by_k


def read(outputs: Tensor, *of_chunks) -> None:
    """`chunk_outputs` into their place."""
    outputs.copy_(chunk_outputs(*of_chunks))


def _step(tensor: Tensor, start: int) -> Tensor:
    """`STEP_TOKENS` tokens of `tensor` `[1, tokens, …]` from `start` on, filled up with zeros, in its strides."""
    given = tensor[0, start : start + STEP_TOKENS]
    if len(given) < STEP_TOKENS:
        whole = given.new_empty_strided((STEP_TOKENS, *given.shape[1:]), given.stride()).zero_()
        whole[:len(given)] = given
        given = whole
    return given[None]
