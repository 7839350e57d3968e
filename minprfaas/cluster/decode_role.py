"""The decode role: reserves blocks, pulls the KVCache that others make, decodes. Chapter 13; paper 3.1, 3.3.

Only this node knows what it already holds, so it orders: the front end says who shall prefill, and the order says from
which token on the KVCache is to be sent.
"""

import math
from collections import deque
from dataclasses import dataclass

from minprfaas.cluster import messages
from minprfaas.cluster.kv_receive import STALL_S, KVReceive
from minprfaas.cluster.node import Happening, Part, PeerLost
from minprfaas.cluster.snapshot_arrivals import SnapshotArrivals
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.config import FRONT, SamplingParams
from minprfaas.engine.request import Request, TokenUpdate
from minprfaas.errors import UserError
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import ArrivalReport, StreamDone, StreamFailed


@dataclass(eq=False)
class Serving:
    """One request at this node, from `Serve` to its last token. Moments are the engine clock's."""

    request: Request
    serve: messages.Serve
    served_at_s: float
    deadline_at_s: float  # of what it waits for at present: room, or its prefill
    kv: KVReceive | None = None  # while it is being prefilled
    done: messages.PrefillDone | None = None
    done_at_s: float = 0.0
    ready_at_s: float = 0.0  # all of its KVCache was here, and its first token
    prefilled_tokens: int = 0
    told: tuple[int, int] = (0, 0)  # progress that the front end knows: tokens, bytes
    told_at_s: float = 0.0


class DecodeRole(Part):
    """Serves `Serve`s. `room_deadline_s` is how long a request may wait for blocks here."""

    def __init__(self, upkeep: Upkeep, room_deadline_s: float):
        self.name, self.engine, self.room_deadline_s = upkeep.name, upkeep.engine, room_deadline_s
        self.servings: dict[str, Serving] = {}
        self.upkeep, self._mail = upkeep, upkeep.mail
        self._kvcache, self._clock = self.engine.kvcache, self.engine.clock
        self._for_room: deque[Serving] = deque()
        self._by_stream: dict[int, Serving] = {}  # of the streams that have not ended
        self._snapshots = SnapshotArrivals(self._kvcache, self._mail, self._clock)

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    @property
    def has_work(self) -> bool:
        """Whether a request or a stream is under way."""
        return bool(self.servings or self.upkeep.has_streams or self._snapshots or self.engine.has_work)

    def hear(self, sender: str, message: messages.Message) -> None:
        match message:
            case messages.Serve() if sender == FRONT:
                self._accept(message)
            case messages.Abort(id=id) if sender == FRONT and id in self.servings:
                self._forget(self.servings[id])
            case messages.PrefillProgress(id=id) | messages.PrefillDone(id=id) | messages.Failed(id=id):
                serving = self.servings.get(id)
                is_awaited = serving is not None and serving.kv is not None and not serving.ready_at_s
                if is_awaited and serving.serve.prefill_node == sender:
                    self._hear_prefill_node(serving, message)

    def notice(self, happening: Happening) -> None:
        match happening:
            case PeerLost(name=name, reason=reason):
                for serving in list(self.servings.values()):
                    if name == FRONT:  # it has these requests no more, or gives them to another node
                        self._forget(serving)
                    elif serving.serve.prefill_node == name and serving.kv is not None and not serving.ready_at_s:
                        self._lose_prefill(serving, reason)
            case StreamDone(stream_id=stream_id) | StreamFailed(stream_id=stream_id) if stream_id in self._by_stream:
                self._stream_ended(self._by_stream.pop(stream_id), happening)
        self._snapshots.notice(happening)  # last: what has arrived counts with the rows that have

    def step(self) -> None:
        """Order prefills for which there is room, admit what has a place, give up what is overdue; decode one step."""
        self._order_where_there_is_room()
        for serving in list(self.servings.values()):
            self._admit_if_complete(serving)
            if self._clock() > serving.deadline_at_s:
                self._overdue(serving)
            elif serving.kv is not None:
                self._tell_progress(serving)
        if self.engine.has_work:
            for update in self.engine.step():
                self._tell_token(update)
        self._snapshots.step()

    # From the front end's word to the order

    def _accept(self, serve: messages.Serve) -> None:
        now_s = self._clock()
        try:
            if serve.id in self.servings or not 0 <= serve.answered_tokens < len(serve.token_ids):
                raise UserError(f"attempt {serve.id!r} came before, or has no prompt")
            request = Request(serve.id, list(serve.token_ids), SamplingParams(**serve.sampling), arrived_at_s=now_s,
                              answered_tokens=serve.answered_tokens)
            self.engine.check_fits(request)
        except (UserError, TypeError) as error:  # of another process, whose options may be others
            return self._tell(messages.Failed(serve.id, str(error), "too_long"))
        serving = self.servings[serve.id] = Serving(request, serve, now_s, now_s + self.room_deadline_s)
        self._for_room.append(serving)

    def _order_where_there_is_room(self) -> None:
        """First come, first served: a request without room holds those behind it, so that long ones are not starved.
        Requests that were preempted have waited longest; they come before any new one."""
        while self._for_room and not self.engine.waiting:
            serving = self._for_room[0]
            if not self.engine.reserve_remote(serving.request):
                return
            self._for_room.popleft()
            self._order(serving)

    def _order(self, serving: Serving) -> None:
        """The blocks are reserved: expect the streams that will fill them, and order the prefill."""
        request, serve, layout = serving.request, serving.serve, self.engine.layout
        serving.deadline_at_s = self._clock() + serve.deadline_s
        stream_id, snapshot_id = next(self.upkeep.stream_ids), next(self.upkeep.stream_ids)
        wire = self._mail.wire_to(serve.prefill_node)
        plan = stream_plan(layout, stream_id, request.cached_tokens, len(request.token_ids), wire)
        try:
            transport = self._mail.transport(serve.prefill_node)
            serving.kv = KVReceive(self._kvcache, transport, plan, request.cache.block_tables)
            self._by_stream[stream_id] = serving
            request.cache.is_exact = serving.kv.is_exact
            snapshot_at = self._snapshots.expect(snapshot_id, request, serve.prefill_node, serving.deadline_at_s)
        except LinkDown as error:  # the way was lost while the request waited for room
            return self._lose_prefill(serving, str(error))
        self._mail.send(self.name, serve.prefill_node, messages.PrefillOrder(
            request.id, stream_id, list(request.token_ids), request.cached_tokens, snapshot_id, snapshot_at,
            serve.prefix_source, serve.prefix_tokens, serve.answered_tokens, serve.sampling, serve.deadline_s))

    # From the order to the first token

    def _hear_prefill_node(self, serving: Serving, message: messages.Message) -> None:
        match message:
            case messages.PrefillProgress(tokens=tokens):
                serving.prefilled_tokens = tokens
            case messages.Failed(reason=reason, cause=cause):
                self._lose_prefill(serving, reason, cause=cause)
            case messages.PrefillDone():
                serving.done, serving.done_at_s = message, self._clock()
                if not message.sends_snapshot:  # the node had none, or no room for one: its blocks are free again
                    self._snapshots.give_up(serving.request)
                serving.prefilled_tokens = len(serving.request.token_ids)
                uncached = serving.prefilled_tokens - message.cached_tokens
                self._tell(messages.Prefilled(serving.request.id, uncached, message.prefill_s, message.prefix_bytes))
                self._admit_if_complete(serving)

    def _stream_ended(self, serving: Serving, event: StreamDone | StreamFailed) -> None:
        if isinstance(event, StreamDone):
            serving.kv.arrived(event.report)
            self._admit_if_complete(serving)
        else:
            self._lose_prefill(serving, event.reason, event.arrived_end)

    def _admit_if_complete(self, serving: Serving) -> None:
        """Decode begins when the last byte of the KVCache and the first token are both here, and the batch has a place.
        Until then nothing is told: a first token with none to follow would hide that decode is what is short."""
        if serving.kv is None or serving.done is None or not serving.kv.has_arrived:
            return
        serving.ready_at_s = serving.ready_at_s or self._clock()
        serving.deadline_at_s = math.inf  # decoding waits for nobody
        if len(self.engine.running) >= self.engine.scheduler.max_batch:
            return
        request, first_token = serving.request, serving.done.first_token
        if not 0 <= first_token < self.engine.model.config.vocab_size:
            return self._lose_prefill(serving, f"first token {first_token} is outside the vocabulary")
        kv_bytes, report = serving.kv.received_bytes + self._snapshots.received_bytes(request), serving.kv.report
        serving.kv = None
        update = self.engine.admit_remote(request, first_token)
        self._tell_started(serving, kv_bytes, serving.ready_at_s, report)
        self._tell_token(update)

    # When it goes wrong

    def _lose_prefill(self, serving: Serving, reason: str, arrived_end: int = 0, cause: str = "lost") -> None:
        """The prefill will not complete: keep what has arrived, and let the front end begin another attempt."""
        self._forget(serving, arrived_end)
        self.upkeep.tell_news()  # first: who routes the request again should know what has arrived
        self._tell(messages.Failed(serving.request.id, reason, cause))

    def _overdue(self, serving: Serving) -> None:
        if serving.kv is not None:
            return self._lose_prefill(serving, f"deadline of {serving.serve.deadline_s:g} s passed")
        self._forget(serving)
        reason = f"no room in the KVCache pool within {self.room_deadline_s:g} s"
        self._tell(messages.Failed(serving.request.id, reason, "no_room"))

    def _forget(self, serving: Serving, arrived_end: int = 0) -> None:
        """The attempt ends here, in whatever state: free what it holds on both sides. Full blocks that have arrived
        (before `arrived_end` of a stream that failed) become prefix cache: nobody need send them again."""
        request, kv = serving.request, serving.kv
        if serving in self._for_room:
            self._for_room.remove(serving)
        if kv is not None:
            self._mail.send(self.name, serving.serve.prefill_node, messages.Abort(request.id))
            if self._by_stream.pop(kv.plan.stream_id, None) is not None:
                arrived_end = kv.give_up() or 0  # no byte is written after this
            elif kv.has_arrived:
                arrived_end = kv.plan.end
            full_end = arrived_end // self.engine.layout.block_tokens * self.engine.layout.block_tokens
            if full_end > request.cache.num_tokens:
                self._kvcache.advance(request.cache, request.token_ids[:full_end], has_state=False)
            self._snapshots.give_up(request)
        self.engine.abort(request)
        del self.servings[request.id]

    # To the front end

    def _tell_started(self, serving: Serving, kv_bytes: int, ready_at_s: float,
                      report: ArrivalReport | None = None) -> None:
        """Of the time since `Serve` came, `admit_s` has passed since KVCache and first token were here, and what went
        before it since the prefill was said to be done is the exposed transfer. Before that, all but the prefill was
        waiting: for room here; and there, where who computes does not listen, to be heard and to have its turn."""
        request, prefill_s = serving.request, serving.done.prefill_s
        queue_s = serving.done_at_s - serving.served_at_s - prefill_s
        exposed_s = ready_at_s - serving.done_at_s
        transfer_s = hidden_s = 0.0
        if report is not None:
            transfer_s = report.last_byte_at_s - report.first_byte_at_s
            hidden_s = min(max(serving.done_at_s - report.first_byte_at_s, 0.0), transfer_s)
        self._tell(messages.Started(request.id, request.cached_tokens, kv_bytes, queue_s, prefill_s, exposed_s,
                                    self._clock() - ready_at_s, transfer_s, hidden_s))

    def _tell_token(self, update: TokenUpdate) -> None:
        request, reason = update.request, update.finish_reason or ""
        limit = request.length_limit if reason == "length" else ""
        self._tell(messages.TokenDrawn(request.id, update.token_id, update.new_text, reason, limit))
        if reason:
            del self.servings[request.id]

    def _tell_progress(self, serving: Serving) -> None:
        progress = (serving.prefilled_tokens, serving.kv.received_bytes)
        if serving.told != progress:
            serving.told, serving.told_at_s = progress, self._clock()
            self._tell(messages.Progress(serving.request.id, *progress, serving.kv.plan.total_bytes))
        elif serving.done is not None and not serving.kv.has_arrived and self._clock() - serving.told_at_s > STALL_S:
            self._lose_prefill(serving, f"no KVCache arrived for {STALL_S:g} s")

    def _tell(self, message: messages.Message) -> None:
        self._mail.send(self.name, FRONT, message)
