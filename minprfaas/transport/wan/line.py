"""Emulated weather: bandwidth, round-trip time and stalls that a laptop can impose on itself. Chapter 07, paper 3.3.

The sender imposes them, each side on its own direction: a frame leaves the queue when the emulated line is free, and is
handed to Gloo when its last bit would have arrived, half a round-trip time later.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from minprfaas.config import LinkConfig
from minprfaas.errors import UserError

CHUNK_TIME_S = 0.010  # a chunk occupies the line at most this long, so that a control frame waits no longer
CATCH_UP = 1.005  # a line that the machine kept from working catches up at half a percent above its rate
TOLERANCE_S = 0.003  # a thread that wakes late by less than this loses nothing
MAX_LAG_S = 1.0  # and forgets what it is behind by more than this


@dataclass(frozen=True)
class WeatherChange:
    """From `at_s` (seconds after the link first came up) on: what is None stays as it was. A stall passes nothing."""

    at_s: float
    gbps: float | None = None
    rtt_ms: float | None = None
    stall_s: float = 0.0


def load_weather(path: str | Path) -> tuple[WeatherChange, ...]:
    """Read a schedule: a JSON list of `{"at_s": 5, "gbps": 0.5, "rtt_ms": 40, "stall_s": 2}`. Raises UserError."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"weather file {path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, list) or not raw:
        raise UserError(f"weather file {path} holds no list of changes")
    changes = tuple(_change(path, number, item) for number, item in enumerate(raw, 1))
    for number, (before, after) in enumerate(zip(changes, changes[1:]), 2):
        if after.at_s < before.at_s + before.stall_s:
            raise UserError(f"weather file {path}, change {number}: at_s {after.at_s} lies before the end of the "
                            f"change before it ({before.at_s + before.stall_s} s)")
    return changes


def _change(path, number: int, item) -> WeatherChange:
    where = f"weather file {path}, change {number}"
    names = {"at_s", "gbps", "rtt_ms", "stall_s"}
    if not isinstance(item, dict) or "at_s" not in item or not set(item) <= names:
        raise UserError(f"{where}: {item!r} is no object with at_s and any of gbps, rtt_ms, stall_s")
    for name, value in item.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e6:
            raise UserError(f"{where}: {name} is {value!r}; it must be a number from 0 to 1000000")
    change = WeatherChange(**item)
    try:
        LinkConfig(gbps=change.gbps, rtt_ms=change.rtt_ms or 0.0)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return change


class EmulatedLine:
    """One direction of the emulated line. Time is an argument (seconds of any steady clock), so tests need no sleep.

    Two schedules bound a frame's start. The *ideal* line begins it when the line is free and the frame is there, and so
    carries exactly the rate over a busy period however unpunctual the machine is. The *paced* line never runs more
    than half a percent above the rate, so that catching up breaks no one-second window.
    """

    def __init__(self, config: LinkConfig, weather: tuple[WeatherChange, ...], epoch_s: float):
        self.rate = None if config.gbps is None else config.gbps * 1e9 / 8  # bytes per second, at present
        self._half_rtt_s = config.rtt_ms / 2e3
        self._weather = [replace(change, at_s=change.at_s + epoch_s) for change in weather]
        self.free_at = self._paced_at = self._stalled_until = self._last_arrival = epoch_s

    def start_of(self, queued_at: float, now: float) -> float:
        """When a frame that has waited since `queued_at` may start; it may start now if that is not after `now`."""
        self._advance(now)
        return max(self.free_at, queued_at, self._paced_at, self._stalled_until)

    def carry(self, nbytes: int, queued_at: float, now: float) -> float:
        """Occupy the line with a frame; returns when its last bit arrives at the far end."""
        self.free_at = max(self.free_at, queued_at, now - MAX_LAG_S)
        if self.rate is not None:
            self._paced_at = max(self._paced_at, now - TOLERANCE_S) + nbytes / (CATCH_UP * self.rate)
            self.free_at += nbytes / self.rate
        self._last_arrival = max(self._last_arrival, self.free_at + self._half_rtt_s)  # bits do not overtake
        return self._last_arrival

    def chunk_limit(self, now: float) -> int | None:
        """The most bytes that a chunk should have at the present rate; None when the rate is not limited."""
        self._advance(now)
        return None if self.rate is None else max(1024, int(self.rate * CHUNK_TIME_S))

    def _advance(self, now: float) -> None:
        while self._weather and self._weather[0].at_s <= now:
            change = self._weather.pop(0)
            if change.gbps is not None:
                self.rate = change.gbps * 1e9 / 8
            if change.rtt_ms is not None:
                self._half_rtt_s = change.rtt_ms / 2e3
            self._stalled_until = max(self._stalled_until, change.at_s + change.stall_s)
            self.free_at = max(self.free_at, self._stalled_until)  # a stall is not caught up
