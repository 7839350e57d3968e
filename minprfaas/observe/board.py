"""A screenful that is drawn again and again on a terminal; elsewhere a line now and then. Chapter 13."""

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

REDRAW_S = 0.25
PLAIN_EVERY_S = 5.0


class Board:
    """The end of the terminal, below the lines that stay (`line`). Moments are by the caller's clock."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self.shown = self._stream.isatty()
        self._drawn_lines = 0
        self._due_at_s = 0.0

    def draw(self, now_s: float, screenful: Callable[[], list[str]], plain: Callable[[], str] | None = None) -> None:
        """Draw if it is time: the screenful on a terminal, else the plain line, if there is one, which stays."""
        if now_s < self._due_at_s:
            return
        self._due_at_s = now_s + (REDRAW_S if self.shown else PLAIN_EVERY_S)
        if not self.shown:
            return self.line(plain()) if plain is not None else None
        size = shutil.get_terminal_size()
        lines = [line[:size.columns - 1] for line in screenful()[:size.lines - 2]]
        self._write(self._erased() + "\n".join(lines) + "\n")
        self._drawn_lines = len(lines)

    def line(self, text: str) -> None:
        """A line that stays; the board is drawn below it when it is time again."""
        self._write(self._erased() + text + "\n")

    def close(self) -> None:
        """Clear the board."""
        self._write(self._erased())

    def _erased(self) -> str:
        """What takes the cursor back over what was drawn, and clears it."""
        lines, self._drawn_lines = self._drawn_lines, 0
        return f"\x1b[{lines}A\x1b[J" if lines else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def bar(name: str, done: int, total: int, unit: str, elapsed_s: float, after: str = "") -> str:
    """A line of a screenful: how much of `total` is done."""
    in_bytes = dict(unit_scale=True, unit_divisor=1024) if unit == "B" else {}
    return tqdm.format_meter(done, total, elapsed_s, shutil.get_terminal_size().columns - 1, name, unit=unit,
                             postfix=after, **in_bytes)
