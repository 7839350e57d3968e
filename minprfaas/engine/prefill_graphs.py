"""The delta rule of a prefill chunk as captured CUDA graphs. Chapters 02 and 04.

From each chunk to the next go one to three small products or sums, for a pass of 8,192 tokens hundreds in every layer:
launched one by one they take two or three times as long as they run.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minprfaas.engine.decode_graphs import captured
from minprfaas.engine.pieces import choose_by_kernels, compiled_like, is_compiled
from minprfaas.model.delta_segments import (
    CHUNK, SEGMENT_TOKENS, advance_memory, by_tokens, delta_rule_in_segments, for_segments, zero_matrices)
from minprfaas.model.gdn import GDN
from minprfaas.model.kda import KDA

STEP_TOKENS = SEGMENT_TOKENS  # a graph for each multiple: what a pass lacks is padding, which neither writes nor decays


def graph_delta_rules(model: nn.Module) -> tuple[int, int] | None:
    """Let the model's delta rules run by graphs, which layers that are alike share; returns their memory, which others
    may share that run before or after them. Repeated it only returns that."""
    graphs: dict[tuple, DeltaGraph] = {}
    memory = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    in_segments = compiled_segments()
    for module in model.modules():
        if not isinstance(module, (KDA, GDN)):
            continue
        if isinstance(module.chunked, GraphedDeltaRule):
            memory = module.chunked.memory
        else:
            module.chunked = GraphedDeltaRule(module.chunked, graphs, memory)
            # A generated product sums 16 channels at a time, or more.
            if isinstance(module, KDA) and is_compiled(module) and module.config.head_dim % 16 == 0:
                module.mixed = GraphedMixer(module, in_segments, graphs, memory)
    return memory


def compiled_segments() -> Callable:
    """`delta_rule_in_segments` compiled, for the one length that all segments have, with matrices for all its graphs:
    they run one after the other."""
    return partial(delta_rule_in_segments, compiled=_compiled, matrices_of=cache(zero_matrices))


@cache
def _compiled(piece: Callable) -> Callable:
    """A step from chunk to chunk is one kernel if its product is generated with the rest."""
    choose_by_kernels()  # a step is short: once a form that takes twice as long was chosen
    options = {"triton.native_matmul": True, "inplace_buffers": False} if piece is advance_memory else None
    return torch.compile(piece, dynamic=False, options=options)


def room_for(requests: int, tokens: int) -> int | None:
    """Tokens of the graph for a pass; None where it is short, or shared, or wants gradients."""
    if requests > 1 or 2 * tokens < STEP_TOKENS or not torch.is_inference_mode_enabled():
        return None
    return -(-tokens // STEP_TOKENS) * STEP_TOKENS


class GraphedDeltaRule:
    """A layer's `delta_rule_chunked` by a graph, or as it was."""

    def __init__(self, function: Callable, graphs: dict[tuple, "DeltaGraph"], memory: tuple[int, int] | None):
        self._function, self._graphs, self.memory = function, graphs, memory

    def __call__(self, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = q.shape[1]
        if (room := room_for(*q.shape[:2])) is None:
            return self._function(q, *others)
        shape = (q.device, room, *(tensor.shape[2:] for tensor in (q, *others)))
        if shape not in self._graphs:
            *of_tokens, memory = q, *others
            held = [tensor.new_zeros(room, *tensor.shape[2:]) for tensor in of_tokens]
            self._graphs[shape] = DeltaGraph(self._of_one, held, memory, self.memory)
        graph = self._graphs[shape]
        for place, given in zip(graph.places(tokens), (q, *others)):
            place.copy_(given[0])
        outputs, after, before = graph(others[-1])
        return outputs[:, :tokens], after, before

    def _of_one(self, *of_tokens_and_memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *of_tokens, memory = of_tokens_and_memory
        return self._function(*(tensor[None] for tensor in of_tokens), memory)


class GraphedMixer:
    """A layer's `mixed` with a graph of `in_segments`, or as it was. What is before the graph writes into it, and what
    is behind it reads from it: nothing is copied."""

    def __init__(self, layer: KDA, in_segments: Callable, graphs: dict[tuple, "DeltaGraph"],
                 memory: tuple[int, int] | None):
        self._layer, self._in_segments, self._graphs, self._memory = layer, in_segments, graphs, memory
        self._project, self._output = compiled_like(layer, project_into), compiled_like(layer, output_of)

    def __call__(self, x: Tensor, memory: Tensor, tail: Tensor, is_token: Tensor | None) -> tuple:
        layer, tokens, room = self._layer, x.shape[1], room_for(*x.shape[:2])
        if room is None or layer.joined is None or layer.joined.device != x.device:
            return KDA.mixed(layer, x, memory, tail, is_token)
        kind = (x.device, x.dtype, layer.config, room)
        if kind not in self._graphs:
            self._graphs[kind] = DeltaGraph(self._in_segments, self._held(x, tail, room), memory, self._memory)
        graph, chunks = self._graphs[kind], -(-tokens // CHUNK)
        # The convolutions' inputs begin with the tail: where it is, there is the product made.
        channels, before = tail.shape[1:]
        product = x.new_empty(before + chunks * CHUNK, len(layer.joined))
        product[:before, :channels] = tail[0].t()
        torch.mm(x[0], layer.joined.t(), out=product[before:before + tokens])
        places = graph.places(chunks)
        if padding := chunks * CHUNK - tokens:
            product[-padding:] = 0
        gate = self._project(layer, product, *places)[:, :tokens]
        if padding or is_token is not None:  # padding neither writes nor decays
            is_token = x.new_ones(tokens, dtype=torch.bool) if is_token is None else is_token[0]
            is_token = F.pad(is_token, (0, padding)).view(chunks, CHUNK, 1)
            _, _, _, g, beta, _ = places
            g.mul_(is_token[:, None])
            beta.mul_(is_token)
        outputs, after, memories = graph(memory)
        out = self._output(layer, outputs, memories.scale, gate)
        return out, after, memories, [product[None, :before + tokens, :channels]]

    def _held(self, x: Tensor, tail: Tensor, room: int) -> list[Tensor]:
        """What a graph for `room` tokens reads, by chunks."""
        *arguments, _, _ = KDA.project(self._layer, x[:, :2], tail)  # of their shapes and types: nothing to compile
        of_rule = for_segments(*(tensor[:, :1].expand(1, CHUNK, *tensor.shape[2:]) for tensor in arguments))
        return [tensor.new_zeros(room // CHUNK, *tensor.shape[1:]) for tensor in of_rule]


def project_into(layer: KDA, product: Tensor, *places: Tensor) -> Tensor:
    """`layer.project` of the joined projections' product `[kernel - 1 + tokens, width]`, which begins with the tail:
    what `for_segments` makes of q, k, v, g and beta goes to its `places`. The output's gate."""
    before = layer.config.conv_kernel - 1
    q, k, v, decay, gate, beta = layer.apart(product[None])
    arguments = layer.arguments(layer.conv1d.over(q, k, v), decay[:, before:], beta[:, before:])
    for place, argument in zip(places, for_segments(*arguments)):
        place.copy_(argument)
    return layer.second_step("g", gate[:, before:])


def output_of(layer: KDA, outputs: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """`layer.output` of what `delta_rule_in_segments` gives."""
    return layer.output(by_tokens(outputs, scale, gate.shape[1]), gate)


class DeltaGraph:
    """A `function` of what is `held` for it (q, k, v, g, beta, …, by tokens or by chunks) and of a memory like
    `before`. What it gives, but for the memory after it, is valid until the next call. Without CUDA it is computed each
    time, and where a whole pass is captured it becomes a part of that."""

    def __init__(self, function: Callable, held: list[Tensor], before: Tensor, memory: tuple[int, int] | None):
        self._function, self._held, self._memory = function, held, before.clone()
        self._graph = captured(self._compute, before.device, memory) if before.is_cuda else None

    def places(self, count: int) -> list[Tensor]:
        """The first so many of what is held, to be written. Padding follows them."""
        if count < len(self._held[0]):
            for held in self._held:
                held[count:] = 0
        return [held[:count] for held in self._held]

    def __call__(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._graph is None or torch.cuda.is_current_stream_capturing():
            return self._function(*self._held, memory)
        self._memory.copy_(memory)
        self._graph.replay()
        outputs, after, memories = self._given
        return outputs, after.clone(), memories

    def _compute(self) -> None:
        self._given = self._function(*self._held, self._memory)
