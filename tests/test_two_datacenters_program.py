"""The main program as a user runs it: processes, files, exit statuses, and a datacenter that dies. Chapter 13."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Program, run

from minprfaas.cluster.launch import StoreAddress
from minprfaas.cluster.topology import Topology
from minprfaas.commands.live_options import Run, checked
from minprfaas.commands.live_run import Seat, play
from minprfaas.commands.two_datacenters import main, parser
from minprfaas.config import LineConfig, LinkConfig
from minprfaas.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "scripts" / "two_datacenters.py")]
DEADLINE_S = 120


@pytest.fixture
def prompts_file(tmp_path):
    draw = random.Random(0)
    lines = [{"id": f"p{size}", "prompt": "".join(draw.choices("abcdefgh ", k=size)), "max_tokens": 8}
             for size in (400, 20, 300)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def arguments(checkpoints, prompts_file, *more):
    return ["--model", str(checkpoints["kimi_linear"]), "--prompts", str(prompts_file), "--threshold", "100",
            "--prefill-chunk", "64", "--block-tokens", "16", *more]


def test_two_processes_answer_and_agree_with_one(checkpoints, prompts_file, tmp_path):
    out, timeline = tmp_path / "out.jsonl", tmp_path / "timeline.json"
    done = subprocess.run(PROGRAM + arguments(checkpoints, prompts_file, "--check", "--json", str(out), "--timeline",
                                              str(timeline), "--link-gbps", "0.01", "--rtt-ms", "5"),
                          capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 answers are identical" in done.stdout and "emulated" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["route"] for row in rows] == ["prfaas", "pdp", "prfaas"]
    needed = {"id", "token_ids", "text", "route", "prompt_tokens", "cached_tokens", "kv_bytes", "prefill_s",
              "transfer_s", "ttft_s"}
    assert all(needed <= set(row) for row in rows)
    names = {event["name"] for event in json.loads(timeline.read_text())["traceEvents"]}
    assert {"layer 0", "layer 3", "step of 1"} <= names


def test_a_second_turn_continues_the_first_and_crosses_as_an_increment(checkpoints, prompts_file, tmp_path):
    out = tmp_path / "out.jsonl"
    with prompts_file.open("a") as file:
        file.write("\n" + json.dumps({"id": "next", "after": "p300", "prompt": "abc " * 33, "max_tokens": 8}))
    done = run(PROGRAM[1], *arguments(checkpoints, prompts_file, "--check", "--json", str(out)), timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 answers are identical" in done.stdout
    turn = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}["next"]
    assert turn["route"] == "prfaas" and turn["prompt_tokens"] == 300 + 8 + 132
    assert turn["cached_tokens"] >= 288 and turn["kv_bytes"] < turn["kv_bytes_without_cache"]


def test_a_prefill_datacenter_killed_in_the_middle_costs_a_prefill_and_no_answer(checkpoints, prompts_file, tmp_path):
    out = tmp_path / "out.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # 10 kbit/s: the long prompts' KVCache is under way for many seconds when the short answer is printed
    options = arguments(checkpoints, prompts_file, "--check", "--json", str(out), "--link-gbps", "0.00001",
                        "--link-timeout-s", "2")
    nodes = []
    try:
        for rank in (0, 1):
            nodes.append(Program(PROGRAM[1], *options, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                                 MASTER_PORT=str(port)))
        for line in nodes[1].stdout:
            if line.startswith("[p20]"):
                nodes[0].send_signal(signal.SIGKILL)
                break
        rest, errors = nodes[1].communicate(timeout=DEADLINE_S)
    finally:
        for node in nodes:
            node.kill()
    assert nodes[1].returncode == 0, errors
    assert "3 of 3 answers are identical" in rest
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["p400"]["route"] == rows["p300"]["route"] == "pdp"
    assert "link" in rows["p400"]["fallback"]


@pytest.mark.parametrize("change, said", [
    (["--threshold", "-1"], "threshold is -1"),
    (["--lanes", "0"], "lanes is 0"),
    (["--link-gbps", "0"], "bandwidth in Gbps is 0.0"),
    (["--rtt-ms", "-5"], "round-trip time in ms is -5.0"),
    (["--deadline-s", "0"], "deadline is 0.0"),
    (["--pool-blocks", "0"], "--pool-blocks is 0"),
    (["--prompts", "/no/such/file"], "/no/such/file"),
    (["--weather", "/no/such/weather"], "/no/such/weather"),
    (["--json", "/no/such/folder/out.jsonl"], "/no/such/folder"),
])
def test_a_mistake_on_the_command_line_is_named_before_any_process_is_started(checkpoints, prompts_file, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main(arguments(checkpoints, prompts_file, *change))


@pytest.mark.parametrize("change, said", [
    (["--device", "quantum"], "device 'quantum'"),
    (["--pool-blocks", "2"], "KVCache pool"),
    (["--model", "/no/such/directory"], "/no/such/directory"),
])
def test_a_mistake_that_the_processes_find_gets_one_line_and_status_2(
        checkpoints, prompts_file, tmp_path, change, said):
    out = tmp_path / "out.jsonl"
    done = run(PROGRAM[1], *arguments(checkpoints, prompts_file, "--json", str(out), *change), timeout=DEADLINE_S)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not out.exists()


LIMITED = """
import resource, sys
from minprfaas.errors import run_program
resource.setrlimit(resource.RLIMIT_NOFILE, (24, int(sys.argv.pop(1))))
run_program("minprfaas.commands.two_datacenters")
"""


@pytest.mark.parametrize("most, status, said", [(4096, 0, ""), (24, 2, "its limit is 24 (ulimit -n)")])
def test_a_limit_of_open_files_is_raised_or_else_named(checkpoints, prompts_file, tmp_path, most, status, said):
    (tmp_path / "limited.py").write_text(LIMITED)
    done = run(tmp_path / "limited.py", most, *arguments(checkpoints, prompts_file), timeout=DEADLINE_S)
    assert done.returncode == status and said in done.stderr and done.stderr.count("\n") == status // 2, done.stderr


def test_the_store_is_there_before_its_process_has_a_model_and_awaited_for_as_long_as_the_front_end(prompts_file):
    """The others ask for it at once, and the front end's process may compile for minutes."""
    topology = Topology(prfaas=1, pd=1)
    asked = ["--prompts", str(prompts_file), "--model", "no such model", "--wait-s", "0.01"]
    run, places = checked(parser().parse_args(asked), topology), topology.two_places()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = StoreAddress("127.0.0.1", taken.getsockname()[1], "--store S")
        with pytest.raises(UserError, match="no store at --store S: Address already in use"):
            play(run, Seat(places, places[1], address))
    with pytest.raises(UserError, match="nobody answers there within 0.01 s"):
        play(run, Seat(places, places[0], address, is_apart=True))


def test_a_node_that_compiles_is_waited_for_longer(prompts_file):
    for more, seconds in ([], 120), (["--compile"], 900), (["--compile", "--wait-s", "5"], 5):
        args = parser().parse_args(["--prompts", str(prompts_file), *more])
        assert Run(args, Topology(prfaas=1, pd=1), LinkConfig(), LineConfig(), [], None, None).wait_s == seconds


@pytest.mark.parametrize("lanes, mib", [(1, 4), (2, 8), (8, 32), (16, 32)])
def test_gpus_have_larger_chunks_the_more_lanes_there_are(prompts_file, lanes, mib):
    asked = ["--prompts", str(prompts_file), "--device", "cuda", "--lanes", str(lanes)]
    assert checked(parser().parse_args(asked), Topology(prfaas=1, pd=1)).link.chunk_bytes == mib * 2**20
