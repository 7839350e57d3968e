"""The live cluster as a user runs it: many processes, two runs side by side, nodes that die. Chapters 13 and 14."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Program, run

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "scripts" / "cluster.py")]
DEADLINE_S = 240


def write_prompts(path, lengths, seed=0, more=()):
    draw = random.Random(seed)
    lines = [{"id": f"p{number}", "prompt": "".join(draw.choices("abcdefgh ", k=length)), "max_tokens": 8}
             for number, length in enumerate(lengths)]
    path.write_text("\n".join(map(json.dumps, [*lines, *more])))
    return path


def arguments(checkpoints, prompts, topology, *more):
    return ["--topology", topology, "--model", str(checkpoints["kimi_linear"]), "--prompts", str(prompts), "--check",
            "--threshold", "100", "--prefill-chunk", "64", "--block-tokens", "16", "--lanes", "2", *more]


def rows_of(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_six_processes_and_three_more_beside_them_answer_as_one_process_would(checkpoints, tmp_path):
    runs = []
    for seed, topology in enumerate(("prfaas=2,pd=3", "prfaas=1,pd=1")):
        prompts = write_prompts(tmp_path / f"prompts{seed}.jsonl", (400, 20, 300, 60, 350, 90, 310, 30), seed)
        out = str(tmp_path / f"out{seed}.jsonl")
        runs.append(Program(PROGRAM[1], *arguments(checkpoints, prompts, topology, "--json", out, "--link-gbps", "0.01",
                                                   "--rtt-ms", "5")))
    for seed, running in enumerate(runs):
        said, errors = running.communicate(timeout=DEADLINE_S)
        assert running.returncode == 0, errors
        assert errors == "" and "8 of 8 answers are identical" in said
        rows = rows_of(tmp_path / f"out{seed}.jsonl")
        assert [row["route"] for row in rows.values()] == ["prfaas", "pdp"] * 4
        assert all((row["kv_bytes"] > 0) == (row["route"] == "prfaas") for row in rows.values())
    used = {re.search(r"(prfaas|pd)-\d", row["reason"])[0] for row in rows_of(tmp_path / "out0.jsonl").values()}
    assert used == {"prfaas-0", "prfaas-1", "pd-0"}, "both PrfaaS nodes and the PD-P node had work"


@pytest.mark.heavy
def test_two_prfaas_datacenters_on_unequal_lines_share_the_work_and_every_answer_is_right(checkpoints, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", (400, 20, 380, 390, 410, 370, 350, 360))
    running = start(PROGRAM + arguments(
        checkpoints, prompts, "prfaas-a=1,prfaas-b=1,pd=2", "--site-line", "prfaas-a=0.01",
        "--site-line", "prfaas-b=0.0005", "--json", str(tmp_path / "out.jsonl")))
    said, errors = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0, errors
    assert "8 of 8 answers are identical" in said and "link prfaas-b → B 0.5 Mbit/s" in said
    away = [row for row in rows_of(tmp_path / "out.jsonl").values() if row["route"] == "prfaas"]
    there = [row["prefill_node"] for row in away]
    assert len(away) == 7 and there.count("prfaas-a-0") > there.count("prfaas-b-0")
    assert all("expected: prfaas-a in " in row["reason"] for row in away)


DYING = """
import os, signal

from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.errors import run_program

ship = PrefillRole._ship


def ship_or_die(self, request, layer, start, end):
    ship(self, request, layer, start, end)
    if layer == 1 and (self.name == "prfaas-0" or (self.name == "pd-0" and request.id.startswith("turn"))):
        os.kill(os.getpid(), signal.SIGKILL)


PrefillRole._ship = ship_or_die
run_program("minprfaas.commands.cluster")
"""


def test_prefill_nodes_of_both_datacenters_that_are_killed_cost_prefills_and_no_answer(checkpoints, tmp_path):
    """Each dies between two layers of a prefill: the PrfaaS node in its first, the PD-P node in a second turn's."""
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    turns = [{"id": f"turn{number}", "after": f"turn{number - 1}" if number else "p1", "prompt": "abc " * 10,
              "max_tokens": 8} for number in range(2)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", (400, 20, 350), more=turns)
    done = run(program, *arguments(
        checkpoints, prompts, "prfaas=2,pd=3", "--json", str(tmp_path / "out.jsonl"), "--link-gbps", "0.01",
        "--link-timeout-s", "2", "--threshold", "340"), timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 answers are identical" in done.stdout
    for name in ("prfaas-0", "pd-0"):
        assert f"{name} has ended with status -9; --node {name} --store 127.0.0.1:" in done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    reasons = [rows[id]["reason"] for id in ("p0", "p2")]
    assert any("PrfaaS prfaas-1" in reason and "avoiding prfaas-0" in reason for reason in reasons)
    assert rows["p1"]["route"] == "pdp", "the PD-P node had answered before"
    assert [rows[f"turn{number}"]["route"] for number in range(2)] == ["prfaas"] * 2
    assert "no PD-P node" in rows["turn0"]["reason"] or "avoiding pd-0" in rows["turn0"]["reason"]


@pytest.mark.heavy
def test_a_node_that_was_killed_is_used_again_when_it_returns(checkpoints, tmp_path):
    after = [{"id": f"next{number}", "after": "p0", "prompt": "abcde " * (number + 20), "max_tokens": 8}
             for number in range(4)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", (300, 20, 250), more=after)
    # 20 kbit/s: the long prompts' KVCache is under way while the node returns
    common = arguments(checkpoints, prompts, "prfaas=2,pd=3", "--link-gbps", "0.00002", "--link-timeout-s", "2")
    running = start(PROGRAM + common + ["--json", str(tmp_path / "out.jsonl")])
    returned = None
    try:
        wait_for_line(running, "[p1]")
        kill(running.pid, "prfaas-1")
        again = running.stderr.readline()
        assert again.startswith("prfaas-1 has ended with status -9"), again
        options = re.search(r"--node prfaas-1 --store \S+(?= starts it again)", again)[0]
        returned = start(PROGRAM + common + options.split())
        wait_for_line(running, "prfaas-1 has joined as prfaas")
        said, errors = running.communicate(timeout=DEADLINE_S)
        assert running.returncode == 0, errors
        assert returned.wait(DEADLINE_S) == 0
    finally:
        end(running, returned)
    assert "7 of 7 answers are identical" in said
    used = [row["reason"] for row in rows_of(tmp_path / "out.jsonl").values()]
    assert any("PrfaaS prfaas-1" in reason for reason in used[3:]), used


@pytest.mark.heavy
def test_the_prefill_datacenter_outlives_the_other_one_and_serves_it_when_it_returns(checkpoints, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", (300, 20, 250))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"127.0.0.1:{probe.getsockname()[1]}"

    def torchrun(datacenter, processes, *more):
        return start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                      *PROGRAM[1:], *arguments(checkpoints, prompts, "prfaas=1,pd=2", *more),
                      "--datacenter", datacenter, "--store", store])

    prfaas = torchrun("prfaas", 1)
    pd = torchrun("pd", 3, "--link-gbps", "0.00001")  # it would take minutes
    second = None
    try:
        wait_for_line(pd, "[p1]")
        os.killpg(pd.pid, signal.SIGKILL)
        pd.wait(DEADLINE_S)
        second = torchrun("pd", 3)
        said, errors = second.communicate(timeout=DEADLINE_S)
        assert second.returncode == 0 and "3 of 3 answers are identical" in said, errors
        assert "PrfaaS, prefill: prfaas-0" in said
        assert prfaas.wait(DEADLINE_S) == 0
    finally:
        end(prfaas, pd, second)


def start(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(*processes):
    """Whatever is still there, with all that it has started."""
    for one in processes:
        if one is not None and one.poll() is None:
            one.kill()
            one.communicate()


def wait_for_line(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.communicate()[1])


def kill(launcher, *names):
    """Kill the processes of the run that play `names`: rank by rank they are the launcher's children, as long
    as none has ended."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = ["front", "prfaas-0", "prfaas-1", "pd-0", "pd-1", "pd-2"]
    assert len(children) == len(ranks)
    for name in names:
        os.kill(int(children[ranks.index(name)]), signal.SIGKILL)
