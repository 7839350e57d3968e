"""Does the transfer hide behind prefill? TTFT of a real offloaded prefill at several line rates. Chapters 08 and 13.

    python scripts/bench.py overlap                    the embedded model, two processes on this machine

Each reading is one run of `scripts/two_datacenters.py`: process A prefills, B receives and decodes. The line's rate and
round trip are emulated. The first run, without a limit, says how long prefill takes and how much KVCache there is; the
rates are then set so that the transfer alone would take a given share of that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benches import above_zero, at_least_one
from minprfaas.errors import ArgumentParser, UserError
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import read_config
from minprfaas.model.mla import MLAConfig
from minprfaas.observe.tables import human_bytes, table

SCRIPTS = Path(__file__).resolve().parent.parent
RTT_S = 0.020
LAYERS_WITH_ROWS = sum(isinstance(layer.mixer, MLAConfig) for layer in read_config(EMBEDDED).layers)
RUN_DEADLINE_S = 300


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=at_least_one, default=6144, help="of the prompt (6144)")
    parser.add_argument("--prefill-chunk", type=at_least_one, default=512, help="tokens of a prefill chunk (512)")
    parser.add_argument("--shares", type=above_zero, nargs="+", default=[0.25, 0.5, 2.0, 4.0], metavar="S",
                        help="what the transfer alone takes, as a share of prefill (0.25 0.5 2 4)")
    parser.add_argument("--repeats", type=at_least_one, default=1, help="runs of which each reading is the median (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, \
            tqdm(total=1 + 2 * len(args.shares) * args.repeats, unit="run", disable=None, leave=False) as bar:
        prompts = Path(folder) / "prompts.jsonl"
        _program("demo_prompts.py", str(prompts), "--tokens", str(args.tokens))
        prompts.write_text(prompts.read_text().splitlines()[0])  # one request: nothing queues
        free = run(args, prompts, None, True, bar)
        rows = [row(args, prompts, share, free, bar) for share in args.shares]
    print(f"A prompt of {free['prompt_tokens']:,} tokens, {human_bytes(free['kv_bytes'])} of KVCache, "
          f"{args.prefill_chunk} tokens a chunk, round trip {RTT_S * 1e3:g} ms\n")
    print(table(["line", "transfer alone", "prefill", "TTFT", "goal", "TTFT / goal", "--no-overlap", "hidden"], rows))
    print("""
  The line's rate and round trip are emulated; everything else ran. prefill: measured in the run without overlap, so
  that sending does not count as prefill. goal: 1.05 x prefill + round trip + one layer of one chunk, where the transfer
  is the shorter; else 1.05 x transfer + round trip + the first chunk's prefill. hidden: share of the transfer that ran
  while prefill still did.""")
    return 0


def row(args: argparse.Namespace, prompts: Path, share: float, free: dict, bar: tqdm) -> list[str]:
    """One line of the table: medians of runs with and without overlap at the rate that `share` asks for."""
    gbps = free["kv_bytes"] * 8e-9 / (share * free["prefill_s"])
    runs = [(run(args, prompts, gbps, True, bar), run(args, prompts, gbps, False, bar)) for _ in range(args.repeats)]
    ttft_s, plain_s, prefill_s, hidden = (statistics.median(values) for values in zip(*(
        (one["ttft_s"], plain["ttft_s"], plain["prefill_s"], one["hidden"])
        for one, plain in runs)))
    transfer_s = free["kv_bytes"] * 8e-9 / gbps
    chunk = args.prefill_chunk / free["prompt_tokens"]
    if transfer_s < prefill_s:
        goal_s = 1.05 * prefill_s + RTT_S + transfer_s * chunk / LAYERS_WITH_ROWS
    else:
        goal_s = 1.05 * transfer_s + RTT_S + prefill_s * chunk
    return [f"{gbps * 1e3:.1f} Mbps", f"{transfer_s:.2f} s", f"{prefill_s:.2f} s", f"{ttft_s:.2f} s", f"{goal_s:.2f} s",
            f"{ttft_s / goal_s:.2f}", f"{plain_s:.2f} s", f"{hidden:.0%}"]


def run(args: argparse.Namespace, prompts: Path, gbps: float | None, overlap: bool, bar: tqdm) -> dict:
    """One run of the two datacenters; returns the request's line of `--json`."""
    out = prompts.with_suffix(".out")
    _program("two_datacenters.py", "--prompts", str(prompts), "--threshold", "1", "--json", str(out), "--lanes", "2",
             "--rtt-ms", str(RTT_S * 1e3), "--prefill-chunk", str(args.prefill_chunk), "--device", args.device,
             *(["--link-gbps", str(gbps)] if gbps else []), *([] if overlap else ["--no-overlap"]))
    bar.update()
    (line,) = out.read_text().splitlines()
    answer = json.loads(line)
    if answer["route"] != "prfaas":
        raise UserError(f"the prompt was not offloaded: {answer['fallback'] or answer['reason']}")
    return answer


def _program(name: str, *arguments: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # two processes, and two cores are enough
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True,
                          timeout=RUN_DEADLINE_S, env=environment)
    if done.returncode:
        raise UserError(f"{name} ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
