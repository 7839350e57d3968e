"""Starting and ending the processes: what the environment may say wrongly, and who ends when somebody else does.

Chapter 13.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import programs
import pytest
import torch
import torch.distributed as dist
from test_transport_binding import listening
from test_two_datacenters_program import PROGRAM, arguments, prompts_file  # noqa: F401 (a fixture)

from minprfaas.cluster.launch import (Launch, StoreAddress, _wait_for, emulated_line, own_device, start_processes)
from minprfaas.config import LineConfig, WeatherChange
from minprfaas.errors import UserError

DEADLINE_S = 120
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


def run(command, **environment):
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S,
                          env={**os.environ, **environment})


def path_with(directory):
    return f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def one_line(done, said):
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("change, said", [
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not"), ({"MASTER_PORT": None}, "MASTER_PORT is not"),
    ({"RANK": "abc"}, "RANK is 'abc'"), ({"RANK": "2"}, "RANK is '2'"), ({"WORLD_SIZE": "3"}, "started 3 processes"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"), ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ({"RANK": "9" * 5000}, "RANK is '999"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'")])
def test_an_environment_that_is_not_torchruns_is_named(monkeypatch, change, said):
    for name in ("LOCAL_RANK", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**TORCHRUN, **change}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        Launch.from_environment(world_size=2)
    assert len(str(caught.value)) < 300


def test_a_process_takes_its_place_and_its_store_from_torchruns_environment(monkeypatch):
    for name in ("LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment(world_size=2) is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    address = StoreAddress("127.0.0.1", 1234, "MASTER_ADDR 127.0.0.1 MASTER_PORT 1234")
    assert Launch.from_environment(2) == Launch(1, 1, address) and not address.agent_serves
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert Launch.from_environment(2) == Launch(1, 0, replace(address, agent_serves=True))
    assert own_device("cpu", 3) == torch.device("cpu")


@pytest.mark.parametrize("agent_serves, who", [
    (False, " within 0.5 s; the front end's process"), (True, "; torchrun (TORCHELASTIC_")])
def test_a_store_is_served_by_whom_it_is_to_be_and_awaited_for_so_long(monkeypatch, agent_serves, who):
    for name in ("STORE_DEADLINE_S", "AGENT_DEADLINE_S"):
        monkeypatch.setattr(f"minprfaas.cluster.launch.{name}", 0.5)
    monkeypatch.setattr("minprfaas.cluster.launch.WATCH_EVERY_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = StoreAddress("127.0.0.1", port, "here", agent_serves)
    with pytest.raises(UserError, match="no store at here: nobody answers there" + re.escape(who)):
        address.open(serves=agent_serves)  # torchrun's agent serves its own
    for name in ("STORE_DEADLINE_S", "AGENT_DEADLINE_S"):
        monkeypatch.setattr(f"minprfaas.cluster.launch.{name}", DEADLINE_S)
    served = StoreAddress("127.0.0.1", port, "here").open(serves=True)
    assert [each for each in listening() if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    address.open().set("said", "by one")
    assert served.get("said") == b"by one"
    with pytest.raises(UserError, match="no store at here: Address already in use.*so this process cannot serve it"):
        StoreAddress("127.0.0.1", port, "here").open(serves=True)


def test_a_line_is_emulated_where_there_is_a_rate_a_round_trip_or_weather_and_shared_by_its_run():
    store = dist.HashStore()
    assert emulated_line(LineConfig(), store, "pd", "prfaas") is None
    for config in (LineConfig(gbps=1.0), LineConfig(rtt_ms=1.0), LineConfig(weather=(WeatherChange(1.0, gbps=1.0),))):
        line = emulated_line(config, store, "pd", "prfaas")
        name = f"minprfaas-{store.get('run id').decode()}-pd-prfaas.line"
        assert line.config == config and (Path(tempfile.gettempdir()) / name).exists()
        line.close()
        assert not (Path(tempfile.gettempdir()) / name).exists()


@pytest.fixture
def start():
    """`start_processes`, whose signal handlers end with the test. What a process does is a function of its name."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(names, front, does, **options):
        def main(argv):
            return does(names[int(os.environ["RANK"])], *argv)

        return start_processes(names, front, main, ["said"], **options)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def come_to_pass(path):
    """In a process that was started: until the file is there."""
    until_s = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until_s:
        time.sleep(0.005)


def test_each_process_knows_its_place_and_nothing_of_a_torchrun_that_was_here_before(start, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def note(name, said):
        keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        is_a_group = "group" if os.getpgid(0) == os.getpid() else "of its parent's group"
        found = [said, *(os.environ.get(key, "none") for key in keys), is_a_group, str(torch.get_num_threads())]
        (tmp_path / name).write_text(" ".join(found))
        return 0

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert start(["a", "b"], None, note) == 0
    torch.set_num_threads(threads)
    first, second = ((tmp_path / name).read_text().split() for name in "ab")
    assert (first[:4], second[:4]) == (["said", "0", "0", "2"], ["said", "1", "1", "2"])
    assert first[4:] == second[4:] and 0 < int(first[5]) < 65_536
    assert (first[4], *first[6:8]) == ("127.0.0.1", "none", "group"), "an interrupt is for who started it"
    assert first[8] == "1", "they share the cores"


@pytest.mark.parametrize("statuses, front, expected", [
    (dict(a=0, b=0), None, 0), (dict(a=0, b=3, c=1), None, 3), (dict(a=5, b=1), "a", 5), (dict(a=0, b=1), "a", 0)])
def test_the_front_ends_status_counts_or_without_one_the_worst(start, capfd, statuses, front, expected):
    assert start([*statuses], front, lambda name, _: statuses[name], restart="--node {name}") == expected
    said = capfd.readouterr().err.splitlines()
    assert len(said) == len({*said}) and all(" has ended with status " in line for line in said)


def test_who_refuses_a_users_mistake_ends_all_at_once(start, tmp_path):
    assert start(["a", "b"], "a", lambda name, _: 2 if name == "b" else time.sleep(600)) == 2


def test_who_outlives_the_front_end_has_time_to_tidy_up(start, tmp_path):
    def does(name, _):
        if name == "front":
            (tmp_path / "front ended").write_text(str(os.getpid()))
        else:
            wait_until(lambda: has_ended(tmp_path / "front ended"))
            (tmp_path / "tidied").touch()
        return 0

    assert start(["front", "a"], "front", does) == 0 and (tmp_path / "tidied").exists()


def test_a_signal_for_a_front_end_that_has_ended_ends_who_waits_for_the_others(start, tmp_path):
    def does(name, _):
        if name == "front":
            (tmp_path / "front ended").write_text(str(os.getpid()))
            return 0
        wait_until(lambda: has_ended(tmp_path / "front ended"))
        os.kill(os.getppid(), signal.SIGINT)

    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        start(["front", "a"], "front", does, front_ends_all=True)


def test_an_interrupt_between_a_process_and_its_own_group_ends_it_without_a_word():
    done = run([sys.executable, "-c", "import os, signal\nfrom multiprocessing.util import register_after_fork\n"
                "from minprfaas.cluster.launch import start_processes\n"
                "register_after_fork(os, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
                "print(start_processes(['a'], 'a', lambda argv: 0, []))"])
    assert (done.stdout, done.stderr) == (f"{256 - signal.SIGINT}\n", "")


def test_a_process_that_ends_is_told_once_with_how_to_start_it_again(start, tmp_path, capfd):
    def does(name, _):
        if name != "front":
            come_to_pass(tmp_path / {"a": "begin", "b": "a ended"}[name])
            (tmp_path / f"{name} ended").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL) if name == "a" else os._exit(7)
        (tmp_path / "begin").touch()
        come_to_pass(tmp_path / "b ended")
        wait_until(lambda: all(has_ended(tmp_path / f"{name} ended") for name in "ab"))
        return 0

    assert start(["front", "a", "b"], "front", does, restart="cluster.py --node {name}") == 0
    said = sorted(capfd.readouterr().err.splitlines())
    assert said == ["a has ended with status -9; cluster.py --node a starts it again",
                    "b has ended with status 7; cluster.py --node b starts it again"]


def test_with_restarts_a_process_that_was_killed_begins_anew_and_one_that_failed_does_not(start, tmp_path, capfd):
    def does(name, _):
        if name == "front":
            come_to_pass(tmp_path / "again")
            wait_until(lambda: has_ended(tmp_path / "b ended"))
            return 0
        if name == "b":
            (tmp_path / "b ended").write_text(str(os.getpid()))
            os._exit(1)
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "again").touch()
        return 0

    assert start(["front", "a", "b"], "front", does, restarts=True) == 0
    said = sorted(capfd.readouterr().err.splitlines())
    assert re.fullmatch(r"a has ended with status -9; it is process \d+ now", said[0])
    assert said[1:] == ["b has ended with status 1"]


def test_who_failed_before_the_front_end_ended_is_told_however_late_anybody_looks(capfd):
    processes = {"b": ForkProcess(target=os._exit, args=(1,), name="b"), "front": ForkProcess(name="front")}
    for process in processes.values():
        process.start()
        process.join(DEADLINE_S)
    assert _wait_for([processes["front"]], processes, "", None) == 0
    assert capfd.readouterr().err == "b has ended with status 1\n"


def test_a_port_that_is_taken_gets_one_line(checkpoints, prompts_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = programs.run(PROGRAM[1], *arguments(checkpoints, prompts_file), timeout=DEADLINE_S,
                            **{**TORCHRUN, "MASTER_PORT": port})
    one_line(done, f"MASTER_PORT {port}: Address already in use")


def test_a_left_over_agent_store_gets_one_line_and_soon(checkpoints, prompts_file):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    done = programs.run(PROGRAM[1], *arguments(checkpoints, prompts_file), timeout=DEADLINE_S,
                        TORCHELASTIC_USE_AGENT_STORE="True", **{**TORCHRUN, "MASTER_PORT": port})
    one_line(done, "TORCHELASTIC_USE_AGENT_STORE")


def test_what_listens_where_the_store_should_be_and_never_answers_gets_one_line(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.launch.AGENT_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = StoreAddress(*mute.getsockname(), "MASTER_PORT", agent_serves=True)
        with pytest.raises(UserError, match="no store at MASTER_PORT: what listens there does not answer as one"):
            address.open()


def test_an_interface_that_does_not_exist_gets_one_line(checkpoints, prompts_file):
    done = programs.run(PROGRAM[1], *arguments(checkpoints, prompts_file), timeout=DEADLINE_S,
                        GLOO_SOCKET_IFNAME="nope0")
    one_line(done, "nope0")


HELD_BACK = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

from minprfaas.commands import live_run
from minprfaas.errors import run_program

seen, engines_of, sleep = Path(sys.argv.pop(1)), live_run.engines_of, time.sleep

def held_back(*arguments):
    while os.environ.get("RANK") == "1" and not seen.exists():
        sleep(0.01)
    return engines_of(*arguments)

def stand_back(seconds):
    seen.touch()
    sleep(seconds)

live_run.engines_of, live_run.time = held_back, SimpleNamespace(sleep=stand_back)
run_program("minprfaas.commands.two_datacenters")
"""


def test_a_mistake_that_one_process_sees_first_is_said_by_the_other(checkpoints, prompts_file, tmp_path):
    """The front end's process makes its engine only when the other one has seen the mistake, and stands back."""
    program, seen = tmp_path / "held_back.py", tmp_path / "seen"
    program.write_text(HELD_BACK)
    done = programs.run(program, seen, *arguments(checkpoints, prompts_file, "--pool-blocks", "2"), timeout=DEADLINE_S)
    one_line(done, "KVCache pool")
    assert seen.exists(), "the process that saw it first spoke itself"


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_ended(path):
    """Whether the process is over whose number is, or is about to be, in this file."""
    pid = path.read_text() if path.exists() else ""
    return pid != "" and not is_running(pid)


def wait_until(reached, deadline_s=60):
    until_s = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < until_s, "not reached by its deadline"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_whoever_started_the_processes_takes_them_along(checkpoints, prompts_file, number):
    options = arguments(checkpoints, prompts_file, "--link-gbps", "0.00001")  # it would take minutes
    launcher = programs.Program(PROGRAM[1], *options)
    try:
        for line in launcher.stdout:
            if line.startswith("routing"):
                break
        workers = children_of(launcher.pid)
        assert len(workers) == 2
        launcher.send_signal(number)
        launcher.wait(DEADLINE_S)
        wait_until(lambda: not any(map(is_running, workers)))
        errors = launcher.stderr.read()
    finally:
        launcher.kill()
        launcher.communicate()
    assert "Traceback" not in errors
    assert launcher.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[number]


@pytest.mark.parametrize("after_s", [0.2, 0.6, 1.2])
def test_an_interrupt_during_the_start_is_one_line_at_most(checkpoints, prompts_file, tmp_path, after_s):
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'began')!r}, 'w').close()\n")
    starting = subprocess.Popen(PROGRAM + arguments(checkpoints, prompts_file), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, start_new_session=True,
                                env={**os.environ, "PYTHONPATH": path_with(tmp_path)})
    try:
        wait_until((tmp_path / "began").exists)  # before that it is the interpreter's own start that is interrupted
        with pytest.raises(subprocess.TimeoutExpired):
            starting.wait(after_s)
        os.killpg(starting.pid, signal.SIGINT)
        _, errors = starting.communicate(timeout=DEADLINE_S)
    finally:
        starting.kill()
    assert starting.returncode != 0 and errors.count("\n") <= 3 and "File " not in errors, errors


def test_an_environment_a_terminal_and_a_prompt_that_are_odd_are_no_reason_to_die(checkpoints, prompts_file):
    """All at once: torchrun's left-over variable (our own launcher does not hand it on), a secret that is no text, a
    terminal without arrows, and a prompt of spaces only."""
    prompts_file.write_text('{"id": "blank", "prompt": "   ", "max_tokens": 3}\n')
    done = run(PROGRAM + arguments(checkpoints, prompts_file, "--check"), PYTHONIOENCODING="ascii",
               TORCHELASTIC_USE_AGENT_STORE="True", MINPRFAAS_SECRET=os.fsdecode(b"\xff"))
    assert done.returncode == 0 and "link A ? B" in done.stdout, done.stderr
    assert "1 of 1 answers are identical" in done.stdout


def test_a_closed_output_is_no_reason_to_die(checkpoints, prompts_file):
    closed = run(["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, *arguments(checkpoints, prompts_file)])
    assert closed.returncode == 0 and closed.stderr == ""


def test_a_full_disk_is_one_line_after_the_answers(checkpoints, prompts_file):
    done = programs.run(PROGRAM[1], *arguments(checkpoints, prompts_file, "--json", "/dev/full"), timeout=DEADLINE_S)
    one_line(done, "/dev/full cannot be written")
    assert "[p20]" in done.stdout and "3 answers in" in done.stdout, "the answers stay on the screen"
    assert not Path("/dev/full").is_file(), "a device is not replaced by a file"
