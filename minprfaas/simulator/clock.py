"""The simulator's clock: what happens next, in exact time and in a fixed order. Chapter 12."""

import heapq
from collections.abc import Callable


class Clock:
    """Events at one time happen in the order in which they were planned, so a run repeats exactly."""

    def __init__(self):
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable, tuple]] = []
        self._planned = 0

    def at(self, at_s: float, event: Callable, *args) -> None:
        """Plan `event(*args)` for `at_s`, or for now if that is past."""
        self._planned += 1
        heapq.heappush(self._events, (max(at_s, self.now_s), self._planned, event, args))

    def after(self, delay_s: float, event: Callable, *args) -> None:
        """Plan `event(*args)` for `delay_s` from now."""
        self.at(self.now_s + delay_s, event, *args)

    def run(self) -> None:
        """Until nothing is planned."""
        while self._events:
            self.now_s, _, event, args = heapq.heappop(self._events)
            event(*args)
