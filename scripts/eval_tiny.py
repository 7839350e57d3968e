"""How often the embedded model answers right: `python scripts/eval_tiny.py`, or `--documents 20` for a first look.

Fresh documents, of seeds that training never draws; one question each, answered greedily through the engine up to the
end-of-text token; an answer counts when it is the whole name and nothing else. Chapter 02.
"""

import argparse
import sys
import time

import minprfaas  # noqa: F401  (before torch: it silences what torch says of NumPy)
import torch
from tqdm import tqdm

from minprfaas import SamplingParams, generate, load
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error, require_number
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer

GROUP = 8  # documents answered together


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    model, tokenizer = load(args.model, device=args.device)
    if max(args.lengths) > model.config.max_context_tokens:
        raise UserError(f"a document of {max(args.lengths)} tokens is longer than the model's context, "
                        f"{model.config.max_context_tokens} tokens")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, float32 on {args.device}, greedy, torch {torch.__version__}")
    print(f"{'prompt tokens':>14} {'documents':>10} {'facts each':>11} {'right':>6} {'accuracy':>9} {'seconds':>8}")
    for length in args.lengths:
        began = time.monotonic()
        right, facts = evaluate(model, tokenizer, length, args.documents, args.show_wrong)
        print(f"{length:>14} {args.documents:>10} {facts:>11} {right:>6} {right / args.documents:>9.1%} "
              f"{time.monotonic() - began:>8.1f}")
    return 0


def evaluate(model: Transformer, tokenizer: Tokenizer, length: int, documents: int,
             show_wrong: bool) -> tuple[int, int]:
    """How many of `documents` questions on documents of `length` tokens are answered right, and the facts in each."""
    right = facts = 0
    with tqdm(total=documents, desc=f"{length} tokens", unit="document", leave=False, disable=None) as bar:
        for start in range(0, documents, GROUP):
            seeds = range(EVALUATION_SEEDS + start, EVALUATION_SEEDS + min(start + GROUP, documents))
            drawn = [make_document(seed, length, tokenizer.encode) for seed in seeds]
            prompts = [document.prompt(document.questions[0]) for document in drawn]
            outputs = generate(model, tokenizer, prompts, SamplingParams(max_tokens=16), prefill_chunk=4096)
            for document, output in zip(drawn, outputs):
                question, facts = document.questions[0], len(document.questions)
                if output.text == " " + question.answer and output.finish_reason == "eos":
                    right += 1
                elif show_wrong:
                    bar.write(f"{question.text} {question.answer}, not {output.text!r}", file=sys.stdout)
            bar.update(len(drawn))
    return right, facts


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Exact-answer accuracy of the embedded model on fresh documents.",
                                     epilog="example: python scripts/eval_tiny.py --documents 20 --lengths 1024")
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s here)")
    parser.add_argument("--documents", type=int, default=200, metavar="N", help="documents of each length (200)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], metavar="TOKENS",
                        help="of the prompts (1024 4096 8192)")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    require_number("--documents", args.documents, least=1)
    return args


if __name__ == "__main__":
    sys.exit(main())
