"""The live cluster as a user runs it: many processes, two runs side by side, nodes that die. Chapters 13 and 14."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

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
        command = PROGRAM + arguments(checkpoints, prompts, topology, "--json", str(tmp_path / f"out{seed}.jsonl"),
                                      "--link-gbps", "0.01", "--rtt-ms", "5")
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for seed, running in enumerate(runs):
        said, errors = running.communicate(timeout=DEADLINE_S)
        assert running.returncode == 0, errors
        assert errors == "" and "8 of 8 answers are identical" in said
        rows = rows_of(tmp_path / f"out{seed}.jsonl")
        assert [row["route"] for row in rows.values()] == ["prfaas", "pdp"] * 4
        assert all((row["kv_bytes"] > 0) == (row["route"] == "prfaas") for row in rows.values())
    used = {re.search(r"(prfaas|pd)-\d", row["reason"])[0] for row in rows_of(tmp_path / "out0.jsonl").values()}
    assert used == {"prfaas-0", "prfaas-1", "pd-0"}, "both PrfaaS nodes and the PD-P node had work"


def test_killed_prefill_nodes_of_both_datacenters_cost_prefills_and_no_answer(checkpoints, tmp_path):
    after = [{"id": f"next{number}", "after": "p1", "prompt": "abc " * length, "max_tokens": 8}
             for number, length in enumerate((5, 10, 15))]
    prompts = write_prompts(tmp_path / "prompts.jsonl", (400, 20, 300, 350, 310), more=after)
    # 100 kbit/s: the long prompts' KVCache is under way for seconds when the short answer is printed
    command = PROGRAM + arguments(checkpoints, prompts, "prfaas=2,pd=3", "--json", str(tmp_path / "out.jsonl"),
                                  "--link-gbps", "0.0001", "--link-timeout-s", "2")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in running.stdout:
            if line.startswith("[p1]"):
                for name in ("prfaas-0", "pd-0"):
                    kill(running.pid, name)
                break
        said, errors = running.communicate(timeout=DEADLINE_S)
    finally:
        running.kill()
    assert running.returncode == 0, errors
    assert "8 of 8 answers are identical" in said
    assert "prfaas-0 has ended with status -9; --node prfaas-0 --store 127.0.0.1:" in errors
    rows = rows_of(tmp_path / "out.jsonl")
    moved = [row for row in rows.values() if "avoiding" in row["reason"]]
    assert any("avoiding prfaas-0" in row["reason"] and row["route"] == "prfaas" for row in moved), rows
    assert any("avoiding pd-0" in row["reason"] for row in moved), rows


def kill(launcher, name, number=signal.SIGKILL):
    """Send a signal to the process of the run that plays `name`: rank by rank they are the launcher's children."""
    rank = ["front", "prfaas-0", "prfaas-1", "pd-0", "pd-1", "pd-2"].index(name)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(children[rank]), number)
