"""A cached prefix on its way to the node that will compute: shipped instead of computed again. Chapter 11; paper 3.4.3.

The PD side begins: `PrefixOrder` asks for a prefix; `PrefixOffer` offers one and is answered with `PrefixReady`. Either
side may end it with `PrefixAbort`. Whatever goes wrong, the request goes on without: that costs a prefill, never a
wrong token, for a prefix enters the index only when its last byte is here.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from minprfaas.cluster import messages
from minprfaas.cluster.kv_export import stream_plan
from minprfaas.kvcache.manager import KVCacheManager, RequestCache
from minprfaas.transport.events import LinkDown, LinkLost, LinkRestored, StreamAborted, StreamDone, StreamFailed
from minprfaas.transport.link import Link
from minprfaas.transport.sending import SendStream


@dataclass
class _Transfer:
    cache: RequestCache  # holds all of the prefix where it is sent, and room for it where it is received
    prefix: list[int]
    deadline_s: float
    stream: SendStream | None = None
    shipped: Future[int] | None = None  # bytes; 0 if it failed

    @property
    def is_whole(self) -> bool:
        return 0 < len(self.prefix) == self.cache.cached_tokens


class PrefixTransfers:
    """The prefixes that one node is sending or receiving, by stream id. Only the node's own loop calls it.

    `token_ids` are always the prefix and one token more: what `KVCacheManager.open` needs to find all of the prefix.
    """

    def __init__(self, kvcache: KVCacheManager, link: Link, tell: Callable[[object], None], deadline_s: float):
        self.kvcache, self.link, self.deadline_s, self._tell = kvcache, link, deadline_s, tell
        self._under_way: dict[int, _Transfer] = {}
        self._ended: list[tuple[int, int]] = []
        self._threads = ThreadPoolExecutor(thread_name_prefix="prefix")

    def __bool__(self) -> bool:
        return bool(self._under_way or self._ended)

    def fetch(self, stream_id: int, token_ids: list[int]) -> bool:
        """Ask the other node for a prefix. False when this one has it, or no room for it."""
        if not self._open(stream_id, token_ids, self._expect):
            return False
        self._tell(messages.PrefixOrder(stream_id, token_ids, self._start(stream_id)))
        return True

    def offer(self, stream_id: int, token_ids: list[int]) -> bool:
        """Offer the other node a prefix. False when it is not cached here to its end."""
        if not self._open(stream_id, token_ids, self._hold):
            return False
        self._tell(messages.PrefixOffer(stream_id, token_ids))
        return True

    def hear(self, event) -> None:
        """Take a message or an event of the link; any that is not about prefixes is ignored."""
        match event:
            case messages.PrefixOrder(stream_id, token_ids, start) if self._open(stream_id, token_ids, self._hold):
                self._ship(stream_id, start)
            case messages.PrefixOffer(stream_id, token_ids) if self._open(stream_id, token_ids, self._expect):
                self._tell(messages.PrefixReady(stream_id, self._start(stream_id)))
            case messages.PrefixOrder(stream_id) | messages.PrefixOffer(stream_id):
                self._tell(messages.PrefixAbort(stream_id))
            case messages.PrefixReady(stream_id, start):
                self._ship(stream_id, start)
            case StreamDone(stream_id, report) if stream_id in self._under_way:
                transfer = self._under_way[stream_id]
                self.kvcache.advance(transfer.cache, transfer.prefix)  # indexes it, with the state at its end
                self._end(stream_id, report.bytes)
            case messages.PrefixAbort(stream_id) | StreamFailed(stream_id):
                self.give_up(stream_id)
            case LinkLost() | LinkRestored(peer_restarted=True):
                for stream_id in list(self._under_way):
                    self.give_up(stream_id)

    def tend(self) -> list[tuple[int, int]]:
        """Give up what is overdue. Returns what has ended since the last call: (stream id, bytes; 0 if it failed)."""
        for stream_id, transfer in list(self._under_way.items()):
            if transfer.shipped is not None and transfer.shipped.done():
                self._end(stream_id, transfer.shipped.result())
            elif time.monotonic() > transfer.deadline_s:
                self.give_up(stream_id)
        ended, self._ended = self._ended, []
        return ended

    def give_up(self, stream_id: int) -> None:
        """End a transfer, here and on the other side. Harmless for one that has ended."""
        transfer = self._under_way.get(stream_id)
        if transfer is None:
            return
        if transfer.stream is not None:  # its thread may still read the blocks: `tend` ends it when that has stopped
            return transfer.stream.abort()
        self.link.forget_stream(stream_id)
        self._end(stream_id, 0)
        self._tell(messages.PrefixAbort(stream_id))

    def _open(self, stream_id: int, token_ids: list[int], is_ready: Callable[[int, _Transfer], bool]) -> bool:
        """Begin a transfer unless what the cache says speaks against it; then nothing is held."""
        if stream_id in self._under_way:
            return False
        try:
            transfer = _Transfer(self.kvcache.open(token_ids), token_ids[:-1], time.monotonic() + self.deadline_s)
        except ValueError:  # numbers that cannot be tokens
            return False
        if not is_ready(stream_id, transfer):
            self.kvcache.close(transfer.cache)
            return False
        self._under_way[stream_id] = transfer
        return True

    def _start(self, stream_id: int) -> int:
        return self._under_way[stream_id].cache.cached_tokens

    def _end(self, stream_id: int, nbytes: int) -> None:
        self.kvcache.close(self._under_way.pop(stream_id).cache)
        self._ended.append((stream_id, nbytes))

    def _expect(self, stream_id: int, transfer: _Transfer) -> bool:
        """Make room for what is missing of a prefix, and expect its stream."""
        layout, pool, cache, end = self.kvcache.layout, self.kvcache.pool, transfer.cache, len(transfer.prefix)
        if cache.cached_tokens >= end or not self.kvcache.reserve(cache, end):
            return False

        def write_into_blocks(layer: int, start: int, end: int, data) -> None:
            pool.write_bytes(layer, cache.block_tables[layout.group_of_layer[layer].index], start, end, data)

        try:
            self.link.expect_stream(stream_plan(layout, stream_id, cache.cached_tokens, end), write_into_blocks)
        except (LinkDown, ValueError):
            return False
        return True

    def _hold(self, stream_id: int, transfer: _Transfer) -> bool:
        """A prefix is sent only if it is here to its end (still)."""
        return transfer.is_whole

    def _ship(self, stream_id: int, start: int) -> None:
        """Stream tokens from `start` on, and the state at the end, beside the engine."""
        transfer = self._under_way.get(stream_id)
        if transfer is None or not transfer.is_whole or transfer.stream is not None:
            return
        end = len(transfer.prefix)
        try:
            transfer.stream = self.link.open_stream(stream_plan(self.kvcache.layout, stream_id, start, end))
        except (LinkDown, ValueError):
            return self.give_up(stream_id)
        state = self.kvcache.snapshot_tables(transfer.cache, end) or transfer.cache.block_tables
        tables = [blocks or rows for blocks, rows in zip(state, transfer.cache.block_tables)]
        transfer.shipped = self._threads.submit(self._put_all, transfer.stream, tables)

    def _put_all(self, stream: SendStream, tables: list) -> int:
        """In a thread of its own. The transfer's cache holds all that is read, the snapshot too."""
        plan = stream.plan
        try:
            for entry in plan.entries:
                data = self.kvcache.pool.read_bytes(entry.layer, tables[entry.group], plan.start, plan.end)
                stream.put(entry.layer, plan.start, plan.end, data.reshape(-1))
            return stream.finish(self.deadline_s).bytes
        except (LinkDown, StreamAborted, TimeoutError):
            stream.abort()
            return 0
