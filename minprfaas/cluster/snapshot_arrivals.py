"""Snapshots on their way to a decode node: there the conversation's next prompt can begin.

Chapters 08 and 13; paper 3.2.

A favour beside a request's KVCache, for which nobody waits: it may come before its request is admitted or long after,
and counts once the rows up to it are here too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Happening, PeerLost
from minprfaas.cluster.stream_plans import snapshot_plan
from minprfaas.engine.request import Request, Status
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.snapshots import ExpectedSnapshot
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import StreamDone, StreamFailed


@dataclass(eq=False)
class _Arrival:
    request: Request
    source: str
    expected: ExpectedSnapshot
    stream: KVReceive
    deadline_at_s: float


class SnapshotArrivals:
    """The snapshots that one decode role waits for. Only its own loop calls it."""

    def __init__(self, kvcache: KVCacheManager, mail: Mail, clock: Callable[[], float]):
        self._kvcache, self._mail, self._clock = kvcache, mail, clock
        self._arrivals: dict[int, _Arrival] = {}  # by stream

    def __bool__(self) -> bool:
        return bool(self._arrivals)

    def expect(self, stream_id: int, request: Request, source: str, deadline_at_s: float) -> int:
        """Expect the state at the last block boundary before the prompt's last token. Returns that boundary, or 0 when
        there is no room or no use for it (as where the rows up to it are rounded), or the source's blocks end at other
        tokens, so that it has none. Raises LinkDown."""
        if not request.cache.is_exact or not self._mail.wire_to(source).same_blocks:
            return 0
        size = self._kvcache.layout.block_tokens
        at = (len(request.token_ids) - 1) // size * size
        transport, expected = self._mail.transport(source), self._kvcache.snapshots.expect(request.keys, at)
        if expected is None:
            return 0
        plan = snapshot_plan(self._kvcache.layout, stream_id, at)
        try:
            stream = KVReceive(self._kvcache, transport, plan, expected.tables)
        except LinkDown:
            self._kvcache.snapshots.forget(expected)
            raise
        self._arrivals[stream_id] = _Arrival(request, source, expected, stream, deadline_at_s)
        return at

    def received_bytes(self, request: Request) -> int:
        """What has arrived so far of those of a request."""
        return sum(one.stream.received_bytes for one in self._arrivals.values() if one.request is request)

    def give_up(self, request: Request) -> None:
        """Nobody prefills this request any more; what has arrived is kept, if the rows up to it are here."""
        for arrival in [one for one in self._arrivals.values() if one.request is request]:
            self._drop(arrival)

    def notice(self, happening: Happening) -> None:
        """Take what has happened to a stream or to a peer."""
        match happening:
            case PeerLost(name=name):
                for arrival in [one for one in self._arrivals.values() if one.source == name]:
                    self._drop(arrival)
            case StreamDone(stream_id=stream_id, report=report) if stream_id in self._arrivals:
                self._arrivals[stream_id].stream.arrived(report)
            case StreamFailed(stream_id=stream_id) if stream_id in self._arrivals:
                self._drop(self._arrivals[stream_id])

    def step(self) -> None:
        """Index what has arrived, once its request's rows are in the index; give up what is overdue, or came when they
        had left the index again."""
        for stream_id, arrival in list(self._arrivals.items()):
            has_arrived, rows_were_there = arrival.stream.has_arrived, arrival.request.status is not Status.REMOTE
            if has_arrived and self._kvcache.snapshots.index_expected(arrival.expected):
                del self._arrivals[stream_id]
            elif self._clock() > arrival.deadline_at_s or (has_arrived and rows_were_there):
                self._drop(arrival)

    def _drop(self, arrival: _Arrival) -> None:
        arrival.stream.give_up()  # first: no byte may come after its blocks are free
        if not (arrival.stream.has_arrived and self._kvcache.snapshots.index_expected(arrival.expected)):
            self._kvcache.snapshots.forget(arrival.expected)
        del self._arrivals[arrival.stream.plan.stream_id]
