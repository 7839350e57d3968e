"""Emulated accelerators: real work inside the time that a profile gives for it. Chapters 13 and 15; paper 4.

The tokens and the KVCache are real; how long they take is emulated. Each layer of a prefill chunk, and each decode
step, is held back until the profile's time for it has passed, so KVCache leaves at the pace of the emulated machine.
Where the real work needs longer than the profile allows, nothing can be waited out: the run is then not valid, and
`Pace` knows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.engine.engine import Engine
from minprfaas.engine.request import KVListener, Request, TokenUpdate
from minprfaas.engine.runner import Runner
from minprfaas.engine.scheduler import PrefillChunk


@dataclass
class Pace:
    """`prefill_s(tokens)` is the time of a prompt of so many uncached tokens, `decode_step_s(requests)` that of a step
    of so many. What was allowed, needed and exceeded so far is summed in seconds."""

    prefill_s: Callable[[float], float]
    decode_step_s: Callable[[int], float]
    allowed_s: float = 0.0
    needed_s: float = 0.0  # by the real work
    late_s: float = 0.0  # by which it came too late


class PacedRunner:
    """A runner that takes the time of `pace`. `wait(seconds)` lets that time pass."""

    def __init__(self, runner: Runner, pace: Pace, layers: int, clock: Callable[[], float],
                 wait: Callable[[float], None] = time.sleep):
        self._runner, self.pace, self._layers, self._clock, self._wait = runner, pace, layers, clock, wait
        self.step_due_at_s: float | None = None  # of a decode step that has begun
        self.middle_at_s = 0.0  # of that step
        self._waited_s = 0.0  # in the pass under way

    def begin_step(self, requests: int, at_s: float | None = None) -> float:
        """A decode step of so many requests begins at `at_s` (now), unless one has begun; returns when it is due."""
        if self.step_due_at_s is None:
            began_at_s, step_s = self._clock() if at_s is None else at_s, self.pace.decode_step_s(requests)
            self.middle_at_s, self.step_due_at_s = began_at_s + step_s / 2, began_at_s + step_s
        return self.step_due_at_s

    def prefill(self, chunks: list[PrefillChunk], on_kv: KVListener | None) -> list[int | None]:
        """See `Runner.prefill`; of one chunk. Every layer takes an equal part of its time."""
        (chunk,) = chunks
        cached, began_at_s = chunk.request.cache.cached_tokens, self._clock()
        before_s = self.pace.prefill_s(chunk.start - cached) if chunk.start > cached else 0.0
        allowed_s = self.pace.prefill_s(chunk.end - cached) - before_s

        def on_layer(request: Request, layer: int, start: int, end: int) -> None:
            self._wait_until(began_at_s + allowed_s * (layer + 1) / self._layers)
            if on_kv is not None:
                on_kv(request, layer, start, end)

        self._waited_s = 0.0
        tokens = self._runner.prefill(chunks, on_layer)
        self._note(began_at_s, allowed_s, self._clock() - began_at_s - allowed_s)
        return tokens

    def decode(self, batch: list[Request]) -> list[int]:
        """See `Runner.decode`. It is computed at once, and done when its time has passed."""
        work_began_at_s, allowed_s = self._clock(), self.pace.decode_step_s(len(batch))
        due_at_s = self.begin_step(len(batch))
        self._waited_s = 0.0
        tokens = self._runner.decode(batch)
        self._wait_until(due_at_s)
        self.step_due_at_s = None
        # The next step can make up for a lag; one of a whole step is none of a step's beginning any more.
        lag_s = self._clock() - due_at_s
        self._note(work_began_at_s, allowed_s, lag_s if lag_s > allowed_s else 0.0)
        return tokens

    def _wait_until(self, due_at_s: float) -> None:
        remaining_s = due_at_s - self._clock()
        if remaining_s > 0:
            self._wait(remaining_s)
            self._waited_s += remaining_s

    def _note(self, work_began_at_s: float, allowed_s: float, late_s: float) -> None:
        self.pace.allowed_s += allowed_s
        self.pace.needed_s += max(self._clock() - work_began_at_s - self._waited_s, 0.0)
        self.pace.late_s += max(late_s, 0.0)


class PacedEngine(Engine):
    """An engine of an emulated machine that shares its process with others: a decode step, which stands for many, is
    computed when its time has passed, and nothing waits for that. Who joins in its first half takes part in it, as if
    for the whole; who joins in its second half does not: so that an answer takes its steps in the mean."""

    def emulate(self, pace: Pace, max_batch: int) -> None:
        """From now on, take the time of `pace`; at most so many requests are in a decode step."""
        self.runner = PacedRunner(self.runner, pace, len(self.model.config.layers), self.clock)
        self.scheduler.max_batch, self.scheduler.shared_tokens = max_batch, 0  # a profile's times are of one prompt
        self._step_begins_at_s: float | None = None  # the next one begins
        self._late: list[Request] = []  # joined in the second half of the step

    @property
    def is_ready(self) -> bool:
        due_at_s = self.runner.step_due_at_s
        is_stepping = self._only_decodes() and due_at_s is not None and self.clock() < due_at_s
        return super().is_ready and not is_stepping

    def step(self, on_kv: KVListener | None = None) -> list[TokenUpdate]:
        """See `Engine.step`; nothing happens while a decode step takes its time."""
        if self._only_decodes() and self.clock() < self.runner.begin_step(self._batch_size(), self._step_begins_at_s):
            return []
        due_at_s = self.runner.step_due_at_s
        late, self._late = [request for request in self._late if request in self.running], []
        for request in late:
            self.running.remove(request)
        updates = super().step(on_kv)
        self.running += late
        # The next step begins when this one was due, with who has joined by then: looking late must not add up.
        is_late = due_at_s is None or self.clock() >= due_at_s + self.runner.pace.decode_step_s(1)
        self._step_begins_at_s = due_at_s if self.running and not is_late else None
        return updates

    def admit_remote(self, request: Request, first_token: int) -> TokenUpdate:
        if self.runner.step_due_at_s is not None and self.clock() > self.runner.middle_at_s:
            self._late.append(request)
        return super().admit_remote(request, first_token)

    def abort(self, request: Request) -> None:
        """See `Engine.abort`. A step in which nobody takes part any more is none."""
        super().abort(request)
        if not any(one not in self._late for one in self.running):
            self.runner.step_due_at_s = self._step_begins_at_s = None

    def _only_decodes(self) -> bool:
        return bool(self.running) and not (self.prefilling or self.waiting)

    def _batch_size(self) -> int:
        return min(len(self.running), self.scheduler.max_batch)
