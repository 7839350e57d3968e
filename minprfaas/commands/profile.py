"""`python -m minprfaas profile`: what this machine does with a model, as the planner wants to know it.

Chapters 10 and 13.
"""

import argparse
import json
import sys
from contextlib import closing, nullcontext
from pathlib import Path

from minprfaas.commands.options import check_counts
from minprfaas.commands.options import profile as add_arguments  # noqa: F401
from minprfaas.errors import UserError, long_import, require_number
from minprfaas.files import OutputFile
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling.profiles import Profile, ProfilePoint


def run(args: argparse.Namespace) -> None:
    """Measure, check that it is a profile, print it, and write it to `--out`."""
    check_counts(args, "repeats", "batch", "context", "prefill_chunk")
    if len(set(args.lengths)) < 2 or min(args.lengths) < 1:
        raise UserError(f"--lengths {args.lengths} is no curve; it needs two different lengths of at least 1 token")
    # A path that cannot be written is said before minutes of work.
    with closing(OutputFile(args.out)) if args.out else nullcontext() as out:
        profile = _measure(args)
        text = json.dumps(profile.to_json(), indent=2)
        print(text if args.json else _table(profile))
        if out:
            out.write(text + "\n")


def _measure(args: argparse.Namespace) -> Profile:
    with long_import():  # no mistake in the arguments is to wait for it
        import torch

        from minprfaas.engine.measure import measure_decode, measure_prefill
        from minprfaas.engine.warm_up import compile_and_warm_up
        from minprfaas.model.checkpoint import EMBEDDED, load
    torch.manual_seed(0)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    most = model.config.max_context_tokens - 1  # a token of the answer stands behind it
    require_number("the longest of --lengths", max(args.lengths), most=most)
    require_number("--context", args.context, most=most)
    if args.compile:
        compile_and_warm_up(model, tokenizer)
    measured = measure_prefill(model, tokenizer, sorted(set(args.lengths)), args.repeats, args.prefill_chunk)
    points = rising([ProfilePoint(*point) for point in measured])
    for tokens in sorted(set(args.lengths) - {point.tokens for point in points}):
        print(f"left out: {tokens} tokens took longer than more of them did; was the machine busy?", file=sys.stderr)
    t_decode_s = measure_decode(model, tokenizer, args.batch, args.context, steps=16)
    name = f"{Path(args.model).name if args.model else EMBEDDED.name} on {args.device}, {args.dtype}"
    return Profile(name, tuple(points), t_decode_s, args.batch)


def rising(points: list[ProfilePoint]) -> list[ProfilePoint]:
    """The points, by tokens, without those that took as long as a longer prompt: other work on the machine only ever
    adds time, so of two points that cross the slow one is in doubt."""
    kept: list[ProfilePoint] = []
    for point in reversed(points):
        if not kept or point.prefill_s < kept[0].prefill_s:
            kept.insert(0, point)
    return kept


def _table(profile: Profile) -> str:
    rows = [[point.tokens, human_bytes(point.kv_bytes), f"{point.prefill_s:.3f}",
             f"{point.kv_bytes * 8 / point.prefill_s / 1e9:.3f}"] for point in profile.points]
    return (f"{profile.name} (measured in this run)\n"
            + table(["tokens", "KVCache S_kv", "prefill s", "KV throughput Gbps (eq. 1)"], rows)
            + f"\n  decode step of {profile.bs_max} requests: {profile.t_decode_s * 1e3:.1f} ms"
              f" ({profile.bs_max / profile.t_decode_s:.0f} tokens/s)")
