"""Simulated nodes: a prefill node, a decode node with continuous batching, a prefix cache. Chapter 12 (paper 3.1)."""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from minprfaas.config import Role
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.profiles import Profile
from minprfaas.scheduling.router import Decision
from minprfaas.simulator.clock import Clock

BLOCK_TOKENS = 512  # of the prefix cache, as in Mooncake's traces


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request on its way. `keys`: hashes of its prompt's blocks, if prefix caching is simulated. Times in seconds."""

    arrived_at_s: float
    input_tokens: int
    output_tokens: int
    keys: tuple = ()
    id: int = -1  # its number, once it has arrived
    decision: Decision | None = None
    decoder: "DecodeNode | None" = None
    attempts: int = 0  # times it was routed; above 1 after a failure
    cached_tokens: int = 0  # found when its prefill began
    stream_rate: float = 0.0  # bytes per second of KVCache while it is prefilled far away
    first_token_at_s: float = 0.0
    finished_at_s: float = 0.0


class PrefixCache:
    """The prefix-cache blocks of one node, least recently used out first, from the tail of a prefix. A match can end at
    every block: the snapshots of request-level state are taken to be there."""

    def __init__(self, node: str, capacity_blocks: int):
        self._node, self._capacity = node, capacity_blocks
        self._tokens: dict[Hashable, int] = {}  # of a block's prefix, by the block's key, oldest first
        self._sequence = 0  # entries that were told so far

    def match(self, keys: Sequence[Hashable]) -> int:
        """Tokens of the longest prefix that is here."""
        return next((self._tokens[key] for key in reversed(keys) if key in self._tokens), 0)

    def store(self, keys: Sequence[Hashable]) -> CacheChanged | None:
        """Keep the prefix of a request that was computed or received here. Returns the news, if there are any."""
        news = []
        for position in range(min(len(keys), self._capacity) - 1, -1, -1):  # so that the tail is the oldest
            key, tokens = keys[position], (position + 1) * BLOCK_TOKENS
            if self._tokens.pop(key, None) is None:
                news.append((key, tokens))
            self._tokens[key] = tokens
        while len(self._tokens) > self._capacity:
            oldest = next(iter(self._tokens))
            del self._tokens[oldest]
            news.append((oldest, 0))
        self._sequence += len(news)
        return CacheChanged(self._node, self._sequence - len(news) + 1, news) if news else None

    def inventory(self) -> CacheChanged:
        """All that is here."""
        return CacheChanged(self._node, self._sequence, list(self._tokens.items()), inventory=True)

    def clear(self) -> None:
        """The node lost its memory."""
        self._tokens.clear()


class PrefillNode:
    """One instance that prefills one request at a time, in order of arrival. `started` and `done` are told the request
    and the seconds of its prefill."""

    def __init__(self, role: Role, clock: Clock, profile: Profile, cache: PrefixCache,
                 started: Callable[[SimRequest, float], None], done: Callable[[SimRequest, float], None]):
        self.role, self.running, self.alive = role, None, True
        self.waiting: deque[SimRequest] = deque()
        self._clock, self._profile, self._cache, self._started, self._done = clock, profile, cache, started, done

    def submit(self, request: SimRequest) -> None:
        """Queue a request that was routed here."""
        self.waiting.append(request)
        if self.running is None:
            self._start_next()

    def _start_next(self) -> None:
        request = self.running = self.waiting.popleft()
        cached = self._cache.match(request.keys)
        if request.decision.shipment is not None:
            cached = max(cached, request.decision.shipment.end)
        request.cached_tokens = min(cached, request.input_tokens - 1)
        seconds = self._profile.prefill_s(request.input_tokens - request.cached_tokens)
        self._started(request, seconds)
        self._clock.after(seconds, self._finish, request, seconds)

    def _finish(self, request: SimRequest, seconds: float) -> None:
        if request is not self.running:  # the node failed meanwhile
            return
        self.running = None
        self._done(request, seconds)  # keeps its prefix, so that the next request finds it
        if self.waiting and self.running is None:  # `done` may have routed a request to here
            self._start_next()

    def fail(self) -> list[SimRequest]:
        """Lose everything; returns the requests that must begin again."""
        lost = [self.running, *self.waiting] if self.running else list(self.waiting)
        self.running, self.alive = None, False
        return lost


class DecodeNode:
    """Continuous batching: up to `bs_max` requests draw one token a step and join and leave between steps, others wait.
    Steps take longer in a larger batch, so time is counted in steps (`_steps`)."""

    def __init__(self, clock: Clock, profile: Profile, done: Callable[[SimRequest], None]):
        self.waiting: deque[SimRequest] = deque()
        self.alive = True
        self.running: list[tuple[float, int, SimRequest]] = []  # a heap by the step at which the last token is drawn
        self._clock, self._profile, self._done = clock, profile, done
        self._steps, self._updated_at_s, self._joined, self._plan = 0.0, 0.0, 0, 0

    def admit(self, request: SimRequest) -> None:
        """The request's KVCache is here."""
        if len(self.running) >= self._profile.bs_max:
            self.waiting.append(request)
            return
        self._advance()
        self._join(request)
        self._plan_next()

    def _join(self, request: SimRequest) -> None:
        request.first_token_at_s = self._clock.now_s
        self._joined += 1
        heapq.heappush(self.running, (self._steps + request.output_tokens, self._joined, request))

    def _step_s(self) -> float:
        return self._profile.decode_step_s(len(self.running))

    def _advance(self) -> None:
        now_s = self._clock.now_s
        if self.running:
            self._steps += (now_s - self._updated_at_s) / self._step_s()
        self._updated_at_s = now_s

    def _plan_next(self) -> None:
        self._plan += 1
        if self.running:
            self._clock.after((self.running[0][0] - self._steps) * self._step_s(), self._leave, self._plan)

    def _leave(self, plan: int) -> None:
        if plan != self._plan:  # the batch changed meanwhile
            return
        self._advance()
        self._steps = self.running[0][0]  # exactly: rounding must not plan the same departure again
        _, _, request = heapq.heappop(self.running)
        request.finished_at_s = self._clock.now_s
        if self.waiting:
            self._join(self.waiting.popleft())
        self._plan_next()
        self._done(request)

    def fail(self) -> list[SimRequest]:
        """Lose everything; returns the requests that must begin again."""
        lost = [request for _, _, request in self.running] + list(self.waiting)
        self.running, self.alive = [], False
        self._plan += 1
        return lost
