"""Starting and ending the processes: what the environment may say wrongly, and who ends when somebody else does.

Chapter 13.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_two_datacenters_program import PROGRAM, arguments, prompts_file  # noqa: F401 (a fixture)

from minprfaas.cluster.launch import Launch, StoreAddress, threads_of
from minprfaas.cluster.topology import Place
from minprfaas.config import Role
from minprfaas.errors import UserError
from minprfaas.files import OutputFile

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


def test_without_torchrun_there_is_no_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert Launch.from_environment(world_size=2) is None


def test_a_port_that_is_taken_gets_one_line(checkpoints, prompts_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(PROGRAM + arguments(checkpoints, prompts_file), **{**TORCHRUN, "MASTER_PORT": port})
    one_line(done, f"MASTER_PORT {port}: Address already in use")


def test_a_left_over_agent_store_gets_one_line_and_soon(checkpoints, prompts_file):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    done = run(PROGRAM + arguments(checkpoints, prompts_file), TORCHELASTIC_USE_AGENT_STORE="True",
               **{**TORCHRUN, "MASTER_PORT": port})
    one_line(done, "TORCHELASTIC_USE_AGENT_STORE")


def test_what_listens_where_the_store_should_be_and_never_answers_gets_one_line(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.launch.AGENT_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = StoreAddress(*mute.getsockname(), "MASTER_PORT", agent_serves=True)
        with pytest.raises(UserError, match="no store at MASTER_PORT: what listens there does not answer as one"):
            address.open()


def test_an_interface_that_does_not_exist_gets_one_line(checkpoints, prompts_file):
    done = run(PROGRAM + arguments(checkpoints, prompts_file), GLOO_SOCKET_IFNAME="nope0")
    one_line(done, "nope0")


def test_a_mistake_that_one_process_sees_first_is_said_by_the_other(checkpoints, prompts_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1': time.sleep(1)\n")
    done = run(PROGRAM + arguments(checkpoints, prompts_file, "--pool-blocks", "2"), PYTHONPATH=path_with(tmp_path))
    one_line(done, "KVCache pool")


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


def wait_until(reached, deadline_s=60):
    until_s = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < until_s, "not reached by its deadline"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_whoever_started_the_processes_takes_them_along(checkpoints, prompts_file, number):
    command = PROGRAM + arguments(checkpoints, prompts_file, "--link-gbps", "0.00001")  # it would take minutes
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                start_new_session=True)
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
    """All at once: torchrun's left-over variable (our own launcher does not hand it on), a terminal without arrows, and
    a prompt of spaces only."""
    prompts_file.write_text('{"id": "blank", "prompt": "   ", "max_tokens": 3}\n')
    done = run(PROGRAM + arguments(checkpoints, prompts_file, "--check"), PYTHONIOENCODING="ascii",
               TORCHELASTIC_USE_AGENT_STORE="True")
    assert done.returncode == 0 and "link A ? B" in done.stdout, done.stderr
    assert "1 of 1 answers are identical" in done.stdout


def test_a_closed_output_is_no_reason_to_die(checkpoints, prompts_file):
    closed = run(["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, *arguments(checkpoints, prompts_file)])
    assert closed.returncode == 0 and closed.stderr == ""


def test_a_full_disk_is_one_line_after_the_answers(checkpoints, prompts_file):
    done = run(PROGRAM + arguments(checkpoints, prompts_file, "--json", "/dev/full"))
    one_line(done, "/dev/full cannot be written")
    assert "[p20]" in done.stdout and "3 answers in" in done.stdout, "the answers stay on the screen"
    assert not Path("/dev/full").is_file(), "a device is not replaced by a file"


def test_an_output_that_cannot_be_written_is_found_before_the_run(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(UserError, match="cannot be written"):
            OutputFile(path)
    output = OutputFile(tmp_path / "out.json")
    output.close()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("cores, threads", [(1, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (4, [1, 1, 1, 1]), (6, [1, 1, 2, 2]),
                                            (7, [2, 1, 2, 2]), (16, [4, 4, 4, 4])])
def test_nodes_of_one_host_share_its_cores_and_those_that_prefill_get_what_remains(cores, threads):
    names = ("pd-1", "pd-2", "prfaas-0", "pd-0")
    roles = (Role.PDD, Role.PDD, Role.PRFAAS, Role.PDP)
    places = [Place("front", "pd", {}, has_front=True), *(Place(n, n[:2], {n: role}) for n, role in zip(names, roles))]
    assert threads_of(places, cores) == dict(zip(names, threads))
