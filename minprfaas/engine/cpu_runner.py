"""The runner for a CPU: a decode step attends to pages where they lie. Chapter 05.

The eager `Runner` gathers the context of every layer at every step; this one differs from it in that alone. Where a
model's pieces are compiled, attention to pages is too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from minprfaas.config import StateKind
from minprfaas.engine.pieces import compiled, is_compiled
from minprfaas.engine.request import Request
from minprfaas.engine.runner import Runner
from minprfaas.kvcache.paged import PagedLayer, PagedState
from minprfaas.model.paged_attention import (
    PageRuns, attend_to_copied_pages, attend_to_each_page, attend_to_runs, page_runs)
from minprfaas.model.spec import LayerState, ModelState, TokenContext

# What a page, and a call for a run of pages, cost beside the reading is worth the copy of so many bytes. For 8 requests
# of 17 pages the copy took 1.5 to 1.9 times as long as one run with pages of 128 KiB, 1.1 to 1.2 with 32 KiB, 0.6 with
# 8 KiB; with pages of 128 KiB in runs of four 1.2 times, of two 0.97, of one 0.78 (CPU time of one thread).
PAGE_BYTES, RUN_BYTES = 2**15, 2**18


class CPURunner(Runner):
    """`Runner` with decode steps that copy no context, unless its pages are small or scattered; compiled sums (float32)
    read those, too."""

    def _decode_state(self, batch: list[Request]) -> ModelState:
        by_page = None
        if self.model.dtype is torch.float32 and is_compiled(self.model.model.layers[0]):
            by_page = compiled(attend_to_each_page, "cpu")
        return InPlaceState(super()._decode_state(batch), by_page)


class InPlaceState:
    """A `PagedState` of a decode step, whose contexts are attended to where they lie (implements `ModelState`)."""

    new = None

    def __init__(self, state: PagedState, by_page: Callable | None):
        self.start, self._state, self._by_page = state.start, state, by_page
        self._runs: dict[int, PageRuns] = {}  # by group, made once a step and shared by its layers

    def layer(self, index: int) -> LayerState:
        """The state of layer `index`."""
        layer = self._state.layer(index)
        if layer.group.spec.kind is not StateKind.TOKEN:
            return layer
        return InPlaceLayer(layer, self._runs, self._by_page)


class InPlaceLayer:
    """One token-state layer of it (implements what a mixer of such a layer uses of `LayerState`)."""

    def __init__(self, layer: PagedLayer, runs: dict[int, PageRuns], by_page: Callable | None):
        self._layer, self._runs, self._by_page = layer, runs, by_page

    def append(self, rows: torch.Tensor) -> TokenContext:
        """As `PagedLayer.append`, with a way to attend to the context without a copy."""
        context, group = self._layer.append(rows), self._layer.group.index
        pages, page_bytes = context.pages, context.pages.view[0].nbytes
        if page_bytes < PAGE_BYTES and self._by_page is None:
            return context
        if group not in self._runs:
            self._runs[group] = page_runs(pages)
        runs = self._runs[group]
        if len(runs.owners) * page_bytes < (len(runs.runs) - 1) * RUN_BYTES and self._by_page is None:
            return context

        def attend(q: torch.Tensor, scale: float, kv_heads: int) -> tuple[torch.Tensor, ...]:
            if pages.view.shape[2] == 2 * kv_heads * q.shape[3]:
                return (attend_to_runs(q, pages.view, runs, scale, self._by_page),)
            return attend_to_copied_pages(q, pages, runs.row_counts, scale, kv_heads)

        return replace(context, attend=attend)
