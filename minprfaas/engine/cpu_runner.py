"""The runner for a CPU: a decode step attends to pages where they lie. Chapter 05.

The eager `Runner` gathers the context of every layer at every step; this one differs from it in that alone.
"""

from dataclasses import replace

import torch

from minprfaas.config import StateKind
from minprfaas.engine.request import Request
from minprfaas.engine.runner import Runner
from minprfaas.kvcache.paged import PagedLayer, PagedState
from minprfaas.model.paged_attention import PageRuns, attend_to_copied_pages, attend_to_runs, page_runs
from minprfaas.model.spec import LayerState, ModelState, TokenContext

RUN_BYTES = 2**16  # of a run of pages, on average: a call for each takes longer than a copy of shorter ones


class CPURunner(Runner):
    """`Runner` with decode steps that copy no context."""

    def _decode_state(self, batch: list[Request]) -> ModelState:
        return InPlaceState(super()._decode_state(batch))


class InPlaceState:
    """A `PagedState` of a decode step, whose contexts are attended to where they lie (implements `ModelState`)."""

    new = None

    def __init__(self, state: PagedState):
        self.start, self._state = state.start, state
        self._runs: dict[int, PageRuns] = {}  # by group, made once a step and shared by its layers

    def layer(self, index: int) -> LayerState:
        """The state of layer `index`."""
        layer = self._state.layer(index)
        return InPlaceLayer(layer, self._runs) if layer.group.spec.kind is StateKind.TOKEN else layer


class InPlaceLayer:
    """One token-state layer of it (implements what a mixer of such a layer uses of `LayerState`)."""

    def __init__(self, layer: PagedLayer, runs: dict[int, PageRuns]):
        self._layer, self._runs = layer, runs

    def append(self, rows: torch.Tensor) -> TokenContext:
        """As `PagedLayer.append`, with a way to attend to the context without a copy."""
        context, group = self._layer.append(rows), self._layer.group.index
        if group not in self._runs:
            self._runs[group] = page_runs(context.pages)
        runs, pages = self._runs[group], context.pages
        page_bytes = pages.view.shape[1] * pages.view.shape[2] * pages.view.element_size()
        if len(runs.owners) * page_bytes < (len(runs.runs) - 1) * RUN_BYTES:
            return context

        def attend(q: torch.Tensor, scale: float, kv_heads: int) -> tuple[torch.Tensor, ...]:
            if pages.view.shape[2] == 2 * kv_heads * q.shape[3]:
                return (attend_to_runs(q, pages.view, runs, scale),)
            return attend_to_copied_pages(q, pages, runs.row_counts, scale, kv_heads)

        return replace(context, attend=attend)
