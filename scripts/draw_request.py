"""Draws one offloaded request of a run, layer by layer, as a picture with words.

python scripts/draw_request.py out/demo.jsonl out/demo_timeline.json docs/one_request.svg
"""

import sys
import textwrap
from html import escape
from pathlib import Path

from minprfaas.commands.report import read_run
from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error
from minprfaas.files import write_whole
from minprfaas.observe.page import gathered
from minprfaas.observe.tables import human_bytes

WIDTH, LEFT, RIGHT, TOP, ROW = 460, 58, 446, 108, 24
STYLE = """
  svg { --bg: #fbfaf7; --ink: #1f2328; --soft: #5d6269; --near: #2f6fb0; --far: #d9822b; --write: #2f7d50; }
  @media (prefers-color-scheme: dark) {
    svg { --bg: #15171a; --ink: #ebe9e3; --soft: #a9adb5; --near: #6aa8e0; --far: #ec9c4d; --write: #66bf8d; } }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); }
  .b { font-weight: 650; font-size: 14px; } .s { fill: var(--soft); }
  .c { fill: none; stroke-width: 2; } .e { text-anchor: end; } .m { text-anchor: middle; }
  .n { fill: var(--bg); font-size: 11px; font-weight: 700; }
"""


@exit_on_user_error
def main() -> int:
    """Read a run, choose its request, write the picture; returns the exit status."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=f"example: {__doc__.splitlines()[-1]}")
    parser.add_argument("json", metavar="RUN.jsonl", help="what a run's --json wrote")
    parser.add_argument("timeline", metavar="RUN.json", help="what its --timeline wrote")
    parser.add_argument("picture", metavar="PICTURE.svg", help="where the picture goes")
    parser.add_argument("--request", metavar="ID", help="of the run (the first one that was offloaded)")
    args = parser.parse_args()
    offloaded = {request["id"]: request for request in gathered(*read_run(args.json, args.timeline))["requests"]
                 if request["route"] == "prfaas" and request["layers"]}
    if not offloaded or (args.request is not None and args.request not in offloaded):
        raise UserError(f"{args.json} has no offloaded request {args.request or 'with layers in the timeline'}; it has "
                        f"{', '.join(offloaded) or 'none'}")
    write_whole(Path(args.picture), drawn(offloaded[args.request or next(iter(offloaded))]))
    return 0


def drawn(request: dict) -> str:
    """The picture as SVG: a row a layer, computed above, sent below, from the request's arrival to its first token."""
    began_s, whole_s = request["arrived_at_s"], request["ttft_s"]
    computed_s = request["route_s"] + request["queue_s"] + request["prefill_s"]  # since its arrival
    bottom = TOP + ROW * len(request["layers"])

    def x(since_arrival_s: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(max(since_arrival_s / whole_s, 0.0), 1.0)

    def bars(spans: list[list[float]], y: float, height: float, color: str) -> list[str]:
        ends = [(x(start_s - began_s), x(end_s - began_s)) for start_s, end_s in spans]
        return [f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 0.8):.1f}" height="{height}" '
                f'fill="var(--{color})"/>' for left, right in ends]

    heading = f"{request['id']}: {request['prompt_tokens']:,} tokens, {human_bytes(request['kv_bytes'])} of KVCache"
    parts = [text(14, 26, heading, "b"),
             text(14, 46, "each row is a layer: computed (blue), then sent (orange)", "s")]
    for name, since_s, took_s, color in (
            ("prefill", computed_s - request["prefill_s"], request["prefill_s"], "near"),
            ("exposed", computed_s, request["transfer_exposed_s"], "far")):
        left, right, label = x(since_s), x(since_s + took_s), f"{name} {took_s:.2f} s"
        parts += [f'<path d="M{left:.1f} 92 v-5 H{right:.1f} v5" stroke="var(--{color})" class="c"/>',
                  text((left + right) / 2, 80, label, "m") if name == "prefill" else text(RIGHT, 64, label, "e")]
    for number, layer in enumerate(request["layers"]):
        y = TOP + ROW * number
        parts += [text(LEFT - 8, y + 14, f"layer {layer['layer']}" if number % 2 == 0 else "", "s e"),
                  *bars(layer["computed"], y, 9, "near"), *bars(layer["sent"], y + 10, 9, "far")]
    parts += [f'<path d="M{x(computed_s):.1f} 92 V{bottom + 6}" stroke="var(--near)" stroke-dasharray="3 3"/>',
              f'<path d="M{RIGHT} 92 V{bottom + 6}" stroke="var(--write)" stroke-width="1.6"/>',
              text(RIGHT, bottom + 22, "first token", "e"), text(LEFT, bottom + 22, "0 s"),
              text(x(whole_s / 2), bottom + 22, f"{whole_s / 2:.1f} s", "m s")]
    growing, fixed = by_kind(request["layers"])
    for mark, layers in (("1", growing), ("2", fixed)):
        if layers:
            at, y = x(layers[0]["sent"][0][0] - began_s), TOP + ROW * request["layers"].index(layers[0]) + 14
            parts += [f'<circle cx="{at - 11:.1f}" cy="{y}" r="8" fill="var(--ink)"/>',
                      text(at - 11, y + 4, mark, "m n")]
    y = bottom + 50
    for line in (line for paragraph in words(request, growing, fixed) for line in textwrap.wrap(paragraph, 64)):
        parts.append(text(14, y, line))
        y += 18
    height = y + 2
    parts.insert(0, f'<rect width="{WIDTH}" height="{height}" rx="12" fill="var(--bg)"/>')
    title = f"{escape(request['id'])}: prefill and transfer of each layer over time"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
            + "\n".join(parts) + "\n</svg>\n")


def by_kind(layers: list[dict]) -> tuple[list[dict], list[dict]]:
    """The layers that sent rows again and again, and those whose state left once prefill had all but ended."""
    most = max(len(layer["sent"]) for layer in layers)
    growing = [layer for layer in layers if len(layer["sent"]) > most / 2 and most > 2]
    return growing, [layer for layer in layers if layer not in growing and layer["sent"]]


def words(request: dict, growing: list[dict], fixed: list[dict]) -> list[str]:
    """What the picture shows, a paragraph each."""
    said = []
    if growing:
        names = " and ".join(str(layer["layer"]) for layer in growing)
        said.append(f"(1) Layers {names} remember each token: after every chunk their new rows leave, while the next "
                    "layers are computed.")
    if fixed and growing:
        said.append("(2) The others keep a state of one size, which leaves once the last tokens are in it.")
    return [*said, f"The transfer took {request['transfer_s']:.2f} s over an emulated line; {request['hidden']:.0%} "
                   f"of it ran while prefill still did. Exposed: {request['transfer_exposed_s']:.2f} s of the "
                   f"{request['ttft_s']:.2f} s to the first token."]


def text(x: float, y: float, words: str, classes: str = "") -> str:
    """A line of words."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
