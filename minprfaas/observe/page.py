"""The picture of a run: one self-contained page from what `--json` and `--timeline` wrote. Chapter 13.

Python gathers, the page draws: `assets/report.html` holds the whole of it but for the data, and loads nothing.
"""

import html
import json
from collections import defaultdict
from pathlib import Path

from minprfaas.errors import UserError, require_number, shown

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report.html"
NEEDED = ("id", "route", "reason", "text", "prompt_tokens", "cached_tokens", "kv_bytes", "arrived_at_s",
          "finished_at_s")
PARTS = ("route_s", "queue_s", "prefill_s", "transfer_exposed_s", "admit_s", "ttft_s")
LINE_POINTS = 400  # of the line's curve: a screen shows no more


def page(rows: list[dict], events: list[dict], title: str) -> str:
    """The page of a run; arguments and errors as of `gathered`."""
    try:
        data = json.dumps({"title": title, **gathered(rows, events)}, allow_nan=False)
    except ValueError:
        raise UserError("a number of the run is not finite, which no run writes") from None
    data = data.replace("</", "<\\/")  # in a script element nothing is escaped but the end of the element itself
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data).replace("__TITLE__", html.escape(title))


def gathered(rows: list[dict], events: list[dict]) -> dict:
    """What a picture of a run shows: its requests with their layers, and its lines. `rows` are the lines of `--json`,
    `events` those of `--timeline` (none: without layers and without the line). Raises UserError for rows or
    events that are none of ours."""
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"request {number}")
    if not rows:
        raise UserError("there is no request to report; a run writes one line a request with --json")
    began_at_s = min(row["arrived_at_s"] for row in rows)
    try:
        layers, lines = _layers(events, began_at_s), _lines(events, began_at_s)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # another program's trace
        raise UserError(f"the timeline has an event that no run writes ({type(error).__name__}: {error})") from None
    requests = [_request(row, began_at_s, layers.get(row["id"], [])) for row in rows]
    return {"requests": requests, "lines": lines, "link": rows[0].get("link", "")}


def _check_row(row: object, what: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{what} is a JSON {type(row).__name__}, not an object")
    missing = [name for name in (*NEEDED, *PARTS) if name not in row]
    if missing:
        raise UserError(f"{what} has no {missing[0]!r}; a line that `--json` wrote has it")
    if not isinstance(row["id"], str):
        raise UserError(f"{what}: id is {shown(row['id'])}; it must be a string")
    for name in ("arrived_at_s", "finished_at_s", "prompt_tokens", "cached_tokens", "kv_bytes"):
        require_number(f"{what}: {name}", row[name], least=0, most=10**15)
    for name in PARTS:
        if row[name] is not None:  # of a request without an answer
            require_number(f"{what}: {name}", row[name], most=10**15)


def _request(row: dict, began_at_s: float, layers: list[dict]) -> dict:
    """One request as the page draws it; times in seconds from the run's beginning."""
    shown = {name: row.get(name) for name in (*NEEDED, *PARTS, "hidden", "transfer_s", "fallback", "error",
                                              "kv_bytes_without_cache", "prefill_node", "decode_node", "tokens_per_s")}
    return {**shown, "arrived_at_s": row["arrived_at_s"] - began_at_s,
            "finished_at_s": row["finished_at_s"] - began_at_s, "layers": layers}


def _layers(events: list[dict], began_at_s: float) -> dict[str, list[dict]]:
    """By request: each layer's spans [from, to], computed and sent. A stream says once whose it is. Nodes know attempts
    (`doc-1#2`), of which a request may have several."""
    owner = {event["args"]["stream"]: _request_of(event) for event in events
             if event.get("ph") == "i" and event.get("name") == "stream opened"}
    found: dict[str, dict[int, dict]] = defaultdict(lambda: defaultdict(lambda: {"computed": [], "sent": []}))
    for event in events:
        words = str(event.get("name", "")).split()
        if event.get("ph") != "X" or not words:
            continue
        start_s = event["ts"] / 1e6 - began_at_s
        span = [round(start_s, 4), round(start_s + event["dur"] / 1e6, 4)]
        if words[0] == "layer" and "request" in event["args"]:
            found[_request_of(event)][int(words[1])]["computed"].append(span)
        elif words[0] == "stream" and words[2:3] == ["layer"] and int(words[1]) in owner:
            found[owner[int(words[1])]][int(words[3])]["sent"].append(span)
    return {request: [{"layer": layer, "computed": _merged(spans["computed"]), "sent": _merged(spans["sent"])}
                      for layer, spans in sorted(by_layer.items())] for request, by_layer in found.items()}


def _request_of(event: dict) -> str:
    return event["args"]["request"].rpartition("#")[0]


def _merged(spans: list[list[float]]) -> list[list[float]]:
    """Overlapping spans as one: many lanes send parts of a layer side by side."""
    merged: list[list[float]] = []
    for start_s, end_s in sorted(spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end_s)
        else:
            merged.append([start_s, end_s])
    return merged


def _lines(events: list[dict], began_at_s: float) -> list[dict]:
    """Each link's samples, by the end that sent: Gbps out of it and MB that waited, over time."""
    sender = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    samples = defaultdict(list)
    for event in events:
        if event.get("ph") == "C" and "egress Gbps" in event.get("args", {}):
            values = event["args"]
            name = f"out of {sender.get(event['pid'], 'an unnamed process')}, over the link {event['name']}"
            samples[name].append(
                [round(event["ts"] / 1e6 - began_at_s, 3), values["egress Gbps"], values.get("queued MB", 0.0)])
    lines = [{"name": name, "points": points[::max(1, len(points) // LINE_POINTS)]} for name, points in samples.items()]
    return [line for line in lines if any(point[1] for point in line["points"])]
