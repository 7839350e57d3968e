"""A library beside ours in a benchmark: absent, broken or dying, it costs one line and no more. Chapter 04."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from benches import peers  # noqa: E402

CASE = {"phase": "decode", "batch": 1, "context": 8}


@pytest.fixture
def ask(tmp_path, capsys):
    """`ask(module)`: what gpt-fast's answers to two cases are, and what is printed, with this text in its checkout."""

    def run(module: str | None) -> tuple[list, str]:
        peers.Peer._said.clear()
        if module is not None:
            (tmp_path / "gpt-fast").mkdir()
            (tmp_path / "gpt-fast" / "model.py").write_text(module)
        with peers.Peer("gpt-fast", {}, "cpu", str(tmp_path)) as peer:
            answers = [peer.ms(CASE), peer.ms(CASE)]
        return answers, capsys.readouterr().out

    return run


def test_an_absent_peer_is_one_line(ask):
    line = "  gpt-fast is absent: it is neither installed nor in the folder of --peers\n"
    assert ask(None) == ([None, None], line)


def test_a_broken_peer_is_one_line_whatever_it_prints(ask):
    assert ask("print('{\"ms\": 1.0}')\nraise RuntimeError('no\\ncard')") == (
        [None, None], "  gpt-fast failed: RuntimeError: no card\n")


def test_a_peer_whose_process_dies_is_one_line(ask):
    assert ask("import os\nos._exit(3)") == ([None, None], "  gpt-fast failed: its process ended with 3\n")


def test_a_peer_that_does_not_answer_is_given_up(ask, monkeypatch):
    monkeypatch.setattr(peers, "DEADLINE_S", 0.5)
    silent = "import threading\nthreading.Event().wait()"
    assert ask(silent) == ([None, None], "  gpt-fast failed: no answer in 0.5 s\n")


def test_what_the_benchmark_sets_for_itself_is_not_for_a_peer(ask, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    told = ask("import os\nraise RuntimeError(os.environ.get('CUBLAS_WORKSPACE_CONFIG'))")
    assert told == ([None, None], "  gpt-fast failed: RuntimeError: None\n")
