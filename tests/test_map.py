"""The map is true: each chapter claims modules, tests and sections of the paper and uses them; none is left over.

Chapters 00 to 15. `python tests/test_map.py` writes the table of tests/README.md anew, from the tests' first sentences.
"""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted(path for path in (ROOT / "tests").glob("test_*.py"))
PAGE = ROOT / "tests" / "README.md"
TUTORIALS = ROOT / "tutorials"
CHAPTERS = {int(path.name[:2]): path for path in sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))}
MODULES = sorted(str(path.relative_to(ROOT / "minprfaas")) for path in (ROOT / "minprfaas").rglob("*.py")
                 if path.name not in ("__init__.py", "__main__.py"))


@cache
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
    ordered = sorted(TESTS, key=lambda path: ((chapters_named(docstring_of(path)) or [99])[0], path.name))
    return "\n".join(["| file | what it promises | chapter |", "|---|---|---|", *map(row, ordered)]) + "\n"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_test_file_opens_with_what_it_promises_and_its_chapter(path):
    promise = docstring_of(path).split("\n\n")[0]
    assert len(promise) > 30 and re.search(r"[.!?]$", promise.strip()), promise
    assert chapters_named(docstring_of(path)), f"{path.name} names no chapter"


def test_the_page_of_the_tests_lists_each_with_its_promise():
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index("| file |"):] == table(), "python tests/test_map.py writes the table anew"


@cache
def claims(chapter: int) -> dict[str, list[str]]:
    """What a chapter's docstring says at its end, by kind: "Modules" (files and folders), "Tests", "Paper"."""
    found = {"Modules": [], "Tests": [], "Paper": []}
    for kind, text in re.findall(r"^(Modules|Tests|Paper): (.*?)(?=^\w+: |\Z)", docstring_of(CHAPTERS[chapter]),
                                 re.MULTILINE | re.DOTALL):
        found[kind] = [word for word in re.split(r",\s+", text.strip().rstrip(".")) if word]
    return found


def covers(claim: str, module: str) -> bool:
    """A folder covers what is in it, a file itself and the parts that it was split into (`fabric_sending` by
    `fabric`)."""
    return module.startswith(claim if claim.endswith("/") else claim.removesuffix(".py") + "_") or module == claim


@cache
def used_by(path: Path) -> frozenset[str]:
    """The package's modules from which a chapter, or a file beside it that it imports, takes something."""
    used, beside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if (TUTORIALS / f"{name}.py").is_file():
                beside |= used_by(TUTORIALS / f"{name}.py")
            if name.split(".")[0] != "minprfaas":
                continue
            used.add(name)
            if isinstance(node, ast.ImportFrom):  # what a package hands on has its home elsewhere
                package = importlib.import_module(name)
                for alias in node.names:
                    thing = getattr(package, alias.name, None)
                    used |= {f"{name}.{alias.name}", getattr(thing, "__module__", None) or name}
    files = {f"{name.replace('.', '/')}{end}".removeprefix("minprfaas/") for name in used for end in (".py", "/")}
    return frozenset(beside | {file for file in files if file in MODULES or file.endswith("/")})


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_says_what_it_is_about_and_all_of_it_is_there(chapter):
    said = claims(chapter)
    assert all(said.values()), "the docstring ends with Modules:, Tests: and Paper:"
    assert [claim for claim in said["Modules"] if not any(covers(claim, module) for module in MODULES)] == []
    assert [name for name in said["Tests"] if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_section_with_code_asks_for_a_guess_and_offers_a_line_to_change(chapter):
    """A guess has a number, or a few answers to choose from: it ends in a question. (15.9 and 15.10 have no code.)"""
    _, *sections = re.split(r"^# ## (?=\d+\. )", CHAPTERS[chapter].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(sections) >= 4
    for section in sections:
        title, text = section.split("\n")[0], section.split("# ### Exercises")[0]
        if "\n# %%\n" in text and not title.startswith("10. What the paper"):
            guess = re.search(r"\*Guess first:\*(.*?)\n(?!# )", text + "\n", re.DOTALL)
            assert guess and "?" in guess[1], f"{CHAPTERS[chapter].name}: no guess in {title}"
            assert "*Change this line:*" in text, f"{CHAPTERS[chapter].name}: nothing to change in {title}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_uses_what_it_claims(chapter):
    text, used = CHAPTERS[chapter].read_text(encoding="utf-8"), used_by(CHAPTERS[chapter])
    for claim in claims(chapter)["Modules"]:
        used |= {claim} if any(covers(module, claim) for module in used) else set()  # a part of what is imported
        is_shown = claim == "commands/" and "python -m minprfaas" in text  # as one calls them
        assert is_shown or any(covers(claim, module) for module in used), f"nothing of {claim} is imported"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_in_a_chapter_that_its_docstring_names(module):
    claimed_by = {chapter for chapter in CHAPTERS if any(covers(claim, module) for claim in claims(chapter)["Modules"])}
    assert claimed_by, f"no chapter claims {module}"
    named = chapters_named(docstring_of(ROOT / "minprfaas" / module))
    assert claimed_by & {*named}, f"{module} names the chapters {named}, and those that claim it are {claimed_by}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_test_file_is_in_a_chapter_that_its_docstring_names(path):
    claimed_by = {chapter for chapter in CHAPTERS if path.name in claims(chapter)["Tests"]}
    assert claimed_by & {*chapters_named(docstring_of(path))}, f"{path.name} is claimed by {claimed_by or 'no chapter'}"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[:text.index("| file |")] + table(), encoding="utf-8")
