"""The case study's file of results: JSON lines, so that a run can be taken up again. Chapter 13."""

import json
from dataclasses import asdict
from pathlib import Path

from case_study.sustained import Reading
from minprfaas.errors import UserError


class Results:
    """`settings` names everything that a figure depends on: lines of other settings are left alone, and not used."""

    def __init__(self, path: str | Path, settings: str):
        self._path, self.settings = Path(path), settings
        try:
            with open(self._path, "a+", encoding="utf-8") as file:
                file.seek(0)
                lines = file.read().splitlines(keepends=True)
                if lines and not lines[-1].endswith("\n"):  # of a run that was killed while it wrote
                    file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} cannot be used for results: {error}") from None
        self._rows = [row for row in map(_parse, lines) if row is not None and row.get("settings") == settings]

    def again(self) -> "Results":
        """As the file is now: other processes have added to it."""
        return Results(self._path, self.settings)

    def reading(self, deployment: str, rate_rps: float) -> Reading | None:
        """What was measured at this rate, if it was."""
        for row in self._of(deployment, "reading"):
            if row["reading"]["rate_rps"] == rate_rps:
                return Reading(**row["reading"])
        return None

    def readings(self, deployment: str) -> list[Reading]:
        """All of a deployment."""
        return [Reading(**row["reading"]) for row in self._of(deployment, "reading")]

    def last(self, run: str, kind: str) -> dict | None:
        """The last line of a run: the "verdict" on a whole deployment, what a "loop" gave, how a "soak" went."""
        return next((row[kind] for row in reversed(self._of(run, kind))), None)

    def add(self, deployment: str, kind: str, value: Reading | dict) -> None:
        """Append a "reading", or a line of another kind."""
        row = {"settings": self.settings, "deployment": deployment,
               kind: asdict(value) if isinstance(value, Reading) else value}
        self._rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _of(self, deployment: str, kind: str) -> list[dict]:
        return [row for row in self._rows if row.get("deployment") == deployment and kind in row]


def _parse(line: str) -> dict | None:
    """None for what is no line of ours, such as half of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
