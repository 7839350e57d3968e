"""Decode as captured CUDA graphs: a step of fixed shape that one launch replays. Chapter 05.

A step has a *bucket*: a number of requests and of pages for each, both rounded up. The host overwrites what changes
from step to step before it replays the graph. So a step costs one copy to the device, one launch and one wait for the
tokens, whatever the model does inside. Without CUDA the same step runs uncaptured.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch

from minprfaas.engine.decode_layers import step_logits
from minprfaas.engine.decode_state import LiveState, StepState, StepTables
from minprfaas.engine.pieces import compiled_like
from minprfaas.engine.request import Request
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.transformer import Transformer

LEAST_PAGES = 4
capture_stream = cache(torch.cuda.Stream)  # by device: libraries keep 32 MiB for each stream that they have met


def bucket_of(requests: int, pages: int) -> tuple[int, int]:
    """The smallest bucket that holds so many requests of at most so many pages: requests in powers of two up to 8 and
    multiples of 8 beyond, pages in powers of two and the halves between."""
    batch = 2 ** math.ceil(math.log2(requests)) if requests <= 8 else -(-requests // 8) * 8
    power = 2 ** math.ceil(math.log2(max(pages, LEAST_PAGES)))
    return batch, power * 3 // 4 if pages <= power * 3 // 4 and power > LEAST_PAGES else power


class DecodeStep:
    """The step of one bucket. `run` replays it; where there is no CUDA it computes it. To capture it is to compute it
    with whatever `live` holds."""

    def __init__(self, model: Transformer, pool: BlockPool, live: LiveState, batch: int, pages: int,
                 memory: tuple[int, int] | None):
        self.model, self.pool, self.live = model, pool, live
        self.tables = StepTables(pool, batch, pages)
        self.graph = captured(self._forward, pool.device, memory) if pool.device.type == "cuda" else None

    def _forward(self) -> None:
        self.tables.tell()
        state = StepState(self.pool, self.tables, self.live, partial(compiled_like, self.model.model.layers[0]))
        self.logits = step_logits(self.model, self.tables.tokens, state)[:, 0]
        self.greedy = self.logits.argmax(dim=-1)

    def run(self, requests: Sequence[Request]) -> None:
        """Begin the step: afterwards `greedy` `[batch]` and `logits` `[batch, vocab]` are on their way."""
        self.tables.fill(requests)
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()


def captured(compute: Callable[[], None], device: torch.device, memory: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """`compute` as a graph, out of the pool `memory`. It is run twice beside the current stream (libraries set
    themselves up, pieces are compiled), then recorded."""
    beside, graph = capture_stream(device), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(2):
            compute()
    beside.synchronize()  # what it read of the host's memory may change from now on
    # The stream is named because the default one belongs to the first GPU. Other threads use the device meanwhile
    # (KVCache leaves and arrives): only what this one does may spoil the capture.
    with uncollected(), torch.cuda.graph(graph, pool=memory, stream=beside, capture_error_mode="thread_local"):
        compute()
    return graph


@contextmanager
def uncollected() -> Iterator[None]:
    """A capture that no garbage collection falls into: if it met a graph of an engine that nobody has any more, that
    would be destroyed, which CUDA forbids the thread that captures, and the capture would be lost."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
