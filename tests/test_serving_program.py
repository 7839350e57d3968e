"""What others see of a house that serves, how it ends, and the same door before a cluster.

Chapter 13.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_support import (  # noqa: F401
    COMPLETIONS, DEADLINE_S, GREEDY, Response, call, connect, house, open_house, reference,
    request_bytes, streamed_text, wait_until)

from minprfaas.__main__ import main
from minprfaas.cluster import node, upkeep
from minprfaas.commands import cluster
from minprfaas.errors import UserError
from minprfaas.serving import api, door
from minprfaas.serving.metrics import TTFT_PARTS
from minprfaas.serving.service import serve

ROOT = Path(__file__).resolve().parent.parent


# ---- what others see of the house


def test_metrics_count_what_happened(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"]) as one:
        with one.running():
            for _ in range(3):
                usage = call(one.port, COMPLETIONS, {"prompt": [7] * 100, **GREEDY}).json["usage"]
            call(one.port, COMPLETIONS, {"prompt": 7})
            response = call(one.port, "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = values_of(response)
    assert values['requests_total{state="length",route="pdp"}'] == 3
    assert values["prompt_tokens_total"] == 300 and values["output_tokens_total"] == 36
    assert values["cached_tokens_total"] == 2 * usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert values['http_responses_total{path="/v1/completions",status="400"}'] == 1
    assert values['node_blocks{node="pd-0/pdd",role="pdd",device="cpu"}'] == 400
    total = values['ttft_seconds_sum{part="ttft"}']
    parts = [values[f'ttft_seconds_sum{{part="{part[:-2]}"}}'] for part in TTFT_PARTS if part != "ttft_s"]
    assert sum(parts) == pytest.approx(total) and total > 0
    buckets = [values[f'ttft_seconds_bucket{{part="ttft",le="{limit}"}}'] for limit in ("0.01", "1", "60", "+Inf")]
    assert buckets == sorted(buckets) and buckets[-1] == values['ttft_seconds_count{part="ttft"}'] == 3


def values_of(response):
    """What a scrape reads, by name and labels."""
    lines = [line.rsplit(" ", 1) for line in response.body.decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("minprfaas_"): float(value) for name, value in lines}


def test_gauges_say_how_each_node_stands(hybrid, checkpoints, monkeypatch):
    """Each node tells its figures once a second; here it does in every step."""
    monkeypatch.setattr(upkeep, "FIGURES_S", 0.0)
    monkeypatch.setattr(door, "SAMPLE_S", 0.0)
    prompt, answer = [7] * 100, dict(GREEDY)
    with house(*hybrid, checkpoints["kimi_linear"]) as one:
        with connect(one.port) as connection:
            connection.sendall(request_bytes(COMPLETIONS, {"prompt": prompt, **answer, "stream": True}))
            one.step_until(lambda: any(len(journey.output_ids) == 5 for journey in one.front.journeys.values()))
            during = values_of(call(one.port, "/metrics"))
            one.step_until(lambda: one.is_empty)
        one.step()
        after = values_of(call(one.port, "/metrics"))
    for values in (during, after):
        for node in ("pd-0/pdp", "pd-0/pdd"):
            states = [values[f'node_blocks_by_state{{node="{node}",state="{state}"}}']
                      for state in ("free", "cached", "in_use")]
            assert sum(states) == 400 and values[f'node_up_seconds{{node="{node}"}}'] > 0
            assert 0 < values[f'node_computed_seconds{{node="{node}"}}'] <= values[f'node_up_seconds{{node="{node}"}}']
    assert (during["requests_decoding"], during["requests_waiting"]) == (1, 0)
    assert during['node_load{node="pd-0/pdd"}'] == 1 and after['node_load{node="pd-0/pdd"}'] == 0
    assert during['node_blocks_by_state{node="pd-0/pdd",state="in_use"}'] > 0
    assert after['node_blocks_by_state{node="pd-0/pdd",state="in_use"}'] == 0
    assert after['node_blocks_by_state{node="pd-0/pdd",state="cached"}'] > 0
    assert after['node_tokens{node="pd-0/pdp",work="prefilled"}'] == len(prompt)
    assert after['node_tokens{node="pd-0/pdd",work="decoded"}'] == answer["max_tokens"] - 1  # prefill gave the first
    assert "threshold_tokens" not in after, "there is no PrfaaS cluster"


def test_health_says_when_the_loop_does_not_come_round(hybrid, checkpoints, monkeypatch):
    with house(*hybrid, checkpoints["kimi_linear"]) as one:
        assert call(one.port, "/health").status == 503
        one.step()
        assert (call(one.port, "/health").status, call(one.port, "/health").json["status"]) == (200, "ok")
        monkeypatch.setattr(api, "STUCK_S", 0.0)
        response = call(one.port, "/health")
    assert (response.status, response.json["status"]) == (503, "the node's loop does not come round")


def test_the_models_endpoint_names_the_model(open_house):
    (model,) = call(open_house.port, "/v1/models").json["data"]
    assert model["id"] == open_house.name and model["object"] == "model"
    assert call(open_house.port, f"/v1/models/{open_house.name}").json == model


# ---- the program


@pytest.mark.parametrize("signals, drain_s, cut", [
    ([signal.SIGTERM], 60, 0), ([signal.SIGTERM], 0, 2), ([signal.SIGTERM, signal.SIGINT], 60, 2)])
def test_a_signal_lets_requests_end_or_ends_them_in_a_named_error(hybrid, checkpoints, signals, drain_s, cut):
    """The test's thread is the program's; the client is a thread. Whoever is to be cut off does not end before that."""
    body = {"prompt": [[3, 4, 5] * 20, [6, 7]], "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    with house(*hybrid, checkpoints["kimi_linear"], starts=False) as one, ThreadPoolExecutor(1) as client:

        has_begun, are_sent = threading.Event(), threading.Event()

        def stream():
            with connect(one.port) as connection:
                connection.sendall(request_bytes(COMPLETIONS, body))
                connection.recv(1, socket.MSG_PEEK)
                has_begun.set()
                for number in signals:
                    os.kill(os.getpid(), number)
                are_sent.set()
                return Response(connection)

        def look():
            if has_begun.is_set() or any(len(journey.output_ids) > 20 for journey in one.front.journeys.values()):
                assert are_sent.wait(DEADLINE_S)

        response = client.submit(stream)
        assert serve(one.service, one.process, drain_s, look) == cut
        response = response.result(DEADLINE_S)
    if cut:
        *_, error, end = response.body.decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down" and end == ""
    else:
        assert [streamed_text(response.events, index)[1] for index in (0, 1)] == ["length", "length"]


def test_a_signal_ends_a_loop_whose_wait_was_interrupted(hybrid, checkpoints):
    """The handler of another signal outlasts the loop's wait, which in CPython 3.11 has no end then."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: time.sleep(5 * node.IDLE_S))
    with house(*hybrid, checkpoints["kimi_linear"], starts=False) as one, ThreadPoolExecutor(1) as client:

        def interrupt_and_end():
            wait_until(lambda: one.door.metrics.sampled_at_s is not None)  # the loop goes round
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(10 * node.IDLE_S)
            os.kill(os.getpid(), signal.SIGTERM)
            one.service.join(DEADLINE_S)
            has_ended = not one.service.is_serving
            one.door.knock()
            return has_ended

        has_ended = client.submit(interrupt_and_end)
        serve(one.service, one.process, DEADLINE_S, lambda: None)
        assert has_ended.result(DEADLINE_S), "the loop did not hear the signal"
    signal.signal(signal.SIGUSR1, before)


def test_when_the_loop_fails_every_stream_ends_in_a_named_error(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], starts=False) as one, ThreadPoolExecutor(1) as client:
        response = client.submit(call, one.port, COMPLETIONS, {"prompt": "Once", **GREEDY, "max_tokens": 400})

        def look():
            assert not any(len(journey.output_ids) > 3 for journey in one.front.journeys.values()), "a bug"

        with pytest.raises(AssertionError, match="a bug"):
            serve(one.service, one.process, 60, look)
        assert response.result(DEADLINE_S).json["error"]["code"] == "server_failed"


def test_the_program_says_where_it_serves_and_how_it_ended(checkpoints, capsys):
    def ask_and_end():
        said = ""
        while "Ctrl-C" not in said:
            said += capsys.readouterr().out
            time.sleep(0.01)
        port = int(re.search(r":(\d+)/v1", said)[1])
        answer = call(port, COMPLETIONS, {"prompt": "Once", **GREEDY})
        os.kill(os.getpid(), signal.SIGINT)
        return answer

    with ThreadPoolExecutor(1) as client:
        answer = client.submit(ask_and_end)
        assert main(["serve", "--model", str(checkpoints["kimi_linear"]), "--port", "0"]) == 0
        assert answer.result(DEADLINE_S).status == 200
    assert capsys.readouterr() == ("ended: every request has its answer\n", "")


# ---- the same door before a cluster


def test_a_cluster_answers_http_clients_over_its_link_until_a_signal(hybrid, checkpoints):
    prompts = [[3, 4, 5] * 60, [6, 7, 8] * 10]
    expected = [output.text for output in reference(hybrid, prompts, max_tokens=12, ignore_eos=True)]
    program = serving_cluster(checkpoints, "prfaas=1,pd=1")
    try:
        port = port_of(program)
        answer = call(port, COMPLETIONS, {"prompt": prompts, **GREEDY}).json
        assert [choice["text"] for choice in answer["choices"]] == expected
        wait_until(lambda: all(f'route="{route}"}} 1.0'.encode() in call(port, "/metrics").body
                               for route in ("prfaas", "pdp")))
        crossed = re.search(r"\nminprfaas_kv_bytes_total (\S+)", call(port, "/metrics").body.decode())
        assert float(crossed[1]) > 0 and b"\nminprfaas_link_utilization " in call(port, "/metrics").body
        program.send_signal(signal.SIGTERM)
        said, errors = program.communicate(timeout=DEADLINE_S)
    finally:
        program.kill()
    assert (program.returncode, errors) == (0, "") and said.endswith("ended: every request has its answer\n")


def serving_cluster(checkpoints, topology):
    options = ["--topology", topology, "--model", str(checkpoints["kimi_linear"]), "--threshold", "100", "--serve", "0",
               "--prefill-chunk", "64", "--block-tokens", "16", "--lanes", "1"]
    return subprocess.Popen([sys.executable, str(ROOT / "scripts" / "cluster.py"), *options], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def port_of(program):
    return next(int(found[1]) for line in program.stdout if (found := re.search(r":(\d+)/v1", line)))


@pytest.mark.heavy
def test_a_front_end_that_is_killed_leaves_no_answer_that_looks_whole_and_no_process(checkpoints):
    """Nobody is left to name an error: what names it is HTTP, for a stream that ends without its last chunk."""
    body = {"max_tokens": 400, "ignore_eos": True, "stream": True}
    program = serving_cluster(checkpoints, "prfaas=1,pd=2")
    try:
        port = port_of(program)
        clients = [connect(port) for _ in range(20)]
        for number, client in enumerate(clients):
            client.sendall(request_bytes(COMPLETIONS, {**body, "prompt": [number + 1] * 30}))
        for client in clients:
            assert client.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 200"
        front = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()[0]
        os.kill(int(front), signal.SIGKILL)
        for client in clients:
            with pytest.raises((ValueError, ConnectionResetError)), client:  # no chunk follows, or the line is cut
                Response(client)
        assert program.wait(DEADLINE_S) == 256 - signal.SIGKILL
        left = subprocess.run(["pgrep", "--session", str(program.pid)], capture_output=True, text=True).stdout
        assert left == "", "processes of the run are left"
    finally:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("options, said", [
    ([], "nothing is asked"), (["--serve", "0", "--check"], "--check is about a file of prompts"),
    (["--serve", "70000"], "--serve is 70000"), (["--serve", "0", "--max-requests", "0"], "--max-requests is 0")])
def test_a_cluster_has_prompts_or_clients(options, said):
    with pytest.raises(UserError, match=said):
        cluster.main(options)
