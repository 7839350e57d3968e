"""What a person reads first: each program's `--help` fits 80 columns, explains each option and gives an example.

Chapter 13.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas.__main__ import COMMANDS, main
from minprfaas.errors import ArgumentParser, UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
bench = importlib.import_module("bench")
PROGRAMS = ("minprfaas.commands.two_datacenters", "minprfaas.commands.cluster", "case_study.command")
SCRIPTS = ("bench", "check_parity", "demo_prompts", "draw_request", "eval_tiny", "make_parity_fixtures",
           "random_checkpoint", "to_notebook", "train_tiny")


@pytest.fixture
def help_of(capsys, monkeypatch):
    """`help_of(main, arguments)` returns what `--help` prints on a screen of 80 columns."""

    def run(program, arguments=()):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stop:
            program([*arguments, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return run


def reads_well(text):
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert re.search(r"\bexamples?:", text, re.IGNORECASE)
    # An option's line, and the next one unless that is another option's: without words in either it is unexplained.
    for option, rest, below in re.findall(r"^  (-\S+)([^\n]*)\n( {20,}\S)?", text, re.MULTILINE):
        assert re.search(r" {2,}\S", rest) or below, f"{option} is not explained"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help(help_of, command):
    reads_well(help_of(main, [command]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_programs_help(help_of, program):
    reads_well(help_of(importlib.import_module(program).main))


@pytest.fixture
def run_script(capsys, monkeypatch):
    """`run_script(name, *arguments)` runs `scripts/NAME.py` in this process, on a screen of 80 columns; returns its
    status and what it said, on stdout and stderr."""

    def run(name, *arguments):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
        try:
            status = importlib.import_module(name).main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_help(run_script, script):
    status, said, errors = run_script(script, "--help")
    assert (status, errors) == (0, "")
    reads_well(said)


@pytest.mark.parametrize("script", ["check_parity", "make_parity_fixtures"])
def test_a_library_that_is_not_here_is_named(run_script, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_script(script) == (2, "", "error: the oracle is transformers 5.24, which is not installed\n")


@pytest.mark.parametrize("name", [name for name, _ in bench.benchmarks()])
def test_a_benchmarks_help(help_of, name):
    """All that it imports is there: nothing else in the suite runs most of them."""
    assert "usage: " in help_of(importlib.import_module(f"benches.{name}").main)


def test_the_list_of_commands_and_that_of_benchmarks(help_of, run_script):
    commands = help_of(main)
    assert all(f"    {command} " in commands for command in COMMANDS)
    reads_well(commands)
    _, benchmarks, _ = run_script("bench", "--help")
    assert "  cache " in benchmarks and "  wire " in benchmarks
    assert "gpu_cases" not in benchmarks  # a part of another one
    for words, said in (("--no-such-option", "--no-such-option"), ("--repeats 0", "0 is not at least 1"),
                        ("--repeats x", "invalid at_least_one value: 'x'")):
        status, _, errors = run_script("bench", "cache", *words.split())
        assert status == 2 and errors.count("\n") == 1 and said in errors
    status, _, errors = run_script("bench", "nothing")
    assert status == 2 and errors.count("\n") == 1 and "'nothing' is not one of: " in errors


MISTAKES = (  # of programs whose work needs torch: what is said wrong, and what the one line about it names
    ("minprfaas.__main__", "serve --no-such-option", "--no-such-option"),
    ("minprfaas.__main__", "generate", "no prompt was given"),
    ("minprfaas.__main__", "profile --lengths 7", "--lengths [7]"),
    ("minprfaas.commands.two_datacenters", "--prompts P", "prompts file P"),
    ("minprfaas.commands.cluster", "--topology prfaas=2,pd=3 --split 7 --serve 0", "split is 7"),
    ("case_study.command", "--soak 0", "--soak is 0"), ("random_checkpoint", "OUT --shape huge", "'huge'"),
    ("demo_prompts", "OUT --seed -1", "--seed is -1"), ("random_checkpoint", "OUT --seed -1", "--seed is -1"))


def test_neither_help_nor_a_mistake_waits_for_torch():
    """That `plan` and `simulate` run without it is tested where they are; `inspect` reads mixers, which are torch's."""
    asked = [(module, ["--help"]) for module, _, _ in MISTAKES]
    asked += [("minprfaas.__main__", [command, "--help"]) for command in COMMANDS]
    asked += [(module, words.split()) for module, words, _ in MISTAKES]
    code = ("import contextlib, importlib, sys\nfrom minprfaas.errors import exit_on_user_error\n"
            f"programs = {PROGRAMS!r}\n"
            f"for module, words in {asked!r}:\n"
            "    sys.argv = [module, *words]\n"
            "    with contextlib.suppress(SystemExit):\n"
            "        main = importlib.import_module(module).main\n"
            "        exit_on_user_error(main)(*[words] * (module in programs))\n"
            "    assert 'torch' not in sys.modules, sys.argv")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=ROOT / "scripts", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISTAKES)
    assert [named for line, (_, _, named) in zip(lines, MISTAKES) if named not in line] == [], lines


def test_a_first_answer_waits_for_no_compiler():
    """PyTorch's takes as long to import as PyTorch itself, and nobody has asked for it."""
    code = ("import sys\nfrom minprfaas import SamplingParams, generate, load\n"
            "from minprfaas.commands import live_run\n"
            "generate(*load(), ['Once upon a time ' * 30], SamplingParams(max_tokens=3))\n"
            "assert 'torch._dynamo' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one_that_it_takes(command):
    """Parsed, not run."""
    parser = ArgumentParser()
    importlib.import_module(f"minprfaas.commands.{command}").add_arguments(parser)
    try:
        parser.parse_args(shlex.split(COMMANDS[command][1]))
    except UserError as error:
        pytest.fail(str(error))
