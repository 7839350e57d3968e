"""Tables, and sizes in words, for people to read. Chapter 13."""

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Aligned columns under a rule: numbers to the right, words to the left. Floats are printed as given strings."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = [[row[i] for row in cells] for i in range(len(headers))]
    widths = [max(map(len, [header, *column])) for header, column in zip(headers, columns)]
    to_the_right = [bool(column) and all(map(_is_number, column)) for column in columns]
    lines = []
    for line in ([*headers], ["─" * width for width in widths], *cells):
        padded = [cell.rjust(width) if right else cell.ljust(width)
                  for cell, width, right in zip(line, widths, to_the_right)]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """Bytes in binary units.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(cell: str) -> bool:
    head = cell.split(" ")[0].replace(",", "").rstrip("%sx")
    return cell in ("–", "-") or head.replace(".", "", 1).lstrip("+-").isdigit()
