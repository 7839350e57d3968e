"""`python -m minprfaas report`: the picture of a run as one page, from what the run wrote. Chapter 13."""

import argparse
import json
from pathlib import Path

from minprfaas.errors import UserError
from minprfaas.files import make_folder, read_json, read_lines, write_whole
from minprfaas.observe.page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", metavar="RUN.jsonl", required=True, help="what a run's --json wrote")
    parser.add_argument("--timeline", metavar="RUN.json", help="what its --timeline wrote: layers and the line's use")
    parser.add_argument("--out", metavar="PAGE.html", default="out/report.html", help="what to write (out/report.html)")


def run(args: argparse.Namespace) -> None:
    """Read, draw, write. Raises UserError."""
    make_folder(Path(args.out).parent)
    write_whole(args.out, page(*read_run(args.json, args.timeline), f"Run {Path(args.json).stem}"))
    print(f"written: {args.out} (open it in a browser; it loads nothing)")


def read_run(rows_path: str, timeline_path: str | None) -> tuple[list[dict], list[dict]]:
    """The rows and the trace events that a run wrote; without a timeline no events. Raises UserError."""
    events = read_json(timeline_path).get("traceEvents", []) if timeline_path else []
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UserError(f"{timeline_path} holds no list of trace events; a run's --timeline writes one")
    lines = read_lines("run", rows_path)
    try:
        return [json.loads(line) for line in lines if line.strip()], events
    except (ValueError, RecursionError) as error:
        raise UserError(f"{rows_path} cannot be read as JSON lines: {error}") from None
