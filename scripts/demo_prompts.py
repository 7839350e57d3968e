"""Writes a prompts file of freshly invented documents, each with a question: `python scripts/demo_prompts.py OUT.jsonl`."""

import json
import sys
from pathlib import Path

from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import read_config
from minprfaas.model.tokenizer import Tokenizer


@exit_on_user_error
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT.jsonl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 400, 4096, 700, 2048, 512],
                        help="length of each document, its question included")
    parser.add_argument("--next-turn", type=int, default=1500, metavar="TOKENS",
                        help="a second document, and a question about it, that continue the first conversation; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="another seed invents other towns and people")
    args = parser.parse_args()
    tokenizer = Tokenizer(EMBEDDED, read_config(EMBEDDED))
    lines = []
    for number, tokens in enumerate(args.tokens):
        document = make_document(EVALUATION_SEEDS + args.seed * 1000 + number, tokens, tokenizer.encode)
        question = document.questions[0]
        lines.append(json.dumps({"id": f"doc-{number + 1}", "prompt": document.prompt(question), "max_tokens": 16,
                                 "expected": question.answer}))
    if args.next_turn:
        document = make_document(EVALUATION_SEEDS + args.seed * 1000 + 999, args.next_turn, tokenizer.encode)
        question = document.questions[0]
        lines.append(json.dumps({"id": "doc-1-next", "after": "doc-1", "prompt": "\n\n" + document.prompt(question),
                                 "max_tokens": 16, "expected": question.answer}))
    out = Path(args.out)
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out} cannot be written: {out.resolve().parent} is not a directory")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
