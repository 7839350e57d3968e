"""The map is true: each chapter claims modules, tests and sections of the paper and uses them; nothing is left unclaimed.

Chapters 00 to 15. `python tests/test_map.py` writes the table of tests/README.md anew, from the tests' first sentences.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted(path for path in (ROOT / "tests").glob("test_*.py"))
PAGE = ROOT / "tests" / "README.md"


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def chapters_named(text: str) -> list[int]:
    """The chapters that a docstring names: "Chapters 08 and 13", "Chapters 00 to 15"."""
    named = []
    for match in re.finditer(r"\bChapters? \d\d(?:(?:, | and | to |, and )\d\d)*", text):
        numbers = [int(number) for number in re.findall(r"\d\d", match[0])]
        named += range(numbers[0], numbers[1] + 1) if " to " in match[0] else numbers
    return named


def row(path: Path) -> str:
    """A line of the table: the file, its promise, its chapters."""
    text = docstring_of(path)
    promise = re.sub(r" ?\bChapters? [\d, toand]+[.;].*", "", text.split("\n\n")[0].replace("\n", " "))
    chapters = re.search(r"\bChapters? ([\d, toand]+\d)", text)
    return f"| [{path.stem.removeprefix('test_')}]({path.name}) | {promise} | {chapters[1] if chapters else '?'} |"


def table() -> str:
    """All lines, in the order of the chapters; files of the same chapter by name."""
    ordered = sorted(TESTS, key=lambda path: (*chapters_named(docstring_of(path))[:1], path.name))
    return "\n".join(["| file | what it promises | chapter |", "|---|---|---|", *map(row, ordered)]) + "\n"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_test_file_opens_with_what_it_promises_and_its_chapter(path):
    promise = docstring_of(path).split("\n\n")[0]
    assert len(promise) > 30 and re.search(r"[.!?]$", promise.strip()), promise
    assert chapters_named(docstring_of(path)), f"{path.name} names no chapter"


def test_the_page_of_the_tests_lists_each_with_its_promise():
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index("| file |"):] == table(), "python tests/test_map.py writes the table anew"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[:text.index("| file |")] + table(), encoding="utf-8")
