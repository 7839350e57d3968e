"""How a program ends: with its status, its output and its exit functions, whatever threads are left.

Chapters 13 and 14.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minprfaas.errors import UserError, exit_on_user_error
from minprfaas.files import OutputFile

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import atexit, threading

def main(argv):
    threading.Thread(target=threading.Event().wait).start()  # nobody joins it, as a killed peer's in PyTorch
    atexit.register(lambda: print("tidied"))
    print("done")
    return {status}
"""


IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass  # as some libraries do, around an import of their own that may fail

def main(argv):
    print("went on")
"""


def run(folder: Path, program: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `run_program` with this program."""
    (folder / "program.py").write_text(program)
    line = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; " \
           "from minprfaas.errors import run_program; run_program('program')"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("status", [0, 1])
def test_a_thread_that_nobody_joined_does_not_change_how_a_program_ends(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, PROGRAM.format(status=status)) == (status, "done\ntidied\n", "")


def test_an_interrupt_during_an_import_that_swallows_it_ends_the_program_all_the_same(tmp_path: Path) -> None:
    assert run(tmp_path, IMPORT) == (130, "", "interrupted\n")


@pytest.mark.parametrize("words", ["scripts/two_datacenters.py --prompts P", "scripts/cluster.py --prompts P",
                                   "scripts/live_case_study.py", "-m minprfaas generate x", "-m minprfaas profile",
                                   "-m minprfaas serve", "-m minprfaas inspect", "scripts/bench.py cpu",
                                   "scripts/demo_prompts.py OUT", "scripts/random_checkpoint.py OUT"])
def test_so_it_is_wherever_a_program_first_waits_for_torch(tmp_path: Path, words: str) -> None:
    (tmp_path / "torch.py").write_text(IMPORT.partition("def main")[0])
    (tmp_path / "P").write_text('{"prompt": "x"}')
    script, *others = words.split()
    done = subprocess.run([sys.executable, ROOT / script if "/" in script else script, *others], capture_output=True,
                          text=True, timeout=60, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "minprfaas", "plan", "--egress"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_a_gpu_whose_memory_is_used_up_is_one_line_and_no_other_error_of_torchs(capsys) -> None:
    @exit_on_user_error
    def main(error: Exception) -> int:
        raise error

    with pytest.raises(RuntimeError, match="a bug"):
        main(RuntimeError("a bug"))
    with pytest.raises(SystemExit) as ended:
        main(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line"))
    said = capsys.readouterr().err
    assert (ended.value.code, said) == (1, "error: CUDA out of memory. Tried to allocate 2.00 GiB.\n")


OPENING = """
import os

def main(argv):
    with open({path!r}, "w") as file:
        file.write(str(file.fileno()))
"""


def test_with_all_descriptors_closed_no_file_takes_the_number_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(OPENING.format(path=str(tmp_path / "number")))
    line = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; " \
           "from minprfaas.errors import run_program; run_program('program')"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, line], timeout=60)
    assert done.returncode == 0 and int((tmp_path / "number").read_text()) > 2


def test_an_output_that_cannot_be_written_is_found_before_the_run(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "out.json", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            OutputFile(path)
    output = OutputFile(tmp_path / "out.json")
    output.close()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
