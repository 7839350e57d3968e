"""How an answer to an exercise is checked, and what is said of it. Imports no torch unless the exercise does."""

import importlib
import math
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent


def exercises_of(chapter: str) -> Path:
    """The file of a chapter's exercises: "06" -> .../exercises/ex_06.py."""
    return FOLDER / f"ex_{chapter}.py"


def numbers_of(chapter: str) -> list[int]:
    """The numbers of a chapter's exercises, read without running the file: the reader may be in the middle of it."""
    text = exercises_of(chapter).read_text(encoding="utf-8")
    return sorted(int(number) for number in re.findall(r"^def check_(\d+)\(", text, re.MULTILINE))


def run_check(chapter: str, number: int) -> tuple[str, int]:
    """The line to print of an answer, and the exit status: 0 if it is right."""
    try:
        verdict, is_right = judge(importlib.import_module(f"exercises.ex_{chapter}"), number)
    except SyntaxError as error:  # in the reader's file
        verdict, is_right = f"SyntaxError in line {error.lineno} of {_name(chapter)}: {error.msg}", False
    except Exception as error:
        verdict, is_right = _what_was_raised(error, chapter), False
    return f"exercise {number}: {verdict}", 0 if is_right else 1


def judge(exercises: ModuleType, number: int) -> tuple[str, bool]:
    """What to say of an answer, and whether it is right. An exception in a reader's function is an answer, too."""
    chapter = exercises.__name__[-2:]
    try:
        difference = getattr(exercises, f"check_{number}")()
    except Exception as error:
        return _what_was_raised(error, chapter), False
    return ("right", True) if difference is None else (f"not yet: {difference}", False)


def _what_was_raised(error: Exception, chapter: str) -> str:
    """One line on an exception: the function that is still empty, or the last line of the reader's file that ran."""
    places = [place for place in traceback.extract_tb(error.__traceback__)
              if Path(place.filename).name == exercises_of(chapter).name]
    if not places:
        return f"not yet: {type(error).__name__}: {_first_line(error)}"
    if isinstance(error, NotImplementedError):
        return f"not answered yet: edit {places[-1].name} in {_name(chapter)}"
    return f"not yet: {type(error).__name__} in line {places[-1].lineno} of {_name(chapter)}: {_first_line(error)}"


def _name(chapter: str) -> str:
    return f"tutorials/exercises/{exercises_of(chapter).name}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def first_wrong(answer: Callable, cases: Iterable[tuple[tuple, Any]], tolerance: float = 1e-6) -> str | None:
    """Call `answer(*arguments)` for each (arguments, expected). None if all are right; otherwise one line on the first
    that is not. Floats and tensors may differ by `tolerance`, relative to the expected value where it is large."""
    for arguments, expected in cases:
        got = answer(*arguments)
        if not _is_equal(got, expected, tolerance):
            call = f"{answer.__name__}({', '.join(shown(argument) for argument in arguments)})"
            return f"{call}: expected {shown(expected)}, got {shown(got)}{_distance(got, expected)}"
    return None


def _is_equal(got: Any, expected: Any, tolerance: float) -> bool:
    if hasattr(expected, "shape"):
        return (hasattr(got, "shape") and got.shape == expected.shape
                and bool(((got - expected).abs() <= tolerance * (1 + expected.abs())).all()))
    if isinstance(expected, (list, tuple)):
        return (isinstance(got, type(expected)) and len(got) == len(expected)
                and all(_is_equal(a, b, tolerance) for a, b in zip(got, expected)))
    if isinstance(expected, float):
        return isinstance(got, (int, float)) and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)
    return type(got) is type(expected) and got == expected


def _distance(got: Any, expected: Any) -> str:
    """How far apart two tensors of one shape are."""
    if hasattr(expected, "shape") and hasattr(got, "shape") and got.shape == expected.shape:
        return f" (largest difference {float((got - expected).abs().max()):.2g})"
    return ""


def shown(value: Any) -> str:
    """A value as one line can hold it."""
    if hasattr(value, "shape") and value.numel() > 8:
        return f"a tensor {list(value.shape)}"
    if hasattr(value, "shape"):
        return str(value.tolist())
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
