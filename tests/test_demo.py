"""The first minutes: `scripts/demo.sh` from set-up to the next step, and what it says when something is wrong.

Chapter 13. The shell's own part is tested here, on a tiny model; the `.venv` is one that hands on to this Python.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 240
HANDS_ON = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
INVENTS_NOTHING = f'#!/bin/sh\ncase "$1" in *demo_prompts.py) echo > "$2"; exit;; esac\nexec "{sys.executable}" "$@"\n'


@pytest.fixture
def project(tmp_path):
    """A clone as set-up leaves it, but for what is installed: the project's files by links, an `out` of its own."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("scripts", "pyproject.toml", "minprfaas", "tutorials"):
        (clone / name).symlink_to(ROOT / name)
    write_python(clone, HANDS_ON)
    wanted = subprocess.run("cat pyproject.toml scripts/constraints.txt | cksum", shell=True, cwd=clone, check=True,
                            capture_output=True, text=True).stdout
    (clone / ".venv" / ".installed").write_text(wanted)
    return clone


def write_python(clone, script):
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(script)
    python.chmod(0o755)


def start(demo, *options, where):
    return subprocess.Popen(["bash", str(demo), *map(str, options)], cwd=where, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def ended(running):
    said, errors = running.communicate(timeout=DEADLINE_S)
    return running.returncode, said, errors


@pytest.mark.heavy
def test_it_takes_paths_from_where_one_stands_names_files_that_are_there_and_ends_with_chapter_00(project, checkpoints):
    (project / "mine.jsonl").write_text(json.dumps({"prompt": "a" * 200, "max_tokens": 4}))
    status, said, errors = ended(start("clone/scripts/demo.sh", "--prompts", "clone/mine.jsonl", "--model",
                                       checkpoints["qwen3"], "--threshold", "100", where=project.parent))
    assert status == 0, errors
    assert "1 of 1 answers are identical" in said and errors == ""
    written = re.findall(r"(\S+/out/(?!demo_prompts)[\w.]+)", said)
    assert {Path(name).name for name in written} == {"report.html", "demo.jsonl", "demo_timeline.json"}
    assert all(Path(name).is_file() for name in written)
    last = said.splitlines()[-1]
    assert last.endswith("tutorials/00_the_bandwidth_wall.py") and "/.venv/bin/activate && python " in last
    assert Path(last.split()[-1]).is_file()


def test_a_mistake_gets_one_line_and_status_2_and_nothing_is_said_to_be_written(project):
    for name in ("demo.jsonl", "demo_timeline.json"):  # of an earlier run
        (project / "out").mkdir(exist_ok=True)
        (project / "out" / name).write_text("")
        os.utime(project / "out" / name, (1, 1))
    write_python(project, INVENTS_NOTHING)  # the mistake is said before a document is read
    status, said, errors = ended(start("scripts/demo.sh", "--threshold", "-1", where=project))
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("error: threshold is -1")
    assert "written" not in said and "next" not in said


@pytest.mark.heavy
def test_ctrl_c_ends_it_with_one_line_and_status_130(project):
    running = start("scripts/demo.sh", where=project)
    for line in running.stdout:
        if line.startswith("routing"):
            break
    os.killpg(running.pid, signal.SIGINT)
    status, said, errors = ended(running)
    assert (status, errors) == (130, "interrupted\n")
    assert "written" not in said


@pytest.mark.parametrize("pips_status", [0, 1])
def test_set_up_says_what_it_does_and_pips_words_only_when_it_fails(project, pips_status):
    write_python(project, '#!/bin/sh\n[ "$2" = pip ] || exit 5\n'
                          f'echo "WARNING: pip says something"; exit {pips_status}\n')
    (project / ".venv" / ".installed").unlink()
    status, said, errors = ended(start("scripts/demo.sh", where=project))
    assert "installed into .venv" in said and "minute" in said
    if pips_status == 0:
        assert "done in" in said and "WARNING" not in said + errors and status == 5  # of the first real work
        assert (project / ".venv" / ".installed").is_file()
    else:
        assert "WARNING: pip says something" in errors and errors.splitlines()[-1].startswith("error: pip failed")
        assert status == 1 and not (project / ".venv" / ".installed").exists()
