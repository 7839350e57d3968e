"""Emulated weather: bandwidth, round-trip time and stalls that a laptop can impose on itself. Chapter 07, paper 3.3.

The sender imposes them: a frame leaves the queue when the line is free, and is handed to Gloo when its last bit
would have arrived, half a round-trip time later. A line belongs to two datacenters, not to a link: every link that is
given the same line, in this process or (by a `share`) in others, shares its rate.
"""

import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from minprfaas.config import LineConfig, WeatherChange
from minprfaas.errors import UserError, require_number
from minprfaas.files import read_json_value
from minprfaas.transport.wan.shared_words import SharedWords

CHUNK_TIME_S = 0.010  # a chunk occupies the line at most this long, so that a control frame waits no longer
CATCH_UP = 1.005  # a line that the machine kept from working catches up at half a percent above its rate
TOLERANCE_S = 0.003  # a thread that wakes late by less than this loses nothing
MAX_LAG_S = 1.0  # and forgets what it is behind by more than this
# The words that all users of a line share.
_BEGUN_AT, _IS_BEGUN, _FREE_AT, _PACED_AT, _LAST_ARRIVAL, _CONFIG = range(6)


@dataclass(frozen=True)
class _Sky:
    """What the weather is from `at_s` on. Times are seconds since the line first came up."""

    at_s: float
    bytes_per_s: float | None
    half_rtt_s: float
    stalled_until_s: float


class EmulatedLine:
    """One direction between two datacenters. Time is an argument: seconds of `time.monotonic()`, one for all processes.

    Two schedules bound a frame's start. The *ideal* line begins it when the line is free and the frame is there, and so
    carries exactly the rate over a busy period however unpunctual the machine is. The *paced* line never runs more
    than half a percent above the rate, so that catching up breaks no one-second window.
    """

    def __init__(self, config: LineConfig, share: Path | None = None):
        """Lines of the same file `share` are one line; it disappears with its last user. Raises UserError when it is in
        use for a line of another configuration."""
        self.config = config
        self._skies = _forecast(config)
        self._begun_at_s: float | None = None  # known once it is; it never changes
        self._words = SharedWords(6, share)
        digest = float(zlib.crc32(repr(config).encode()) + 1)
        with self._words as words:
            found = words[_CONFIG] if words[_CONFIG] else digest  # 0.0: this is the first user
            words[_CONFIG] = found
        if found != digest:
            self.close()
            raise UserError(f"{share} is in use for an emulated line of another rate, round trip or weather")

    def begin(self, now_s: float) -> None:
        """The line is up: its weather begins, unless it did when another link came up."""
        with self._words as words:
            if not words[_IS_BEGUN]:
                words[_IS_BEGUN] = 1.0
                words[_BEGUN_AT] = words[_FREE_AT] = words[_PACED_AT] = words[_LAST_ARRIVAL] = now_s
            self._begun_at_s = words[_BEGUN_AT]

    def start_of(self, queued_at_s: float, now_s: float) -> float:
        """When a frame that has waited since `queued_at_s` may start; it may start now if that is not after `now_s`."""
        with self._words as words:
            return max(words[_FREE_AT], words[_PACED_AT], self._stalled_until(now_s), queued_at_s)

    def carry(self, nbytes: int, queued_at_s: float, now_s: float) -> float:
        """Occupy the line with a frame; returns when its last bit arrives at the far end. If another user has taken the
        line since `start_of`, the frame goes behind that one's: the rate holds whoever comes first."""
        sky = self._sky(now_s)
        with self._words as words:
            # What a stall cost is not caught up, nor what nobody wanted to send, nor a lag of more than a second.
            free_at_s = max(words[_FREE_AT], self._stalled_until(now_s), queued_at_s, now_s - MAX_LAG_S)
            if sky.bytes_per_s is not None:
                paced_from_s = max(words[_PACED_AT], now_s - TOLERANCE_S)
                words[_PACED_AT] = paced_from_s + nbytes / (CATCH_UP * sky.bytes_per_s)
                free_at_s += nbytes / sky.bytes_per_s
            words[_FREE_AT] = free_at_s
            words[_LAST_ARRIVAL] = max(words[_LAST_ARRIVAL], free_at_s + sky.half_rtt_s)  # bits do not overtake
            return words[_LAST_ARRIVAL]

    def age_s(self, now_s: float) -> float:
        """Seconds since its weather began; 0 before that."""
        return 0.0 if self._begun_at_s is None else now_s - self._begun_at_s

    def rate(self, now_s: float) -> float | None:
        """Bytes per second at `now_s`; None when the rate is not limited."""
        return self._sky(now_s).bytes_per_s

    def chunk_limit(self, now_s: float) -> int | None:
        """The most bytes that a chunk should have at the rate of `now_s`; None when the rate is not limited."""
        rate = self.rate(now_s)
        return None if rate is None else max(1024, int(rate * CHUNK_TIME_S))

    def free_at_s(self) -> float:
        """When everything that it carries so far has left."""
        with self._words as words:
            return words[_FREE_AT]

    def close(self) -> None:
        """Use it no more. Harmless twice; the end of the process does the same."""
        self._words.close()

    def _sky(self, now_s: float) -> _Sky:
        return self._skies[max(0, bisect_right(self._skies, self.age_s(now_s), key=lambda sky: sky.at_s) - 1)]

    def _stalled_until(self, now_s: float) -> float:
        return (self._begun_at_s or 0.0) + self._sky(now_s).stalled_until_s


def _forecast(config: LineConfig) -> list[_Sky]:
    gbps, rtt_ms, stalled_until_s = config.gbps, config.rtt_ms, 0.0
    skies = []
    for change in (WeatherChange(0.0), *config.weather):
        gbps = gbps if change.gbps is None else change.gbps
        rtt_ms = rtt_ms if change.rtt_ms is None else change.rtt_ms
        stalled_until_s = max(stalled_until_s, change.at_s + change.stall_s)
        skies.append(_Sky(change.at_s, None if gbps is None else gbps * 1e9 / 8, rtt_ms / 2e3, stalled_until_s))
    return skies


def load_weather(path: str | Path) -> tuple[WeatherChange, ...]:
    """Read a schedule: a JSON list of `{"at_s": 5, "gbps": 0.5, "rtt_ms": 40, "stall_s": 2}`. Raises UserError."""
    raw = read_json_value(path)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"weather file {path} holds no list of changes")
    changes = tuple(_change(f"weather file {path}, change {number}", item) for number, item in enumerate(raw, 1))
    for number, (before, after) in enumerate(zip(changes, changes[1:]), 2):
        if after.at_s < before.at_s + before.stall_s:
            raise UserError(f"weather file {path}, change {number}: at_s {after.at_s} lies before the end of the "
                            f"change before it ({before.at_s + before.stall_s} s)")
    return changes


def _change(where: str, item: object) -> WeatherChange:
    if not isinstance(item, dict) or "at_s" not in item or not set(item) <= {"at_s", "gbps", "rtt_ms", "stall_s"}:
        raise UserError(f"{where}: {item!r} is no object with at_s and any of gbps, rtt_ms, stall_s")
    for name, value in item.items():
        require_number(f"{where}: {name}", value, least=0, most=1_000_000)
    try:
        LineConfig(item.get("gbps"), item.get("rtt_ms", 0.0))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return WeatherChange(**item)
