"""How a program ends: with its status, its output and its exit functions, whatever threads are left.

Chapters 13 and 14.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import atexit, threading

def main(argv):
    threading.Thread(target=threading.Event().wait).start()  # nobody joins it, as a killed peer's in PyTorch
    atexit.register(lambda: print("tidied"))
    print("done")
    return {status}
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_thread_that_nobody_joined_does_not_change_how_a_program_ends(tmp_path: Path, status: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(status=status))
    line = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; " \
           "from minprfaas.errors import run_program; run_program('program')"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "done\ntidied\n", "")
