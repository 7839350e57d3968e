"""What a person watches: tables, bars, and a board that is drawn again; on a terminal and in a file. Chapter 13."""

import io

import pytest

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.mail import Mail
from minprfaas.commands.live_status import Watch
from minprfaas.config import SamplingParams
from minprfaas.observe import cores
from minprfaas.observe.board import PLAIN_EVERY_S, REDRAW_S, Board
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.transport.events import EventQueue


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self):
        return True


# ---- tables


def test_a_table_has_numbers_to_the_right_words_to_the_left_and_a_rule_under_its_head():
    text = table(("node", "tokens", "share", "note"), [("prfaas-0", 12_345, "7.5%", "idle"), ("pd", 6, "–", "")])
    assert text.split("\n") == [
        "  node      tokens  share  note",
        "  ────────  ──────  ─────  ────",
        "  prfaas-0  12,345   7.5%  idle",
        "  pd             6      –"]


def test_a_table_without_rows_is_its_head():
    assert table(("a", "b"), []) == "  a  b\n  ─  ─"


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
                                         (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB"), (-2048, "-2.0 KiB")])
def test_bytes_are_told_in_the_unit_that_suits_them(count, text):
    assert human_bytes(count) == text


# ---- bars


def test_bars_show_what_was_done_of_what_is_to_do():
    prefilling, writing = (Journey(name, [1] * 100, SamplingParams(), [], 0.0) for name in "ab")
    prefilling.prefilled_tokens, prefilling.received_bytes, prefilling.expected_bytes = 50, 512, 2048
    writing.prefilled_tokens, writing.text = 100, "the end of\nthe answer"
    writing.token_ids += [7] * 10
    front = FrontEnd(ControlPlane(ControlSettings(100, 1.0)), Mail(EventQueue()), lambda token_ids: [], 16, 60.0,
                     lambda: 0.0)
    prefill, stream, decode = Watch(front, [prefilling, writing], 0.0).bars(2.0, 200, 40)
    assert prefill.startswith("prefill") and "150/200" in prefill and "75.00tok/s" in prefill
    assert "512/2.00k" in stream and "10/40" in decode and "the end of the answer" in decode


def test_where_the_output_is_a_file_there_are_lines_and_no_bars():
    file = io.StringIO()
    board = Board(file)
    board.draw(0.0, lambda: ["a bar"])
    board.line("a line that stays")
    board.close()
    assert not board.shown and file.getvalue() == "a line that stays\n"


# ---- the board


def test_a_board_is_drawn_over_itself_and_lines_stay_above_it():
    terminal = Terminal()
    board = Board(terminal)
    board.draw(0.0, lambda: ["two", "lines"], lambda: "plain")
    board.draw(REDRAW_S / 2, lambda: ["too", "soon"], lambda: "plain")
    board.line("stays")
    board.draw(REDRAW_S, lambda: ["new"], lambda: "plain")
    board.close()
    assert terminal.getvalue() == "two\nlines\n" + "\x1b[2A\x1b[J" + "stays\n" + "new\n" + "\x1b[1A\x1b[J"


def test_a_board_is_no_larger_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "6")
    terminal = Terminal()
    Board(terminal).draw(0.0, lambda: ["x" * 50] * 50, lambda: "plain")
    assert terminal.getvalue() == ("x" * 19 + "\n") * 4


def test_where_the_output_is_a_file_a_plain_line_is_written_now_and_then():
    file = io.StringIO()
    board = Board(file)
    for now_s in (0.0, 1.0, PLAIN_EVERY_S - 0.1, PLAIN_EVERY_S):
        board.draw(now_s, lambda: ["screenful"], lambda: f"at {now_s:g}")
    board.close()
    assert file.getvalue() == f"at 0\nat {PLAIN_EVERY_S:g}\n"


# ---- cores


def test_the_cores_are_as_busy_as_the_system_says_and_unknown_where_it_says_nothing(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(cores, "STAT", stat)
    stat.write_text("cpu  100 0 0 500 100 0 0 0 0 0\ncpu0 …\n")
    watched = cores.Cores()
    assert watched.busy_share is None  # no time has passed
    stat.write_text("cpu  160 10 5 520 105 0 0 0 0 0\n")  # 75 ticks of work, 25 of none
    assert watched.busy_share == 0.75 and str(watched) == "cores 75% busy"
    stat.unlink()
    assert cores.Cores().busy_share is None and "does not tell" in str(cores.Cores())
