"""Emulated accelerators: real work inside the time that a profile gives for it. Chapter 13; paper 4.

The tokens and the KVCache are real; how long they take is emulated. Each layer of a prefill chunk, and each decode
step, is held back until the profile's time for it has passed, so KVCache leaves at the pace of the emulated machine.
Where the real work needs longer than the profile allows, nothing can be waited out: the run is then not valid, and
`Pace` knows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.engine.engine import Engine
from minprfaas.engine.request import KVListener, Request
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

    @property
    def late_share(self) -> float:
        """How much longer the emulated machine took than its profile says, as a share of that."""
        return self.late_s / self.allowed_s if self.allowed_s else 0.0


class PacedRunner:
    """A runner that takes the time of `pace`. `wait(seconds)` lets that time pass."""

    def __init__(self, runner: Runner, pace: Pace, layers: int, clock: Callable[[], float],
                 wait: Callable[[float], None] = time.sleep):
        self._runner, self._pace, self._layers, self._clock, self._wait = runner, pace, layers, clock, wait
        self._waited_s = 0.0  # in the pass under way

    def prefill(self, chunk: PrefillChunk, on_kv: KVListener | None) -> int | None:
        """See `Runner.prefill`. Every layer takes an equal part of the chunk's time."""
        cached, began_at_s = chunk.request.cache.cached_tokens, self._clock()
        before_s = self._pace.prefill_s(chunk.start - cached) if chunk.start > cached else 0.0
        allowed_s = self._pace.prefill_s(chunk.end - cached) - before_s

        def on_layer(request: Request, layer: int, start: int, end: int) -> None:
            self._wait_until(began_at_s + allowed_s * (layer + 1) / self._layers)
            if on_kv is not None:
                on_kv(request, layer, start, end)

        self._waited_s = 0.0
        token = self._runner.prefill(chunk, on_layer)
        self._note(began_at_s, allowed_s)
        return token

    def decode(self, batch: list[Request]) -> list[int]:
        """See `Runner.decode`."""
        began_at_s, allowed_s = self._clock(), self._pace.decode_step_s(len(batch))
        self._waited_s = 0.0
        tokens = self._runner.decode(batch)
        self._wait_until(began_at_s + allowed_s)
        self._note(began_at_s, allowed_s)
        return tokens

    def _wait_until(self, due_at_s: float) -> None:
        remaining_s = due_at_s - self._clock()
        if remaining_s > 0:
            self._wait(remaining_s)
            self._waited_s += remaining_s

    def _note(self, began_at_s: float, allowed_s: float) -> None:
        took_s = self._clock() - began_at_s
        self._pace.allowed_s += allowed_s
        self._pace.needed_s += max(took_s - self._waited_s, 0.0)
        self._pace.late_s += max(took_s - allowed_s, 0.0)


def emulate(engine: Engine, pace: Pace) -> None:
    """From now on the engine takes the time of `pace` for what it computes."""
    engine.runner = PacedRunner(engine.runner, pace, len(engine.model.config.layers), engine.clock)
