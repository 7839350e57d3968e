"""KVCache on its way out: what a prefill node ships, layer by layer, while the next layer computes. Chapter 08; paper 3.3."""

from concurrent.futures import Future, ThreadPoolExecutor

from minprfaas.config import StateKind
from minprfaas.engine.request import Request, Status
from minprfaas.kvcache.layout import Layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.transport.events import LinkDown, StreamAborted, StreamReport
from minprfaas.transport.link import Link
from minprfaas.transport.streams import LayerPlan, StreamPlan


def stream_plan(layout: Layout, stream_id: int, start: int, end: int) -> StreamPlan:
    """What crosses for tokens [start, end) of a request: its rows in token layers, its final state in the others.

    Both ends make the plan from their own layout and their own view of the request; the sender's bytes must fit it.
    """
    entries = tuple(LayerPlan(layer, layout.group_of_layer[layer].index, spec.kind, spec.nbytes)
                    for layer, spec in enumerate(layout.specs))
    return StreamPlan(stream_id, entries, start, end)


def snapshot_plan(layout: Layout, stream_id: int, at: int) -> StreamPlan:
    """What crosses for a snapshot: the request-level state at the block boundary `at`."""
    everything = stream_plan(layout, stream_id, 0, at)
    return StreamPlan(stream_id, tuple(entry for entry in everything.entries if entry.kind is not StateKind.TOKEN), 0, at)


class KVExport:
    """The sending half of one request's transfer. `on_kv` is the engine's listener; only the increment is shipped:
    tokens from `plan.start` on, also where this node found them in its own prefix cache."""

    def __init__(self, kvcache: KVCacheManager, link: Link, plan: StreamPlan, snapshot_at: int, overlap: bool):
        self.kvcache, self.link, self.plan, self.snapshot_at = kvcache, link, plan, snapshot_at
        self.stream = link.open_stream(plan)
        self.failure: str | None = None
        self.report: Future[StreamReport] | None = None
        self.request: Request | None = None
        self._overlap = overlap
        self._shipped = {entry.layer: plan.start for entry in plan.entries}

    def attach(self, request: Request) -> None:
        """The request whose KVCache is shipped."""
        self.request = request
        request.on_kv = self.on_kv

    def on_kv(self, layer: int, start: int, end: int) -> None:
        """Layer `layer` now holds tokens up to `end`: ship what the other side lacks. Never raises: a dead link must
        not tear a forward pass in two; the node looks at `failure` afterwards."""
        if self.failure is None and self._overlap:
            self._ship(layer, end)

    def ship_snapshot(self) -> None:
        """Ship the state at the boundary `snapshot_at` once prefill has passed it. Only a favour: it may fail."""
        cache = self.request.cache
        passed = cache is not None and cache.num_tokens >= self.snapshot_at > 0
        if not passed or not (self._overlap or self.request.status is Status.HELD):
            return
        at, self.snapshot_at = self.snapshot_at, 0
        tables = self.kvcache.snapshot_tables(cache, at)
        if tables is None:
            return
        try:
            plan = snapshot_plan(self.kvcache.layout, self.plan.stream_id + 1, at)
            stream = self.link.open_stream(plan)
            for entry in plan.entries:
                stream.put(entry.layer, 0, at, self.kvcache.pool.read_bytes(entry.layer, tables[entry.group], 0, at))
        except (LinkDown, StreamAborted, ValueError):  # ValueError: the highest stream id has no successor
            return

    def finish(self, pool: ThreadPoolExecutor, deadline_s: float) -> None:
        """Everything is prefilled: ship the rest, and wait for the acknowledgements in the background."""
        for entry in self.plan.entries:
            if self.failure is None and self._shipped[entry.layer] < self.plan.end:
                self._ship(entry.layer, self.plan.end)
        self.kvcache.begin_transfer(self.request.cache)
        self.report = pool.submit(self.stream.finish, deadline_s)

    def _ship(self, layer: int, end: int) -> None:
        kind = self.kvcache.layout.specs[layer].kind
        start = self._shipped[layer]
        if end <= start or (kind is not StateKind.TOKEN and end < self.plan.end):
            return
        group = self.kvcache.layout.group_of_layer[layer]
        data = self.kvcache.pool.read_bytes(layer, self.request.cache.block_tables[group.index], start, end)
        try:
            self.stream.put(layer, start, end, data.reshape(-1))
        except (LinkDown, StreamAborted) as error:
            self.failure = str(error)
        self._shipped[layer] = end
