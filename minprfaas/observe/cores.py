"""How busy the machine's cores were meanwhile, whoever kept them so (Linux; elsewhere unknown). Chapter 13."""

from pathlib import Path

STAT = Path("/proc/stat")


class Cores:
    """Counts from when it is made."""

    def __init__(self):
        self._began = _ticks()

    @property
    def busy_share(self) -> float | None:
        """The share of all cores' time in which they worked; None where the system does not tell."""
        if self._began is None or (now := _ticks()) is None:
            return None
        idle, total = (after - before for before, after in zip(self._began, now))
        return 1 - idle / total if total else None

    def __str__(self) -> str:
        share = self.busy_share
        return "the system does not tell how busy the cores were" if share is None else f"cores {share:.0%} busy"


def _ticks() -> tuple[int, int] | None:
    """(idle, all) ticks of all cores since the system started."""
    try:
        ticks = [int(field) for field in STAT.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return ticks[3] + ticks[4], sum(ticks)
