"""The house's own rules: one name for one thing, no long file or function, every function annotated. Chapter 15.

`test_reading.py` holds the core path, `test_map.py` the chapters; here stands what is true of every file.
"""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "minprfaas").rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_COLUMNS = 400, 60, 120
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_two_classes_of_the_package_have_one_name():
    names = Counter(node.name for path in PACKAGE for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))
    assert len(names) > 200 and [name for name, count in names.items() if count > 1] == []


def test_no_two_files_of_the_package_have_one_name():
    names = Counter(path.name for path in PACKAGE if path.name != "__init__.py")
    assert len(names) > 100 and [name for name, count in names.items() if count > 1] == []


def test_a_moment_is_named_by_its_unit():
    """What a clock gave, alone or with seconds added: `now_s`, or `…_at_s` (seconds)."""
    moments = {f"{path.name}: {name}" for path in PACKAGE for node in ast.walk(tree(path))
               if isinstance(node, ast.Assign) for target in node.targets for name in moments_of(target, node.value)}
    assert len(moments) > 40 and [one for one in moments if not one.endswith(("_at_s", " now_s"))] == []


def moments_of(target: ast.expr, value: ast.expr) -> list[str]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return [name for pair in zip(target.elts, value.elts) for name in moments_of(*pair)]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        value = value.left
    is_moment = isinstance(value, ast.Call) and re.search(r"(clock|monotonic|perf_counter)$", ast.unparse(value.func))
    return [ast.unparse(target)] if is_moment else []


def test_no_test_or_script_is_long():
    beside = [path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    lines = {path.name: path.read_text(encoding="utf-8").splitlines() for path in beside}
    assert [name for name, all_of_it in lines.items() if len(all_of_it) >= MOST_LINES] == []
    assert [line for all_of_it in lines.values() for line in all_of_it if len(line) > MOST_COLUMNS] == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_its_functions_take_and_give(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < MOST_LINES and [line for line in lines if len(line) > MOST_COLUMNS] == []
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, FUNCTION)]
    assert [one.name for one in functions if one.end_lineno - one.lineno >= MOST_LINES_OF_A_FUNCTION] == []
    assert [one.name for one in functions if not is_annotated(one)] == []


def is_annotated(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    known = [one for one in arguments if one.annotation is not None or one.arg in ("self", "cls")]
    return len(known) == len(arguments) and (function.returns is not None or function.name == "__init__")
