"""A prefill pass over one request as captured CUDA graphs, one from layer to layer. Chapters 04 and 08.

A pass is some 500 kernels, however few tokens it has. The host needs 17 to 36 ms to launch them; of 8,192 tokens the
GPU needs less than 30 to run them, and a thread that sends KVCache meanwhile takes turns with the launches. Graphs are
launched in less than 1 ms. Each ends where a layer's state is final, so that who listens to the pass is called where
it always was.
"""

import torch
from torch import Tensor

from minprfaas.engine.decode_graphs import capture_stream
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.paged import PagedState
from minprfaas.model.attention import PLANNED_TOKENS
from minprfaas.model.gqa import GQA
from minprfaas.model.layers import MLP
from minprfaas.model.mla import MLA
from minprfaas.model.spec import OnLayer
from minprfaas.model.transformer import Transformer


CHUNK_TOKENS = 8192  # of a long prompt on a GPU, a pass each


class PassGraphs:
    """The captured passes of one model over one request, by shape: a multiple of `unit` tokens (what the request has
    less is padding) that follow a multiple of `chunk`. A shape is captured when it is met for the second time: the
    first time compiles and plans."""

    def __init__(self, model: Transformer, layout: Layout, memory: tuple[int, int] | None,
                 unit: int = PLANNED_TOKENS, chunk: int = CHUNK_TOKENS):
        self.model, self._memory, self._unit, self._chunk = model, memory, unit, chunk
        # A state of one size is overwritten by its pass, and experts that are counted are waited for.
        self._can_be = not layout.request_groups and all(
            isinstance(layer.self_attn, (GQA, MLA)) and isinstance(layer.mlp, MLP) for layer in model.model.layers)
        self._graphs: dict[tuple[int, int, bool], PassGraph | None] = {}

    def room(self, new: int, starts: list[int]) -> int:
        """Tokens, padding included, of a pass over `new` tokens after `starts`."""
        is_captured = self._can_be and len(starts) == 1 and starts[0] % self._chunk == 0
        return -(-new // self._unit) * self._unit if is_captured else new

    def of(self, token_ids: Tensor, state: PagedState) -> "PassGraph | None":
        """The graphs of a pass over `token_ids` `[batch, new]`; None for one that has to be computed as it is."""
        new, start = token_ids.shape[1], state.starts[0]
        if not self._can_be or len(token_ids) > 1 or start % self._chunk:
            return None
        shape = new, start, state.new is None
        if shape not in self._graphs:
            self._graphs[shape] = None
        elif self._graphs[shape] is None:
            self._graphs[shape] = PassGraph(self.model, token_ids, state, self._memory)
        return self._graphs[shape]


class PassGraph:
    """The pass of one shape. Without CUDA it is computed each time."""

    def __init__(self, model: Transformer, token_ids: Tensor, state: PagedState, memory: tuple[int, int] | None):
        self.model, self._token_ids, self._state = model, token_ids.clone(), state
        self._own(state)  # made before the capture, because it is copied from the host
        self._graphs: list[torch.cuda.CUDAGraph] = []
        if token_ids.is_cuda:
            self._capture(memory)

    def __call__(self, token_ids: Tensor, state: PagedState, on_layer: OnLayer | None) -> Tensor:
        """As the model's, `[1, 1, vocab]`; valid until the next call."""
        for held, given in zip([self._token_ids, *self._own(self._state)], [token_ids, *self._own(state)]):
            held.copy_(given)
        if not self._graphs:
            self._compute(on_layer)
        for layer, graph in enumerate(self._graphs):
            graph.replay()
            if on_layer is not None and layer < len(self._graphs) - 1:
                on_layer(layer)
        return self._logits

    def _own(self, state: PagedState) -> list[Tensor]:
        """All of a state that is the request's and not the shape's: how many tokens it has, and where its rows lie."""
        indexes = [state.token_index(group, self._token_ids.shape[1]) for group in state.pool.layout.token_groups]
        places = [tensor for index in indexes for tensor in (index.new_blocks, index.block_table)]
        return places if state.new is None else [state.new, *places]

    def _compute(self, on_layer: OnLayer | None) -> None:
        self._logits = self.model(self._token_ids, self._state, on_layer, last_only=True)

    def _capture(self, memory: tuple[int, int]) -> None:
        beside = capture_stream(self._token_ids.device)
        beside.wait_stream(torch.cuda.current_stream(self._token_ids.device))

        def begin() -> None:
            self._graphs.append(torch.cuda.CUDAGraph())
            # Other threads use the device meanwhile: only what this one does may spoil the capture.
            self._graphs[-1].capture_begin(memory, capture_error_mode="thread_local")

        def next_graph(layer: int) -> None:
            self._graphs[-1].capture_end()
            begin()

        with torch.cuda.stream(beside):
            begin()
            self._compute(next_graph)
            self._graphs[-1].capture_end()
        torch.cuda.current_stream(self._token_ids.device).wait_stream(beside)
