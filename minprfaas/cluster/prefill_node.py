"""The PrfaaS datacenter's node: orders in, KVCache out; it keeps nothing of a request but its prefix. Chapter 13; paper 3.1."""

import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from minprfaas.cluster import messages
from minprfaas.cluster.kv_export import KVExport, stream_plan
from minprfaas.cluster.prefix_transfer import PrefixTransfers
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import Request, Status
from minprfaas.engine.sampling import SamplingParams
from minprfaas.errors import UserError
from minprfaas.transport.events import LinkDown, LinkLost, LinkRestored, MessageReceived, StreamAborted
from minprfaas.transport.link import Link

TIMELINE_PART = 4096  # events a message


class PrefillNode:
    """Serves `PrefillOrder`s from one link until `Shutdown`, or until the link is lost for good."""

    def __init__(self, engine: Engine, link: Link, transfer_deadline_s: float, overlap: bool = True):
        self.engine, self.link = engine, link
        self.transfer_deadline_s, self.overlap = transfer_deadline_s, overlap
        self.exports: dict[str, KVExport] = {}
        self.prefixes = PrefixTransfers(engine.kvcache, link, self._tell, transfer_deadline_s)
        self._stopping = False
        self._sampled_s = 0.0
        self._sequence = 0  # of the last cache event told
        self._events: list[tuple[str, int]] = []
        engine.kvcache.ledger.on_event = self._note_cache_event

    def serve(self) -> None:
        """The node's loop: hear one event, prefill one chunk, look after the transfers."""
        self._tell(messages.NodeReady("prfaas", str(self.engine.model.device), self.engine.kvcache.config.num_blocks))
        self._tell_inventory()
        with ThreadPoolExecutor(thread_name_prefix="acks") as self._acks:
            while not self._stopping or self.exports or self.prefixes:
                event = self.link.receive(0.0 if self.engine.is_ready else 0.02)
                if event is not None:
                    self._handle(event)
                if self.engine.has_work:
                    self.engine.step()
                    self._report_progress()
                self._tend_exports()
                self.prefixes.tend()
                self._tell_news()
        events = self.engine.timeline.events() if self.engine.timeline else []
        for first in range(0, len(events), TIMELINE_PART):
            self._tell(messages.TimelinePart(events[first : first + TIMELINE_PART]))
        self._tell(messages.Goodbye(peak_memory_bytes(self.engine.model.device)))

    def _handle(self, event) -> None:
        self.prefixes.hear(event)
        if isinstance(event, LinkLost):
            self._stopping = True
        if isinstance(event, LinkLost) or (isinstance(event, LinkRestored) and event.peer_restarted):
            for id in list(self.exports):
                self._drop(id)
        if not isinstance(event, MessageReceived):
            return
        try:
            message = messages.decode(event.message)
        except messages.BadMessage:
            return  # the link's handshake vouches for the peer; a message we do not know is one we need not obey
        self.prefixes.hear(message)
        if isinstance(message, messages.PrefillOrder):
            self._accept(message)
        elif isinstance(message, messages.PrefillAbort):
            self._drop(message.id)
        elif isinstance(message, messages.SendInventory):
            self._tell_inventory()
        elif isinstance(message, messages.Shutdown):
            self._stopping = True

    def _accept(self, order: messages.PrefillOrder) -> None:
        try:
            if order.id in self.exports:
                raise UserError(f"order {order.id!r} came before, and is not forgotten yet")
            request = Request(order.id, order.token_ids, SamplingParams(**order.sampling), prefill_only=True)
            if not 0 <= order.start < len(order.token_ids):
                raise UserError(f"order {order.id!r} starts at token {order.start} of {len(order.token_ids)}")
            self.engine.check_fits(request)
            plan = stream_plan(self.engine.layout, order.stream_id, order.start, len(order.token_ids))
            export = KVExport(self.engine.kvcache, self.link, plan, order.snapshot_at, self.overlap)
        except (UserError, TypeError, ValueError, LinkDown) as error:
            self._tell(messages.PrefillFailed(order.id, str(error)))
            return
        export.attach(request)
        self.exports[order.id] = export
        self.engine.add(request)

    def _report_progress(self) -> None:
        for export in self.exports.values():
            request = export.request
            if request.status is Status.PREFILL and request.cache.num_tokens > request.cached_tokens:
                self._tell(messages.PrefillProgress(request.id, request.cache.num_tokens))

    def _tend_exports(self) -> None:
        for id, export in list(self.exports.items()):
            request = export.request
            export.ship_snapshot()
            if export.failure is not None:
                self._tell(messages.PrefillFailed(id, export.failure))
                self._drop(id)
            elif request.status is Status.HELD and export.report is None:
                self._prefilled(export)
            elif export.report is not None and export.report.done():
                self._transferred(export)

    def _note_cache_event(self, kind: str, key: bytes, tokens: int) -> None:
        self._events.append((key.hex(), tokens if kind == "stored" else 0))

    def _tell_news(self) -> None:
        """Cache events since the last time, and the link's newest sample, for the other side's router."""
        if self._events:
            events, self._events = self._events, []
            self._tell(messages.CacheEvents(self._sequence + 1, *map(list, zip(*events)), inventory=False))
            self._sequence += len(events)
        samples = self.link.stats().samples
        if samples and samples[-1].time_s > self._sampled_s:
            self._sampled_s = samples[-1].time_s
            self._tell(messages.EgressSample(samples[-1].egress_gbps, samples[-1].utilization, samples[-1].queued_bytes))

    def _tell_inventory(self) -> None:
        self._sequence, self._events = self._sequence + len(self._events), []
        held = [(key.hex(), tokens) for key, tokens in self.engine.kvcache.ledger.hittable()]
        keys, tokens = map(list, zip(*held)) if held else ([], [])
        self._tell(messages.CacheEvents(self._sequence, keys, tokens, inventory=True))

    def _prefilled(self, export: KVExport) -> None:
        request = export.request
        self._tell(messages.PrefillDone(request.id, request.token_ids[-1], request.cached_tokens,
                                        request.prefill_ended_s - request.prefill_started_s))
        export.finish(self._acks, self.transfer_deadline_s)

    def _transferred(self, export: KVExport) -> None:
        request = export.request
        try:
            report = export.report.result()
        except (LinkDown, StreamAborted, TimeoutError) as error:
            self._tell(messages.PrefillFailed(request.id, str(error)))
            export.stream.abort()
        else:
            exposed_s = max(0.0, report.acked_s - max(report.first_put_s, request.prefill_ended_s))
            self._tell(messages.TransferDone(request.id, report.bytes, report.acked_s - report.first_put_s, exposed_s))
        self._end(export)

    def _drop(self, id: str) -> None:
        """Forget a request in whatever state; blocks whose transfer is under way stay until that has ended."""
        export = self.exports.get(id)
        if export is None:
            return
        export.stream.abort()
        if export.report is None:
            self.exports.pop(id)
            self.engine.abort(export.request)

    def _end(self, export: KVExport) -> None:
        self.engine.kvcache.end_transfer(export.request.cache)
        self.engine.release(export.request)
        self.exports.pop(export.request.id)

    def _tell(self, message) -> None:
        try:
            self.link.send_message(messages.encode(message))
        except LinkDown:
            self._stopping = True


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: resident, plus what it took of its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
