"""`python -m minprfaas generate`: answers in one process, the reference for everything distributed. Chapter 05."""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from minprfaas.config import CacheConfig
from minprfaas.engine.generate import answer_prompts
from minprfaas.engine.pieces import compile_and_warm_up
from minprfaas.engine.prompts import Prompt, read_prompts
from minprfaas.engine.request import TokenUpdate
from minprfaas.engine.sampling import SamplingParams
from minprfaas.errors import UserError
from minprfaas.model.checkpoint import load
from minprfaas.observe.report import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("prompt", nargs="*", help="what to answer; or give --prompts")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--prompts", metavar="FILE.jsonl",
                        help='one {"id", "prompt", "max_tokens"} a line; {"after": id} continues that conversation')
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="the most that an answer may have (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 is all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest, P in sum (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of weights and KVCache (float32)")
    parser.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="tokens of a chunk (1024; on a GPU 8192)")
    parser.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of the pool (default: room for all)")
    parser.add_argument("--compile", action="store_true", help="compile the model's pieces first: minutes on two cores")
    parser.add_argument("--json", action="store_true", help="print one JSON line an answer")


def run(args: argparse.Namespace) -> None:
    """Answer the prompts; a single prompt's answer streams as it is drawn."""
    prompts = _prompts(args)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    if args.compile:
        compile_and_warm_up(model, tokenizer)
    streams = len(prompts) == 1 and not args.json

    def show(update: TokenUpdate) -> None:
        print(update.new_text, end="", flush=True)

    cache = CacheConfig(args.pool_blocks) if args.pool_blocks is not None else None
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
