"""The chapters' exercises: each check takes the right answer, notices a wrong one, and says when there is none.

Chapters 00 to 15.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
sys.path.insert(0, str(TUTORIALS))
from exercises import checking  # noqa: E402  (as the chapters import it)

CHAPTERS = sorted(path.stem[-2:] for path in (TUTORIALS / "exercises").glob("ex_[0-9][0-9].py"))
CHECKS = [(chapter, number) for chapter in CHAPTERS for number in checking.numbers_of(chapter)]


def solutions_of(chapter: str) -> dict:
    """The solutions by function name; under "WRONG" the wrong ones."""
    path = ROOT / "tests" / "solutions" / f"ch_{chapter}.py"
    spec = importlib.util.spec_from_file_location(f"solutions_{chapter}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def answer(monkeypatch, exercises, solutions: dict) -> None:
    """Give these functions for the reader's."""
    for name in solutions_of(exercises.__name__[-2:])["WRONG"]:
        monkeypatch.setattr(exercises, name, solutions[name])


def open_exercises(chapter: str):
    return importlib.import_module(f"exercises.ex_{chapter}")


@pytest.mark.parametrize("chapter, number", CHECKS)
def test_an_exercise_says_that_it_is_not_answered_and_where(chapter, number):
    said, is_right = checking.judge(open_exercises(chapter), number)
    named = re.fullmatch(rf"not answered yet: edit (\w+) in tutorials/exercises/ex_{chapter}\.py", said)
    assert named and named[1] in solutions_of(chapter)["WRONG"] and not is_right


@pytest.mark.parametrize("chapter, number", CHECKS)
def test_a_check_takes_the_solution(monkeypatch, chapter, number):
    exercises = open_exercises(chapter)
    answer(monkeypatch, exercises, solutions_of(chapter))
    assert checking.judge(exercises, number) == ("right", True)


@pytest.mark.parametrize("chapter, number", CHECKS)
def test_a_check_notices_a_plausible_wrong_answer_and_says_what_was_expected(monkeypatch, chapter, number):
    exercises = open_exercises(chapter)
    answer(monkeypatch, exercises, solutions_of(chapter)["WRONG"])
    said, is_right = checking.judge(exercises, number)
    assert said.startswith("not yet: ") and "expected" in said and "\n" not in said and not is_right


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_wrong_answer_alone_is_noticed_by_some_check(monkeypatch, chapter):
    exercises, solutions = open_exercises(chapter), solutions_of(chapter)
    for name, wrong in solutions["WRONG"].items():
        answer(monkeypatch, exercises, {**solutions, name: wrong})
        assert not all(checking.judge(exercises, number)[1] for number in checking.numbers_of(chapter)), name


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_ends_with_its_exercises_and_how_to_check_them(chapter):
    (path,) = TUTORIALS.glob(f"{chapter}_*.py")
    numbers = checking.numbers_of(chapter)
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) in (2, 3)
    last = path.read_text(encoding="utf-8").rpartition("# %% [markdown]\n")[2]
    assert re.search(r"^# #+ Exercises$", last, re.MULTILINE)
    assert f"python tutorials/{path.name} --check " in last
    assert re.findall(r"^# (\d+)\. ", last, re.MULTILINE) == [str(number) for number in numbers]
    for name in solutions_of(chapter)["WRONG"]:
        assert f"`{name}`" in last, name


@pytest.fixture
def reader(tmp_path):
    """A copy of what a reader of a chapter edits: write(text) sets the exercises, run(*options) runs the chapter."""
    for name in ("helper.py", "00_the_bandwidth_wall.py", "exercises/checking.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(TUTORIALS / name, tmp_path / name)

    def write(body: str) -> None:
        (tmp_path / "exercises" / "ex_00.py").write_text(
            f"def double(number):\n    {body}\n\n\ndef check_1():\n"
            "    return None if double(2) == 4 else f'double(2): expected 4, got {double(2)}'\n")

    def run(*options: str) -> tuple[int, str, str]:
        ran = subprocess.run([sys.executable, str(tmp_path / "00_the_bandwidth_wall.py"), *options], timeout=120,
                             capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        return ran.returncode, ran.stdout, ran.stderr

    return write, run


@pytest.mark.parametrize("body, status, said", [
    ("return 2 * number", 0, "right"),
    ("return number", 1, "not yet: double(2): expected 4, got 2"),
    ("raise NotImplementedError", 1, "not answered yet: edit double in tutorials/exercises/ex_00.py"),
    ("return number / 0", 1, "not yet: ZeroDivisionError in line 2 of tutorials/exercises/ex_00.py: division by zero"),
    ("return number +", 1, "SyntaxError in line 2 of tutorials/exercises/ex_00.py: invalid syntax")])
def test_check_prints_one_line_and_ends_before_the_chapter_begins(reader, body, status, said):
    write, run = reader
    write(body)
    assert run("--check", "1") == (status, f"exercise 1: {said}\n", "")


@pytest.mark.parametrize("number", ["2", "0", "-1", "one"])
def test_an_exercise_that_is_not_there_is_named_with_those_that_are(reader, number):
    write, run = reader
    write("return 2 * number")
    assert run(f"--check={number}") == (2, "", f"error: --check {number}: chapter 00 has the exercises 1\n")
