"""Draws a timeline that `--timeline` wrote as a picture: `python scripts/draw_timeline.py out/demo_timeline.json out/timeline.png`."""

import json
import sys
from pathlib import Path

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error
from minprfaas.observe.plots import new_figure, save_figure


@exit_on_user_error
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("timeline", metavar="TIMELINE.json")
    parser.add_argument("picture", metavar="PICTURE.png")
    args = parser.parse_args()
    try:
        events = json.loads(Path(args.timeline).read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{args.timeline} is no timeline: {error}") from None
    draw(events, Path(args.picture))
    return 0


def draw(events: list[dict], picture: Path) -> None:
    """One row a track: spans as bars over seconds since the first one."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    tracks = {(e["pid"], e["tid"]): f"{processes[e['pid']]}, {e['args']['name']}" for e in events if e.get("name") == "thread_name"}
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            spans.setdefault(tracks[event["pid"], event["tid"]], []).append((event["ts"] / 1e6, event["dur"] / 1e6))
    if not spans:
        raise UserError("the timeline holds no spans")
    began = min(start for bars in spans.values() for start, _ in bars)
    figure, axes = new_figure(9, 0.6 + 0.32 * len(spans))
    names = sorted(spans, reverse=True)
    for row, name in enumerate(names):
        color = "tab:blue" if "prefill" in name else "tab:green" if "decode" in name else "tab:orange"
        axes.broken_barh([(start - began, max(length, 0.002)) for start, length in spans[name]], (row - 0.4, 0.8), color=color)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("seconds (the link is emulated)")
    save_figure(figure, picture.parent, picture.name)


if __name__ == "__main__":
    sys.exit(main())
