"""The core path of docs/reading.md: it exists, it stays short, and it is closed. Chapter 15."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
CORE_TABLE, DOOR_TABLE = PAGE.split("## Doors")
CORE = re.findall(r"^\| `(minprfaas/[\w/]+\.py)`", CORE_TABLE, re.MULTILINE)
DOORS = [f"minprfaas/{path}" for path in re.findall(r"^\| `([\w/]+\.py)`", DOOR_TABLE, re.MULTILINE)]
MOST_LINES = 2799
ALWAYS_OPEN = {"minprfaas/config.py", "minprfaas/errors.py"}


def imported_files(path: str) -> set[str]:
    """The package's files that a file imports, by name."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            file = module.replace(".", "/") + ".py"
            if module.startswith("minprfaas.") and (ROOT / file).is_file():
                found.add(file)
    return found


def test_every_file_that_the_page_lists_exists():
    assert len(CORE) >= 15
    assert [path for path in CORE + DOORS if not (ROOT / path).is_file()] == []


def test_the_core_path_can_be_read_in_a_sitting():
    lines = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in CORE}
    assert sum(lines.values()) <= MOST_LINES, lines


@pytest.mark.parametrize("path", CORE)
def test_a_file_of_the_core_path_leads_only_to_the_core_path_and_to_doors_that_the_page_names(path):
    assert imported_files(path) - {*CORE, *DOORS, *ALWAYS_OPEN} == set()


def test_every_door_is_one_that_the_core_path_has():
    behind = set().union(*map(imported_files, CORE))
    assert set(DOORS) - behind == set()


def test_every_listed_file_has_its_sentence():
    for path in CORE + DOORS:
        name = path.removeprefix("minprfaas/")
        (sentence,) = re.findall(rf"^\| `(?:minprfaas/)?{name}` \| (.+) \|$", PAGE, re.MULTILINE)
        assert sentence.endswith(".") and len(sentence) > 20, path
