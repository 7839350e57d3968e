"""A timeline in the Chrome trace event format, which opens in Perfetto (ui.perfetto.dev). Chapters 08 and 13.

Times are `time.monotonic()` seconds: on one host its processes share that clock, so their timelines merge as they are.
One process is one group of tracks; a track is a lane, a layer loop, whatever its name says.
"""

import json
import os
import threading
from collections import deque

EVENT_LIMIT = 400_000  # the oldest are dropped: a timeline must not become the leak that it is meant to show


class Timeline:
    """Collects events of one process; any thread may call any method."""

    def __init__(self, process: str):
        self.process = process
        self._events: deque[dict] = deque(maxlen=EVENT_LIMIT)
        self._tracks: dict[str, int] = {}
        self._lock = threading.Lock()

    def span(self, track: str, name: str, start_s: float, end_s: float, **details) -> None:
        """Something that took from `start_s` to `end_s`."""
        self._add("X", track, name, start_s, dur=(end_s - start_s) * 1e6, args=details)

    def instant(self, track: str, name: str, at_s: float, **details) -> None:
        """Something that happened at `at_s`."""
        self._add("i", track, name, at_s, s="t", args=details)

    def counter(self, name: str, values: dict[str, float], at_s: float) -> None:
        """Values that Perfetto draws as a curve."""
        self._add("C", name, name, at_s, args=values)

    def _add(self, phase: str, track: str, name: str, at_s: float, **fields) -> None:
        with self._lock:
            number = self._tracks.setdefault(track, len(self._tracks) + 1)
            self._events.append({"ph": phase, "pid": os.getpid(), "tid": number, "name": name, "ts": at_s * 1e6,
                                 **fields})

    def events(self) -> list[dict]:
        """Everything so far, and the names of the process and its tracks; JSON, to be sent to who writes the file."""
        with self._lock:
            names = [{"ph": "M", "pid": os.getpid(), "tid": number, "name": "thread_name", "args": {"name": track}}
                     for track, number in self._tracks.items()]
            process = {"ph": "M", "pid": os.getpid(), "tid": 0, "name": "process_name", "args": {"name": self.process}}
            return [process, *names, *self._events]


def timeline_json(*event_lists: list[dict]) -> str:
    """The events of one or more processes as the text of one file."""
    return json.dumps({"traceEvents": [event for events in event_lists for event in events], "displayTimeUnit": "ms"})
