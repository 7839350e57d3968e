"""`python -m minprfaas report`: the picture of a run as one page, from what the run wrote. Chapter 13."""

import argparse
import json
from pathlib import Path

from minprfaas.errors import UserError
from minprfaas.files import read_bytes, read_json, write_whole
from minprfaas.observe.page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", metavar="RUN.jsonl", required=True, help="what a run's --json wrote")
    parser.add_argument("--timeline", metavar="RUN.json", help="what its --timeline wrote: layers and the line's use")
    parser.add_argument("--out", metavar="PAGE.html", default="out/report.html", help="(out/report.html)")


def run(args: argparse.Namespace) -> None:
    """Read, draw, write. Raises UserError."""
    events = read_json(args.timeline).get("traceEvents", []) if args.timeline else []
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise UserError(f"{args.timeline} holds no list of trace events; a run's --timeline writes one")
    folder = Path(args.out).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    write_whole(args.out, page(_rows(args.json), events, f"Run {Path(args.json).stem}"))
    print(f"written: {args.out} (open it in a browser; it loads nothing)")


def _rows(path: str) -> list[dict]:
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from None
