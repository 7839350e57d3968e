"""The local PD datacenter's node: front end, router, its own prefill, and all decoding. Chapter 13; paper 3.1 and 3.3."""

import itertools
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from minprfaas.cluster import messages
from minprfaas.cluster.desk import HERE, THERE, RoutingDesk, transfer_costs
from minprfaas.cluster.kv_export import snapshot_plan, stream_plan
from minprfaas.cluster.prefix_transfer import PrefixTransfers
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import Request, Status, TokenUpdate
from minprfaas.errors import UserError
from minprfaas.scheduling.router import CacheTransfer, Decision
from minprfaas.transport.events import LinkDown, LinkLost, LinkRestored, MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.link import Link
from minprfaas.transport.streams import StreamPlan


@dataclass
class Journey:
    """What became of one request: the route, and what the table shows. Times are seconds."""

    request: Request
    route: str = "pdp"
    reason: str = ""
    kv_bytes: int = 0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    prefix: CacheTransfer | None = None  # a cached prefix that was to be shipped before the prefill
    prefix_bytes: int = 0  # of it, that were: 0 if that failed
    fallback: str | None = None  # why a request that was offloaded was prefilled here after all
    # while the request is away:
    stream_id: int = 0
    streams: set[int] = field(default_factory=set)  # that have not arrived: the KVCache, and maybe a snapshot
    deadline_s: float = 0.0
    first_token: int | None = None
    done_tokens: int = 0
    arrived_tokens: int = 0  # whose rows are here, in every layer that has rows; known once the stream has ended
    expected_bytes: int = 0
    received_bytes: int = 0

    @property
    def hidden(self) -> float:
        """Share of the transfer that ran while prefill still did, from 0 to 1."""
        return 1 - self.exposed_s / self.transfer_s if self.transfer_s > 0 else 0.0


class LocalNode:
    """Serves requests end to end; those that the routing desk sends away are prefilled across the link.

    `on_update(journey, token_update | None)` hears of every token, and of prefill and transfer progress.
    """

    def __init__(self, engine: Engine, link: Link, threshold: int, offload_deadline_s: float,
                 on_update: Callable[[Journey, TokenUpdate | None], None] = lambda journey, update: None,
                 ship_prefixes: bool = False):
        self.engine, self.link = engine, link
        self.desk = RoutingDesk(threshold, link.config.gbps, transfer_costs(engine.layout) if ship_prefixes else None)
        self.prefixes = PrefixTransfers(engine.kvcache, link, self._tell, offload_deadline_s)
        self.offload_deadline_s, self.on_update = offload_deadline_s, on_update
        self.peer: messages.NodeReady | None = None
        self.peer_peak_bytes = 0
        self.peer_timeline: list[dict] = []
        self.journeys: dict[str, Journey] = {}
        self._queue: deque[Journey] = deque()
        self._away: dict[str, Journey] = {}
        self._by_stream: dict[int, Journey] = {}
        self._awaiting_prefix: dict[int, Journey] = {}  # by the stream that brings it, or takes it away
        self._stream_ids = itertools.count(secrets.randbits(32) << 16, 2)

    def submit(self, request: Request) -> Journey:
        """Queue a request. UserError when its prompt can never fit, or its id was used before."""
        self.engine.check_fits(request)
        if request.id in self.journeys:  # a late message about the old one would be taken for one about the new
            raise UserError(f"request id {request.id!r} was used before; every request needs an id of its own")
        request.arrived_s = self.engine.clock()
        journey = self.journeys[request.id] = Journey(request)
        self._queue.append(journey)
        return journey

    def abort(self, id: str) -> None:
        """The client of this request went away: forget it wherever it stands, and free what it holds on both sides."""
        journey = self.journeys.get(id)
        if journey is None or journey.request.status is Status.FINISHED:
            return
        if journey in self._queue:
            self._queue.remove(journey)
        if id in self._away:
            self._forget_away(journey)
            self._tell(messages.PrefillAbort(id))
        for stream_id in [stream_id for stream_id, one in self._awaiting_prefix.items() if one is journey]:
            self._awaiting_prefix.pop(stream_id)
            self.prefixes.give_up(stream_id)
        self.engine.abort(journey.request)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._queue or self._away or self.prefixes or self.engine.has_work)

    def run(self) -> None:
        """Serve until every submitted request has its answer."""
        while self.has_work:
            self.step()

    def step(self) -> None:
        """Route what waits, hear one event, compute one step, give up on what is overdue."""
        self._requeue_prefixed()
        self._dispatch()
        event = self.link.receive(0.0 if self.engine.is_ready else 0.02) if self.desk.link_up else None
        if event is not None:
            self._handle(event)
        if self.engine.has_work:
            for update in self.engine.step():
                self._note(update)
        for journey in list(self._away.values()):
            if self.engine.clock() > journey.deadline_s:
                self._bring_home(journey, f"deadline of {self.offload_deadline_s:.0f} s passed")

    def shutdown(self, deadline_s: float) -> None:
        """Tell the prefill node that no more requests come, and wait for its last message."""
        until = self.engine.clock() + deadline_s
        self._tell(messages.Shutdown())
        while self.desk.link_up and not self.peer_peak_bytes and self.engine.clock() < until:
            event = self.link.receive(0.05)
            if event is not None:
                self._handle(event)

    # Routing

    def _dispatch(self) -> None:
        """Send requests on their way, oldest first; one that has no room for its KVCache holds the queue."""
        while self._queue:
            journey = self._queue[0]
            decision = self._decide(journey)
            if decision.transfer is not None:
                self._ship_prefix(journey, decision.transfer)
                continue
            if decision.route == "prfaas" and not self._offload(journey):
                return
            self._queue.popleft()
            journey.reason = decision.reason
            if journey.prefix_bytes:
                journey.reason += f"; {journey.prefix.end:,} cached tokens came from {journey.prefix.source}"
            if decision.route == "pdp":
                self.engine.add(journey.request)

    def _ship_prefix(self, journey: Journey, transfer: CacheTransfer) -> None:
        """Begin to ship a prefix, if that can be: the request waits for it beside the queue, and is then routed again.
        There is one attempt."""
        size = self.engine.layout.block_tokens
        journey.prefix = transfer._replace(end=transfer.end // size * size)  # no prefix ends within a block
        begin = self.prefixes.offer if transfer.source == HERE else self.prefixes.fetch
        stream_id = next(self._stream_ids)
        if begin(stream_id, journey.request.token_ids[:journey.prefix.end + 1]):
            self._awaiting_prefix[stream_id] = self._queue.popleft()

    def _requeue_prefixed(self) -> None:
        """Requests whose prefix has been shipped, or could not be, are next."""
        for stream_id, nbytes in self.prefixes.tend():
            journey = self._awaiting_prefix.pop(stream_id, None)
            if journey is None:
                continue
            journey.prefix_bytes = nbytes
            if not nbytes and journey.prefix.source == THERE:  # most likely it is gone
                keys = self.engine.kvcache.keys(journey.request.token_ids[:journey.prefix.end])
                self.desk.directory.report_stale(THERE, keys[-1].hex())
            self._queue.appendleft(journey)

    def _decide(self, journey: Journey) -> Decision:
        request, kvcache = journey.request, self.engine.kvcache
        load_here = sum(r.prompt_tokens for r in (*self.engine.waiting, *self.engine.prefilling))
        load_there = sum(j.request.prompt_tokens - j.done_tokens for j in self._away.values())
        return self.desk.route(request.prompt_tokens, kvcache.keys(request.token_ids), kvcache.match(request.token_ids),
                               load_here, load_there, journey.prefix is None, self.engine.clock())

    def _offload(self, journey: Journey) -> bool:
        """Reserve blocks, expect the streams that will fill them, order the prefill. False when there is no room."""
        request, kvcache = journey.request, self.engine.kvcache
        if not self.engine.reserve_remote(request):
            return False
        journey.route, journey.stream_id = "prfaas", next(self._stream_ids)
        journey.deadline_s = self.engine.clock() + self.offload_deadline_s
        self._away[request.id] = journey
        plan = stream_plan(self.engine.layout, journey.stream_id, request.cached_tokens, request.prompt_tokens)
        self._expect(journey, plan, request.cache.block_tables)
        boundary = (request.prompt_tokens - 1) // self.engine.layout.block_tokens * self.engine.layout.block_tokens
        tables = kvcache.expect_snapshot(request.cache, boundary) if boundary > request.cached_tokens else None
        if tables is not None:
            self._expect(journey, snapshot_plan(self.engine.layout, journey.stream_id + 1, boundary), tables)
        self._tell(messages.PrefillOrder(request.id, journey.stream_id, request.token_ids, request.cached_tokens,
                                         boundary if tables is not None else 0, asdict(request.params)))
        return True

    def _expect(self, journey: Journey, plan: StreamPlan, tables: list) -> None:
        layout, pool = self.engine.layout, self.engine.kvcache.pool

        def write_into_blocks(layer: int, start: int, end: int, data) -> None:
            pool.write_bytes(layer, tables[layout.group_of_layer[layer].index], start, end, data)
            journey.received_bytes += data.numel()

        journey.streams.add(plan.stream_id)
        journey.expected_bytes += plan.total_bytes
        self._by_stream[plan.stream_id] = journey
        try:
            self.link.expect_stream(plan, write_into_blocks)
        except LinkDown:
            pass  # the link's last event, LinkLost, brings the request home

    # What the link brings

    def _handle(self, event) -> None:
        self.prefixes.hear(event)
        if isinstance(event, MessageReceived):
            try:
                self._hear(messages.decode(event.message))
            except messages.BadMessage:
                return
        elif isinstance(event, StreamDone) and event.stream_id in self._by_stream:
            journey = self._by_stream.pop(event.stream_id)
            journey.streams.discard(event.stream_id)
            journey.kv_bytes += event.report.bytes
            if event.stream_id == journey.stream_id:
                journey.arrived_tokens = journey.request.prompt_tokens
            self._admit_if_complete(journey)
        elif isinstance(event, StreamFailed) and event.stream_id in self._by_stream:
            journey = self._by_stream[event.stream_id]
            if event.stream_id == journey.stream_id:
                journey.arrived_tokens = event.arrived_end
                self._bring_home(journey, event.reason)
        elif isinstance(event, LinkLost):  # for good: from now on everything is prefilled here
            self.desk.link_up = False
            self._bring_all_home(f"link lost: {event.reason}")
        elif isinstance(event, LinkRestored) and event.peer_restarted:
            self.desk.peer_is_new()
            self._bring_all_home("the prefill node restarted")

    def _hear(self, message) -> None:
        self.prefixes.hear(message)
        if isinstance(message, messages.NodeReady):
            self.peer = message
        elif isinstance(message, messages.TimelinePart):
            self.peer_timeline += message.events
        elif isinstance(message, messages.Goodbye):
            self.peer_peak_bytes = message.peak_bytes
        elif isinstance(message, messages.EgressSample):
            self.desk.hear_sample(message, self.engine.clock())
        elif isinstance(message, messages.CacheEvents):
            if not self.desk.hear_events(message):
                self._tell(messages.SendInventory())
        elif isinstance(message, messages.TransferDone) and message.id in self.journeys:
            journey = self.journeys[message.id]
            journey.transfer_s, journey.exposed_s = message.transfer_s, message.exposed_s
        elif getattr(message, "id", None) in self._away:
            journey = self._away[message.id]
            if isinstance(message, messages.PrefillProgress):
                journey.done_tokens = message.tokens
                self.on_update(journey, None)
            elif isinstance(message, messages.PrefillDone):
                journey.first_token, journey.prefill_s = message.first_token, message.prefill_s
                self.desk.hear_prefill(THERE, journey.request.prompt_tokens - message.cached_tokens, message.prefill_s)
                journey.done_tokens = journey.request.prompt_tokens
                self.on_update(journey, None)
                self._admit_if_complete(journey)
            elif isinstance(message, messages.PrefillFailed):
                self._bring_home(journey, message.reason)

    def _admit_if_complete(self, journey: Journey) -> None:
        """Decode begins when the last byte of the KVCache and the first token are both here."""
        if journey.stream_id in journey.streams or journey.first_token is None or journey.request.id not in self._away:
            return
        if not 0 <= journey.first_token < self.engine.model.config.vocab_size:
            self._bring_home(journey, f"first token {journey.first_token} is outside the vocabulary")
            return
        self._forget_away(journey)
        if journey.streams:  # only the snapshot is missing
            self.engine.kvcache.forget_snapshot(journey.request.cache)
        self._note(self.engine.admit_remote(journey.request, journey.first_token))

    def _bring_home(self, journey: Journey, reason: str) -> None:
        """The offloaded prefill will not complete: prefill here, from what arrived on."""
        self._forget_away(journey)
        journey.route, journey.fallback = "pdp", reason
        self._tell(messages.PrefillAbort(journey.request.id))
        self._keep_arrived(journey)
        self.engine.prefill_here_instead(journey.request)

    def _keep_arrived(self, journey: Journey) -> None:
        """Turn full blocks that arrived into prefix cache. Request-level state is of no use midway: a model that has any
        can begin only at the snapshot, if that arrived too."""
        cache, layout = journey.request.cache, self.engine.layout
        full = journey.arrived_tokens // layout.block_tokens
        if layout.request_groups:
            snapshot = cache.expected[0] if cache.expected and journey.stream_id + 1 not in journey.streams else 0
            full = snapshot if snapshot <= full else 0
        if full * layout.block_tokens > cache.num_tokens:
            self.engine.kvcache.advance(cache, journey.request.token_ids[: full * layout.block_tokens])

    def _bring_all_home(self, reason: str) -> None:
        for journey in list(self._away.values()):
            self._bring_home(journey, reason)

    def _forget_away(self, journey: Journey) -> None:
        """No byte of the request's streams is written after this."""
        self._away.pop(journey.request.id)
        for stream_id in journey.streams:
            self._by_stream.pop(stream_id, None)
            arrived = self.link.forget_stream(stream_id)
            if stream_id == journey.stream_id and arrived is not None:
                journey.arrived_tokens = arrived

    def _note(self, update: TokenUpdate) -> None:
        request = update.request
        journey = self.journeys[request.id]
        if journey.route == "pdp" and request.prefill_ended_s:
            prefill_s = request.prefill_ended_s - request.prefill_started_s
            if journey.prefill_s != prefill_s:  # not told yet
                journey.prefill_s = prefill_s
                self.desk.hear_prefill(HERE, request.prompt_tokens - request.cached_tokens, journey.prefill_s)
        self.on_update(journey, update)

    def _tell(self, message) -> None:
        try:
            self.link.send_message(messages.encode(message))
        except LinkDown:
            pass  # as in `_expect`
