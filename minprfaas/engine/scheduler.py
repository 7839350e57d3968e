"""What runs next: the queues, admission, preemption and the next prefill chunks. Chapter 05; paper 2.1.

No tensor is touched here. A request waits until the pool has room for its whole prompt, is prefilled chunk by chunk,
and then decodes with all the others until its answer ends. When a running request needs a block and there is none, the
youngest gives everything back and waits again, ahead of those that never ran.
"""

from collections import deque
from dataclasses import dataclass

from minprfaas.engine.request import Request, Status
from minprfaas.errors import require_number
from minprfaas.kvcache.manager import KVCacheManager


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of a request, to be computed in one forward pass."""

    request: Request
    start: int
    end: int


class Scheduler:
    """The requests of one engine, in three queues: `waiting`, `prefilling` and `running`, each oldest first."""

    def __init__(self, kvcache: KVCacheManager, prefill_chunk: int, max_batch: int, shared_tokens: int):
        require_number("prefill chunk in tokens", prefill_chunk, least=1, whole=True)
        self.kvcache, self.prefill_chunk, self.max_batch = kvcache, prefill_chunk, max_batch
        self.shared_tokens = shared_tokens  # of a pass that prompts may share, padding included
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.running: list[Request] = []
        self.has_no_room = False  # whether the oldest waiting request did not fit the last time

    def remove(self, request: Request) -> None:
        """Take a request out of whichever queue it is in; harmless if it is in none."""
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)

    def open_cache(self, request: Request, to_receive: bool = False) -> bool:
        """Attach the cached prefix, and blocks for the rest of what is known of the request. False, and nothing is
        held, when the pool has no room now."""
        request.cache = self.kvcache.open(request.token_ids, request.keys, to_receive)
        request.keys = request.cache.keys  # one that waits for room must not be hashed again at every step
        if self.kvcache.reserve(request.cache, len(request.token_ids)):
            return True
        self.close_cache(request)
        return False

    def close_cache(self, request: Request) -> None:
        """Let go of a request's blocks; harmless when it has none."""
        if request.cache is not None:
            self.kvcache.close(request.cache)
            request.cache = None

    # Prefill

    def next_chunks(self) -> list[PrefillChunk]:
        """Admit what fits, then plan the next pass: a chunk of the oldest admitted prompt, and beside it all the rest
        of those that follow, while a row for each, as long as the longest, is no more than `shared_tokens`."""
        self._admit()
        chunks, longest = [], 0
        for request in self.prefilling:
            start, known = request.cache.num_tokens, len(request.token_ids)
            longest = max(longest, known - start)
            if chunks and longest * (len(chunks) + 1) > self.shared_tokens:
                break
            end = self.kvcache.plan_chunk(request.cache, known, self.prefill_chunk)
            chunks.append(PrefillChunk(request, start, end))
        return chunks

    def _admit(self) -> None:
        """Move waiting requests to prefill, oldest first, while the pool has room for their whole prompts."""
        self.has_no_room = False
        while self.waiting and len(self.prefilling) + len(self.running) < self.max_batch:
            request = self.waiting[0]
            if not self.open_cache(request):
                self.has_no_room = True  # nobody overtakes the oldest: a long prompt would starve behind short ones
                return
            self.waiting.popleft()
            if not request.preemptions:  # afterwards it finds its own blocks: no saving that a client should hear of
                request.cached_tokens = request.cache.cached_tokens
            request.status = Status.PREFILL
            self.prefilling.append(request)

    # Decode

    def next_batch(self) -> list[Request]:
        """The running requests, each with room for one more token; the youngest are preempted until that holds."""
        for request in list(self.running):
            while request in self.running and not self.kvcache.reserve(request.cache, len(request.token_ids)):
                self._preempt_youngest()
        return self.running[:self.max_batch]  # one that was preempted may find its place taken; it is the last

    def _preempt_youngest(self) -> None:
        """Free the blocks of the request that came last; it computes again later what its prefix cache has lost.
        It keeps the tokens that it has drawn: they are part of its prompt from now on."""
        request = self.prefilling.pop() if self.prefilling else self.running.pop()
        self.close_cache(request)
        request.preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
