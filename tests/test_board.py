"""The live status: on a terminal one screenful that is drawn over itself and leaves nothing behind; elsewhere lines.

Chapter 13.
"""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.messages import NodeFigures, NodeReady
from minprfaas.cluster.node import PeerLost
from minprfaas.commands.live_status import Watch
from minprfaas.config import SamplingParams
from minprfaas.observe.board import PLAIN_EVERY_S, REDRAW_S, Board
from minprfaas.scheduling.control import ControlPlane, ControlSettings, NewThreshold
from minprfaas.transport.events import EventQueue

PROGRAM = Path(__file__).resolve().parent.parent / "scripts" / "cluster.py"
LINES, COLUMNS = 30, 120


class Terminal:
    """What a person sees, and what has scrolled away above it."""

    def __init__(self):
        self.rows, self.row, self.column, self.erasures = [""], 0, 0, 0

    def feed(self, text):
        for up, down, erased, ret, new, words in re.findall(
                r"\x1b\[(\d+)A|\x1b\[(\d+)B|(\x1b\[J)|(\r)|(\n)|([^\x1b\r\n]+)", text):
            if up:
                assert int(up) < LINES, "what has left the screen cannot be drawn over"
                self.row -= int(up)
            elif erased:
                self.rows[self.row:] = [self.rows[self.row][:self.column]]
                self.erasures += 1
            elif ret:
                self.column = 0
            elif new:
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif words:
                assert self.column + len(words) < COLUMNS, f"it would wrap: {words!r}"
                self.rows[self.row] = self.rows[self.row][:self.column] + words
                self.column += len(words)
            assert not down and 0 <= self.row

    @property
    def text(self):
        return "\n".join(self.rows).rstrip("\n")


@pytest.fixture
def terminal(monkeypatch):
    """A pseudo-terminal: a stream to write to, and `seen()`, which shows what was written so far."""
    monkeypatch.setenv("LINES", str(LINES))
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    screen = Terminal()

    def seen():
        try:
            while data := os.read(master, 65_536):
                screen.feed(data.decode())
        except BlockingIOError:
            pass
        return screen.text

    with os.fdopen(slave, "w") as stream:
        yield stream, seen
    os.close(master)


def test_on_a_terminal_a_screenful_is_drawn_over_itself_and_is_gone_at_the_end(terminal):
    stream, seen = terminal
    board = Board(stream)
    board.draw(0.0, lambda: ["one", "two", "three"], lambda: "plain")
    assert seen() == "one\ntwo\nthree"
    board.draw(REDRAW_S / 2, lambda: ["too soon"], lambda: "plain")
    assert seen() == "one\ntwo\nthree"
    board.draw(REDRAW_S, lambda: ["shorter"], lambda: "plain")
    assert seen() == "shorter"
    board.line("this stays")
    assert seen() == "this stays"
    board.draw(2 * REDRAW_S, lambda: [f"{number} " + "x" * 500 for number in range(99)], lambda: "plain")
    stays, *drawn = seen().split("\n")
    assert stays == "this stays" and len(drawn) == LINES - 2 and {len(line) for line in drawn} == {COLUMNS - 1}
    board.close()
    assert seen() == "this stays"


def test_elsewhere_there_is_a_line_now_and_then():
    stream = io.StringIO()
    board = Board(stream)
    for quarter in range(int(4 * 2.5 * PLAIN_EVERY_S)):
        board.draw(quarter / 4, lambda: ["a screenful"], lambda: f"at {quarter / 4:g} s")
    board.close()
    assert stream.getvalue() == f"at 0 s\nat {PLAIN_EVERY_S:g} s\nat {2 * PLAIN_EVERY_S:g} s\n"


def front_with(figures):
    """A front end that knows of two nodes, and what each has said of itself."""
    front = FrontEnd(ControlPlane(ControlSettings(100, 1.0)), Mail(EventQueue()), lambda token_ids: [], 16, 60.0,
                     lambda: 0.0)
    for name, role in (("pd-0", "pdp"), ("pd-1", "pdd")):
        front.hear(name, NodeReady(role, "cpu", 40))
    for name, one in figures.items():
        front.hear(name, one)
    return front


def test_the_status_shows_what_each_node_did_since_it_was_looked_at_last():
    front = front_with({"pd-0": NodeFigures(10.0, 4.0, 1000, 0, 30, 6, 4)})
    watch = Watch(front, [], 0.0)
    watch.screenful(10.0)
    front.hear("pd-0", NodeFigures(12.0, 5.5, 1600, 0, 20, 10, 10))
    rows = {line.split()[0]: line.split()[1:] for line in watch.screenful(12.0) if line.strip()}
    assert rows["pd-0"] == ["pdp", "75%", "0", "300", "0", "20", "10", "10"]
    assert rows["pd-1"][:2] == ["pdd", "–"] and rows["threshold"][:2] == ["100", "tokens;"]
    front.hear("pd-0", NodeFigures(1.0, 0.5, 30, 0, 40, 0, 0))  # it was started again
    assert "pd-0 pdp 50%" in watch.plain(13.0)


def test_the_last_table_has_the_nodes_that_are_lost_only_when_they_are_dismissed():
    front = front_with({name: NodeFigures(10.0, 4.0, 1000, 0, 30, 6, 4) for name in ("pd-0", "pd-1")})
    watch = Watch(front, [], 0.0)
    front.notice(PeerLost("pd-1", "killed before the end"))
    watch.end()
    front.notice(PeerLost("pd-0", "dismissed"))
    shown = watch.tables(10.0)
    assert "  pd-0  pdp " in shown and "pd-1" not in shown


def test_a_move_of_the_threshold_and_a_request_are_shown():
    front = front_with({})
    waiting = Journey("a", [1, 2], SamplingParams(), [], 0.0)
    begun = Journey("b", [1, 2], SamplingParams(), [], 0.0)
    begun.first_token_at_s = 0.25
    watch = Watch(front, [waiting, begun], 0.0)
    assert watch.take([NewThreshold(640.0, "bandwidth is scarce")], 3.0) == [
        "threshold     after 3.0 s: 640 tokens: bandwidth is scarce"]
    shown = "\n".join(watch.screenful(3.0))
    assert "1 waiting, 1 decoding, 0 done, 0 failed; TTFT mean 0.25 s, P90 0.25 s" in shown
    assert "after 3.0 s: 640 tokens: bandwidth is scarce" in shown


@pytest.mark.heavy
def test_a_whole_run_on_a_terminal_leaves_only_the_lines_that_stay(checkpoints, terminal):
    stream, seen = terminal
    command = [sys.executable, str(PROGRAM), "--topology", "prfaas=1,pd=1", "--model", str(checkpoints["kimi_linear"]),
               "--threshold", "60", "--load", "poisson:5", "--requests", "20", "--block-tokens", "16", "--check"]
    running = subprocess.Popen(command, stdout=stream, stderr=subprocess.PIPE, text=True)
    drawn = []
    while running.poll() is None:
        drawn.append(seen())
    assert running.returncode == 0, running.stderr.read()
    most = max(text.count("  requests  ") for text in drawn)
    assert most == 1 and len({text for text in drawn if "  requests  " in text}) > 3, "one screenful, drawn again"
    assert "  requests  " not in seen() and "20 of 20 answers are identical" in seen() and "part of TTFT" in seen()
    running.stderr.close()
