"""The README and the pages of docs/ keep their word: every command works, and every link leads somewhere.

Chapters 13 and 15. Quick: each line is parsed as it stands by the program that it starts. Heavy: what needs no GPU, no
network, no second machine and no more than two minutes is run as it is written, from a folder as the demo leaves it:
`python -m pytest -m heavy -s tests/test_readme.py`, which lists what was not run.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas.__main__ import COMMANDS
from minprfaas.commands import cluster, two_datacenters
from minprfaas.errors import ArgumentParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("t*s/README.md"))]
DEADLINE_S = 900
PARSERS = {"scripts/cluster.py": cluster.parser, "scripts/two_datacenters.py": two_datacenters.parser}
OPTIONS = {option for folder in ("scripts", "minprfaas/commands", "tutorials") for path in (ROOT / folder).rglob("*.py")
           for option in re.findall(r'"(--[a-z][a-z-]*)"', path.read_text(encoding="utf-8"))}
NOT_RUN = {  # a piece of the line, and why it is only parsed
    "<this repository>": "a placeholder", "pip install": "the network", "hf download": "the network",
    "models/": "a checkpoint that would have to be downloaded", "two_gpu_check": "two GPUs", "--device cuda": "a GPU",
    "10.0.0.1": "two machines", "export ": "goes with the line below it", "--quick": "ten minutes",
    "two_datacenters.py --prompts FILE": "placeholders", "--load poisson": "a minute; tests/test_cluster_program.py",
    "serve": "until a signal; tests/test_serving.py", "profile --out P": "placeholders", "report --json RUN":
    "placeholders", "FILE": "placeholders", "DIR": "placeholders", "…": "an ellipsis", "NAME": "placeholders",
    "-m heavy": "minutes", "--check 2": "an exercise that the reader has to answer first", "test.sh": "the whole suite",
    "bench.py cpu": "minutes", "bench.py gpu": "a GPU", "eval_tiny": "minutes", "train_tiny": "half an hour",
    "make_parity": "needs Transformers", "random_checkpoint": "a gigabyte",
    "bash scripts/demo.sh": "tests/test_demo.py"}


def commands() -> list[tuple[Path, str]]:
    """(page, line) of every command of a bash block, and of every `code` that begins as a command does."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        inline = re.findall(r"`((?:python|torchrun|bash) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found += ((page, line) for line in dict.fromkeys([*lines, *map(" ".join, map(str.split, inline))]))
    return found


def why_not_run(line):
    return next((why for piece, why in NOT_RUN.items() if piece in line), None)


@pytest.mark.parametrize("page, line", commands(), ids=lambda value: getattr(value, "stem", str(value)[:60]))
def test_a_command_names_files_that_are_there_and_options_that_exist(page, line):
    words = shlex.split(line)
    for word in words:
        if re.fullmatch(r"(?:scripts|tutorials|tests)/[\w/.]+", word):
            assert (ROOT / word).exists(), f"{page.name}: {word} is not there"
    if "-m" in words and "minprfaas" in words:
        command, *rest = words[words.index("minprfaas") + 1:]
        assert command in COMMANDS
        parser = ArgumentParser()
        importlib.import_module(f"minprfaas.commands.{command}").add_arguments(parser)
        parser.parse_args([word for word in rest if word not in ("…", "[DIR]")])  # a UserError names what is wrong
    for program, parser in PARSERS.items():
        if program in words:
            rest = [word for word in words[words.index(program) + 1:] if word != "…"]
            known = {option for action in parser()._actions for option in action.option_strings}
            assert {word for word in rest if word.startswith("--")} <= known
            if "…" not in words:
                parser().parse_args(rest)
    programs = [word for word in words if re.fullmatch(r"(?:scripts|tutorials)/[\w/]+\.py", word)]
    if programs and programs[0] not in PARSERS:
        assert {word for word in words if word.startswith("--")} - {"--nproc-per-node", "--standalone"} <= OPTIONS
    if "scripts/bench.py" in words:
        name = words[words.index("scripts/bench.py") + 1]
        assert name == "NAME" or (ROOT / "scripts" / "benches" / f"{name}.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_the_python_of_the_readme_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "Ilsa Trent"


@pytest.mark.heavy
def test_every_command_of_the_readme_that_can_run_here_runs_as_written(tmp_path, capsys):
    """In one shell's environment after `. .venv/bin/activate`, whose `python` is this one."""
    for name in ("scripts", "tutorials", "minprfaas", "tests", "docs", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for name in ("python", "torchrun"):
        module = " -m torch.distributed.run" if name == "torchrun" else ""
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(line):
        return subprocess.run(["bash", "-c", f". .venv/bin/activate && {line}"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=DEADLINE_S, env=environment)

    # what the demo leaves, on a smaller scale
    assert run("python scripts/demo_prompts.py out/demo_prompts.jsonl --tokens 1200 300 --next-turn 0").returncode == 0
    made = run("python scripts/two_datacenters.py --prompts out/demo_prompts.jsonl --link-gbps 0.02 "
               "--json out/demo.jsonl --timeline out/demo_timeline.json")
    assert made.returncode == 0, made.stderr
    ran, left = [], []
    for page, line in commands():
        why = why_not_run(line)
        if page != ROOT / "README.md" or why is not None:
            left.append(f"not run ({why or 'not the README'}): {line}")
            continue
        done = run(line)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran.append(line)
    with capsys.disabled():
        print("", *(f"ran: {line}" for line in ran), *left, sep="\n")
    assert len(ran) >= 5
