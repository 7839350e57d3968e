"""Simulated nodes: a prefill node, a decode node with continuous batching, a prefix cache. Chapter 12 (paper 3.1)."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from minprfaas.scheduling.directory import CacheEvent, Directory
from minprfaas.scheduling.profiles import Profile
from minprfaas.scheduling.router import Decision, NodeView
from minprfaas.simulator.events import Clock
from minprfaas.simulator.trace import BLOCK_TOKENS

# Modelled: the share of a full batch's decode step that a batch of one would take too (weights are read once a step,
# the KVCache once a request). A full batch takes the profile's t_decode_s whatever this is.
STEP_FIXED_SHARE = 0.5


class SimRequest:
    """A request on its way. `keys`: hashes of its prompt's blocks, if prefix caching is simulated. Times in seconds."""

    __slots__ = ("arrival_s", "input_tokens", "output_tokens", "keys", "decision", "decoder", "attempts",
                 "cached_tokens", "work_tokens", "work_s", "stream_rate", "first_token_s", "finished_s")

    def __init__(self, arrival_s: float, input_tokens: int, output_tokens: int, keys: Sequence = ()):
        self.arrival_s, self.input_tokens, self.output_tokens, self.keys = arrival_s, input_tokens, output_tokens, keys
        self.decision: Decision | None = None
        self.decoder: DecodeNode | None = None
        self.attempts = 0  # times it was routed; above 1 after a failure
        self.cached_tokens = 0  # found when its prefill began
        self.work_tokens, self.work_s = 0, 0.0  # what its prefill node expects to compute
        self.stream_rate = 0.0  # bytes per second of KVCache while it is prefilled far away
        self.first_token_s = self.finished_s = 0.0


class PrefixCache:
    """The prefix-cache blocks of one node, least recently used out first, from the tail of a prefix; it tells the
    directory. A match can end at every block: the snapshots of request-level state are taken to be there."""

    def __init__(self, node: str, capacity_blocks: int, directory: Directory):
        self._node, self._capacity, self._directory = node, capacity_blocks, directory
        self._blocks: dict = {}  # key -> tokens, oldest first
        self._sequence = 0

    def match(self, keys: Sequence) -> int:
        """Tokens of the longest prefix that is here."""
        for key in reversed(keys):
            if key in self._blocks:
                return self._blocks[key]
        return 0

    def store(self, keys: Sequence) -> None:
        """Keep the prefix of a request that was computed or received here."""
        for position in range(min(len(keys), self._capacity) - 1, -1, -1):
            key, tokens = keys[position], (position + 1) * BLOCK_TOKENS
            if self._blocks.pop(key, None) is None:
                self._tell("stored", key, tokens)
            self._blocks[key] = tokens
        while len(self._blocks) > self._capacity:
            key = next(iter(self._blocks))
            self._tell("evicted", key, self._blocks.pop(key))

    def entries(self) -> tuple[int, list]:
        """What a resync sends: the number of the last event, and all (key, tokens)."""
        return self._sequence, list(self._blocks.items())

    def clear(self) -> None:
        """The node lost its memory."""
        self._blocks.clear()

    def _tell(self, kind: str, key, tokens: int) -> None:
        self._sequence += 1
        self._directory.publish(CacheEvent(self._node, self._sequence, kind, key, tokens))


class PrefillNode:
    """One instance that prefills one request at a time, in order of arrival. `started(request, seconds)` and
    `done(request)` are the cluster's; `waiting_s` is the prefill that waits, as expected at arrival,
    and `overhead_tokens` what any request costs beside its tokens, in tokens: in load, short requests count with it."""

    def __init__(self, view: NodeView, clock: Clock, profile: Profile, cache: PrefixCache, started: Callable,
                 done: Callable):
        self.view, self.cache, self.running, self.alive = view, cache, None, True
        self.waiting: deque[SimRequest] = deque()
        self.waiting_s = 0.0
        first, last = profile.points[0], profile.points[-1]
        s_per_token = (last.prefill_s - first.prefill_s) / (last.tokens - first.tokens)
        self.overhead_tokens = round(profile.prefill_s(0) / s_per_token)
        self._clock, self._profile, self._started, self._done = clock, profile, started, done

    def submit(self, request: SimRequest) -> None:
        """Queue a request that was routed here; `view.load` grew when it was."""
        request.work_s = self._profile.prefill_s(request.work_tokens - self.overhead_tokens)
        self.waiting.append(request)
        self.waiting_s += request.work_s
        if self.running is None:
            self._start_next()

    def _start_next(self) -> None:
        request = self.running = self.waiting.popleft()
        self.waiting_s -= request.work_s
        cached = min(self.cache.match(request.keys), request.input_tokens - 1)
        if request.decision.transfer is not None:
            cached = max(cached, request.decision.transfer.end)
        request.cached_tokens = cached
        seconds = self._profile.prefill_s(request.input_tokens - cached)
        self._started(request, seconds)
        self._clock.after(seconds, self._finish, request)

    def _finish(self, request: SimRequest) -> None:
        if request is not self.running:  # the node failed meanwhile
            return
        self.running = None
        self.view.load -= request.work_tokens
        self.cache.store(request.keys)
        if self.waiting:
            self._start_next()
        self._done(request)

    def fail(self) -> list[SimRequest]:
        """Lose everything; returns the requests that must begin again."""
        lost = [self.running, *self.waiting] if self.running else list(self.waiting)
        self.running, self.alive = None, False
        self.cache.clear()
        return lost


class DecodeNode:
    """Continuous batching: up to `bs_max` requests draw one token each per step, others wait for a place; a request
    joins and leaves between steps. Steps take longer in a larger batch, so time is counted in steps (`_steps`)."""

    def __init__(self, view: NodeView, clock: Clock, profile: Profile, cache: PrefixCache, done: Callable):
        self.view, self.cache, self.waiting, self.alive = view, cache, deque(), True
        self.running: list[tuple[float, int, SimRequest]] = []  # a heap by the step at which the last token is drawn
        self._clock, self._profile, self._done = clock, profile, done
        self._steps, self._updated_s, self._joined, self._plan = 0.0, 0.0, 0, 0

    def admit(self, request: SimRequest) -> None:
        """The request's KVCache is here."""
        self.cache.store(request.keys)
        if len(self.running) < self._profile.bs_max:
            self._advance()
            self._join(request)
            self._plan_next()
        else:
            self.waiting.append(request)

    def _join(self, request: SimRequest) -> None:
        request.first_token_s = self._clock.now_s
        self._joined += 1
        heapq.heappush(self.running, (self._steps + request.output_tokens, self._joined, request))

    def _step_s(self) -> float:
        fill = len(self.running) / self._profile.bs_max
        return self._profile.t_decode_s * (STEP_FIXED_SHARE + (1 - STEP_FIXED_SHARE) * fill)

    def _advance(self) -> None:
        now = self._clock.now_s
        if self.running:
            self._steps += (now - self._updated_s) / self._step_s()
        self._updated_s = now

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
        request.finished_s = self._clock.now_s
        self.view.load -= 1
        if self.waiting:
            self._join(self.waiting.popleft())
        self._plan_next()
        self._done(request)

    def fail(self) -> list[SimRequest]:
        """Lose everything; returns the requests that must begin again."""
        lost = [request for _, _, request in self.running] + list(self.waiting)
        self.running, self.alive = [], False
        self.cache.clear()
        self._plan += 1
        return lost
