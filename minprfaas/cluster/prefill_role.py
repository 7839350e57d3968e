"""The prefill role: orders in, KVCache out; it keeps nothing of a request but its prefix. Chapter 13; paper 3.1.

A node of the PrfaaS cluster and a PD-P node run this same code; only the way that leads to the decode node differs.
"""

from concurrent.futures import wait
from dataclasses import dataclass
from enum import Enum

from minprfaas.cluster import messages
from minprfaas.cluster.kv_send import KVSend
from minprfaas.cluster.node import Happening, Part, PeerLost
from minprfaas.cluster.prefix_shipping import Fetch
from minprfaas.cluster.stream_plans import snapshot_plan, stream_plan
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.config import SamplingParams
from minprfaas.engine.request import Request, Status, TokenUpdate
from minprfaas.errors import UserError
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.transport.base import StreamPlan


class Stage(Enum):
    """Where a prefill stands."""

    FETCHING = "a cached prefix is on its way here"
    COMPUTING = "queued, or being prefilled; its streams leave meanwhile"
    SENDING = "prefilled; the rest of the KVCache leaves"


@dataclass(eq=False)
class Prefill:
    """One order, from its arrival until the last byte of its streams is acknowledged."""

    order: messages.PrefillOrder
    plan: StreamPlan
    snapshot_plan: StreamPlan | None
    decode_node: str
    request: Request
    deadline_at_s: float
    stage: Stage = Stage.COMPUTING
    fetch: Fetch | None = None  # of a prefix that is to be here before the prefill begins
    cache: RequestCache | None = None  # once the prompt has its blocks
    stream: KVSend | None = None  # from then on
    snapshot: KVSend | None = None  # once the prefill has passed the boundary


class PrefillRole(Part):
    """Serves `PrefillOrder`s. `overlap` False ships KVCache only after prefill, for comparison."""

    def __init__(self, upkeep: Upkeep, overlap: bool = True):
        self.name, self.engine, self.overlap = upkeep.name, upkeep.engine, overlap
        self.prefills: dict[str, Prefill] = {}
        self.drawn: list[TokenUpdate] = []  # in the last step
        self.upkeep, self._mail = upkeep, upkeep.mail
        self._kvcache, self._clock = self.engine.kvcache, self.engine.clock

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    @property
    def has_work(self) -> bool:
        """Whether a prefill or a stream is under way."""
        return bool(self.prefills or self.upkeep.has_streams or self.engine.has_work)

    def hear(self, sender: str, message: messages.Message) -> None:
        match message:
            case messages.PrefillOrder():
                self._accept(sender, message)
            case messages.Abort(id=id) if id in self.prefills and self.prefills[id].decode_node == sender:
                self._drop(self.prefills[id])

    def notice(self, happening: Happening) -> None:
        if isinstance(happening, PeerLost):
            for prefill in list(self.prefills.values()):
                if prefill.decode_node == happening.name:
                    self._drop(prefill)

    def step(self) -> None:
        """Prefill one chunk, take each prefill further."""
        self.drawn = self.engine.step(on_kv=self._ship) if self.engine.has_work else []
        self._report_progress()
        for prefill in list(self.prefills.values()):
            self._tend(prefill)

    # An order's life

    def _accept(self, sender: str, order: messages.PrefillOrder) -> None:
        layout = self.engine.layout
        try:
            if order.id in self.prefills:
                raise UserError(f"order {order.id!r} came before, and is not forgotten yet")
            if not (0 <= order.start < len(order.token_ids) and 0 <= order.answered_tokens < len(order.token_ids)):
                raise UserError(f"order {order.id!r} starts at token {order.start} of {len(order.token_ids)}")
            request = Request(order.id, list(order.token_ids), SamplingParams(**order.sampling), prefill_only=True,
                              answered_tokens=order.answered_tokens)
            self.engine.check_fits(request)
            wire = self._mail.wire_to(sender)
            plan = stream_plan(layout, order.stream_id, order.start, len(order.token_ids), wire)
            snapshot = snapshot_plan(layout, order.snapshot_stream_id, order.snapshot_at) if order.snapshot_at else None
        except (UserError, TypeError, ValueError) as error:  # of another process, whose fields may hold anything
            return self._mail.send(self.name, sender, messages.Failed(order.id, str(error), "refused"))
        prefill = Prefill(order, plan, snapshot, sender, request, self._clock() + order.deadline_s)
        self.prefills[order.id] = prefill
        if 0 < order.prefix_tokens < len(order.token_ids):
            prefill.fetch = self.upkeep.prefixes.fetch(order.token_ids[:order.prefix_tokens + 1], order.prefix_source)
        if prefill.fetch is None:
            self.engine.add(request)
        else:
            prefill.stage = Stage.FETCHING

    def _ship(self, request: Request, layer: int, start: int, end: int) -> None:
        """Between two layers of a forward pass: the layer's state is final up to `end`. Neither blocks nor raises."""
        prefill = self.prefills[request.id]
        if prefill.cache is None:  # the first chunk: only now has the prompt its blocks
            prefill.cache = request.cache
            prefill.stream = self._open(prefill, prefill.plan, request.cache.block_tables)
        if prefill.stream is not None:
            prefill.stream.ready(layer, end)

    def _open(self, prefill: Prefill, plan: StreamPlan, tables: list) -> KVSend | None:
        """Begin a stream. None when it cannot begin."""
        self.upkeep.mark_stream(plan.stream_id, prefill.order.id)
        return self.upkeep.outgoing.open(prefill.decode_node, plan, prefill.cache, tables, prefill.deadline_at_s,
                                         self.overlap)

    def _tend(self, prefill: Prefill) -> None:
        """Take a prefill one stage further, if it is time."""
        if self._clock() > prefill.deadline_at_s:
            return self._fail(prefill, f"deadline of {prefill.order.deadline_s:g} s passed")
        stream_ended = prefill.stream is not None and prefill.stream.outcome.done()
        if prefill.stage is Stage.FETCHING:
            self._begin_once_prefix_is_here(prefill)
        elif prefill.stage is Stage.COMPUTING and prefill.cache is not None:
            self._ship_snapshot(prefill)
            if prefill.stream is None:
                self._fail(prefill, "there is no way to the decode node")
            elif stream_ended:
                self._fail(prefill, str(prefill.stream.outcome.exception()))
            elif prefill.request.status is Status.HELD:
                self._prefilled(prefill)
        elif prefill.stage is Stage.SENDING and stream_ended:
            self._transferred(prefill)

    def _begin_once_prefix_is_here(self, prefill: Prefill) -> None:
        """Without its prefix this may be the wrong node for the request: that is not for this node to decide."""
        if prefill.fetch.nbytes is None:
            return
        if prefill.fetch.nbytes == 0:
            return self._fail(prefill, f"the prefix at {prefill.fetch.source} did not come", "no_prefix")
        prefill.stage = Stage.COMPUTING
        self.engine.add(prefill.request)

    def _ship_snapshot(self, prefill: Prefill) -> None:
        """Ship the state at the boundary that the order names, once prefill has passed it. Nobody waits for it."""
        plan, cache = prefill.snapshot_plan, prefill.cache
        may_ship = self.overlap or prefill.request.status is Status.HELD
        if plan is None or prefill.snapshot is not None or cache.num_tokens < plan.end or not may_ship:
            return
        prefill.snapshot_plan = None  # one attempt
        tables = self._kvcache.snapshots.hold(cache, plan.end)
        if tables is not None:
            prefill.snapshot = self._open(prefill, plan, tables)
        if prefill.snapshot is not None:
            prefill.snapshot.finish()

    def _prefilled(self, prefill: Prefill) -> None:
        request = prefill.request
        prefill.stage = Stage.SENDING
        prefill.stream.finish()
        if self._mail.is_here(prefill.decode_node):  # decoding begins before this node goes into the next prompt
            wait([prefill.stream.outcome], timeout=1.0)  # a copy in memory takes far less, or stands still
        self._tell(prefill, messages.PrefillDone(
            request.id, request.token_ids[-1], request.cached_tokens,
            request.prefill_ended_at_s - request.prefill_started_at_s, prefill.fetch.nbytes if prefill.fetch else 0,
            prefill.snapshot is not None))

    def _transferred(self, prefill: Prefill) -> None:
        error = prefill.stream.outcome.exception()
        if error is not None:
            return self._fail(prefill, str(error))
        self.engine.release(prefill.request)
        del self.prefills[prefill.order.id]

    def _fail(self, prefill: Prefill, reason: str, cause: str = "lost") -> None:
        self._tell(prefill, messages.Failed(prefill.order.id, reason, cause))
        self._drop(prefill)

    def _drop(self, prefill: Prefill) -> None:
        """Nobody waits for this prefill any more: compute no further, and let its streams end."""
        if prefill.stage is Stage.FETCHING:
            self.upkeep.prefixes.give_up(prefill.fetch)
        for stream in (prefill.stream, prefill.snapshot):
            if stream is not None:
                stream.abort()
        self.engine.abort(prefill.request)  # its blocks stay as long as a stream holds them
        del self.prefills[prefill.order.id]

    def _report_progress(self) -> None:
        for prefill in self.prefills.values():
            request = prefill.request
            if request.status is Status.PREFILL and request.cache.num_tokens > request.cached_tokens:
                self._tell(prefill, messages.PrefillProgress(request.id, request.cache.num_tokens))

    def _tell(self, prefill: Prefill, message: messages.Message) -> None:
        self._mail.send(self.name, prefill.decode_node, message)
