"""Makes a notebook of a chapter: `python scripts/to_notebook.py tutorials/03_paged_kvcache.py out/03.ipynb`.

A cell begins at a line `# %%`, a cell of text at `# %% [markdown]`, whose lines are comments. What stands before the
first such line is the first cell. The notebook is to be opened beside the chapters, for they import `helper.py`.
"""

import ast
import json
import sys
from pathlib import Path

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error
from minprfaas.files import write_whole

BEGINNING = """import sys

sys.path[:0] = [{tutorials!r}, {root!r}]  # where the chapters' helper lies, and the package
sys.argv[1:] = []  # a notebook has no command line
__doc__ = {documented!r}"""


@exit_on_user_error
def main() -> int:
    """Read a chapter, write the notebook; returns the exit status."""
    parser = ArgumentParser(description=__doc__.splitlines()[0].split(":")[0] + ".",
                            epilog="example: python scripts/to_notebook.py tutorials/03_paged_kvcache.py out/03.ipynb")
    parser.add_argument("chapter", metavar="CHAPTER.py", help="a file with cells, such as a chapter")
    parser.add_argument("notebook", metavar="NOTEBOOK.ipynb", help="what to write")
    args = parser.parse_args()
    chapter = Path(args.chapter).resolve()
    try:
        text = chapter.read_text(encoding="utf-8")
        documented = ast.get_docstring(ast.parse(text))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{args.chapter} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    first = BEGINNING.format(tutorials=str(chapter.parent), root=str(chapter.parent.parent), documented=documented)
    write_whole(args.notebook, json.dumps(notebook([("code", first), *cells_of(text)]), indent=1) + "\n")
    print(f"written: {args.notebook}")
    return 0


def cells_of(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell, kind "code" or "markdown". The docstring becomes text; what only a script needs, the
    block `if __name__ == "__main__"` that answers `--help`, is left out, as a notebook has no command line."""
    documented = ast.get_docstring(ast.parse(text)) or ""
    cells, lines, kind = [("markdown", documented)], [], "code"
    for line in [*text.splitlines(), "# %%"]:
        if not line.startswith("# %%"):
            lines.append(line)
            continue
        source = "\n".join(lines).strip("\n")
        if kind == "markdown":
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
        elif len(cells) == 1:
            source = _without_beginning(source)
        if source:
            cells.append((kind, source))
        lines, kind = [], "markdown" if line.startswith("# %% [markdown]") else "code"
    return cells


def _without_beginning(source: str) -> str:
    """The first cell without its docstring and without `if __name__ == "__main__":`, when that only begins a script."""
    left = []
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring and not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            left.append(ast.get_source_segment(source, node))
    return "\n".join(left)


def notebook(cells: list[tuple[str, str]]) -> dict:
    """Version 4 of the notebook format, without outputs."""
    def cell(number: int, kind: str, source: str) -> dict:
        whole = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(keepends=True)}
        return whole if kind == "markdown" else {**whole, "execution_count": None, "outputs": []}

    return {"nbformat": 4, "nbformat_minor": 5, "cells": [cell(number, *one) for number, one in enumerate(cells)],
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}}


if __name__ == "__main__":
    sys.exit(main())
