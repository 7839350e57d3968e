"""The HTTP door: who does something wrong, as a client or on the command line, gets one line and costs nobody else.

Chapter 13.
"""

import random
import re
import resource
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from serving_support import (  # noqa: F401
    CHAT, COMPLETIONS, DEADLINE_S, GREEDY, Response, call, connect, house, open_house, request_bytes)

from minprfaas.__main__ import main
from minprfaas.cluster.launch import require_open_files
from minprfaas.errors import UserError
from minprfaas.serving.http import Limits
from minprfaas.serving.service import UNACCEPTED


def post(**change):
    return request_bytes(COMPLETIONS, {"prompt": "Once", **change})


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
MISTAKES = [
    (request_bytes("/nowhere"), 404, "there is no /nowhere"),
    (request_bytes(COMPLETIONS), 405, "takes POST, not GET"),
    (request_bytes("/v1/models", method="DELETE"), 405, "takes GET"),
    (HEAD + b"\r\n", 411, "Content-Length"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411, "chunked"),
    (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n{ }", 400, "both"),
    (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{ }", 400, "twice"),
    (HEAD + b"Content-Length: -3\r\n\r\n", 400, "'-3'"),
    (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413, "99,999,999,999 bytes"),
    (HEAD + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 431, "16,384 bytes"),
    (HEAD + b"no header\r\n\r\n", 400, "no header"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "request line"),
    (b"\rGET /health HTTP/1.1\r\n\r\n", 400, "request line"),
    (b"GET /health HTTP/2.0\r\n\r\n", 505, "HTTP/2.0"),
    (b"GET health HTTP/1.1\r\n\r\n", 400, "begin with /"),
    (request_bytes(COMPLETIONS, b"{nonsense"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b"\xff\xfe"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b"[" * 100_000), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'), 400, "NaN"),
    (request_bytes(COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, [1]), 400, "must be an object"),
    (request_bytes(COMPLETIONS, {}), 400, "prompt is None"),
    (post(prompt=""), 400, "has 0 tokens"), (post(prompt=[]), 400, "0 prompts"),
    (post(prompt=[[]]), 400, "prompt is []"),
    (post(prompt=[1, 257]), 400, "vocabulary of 257"), (post(prompt=[-1]), 400, "vocabulary"),
    (post(prompt=[2**70]), 400, "vocabulary"), (post(prompt=[True]), 400, "prompt is True"),
    (post(prompt=["a", 3]), 400, "prompt is 3"), (post(prompt=["a"] * 200), 400, "200 prompts"),
    (post(prompt="x" * 600), 400, "context holds 512"), (post(prompt="\ud800"), 400, "surrogate"),
    (post(model="gpt-17"), 404, "model 'gpt-17' is not served"),
    (post(max_tokens=0), 400, "max_tokens is 0"), (post(max_tokens="9"), 400, "max_tokens is '9'"),
    (post(temperature=-1), 400, "temperature"), (post(top_p=2), 400, "top_p"), (post(seed=1.5), 400, "seed"),
    (post(n=2), 400, "n is 2; this server knows only 1"), (post(n=True), 400, "n is True"),
    (post(echo=True), 400, "echo is True"), (post(logprobs=3), 400, "logprobs is 3"), (post(best_of=4), 400, "best_of"),
    (post(suffix="x"), 400, "suffix"), (post(presence_penalty=0.5), 400, "presence_penalty"),
    (post(surprise=1), 400, "'surprise' is no option here"), (post(messages=[]), 400, "'messages'"),
    (post(stop=[""]), 400, "stop"), (post(stop=["a"] * 99), 400, "at most 16"), (post(stop={"a": 1}), 400, "stop is"),
    (post(stream="yes"), 400, "stream is 'yes'"), (post(stream_options={"x": 1}), 400, "include_usage"),
    (request_bytes(CHAT, {"messages": [{"role": "user", "content": "Hi"}]}), 400, "has no chat template"),
    (request_bytes(COMPLETIONS, {"prompt": "a"}).replace(b"application/json", b"text/plain"), 415, "application/json"),
]


def test_every_mistake_gets_its_status_and_one_line(open_house):
    for sent, status, said in MISTAKES:
        with connect(open_house.port) as connection:
            connection.sendall(sent)
            response = Response(connection)
        assert (response.status, response.body.count(b"\n")) == (status, 1), sent[:200]
        error = response.json["error"]
        assert said in error["message"] and "\n" not in error["message"], (sent[:200], error)
        assert {"type", "param", "code"} <= set(error)
    assert call(open_house.port, "/v1/models").status == 200


def test_who_asks_for_the_head_of_an_answer_gets_no_more_and_may_ask_again(open_house):
    with connect(open_house.port) as connection:
        for path, status in (("/v1/models", 200), ("/nowhere", 404), (COMPLETIONS, 405)):
            connection.sendall(request_bytes(path, method="HEAD"))
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            assert head.startswith(b"HTTP/1.1 %d " % status) and head.endswith(b"\r\n\r\n")
            connection.sendall(request_bytes("/v1/models"))
            response = Response(connection)
            assert response.status == 200
            if status == 200:
                assert f"Content-Length: {len(response.body)}\r\n".encode() in head


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this system does not tell")
def test_a_burst_of_clients_may_wait_to_be_accepted(open_house):
    state = open_house.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (most_waiting,) = struct.unpack_from("I", state, 28)  # of one that listens: how long its queue may be
    assert most_waiting == min(UNACCEPTED, int(Path("/proc/sys/net/core/somaxconn").read_text()))


def test_a_client_that_is_refused_while_it_still_sends_can_read_why(hybrid, checkpoints):
    limits = Limits(9, linger_s=DEADLINE_S)
    with house(*hybrid, checkpoints["kimi_linear"], limits=limits) as one, connect(one.port) as connection:
        connection.sendall(HEAD + b"Content-Length: 9000000\r\n\r\n" + b"x" * 9_000_000)
        assert Response(connection).status == 413


def test_300_malformed_requests_leave_a_server_that_answers(hybrid, checkpoints, capfd):
    draw, good = random.Random(0), post(max_tokens=2, temperature=0.5, stop=["x"], stream=True)
    limits = Limits(400, head_s=0.5, body_s=0.5, linger_s=0.1)
    statuses = Counter()
    with house(*hybrid, checkpoints["kimi_linear"], limits=limits, capacity=300) as one, one.running():
        connections = [(connect(one.port), spoiled(draw, good, number % 3)) for number in range(300)]
        for connection, sent in connections:
            connection.sendall(sent)
        for connection, sent in connections:
            with connection:
                answer = connection.makefile("rb").readline()
            assert re.fullmatch(rb"HTTP/1.1 (200|4\d\d|505) [\w ]+\r\n", answer), (sent, answer)
            statuses[answer[9:12]] += 1
        assert call(one.port, COMPLETIONS, {"prompt": "Once", **GREEDY}).status == 200
    assert capfd.readouterr().err == "" and len(statuses) >= 5 and statuses[b"400"] > 100, statuses


def spoiled(draw, good, how):
    """A request with one to five bytes changed, pieces cut out, or pieces put in."""
    sent = bytearray(good)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(sent))
        if how == 0:
            sent[at] = draw.randrange(256)
        elif how == 1:
            del sent[at:at + draw.randrange(1, 20)]
        else:
            sent[at:at] = draw.choice([b"\r\n", b"\0", b"{", b'"', b"9" * 30, b": ", b"\r\n\r\n", b"\xf0\x9f"])
    return bytes(sent)


# ---- on the command line


@pytest.mark.parametrize("options, said", [
    (["--port", "-1"], "--port is -1"),
    (["--port", "65536"], "--port is 65536"),
    (["--max-requests", "0"], "--max-requests is 0"),
    (["--drain-s", "-1"], "--drain-s is -1"),
    (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    (["--host", "ä..b"], "the host to listen on is 'ä..b', which is no name or address"),
    (["--pool-blocks", "0"], "--pool-blocks is 0"),
    (["--port", "0", "--model", "/no/such"], "/no/such"),
    (["--port", "0", "--chat-template", "llama3"], "no token of this model")])
def test_a_mistake_on_the_command_line_is_named(options, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["serve", *options])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and said in line and line.count("\n") == 1


def test_a_house_that_may_not_open_a_file_for_each_connection_says_so():
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600)); " \
              "from minprfaas.__main__ import main; main(['serve', '--port', '0', '--max-requests', '300'])"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "opens up to 696 files, connections included; its limit is 600" in done.stderr


@pytest.mark.parametrize("limits, needed, raised", [
    ((256, 4096), 200, None), ((256, 4096), 300, (300, 4096)), ((256, resource.RLIM_INFINITY), 300,
                                                                (300, resource.RLIM_INFINITY)),
    ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 300, None)])
def test_a_process_may_open_as_many_files_as_it_needs(monkeypatch, limits, needed, raised):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, wanted: asked.append(wanted))
    require_open_files(needed)
    assert asked == ([] if raised is None else [raised])
    with pytest.raises(UserError, match="opens up to 5000 files, connections included; its limit is 4096"):
        monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
        require_open_files(5000)


def test_a_port_that_is_taken_is_said_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit:
        main(["serve", "--port", str(taken.getsockname()[1])])
    assert exit.value.code == 2 and "cannot listen on 127.0.0.1 port" in capsys.readouterr().err
