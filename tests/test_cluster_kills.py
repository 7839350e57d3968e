"""Six processes under load, and nodes of every kind that die or stand still and return: nothing is lost. Chapter 14.

`MINPRFAAS_KILLS=100 python -m pytest -m heavy -s tests/test_cluster_kills.py` for a long evening; it prints its tally.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

PROGRAM = [sys.executable, str(Path(__file__).resolve().parent.parent / "scripts" / "cluster.py")]
KILLS = int(os.environ.get("MINPRFAAS_KILLS", "10"))
REQUESTS_A_KILL = 10  # 1.5 a second, and the status line, at which the test acts, comes every 5 s
RECOVERY_S = 90.0  # until a node that was killed, or goes on after a stop, takes work again; seconds where it is quiet
LINE_DEADLINE_S = 180
NAMES = ("front", "prfaas-0", "prfaas-1", "pd-0", "pd-1", "pd-2")


class Nodes:
    """The processes of a run by name, as its launcher tells of them, and what was done to them."""

    def __init__(self, launcher):
        self.launcher, self.pids, self.said = launcher, {}, []
        self.stopped, self.hit_at_s, self.recovery_s, self.tally = {}, {}, [], Counter()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.launcher.stderr:
            self.said.append(line)
            if found := re.match(r"(\S+) has ended with status -9; it is process (\d+) now", line):
                self.pids[found[1]] = int(found[2])

    def act(self, draw, ready):
        """Let those go on that stood still for long enough; then kill one of those that take work, or stop it."""
        for name in list(self.stopped):
            self.stopped[name] -= 1
            if self.stopped[name] == 0 or not ready:
                del self.stopped[name]
                self._signal(name, signal.SIGCONT)
        able = sorted(ready - self.stopped.keys())
        if not self.pids:
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
            self.pids.update(zip(NAMES, map(int, children)))
        if not able:
            return
        name, number = draw.choice(able), draw.choice((signal.SIGKILL, signal.SIGSTOP))
        self._signal(name, number)
        if number == signal.SIGSTOP:
            self.stopped[name] = draw.choice((1, 4))  # status lines: short enough to be waited for, or lost
        self.tally[number.name, name] += 1

    def _signal(self, name, number):
        os.kill(self.pids[name], number)
        self.hit_at_s[name] = time.monotonic()

    def joined(self, name):
        if name in self.hit_at_s:
            self.recovery_s.append(time.monotonic() - self.hit_at_s.pop(name))

    @property
    def orphans(self):
        """Processes of the run that are there although it has ended."""
        sessions = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                sessions[path.parent.name] = path.read_text().rpartition(")")[2].split()[3]
            except OSError:
                pass  # it has ended meanwhile
        return [pid for pid, session in sessions.items() if session == str(self.launcher.pid)]


@pytest.mark.heavy
def test_kills_and_stops_under_load_lose_no_request_no_block_and_no_process():
    command = [*PROGRAM, "--topology", "prfaas=2,pd=3", "--split", "1", "--restart", "--load", "poisson:1.5",
               "--requests", str(REQUESTS_A_KILL * (KILLS + 2)), "--length-scale", "0.01", "--threshold", "250",
               "--link-gbps", "0.02", "--rtt-ms", "5", "--link-timeout-s", "2", "--pool-blocks", "300", "--check"]
    draw, output = random.Random(KILLS), []
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                start_new_session=True)
    nodes = Nodes(launcher)
    watchdog = threading.Timer(LINE_DEADLINE_S + 30 * KILLS, launcher.kill)
    watchdog.start()
    try:
        for line in launcher.stdout:
            output.append(line)
            if found := re.match(r"(\S+) has joined", line):
                nodes.joined(found[1])
            if re.match(r"\d+ s: .* (waiting|decoding)", line) and nodes.tally.total() < KILLS + bool(nodes.stopped):
                if nodes.tally.total() < KILLS:
                    nodes.act(draw, set(re.findall(r"((?:prfaas|pd)-\d) p\w+ ", line)))
                else:
                    nodes.act(draw, set())  # the last one goes on
        launcher.wait(LINE_DEADLINE_S)
    finally:
        watchdog.cancel()
        launcher.kill()
    said = "".join(output)
    answers = re.search(r"(\d+) answers in (\S+) s", said)
    print(f"\n{nodes.tally.total()} of {KILLS}: " + ", ".join(
        f"{number} {name} {count}" for (number, name), count in sorted(nodes.tally.items())))
    mean_s = sum(nodes.recovery_s) / max(1, len(nodes.recovery_s))
    print(f"{answers and answers[0]}; {len(nodes.recovery_s)} nodes were lost and took work again after {mean_s:.1f} s "
          f"in the mean, {max(nodes.recovery_s, default=0):.1f} s at most")
    print("\n".join(said.splitlines()[-40:]))
    assert launcher.returncode == 0, (said, nodes.said)
    total = REQUESTS_A_KILL * (KILLS + 2)
    assert f"{total} answers in" in said and f"{total} of {total} answers are identical" in said
    assert nodes.tally.total() == KILLS
    assert nodes.recovery_s and max(nodes.recovery_s) < RECOVERY_S
    assert not nodes.orphans
