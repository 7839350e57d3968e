"""`scripts/mutate.py` breaks what it says, and what `scripts/mutations.py` names is still there to be broken.

Chapter 15.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import mutate  # noqa: E402
from mutants import compiles, mutants_of  # noqa: E402
from mutations import GUARDS, NAMED, NOT_ON_A_CPU, ROOMS  # noqa: E402

SOURCE = '''"""A text: 1 < 2 and not 3."""
def due(waiting, now_s: float = 2.5) -> list:
    """Not 1."""
    if waiting and not now_s >= 3:  # “soon”
        raise ValueError(f"{now_s - 1} s")
    if device == "cuda" and now_s > 1:
        now_s += 1
    log.info("due", 4)
    waiting.append(min(now_s, 7))
    return sorted(waiting, key=len)
'''


def test_each_mutant_changes_one_line_and_texts_for_people_and_gpu_branches_are_left_alone():
    mutants = mutants_of("due.py", SOURCE)
    lines = SOURCE.split("\n")
    for mutant in mutants:
        pairs = zip(lines, mutant.applied(SOURCE).split("\n"), strict=True)
        assert [number for number, (was, now) in enumerate(pairs, 1) if was != now] == [mutant.line], mutant
        assert compiles(mutant.applied(SOURCE)), mutant
    assert {mutant.line for mutant in mutants} == {2, 4, 9, 10}
    broken = {mutant.applied(SOURCE).split("\n")[3].strip() for mutant in mutants if mutant.line == 4}
    assert broken == {
        "if waiting or not now_s >= 3:  # “soon”", "if waiting and now_s >= 3:  # “soon”",
        "if waiting and not now_s > 3:  # “soon”", "if waiting and not now_s < 3:  # “soon”",
        "if waiting and not now_s >= 4:  # “soon”", "if True:  # “soon”", "if False:  # “soon”"}
    last = {mutant.applied(SOURCE).split("\n")[9].strip() for mutant in mutants if mutant.line == 10}
    assert last == {"return None", "return sorted(waiting, key=None)"}


CHOICES = """WINDOW, LIMIT_S = 2048, 2.5
LOOK_EVERY_S = 3
recent = 2048

def chunk(device, on_gpu):
    size = 8192 if on_gpu else 1024
    if size > 7:
        log.info("large")
        time.sleep(5)
    if device.type != "cuda":
        return size + 1
    return size + 2

class Graphs:
    def run(self):
        return 5 + 6
"""


def test_a_modules_own_choices_are_lost_and_what_only_a_gpu_runs_is_left_alone():
    broken = {CHOICES.split("\n")[mutant.line - 1][:mutant.start] + mutant.new for mutant in
              mutants_of("chunk.py", CHOICES, not_on_a_cpu=("Graphs",))}
    assert broken == {"WINDOW, LIMIT_S = 0", "WINDOW, LIMIT_S = 2048, 0.0", "recent = 2049",
                      "    size = 8192 if on_gpu else 1025", "        return None", "        return size - ",
                      "        return size + 2"}


def test_the_same_seed_draws_the_same_mutants_and_at_most_one_of_a_line():
    drawn = mutate.drawn(40, 3, ["kvcache"])
    assert drawn == mutate.drawn(40, 3, ["kvcache"]) != mutate.drawn(40, 4, ["kvcache"])
    assert len({(mutant.file, mutant.line) for mutant in drawn}) == 40


def test_what_is_named_is_still_there_and_so_are_the_tests_that_look_after_it():
    names = [id for id, _, _ in mutate.named_work()]  # raises when a text is gone
    assert len(names) == len(set(names)) == len(NAMED)
    tests = {test.split("::")[0] for one in NAMED for test in one.tests}
    tests |= {test for files in (*ROOMS.values(), *GUARDS.values()) for test in files}
    assert [test for test in sorted(tests) if not (ROOT / "tests" / test).is_file()] == []
    files = [*NOT_ON_A_CPU, *(f"minprfaas/{file}" for file in GUARDS)]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    for file, names in NOT_ON_A_CPU.items():
        assert all(re.search(rf"(class|def) {name}\b", (ROOT / file).read_text()) for name in names)


def test_the_tests_that_import_a_file_come_before_the_others_of_its_room():
    tests = mutate.tests_for("minprfaas/scheduling/directory.py")
    assert set(ROOMS["scheduling"]) <= set(tests)
    assert tests.index("test_directory.py") < tests.index("test_monitor.py")
    guards = list(GUARDS["cluster/journey.py"])
    assert mutate.tests_for("minprfaas/cluster/journey.py")[:len(guards)] == guards
    assert {"test_case_study.py", "test_front_end.py"} <= {*mutate.tests_for("minprfaas/scheduling/control.py")}


def test_trees_side_by_side_judge_what_is_broken_and_a_second_run_goes_on_from_the_results(
        tmp_path, monkeypatch, capsys):
    source = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
    files = {"minprfaas/__init__.py": "", "minprfaas/maths.py": source, "scripts/none.py": "", "pyproject.toml": "",
             "tests/test_double.py": "from minprfaas.maths import double\n\ndef test_double():\n"
                                     "    assert double(2) == 4\n",
             "tests/test_fails.py": "def test_fails():\n    assert False\n"}
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(mutate, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(mutate, "IMPORTED_ONCE", ("pytest",))
    tests = ["test_fails.py", "test_double.py"]
    work = [(name, {"minprfaas/maths.py": source.replace(*change)}, tests)
            for name, change in (("doubles", ("2 *", "4 *")), ("triples", ("3 *", "4 *")))]
    results = tmp_path / "results.jsonl"
    bench = mutate.Bench(tmp_path / "first", jobs=2, results=results)
    verdicts = {result["id"]: (result["verdict"], result["by"]) for result in bench.judge(work)}
    assert verdicts == {"doubles": ("caught", "test_double.py::test_double"), "triples": ("survived", "")}
    assert "left out: tests/test_fails.py fails without any mutation" in capsys.readouterr().out
    assert (tmp_path / "tree" / "minprfaas" / "maths.py").read_text() == source
    again = mutate.Bench(tmp_path / "second", jobs=1, results=results)
    assert again.known == bench.known and {"doubles", "triples", "unbroken test_double.py"} <= set(again.known)


@pytest.mark.parametrize("option", ["--count", "--jobs"])
def test_a_number_out_of_range_is_one_line(capsys, monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["mutate.py", option, "0"])
    with pytest.raises(SystemExit) as error:
        mutate.main()
    assert error.value.code == 2 and f"error: {option} is 0; it must be" in capsys.readouterr().err
