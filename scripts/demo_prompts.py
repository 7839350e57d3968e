"""Writes a prompts file of invented documents, each with a question: `python scripts/demo_prompts.py OUT.jsonl`."""

import json
import sys
from contextlib import closing

from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.errors import ArgumentParser, exit_on_user_error, long_import, require_number
from minprfaas.files import OutputFile


@exit_on_user_error
def main() -> int:
    parser = ArgumentParser(description=__doc__.split(":")[0] + ".",
                            epilog="example: python scripts/demo_prompts.py out/short.jsonl --tokens 2048 512")
    parser.add_argument("out", metavar="OUT.jsonl", help="what to write: a line of JSON for each document")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 400, 4096, 700, 2048, 512], metavar="N",
                        help="length of each document, its question included (8192 400 4096 700 2048 512)")
    parser.add_argument("--next-turn", type=int, default=1500, metavar="TOKENS",
                        help="a second document and question that continue the first conversation; 0 for none (1500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one, other towns and people (0)")
    args = parser.parse_args()
    require_number("--seed", args.seed, least=0)  # below it are the documents that the model was trained on
    with closing(OutputFile(args.out)) as out:
        out.write("\n".join(invented_lines(args.tokens, args.next_turn, args.seed)) + "\n")
    return 0


def invented_lines(lengths: list[int], next_turn: int, seed: int) -> list[str]:
    """A line of JSON for each document of so many tokens, and one that continues the first conversation."""
    with long_import():  # neither --help nor a mistake is to wait for it
        from minprfaas.model.checkpoint import EMBEDDED
        from minprfaas.model.families import read_config
        from minprfaas.model.tokenizer import Tokenizer
    tokenizer = Tokenizer(EMBEDDED, read_config(EMBEDDED))
    lines = []
    for number, tokens in enumerate(lengths):
        document = make_document(EVALUATION_SEEDS + seed * 1000 + number, tokens, tokenizer.encode)
        question = document.questions[0]
        lines.append(json.dumps({"id": f"doc-{number + 1}", "prompt": document.prompt(question), "max_tokens": 16,
                                 "expected": question.answer}))
    if next_turn:
        document = make_document(EVALUATION_SEEDS + seed * 1000 + 999, next_turn, tokenizer.encode)
        question = document.questions[0]
        lines.append(json.dumps({"id": "doc-1-next", "after": "doc-1", "prompt": "\n\n" + document.prompt(question),
                                 "max_tokens": 16, "expected": question.answer}))
    return lines


if __name__ == "__main__":
    sys.exit(main())
