"""Prefix shipping: a cached prefix is sent to the node where a prefill will begin, instead of being computed again.

Chapters 11 and 13; paper 3.4.3. Who will compute pulls: `PrefixOrder` asks a node that holds the prefix, which streams
what the other lacks. Whatever goes wrong, the prefill goes on without: that costs time, never a wrong token, for a
prefix enters the index only when its last byte is there. It crosses exactly, whatever the encoding of a link: others
will begin with it, here and in the datacenter beyond.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.kv_send import Outgoing
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.messages import PrefixAbort, PrefixOrder
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import StreamDone, StreamFailed


@dataclass(eq=False)
class Fetch:
    """A prefix on its way here. `nbytes` is None while it is under way, and 0 when it did not come."""

    source: str
    prefix: list[int]
    cache: RequestCache
    deadline_at_s: float
    arriving: KVReceive
    nbytes: int | None = None


class PrefixShipping:
    """The prefixes that one part sends, among all that is `outgoing`, and receives. Only its own loop calls it."""

    def __init__(self, name: str, kvcache: KVCacheManager, mail: Mail, outgoing: Outgoing,
                 clock: Callable[[], float], deadline_s: float, stream_ids: Iterator[int]):
        self.deadline_s, self._stream_ids = deadline_s, stream_ids
        self._name, self._kvcache, self._mail, self._outgoing, self._clock = name, kvcache, mail, outgoing, clock
        self._fetching: dict[int, Fetch] = {}

    def __bool__(self) -> bool:
        return bool(self._fetching)

    # Who will compute

    def fetch(self, token_ids: list[int], source: str) -> Fetch | None:
        """Ask `source` for the prefix of `token_ids`, all but the last of them. None when there is nothing to ask for:
        it is here already, there is no room, or the source cannot be reached."""
        end = len(token_ids) - 1
        try:
            cache = self._kvcache.open(token_ids)
        except ValueError:  # numbers that cannot be tokens
            return None
        if cache.cached_tokens >= end or not self._kvcache.reserve(cache, end):
            self._kvcache.close(cache)
            return None
        stream_id = next(self._stream_ids)
        try:
            plan = stream_plan(self._kvcache.layout, stream_id, cache.cached_tokens, end)
            arriving = KVReceive(self._kvcache, self._mail.transport(source), plan, cache.block_tables)
        except LinkDown:
            self._kvcache.close(cache)
            return None
        fetch = Fetch(source, token_ids[:end], cache, self._clock() + self.deadline_s, arriving)
        self._fetching[stream_id] = fetch
        self._mail.send(self._name, source, PrefixOrder(stream_id, token_ids, cache.cached_tokens))
        return fetch

    def give_up(self, fetch: Fetch) -> None:
        """The prefix is wanted no more. Harmless for one that has ended."""
        if fetch.nbytes is None:
            fetch.arriving.give_up()
            self._mail.send(self._name, fetch.source, PrefixAbort(fetch.arriving.plan.stream_id))
            self._end_fetch(fetch, 0)

    def _end_fetch(self, fetch: Fetch, nbytes: int) -> None:
        fetch.nbytes = nbytes
        del self._fetching[fetch.arriving.plan.stream_id]
        self._kvcache.close(fetch.cache)

    # Who holds the prefix

    def order(self, sender: str, order: PrefixOrder) -> None:
        """Stream a prefix, if it is here to its end (still)."""
        if not self._send(sender, order):
            self._mail.send(self._name, sender, PrefixAbort(order.stream_id))

    def _send(self, sender: str, order: PrefixOrder) -> bool:
        end = len(order.token_ids) - 1
        try:
            cache = self._kvcache.open(order.token_ids)
        except ValueError:  # numbers that cannot be tokens
            return False
        try:
            if not 0 < end == cache.cached_tokens:
                raise ValueError("the prefix is not here")
            plan = stream_plan(self._kvcache.layout, order.stream_id, order.start, end)
            stream = self._outgoing.open(sender, plan, cache, self._tables(cache, end), self._clock() + self.deadline_s)
        except ValueError:
            stream = None
        self._kvcache.close(cache)  # the stream keeps what it reads
        if stream is not None:
            stream.finish()
        return stream is not None

    def _tables(self, cache: RequestCache, end: int) -> list:
        """The rows' blocks from the request's tables, the state's from the snapshot at the end."""
        snapshot = self._kvcache.snapshots.hold(cache, end)
        tables = list(cache.block_tables)
        for group in self._kvcache.layout.request_groups:
            tables[group.index] = snapshot[group.index]
        return tables

    # Both

    def aborted(self, sender: str, stream_id: int) -> None:
        """The other side gives this prefix up."""
        self._outgoing.abort(sender, stream_id)
        fetch = self._fetching.get(stream_id)
        if fetch is not None and fetch.source == sender:
            self.give_up(fetch)

    def notice(self, event: StreamDone | StreamFailed) -> None:
        """Take what has happened to a stream; one that is not a prefix's is ignored."""
        fetch = self._fetching.get(event.stream_id)
        if fetch is None:
            return
        if isinstance(event, StreamDone):
            self._kvcache.advance(fetch.cache, fetch.prefix)  # indexes it, with the state at its end
            self._end_fetch(fetch, event.report.bytes)
        else:
            self.give_up(fetch)

    def peer_lost(self, name: str) -> None:
        """Nothing comes from there any more."""
        for fetch in [fetch for fetch in self._fetching.values() if fetch.source == name]:
            self.give_up(fetch)

    def step(self) -> None:
        """Give up what is overdue."""
        for fetch in [fetch for fetch in self._fetching.values() if self._clock() > fetch.deadline_at_s]:
            self.give_up(fetch)
