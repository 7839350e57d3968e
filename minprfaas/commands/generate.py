"""`python -m minprfaas generate`: answers in one process, the reference for everything distributed. Chapter 05."""

import argparse
import json
import sys
from dataclasses import asdict

from minprfaas.commands.options import check_counts
from minprfaas.commands.options import generate as add_arguments  # noqa: F401
from minprfaas.config import CacheConfig, SamplingParams, block_tokens_for
from minprfaas.engine.prompts import Prompt, read_prompts
from minprfaas.engine.request import TokenUpdate
from minprfaas.errors import UserError, long_import
from minprfaas.observe.tables import table


def run(args: argparse.Namespace) -> None:
    """Answer the prompts; a single prompt's answer streams as it is drawn."""
    prompts = _prompts(args)
    check_counts(args, "prefill_chunk", "pool_blocks")
    with long_import():  # no mistake above is to wait for it
        import torch

        from minprfaas.engine.reference import answer_prompts
        from minprfaas.engine.warm_up import compile_and_warm_up
        from minprfaas.model.checkpoint import load
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    cache = None
    if args.pool_blocks is not None:
        cache = CacheConfig(args.pool_blocks, block_tokens_for(args.device))
    if args.compile:
        compile_and_warm_up(model, tokenizer)
    streams = len(prompts) == 1 and not args.json

    def show(update: TokenUpdate) -> None:
        print(update.new_text, end="", flush=True)

    outputs = answer_prompts(model, tokenizer, prompts, cache, args.prefill_chunk, progress=not streams,
                             on_token=show if streams else None)
    if args.json:
        for output in outputs:
            print(json.dumps(asdict(output)))
        return
    rows = []
    for output in outputs:
        if not streams:
            print(f"[{output.id}] {output.text.strip()}")
        ended_by = output.length_limit if output.finish_reason == "length" else output.finish_reason
        rows.append([output.id, output.prompt_tokens, len(output.token_ids), ended_by, f"{output.ttft_s:.2f}",
                     f"{output.decode_tokens_per_s:.1f}"])
    print("\n\n" + table(["request", "prompt", "answer", "ended by", "TTFT s", "tokens/s"], rows), file=sys.stderr)


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    if args.prompts and args.prompt:
        raise UserError("prompts were given both as words and with --prompts; give one of the two")
    if args.prompts:
        return read_prompts(args.prompts)
    if not args.prompt:
        raise UserError("no prompt was given; give one as an argument, or a file with --prompts")
    params = SamplingParams(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop))
    return [Prompt(str(number), text, params) for number, text in enumerate(args.prompt)]
