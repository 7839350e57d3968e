"""What a person watches: tables, bars, and a board that is drawn again; on a terminal and in a file. Chapter 13."""

import io

import pytest
from transport_support import wait_until

from minprfaas.observe.board import PLAIN_EVERY_S, REDRAW_S, Board
from minprfaas.observe.report import human_bytes, table
from minprfaas.observe.screen import Screen


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
    assert table(("a", "b"), [], indent="") == "a  b\n─  ─"


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
                                         (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB"), (-2048, "-2.0 KiB")])
def test_bytes_are_told_in_the_unit_that_suits_them(count, text):
    assert human_bytes(count) == text


# ---- bars


def test_bars_show_what_was_done_of_what_is_to_do_and_leave_nothing_behind():
    terminal = Terminal()
    screen = Screen(200, 40, terminal)
    assert screen.shown
    for tell, shown in ((lambda: screen.prefilled(150), "150/200"), (lambda: screen.streamed(512, 2048), "512/2.00k"),
                        (lambda: screen.decoded(10, "the end of\nthe answer"), "10/40")):
        wait_until(lambda: tell() or shown in terminal.getvalue())  # a bar is drawn now and then
    assert "the end of the answer" in terminal.getvalue()
    screen.close()
    assert terminal.getvalue().endswith("\r")


def test_where_the_output_is_a_file_there_are_lines_and_no_bars(capsys):
    file = io.StringIO()
    screen = Screen(200, 40, file)
    screen.prefilled(150), screen.streamed(1, 2), screen.decoded(3, "text")
    screen.line("a line that stays")
    screen.close()
    assert not screen.shown and file.getvalue() == "" and capsys.readouterr().out == "a line that stays\n"


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
