"""Benchmarks: `python scripts/bench.py NAME`, a module of `scripts/benches/`. Ratios are taken within one run."""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

from minprfaas.errors import exit_on_user_error, long_import  # before torch, too: it silences what torch says of NumPy

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the benchmark that is named, or say which there are. Returns the exit status."""
    sys.path.insert(0, str(HERE))
    sentences = dict(benchmarks())
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("-h", "--help"):
        print("usage: python scripts/bench.py NAME [OPTION ...]    (its options: NAME --help)\n\nbenchmarks:")
        for known, sentence in sentences.items():
            print(textwrap.fill(sentence, 79, initial_indent=f"  {known:17}", subsequent_indent=" " * 19))
        print("\nexample: python scripts/bench.py wire --documents 1 --lengths 1024")
        return 0
    if name not in sentences:
        print(f"error: benchmark {name or '(none)'!r} is not one of: {', '.join(sentences)}", file=sys.stderr)
        return 2
    sys.argv[0] += f" {name}"  # as its own --help calls it
    with long_import():
        benchmark = importlib.import_module(f"benches.{name}").main
    return exit_on_user_error(benchmark)(sys.argv[2:])


def benchmarks():
    """(name, its first sentence) of each; the files are read, not run, for some wait long for torch."""
    for path in sorted((HERE / "benches").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield path.stem, " ".join(ast.get_docstring(tree).split("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(main())
