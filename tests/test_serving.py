"""The HTTP door: what a client gets is what one process would have said, and one that leaves frees what it held.

Chapter 13.
"""

import json
import os
import random
import socket
from pathlib import Path

import pytest
from serving_support import (  # noqa: F401
    COMPLETIONS, DEADLINE_S, GREEDY, Response, call, connect, house, open_house, reference, request_bytes,
    still_house, streamed_text, wait_until)

from minprfaas import SamplingParams, generate
from minprfaas.serving.http import Limits


# ---- answers


@pytest.mark.parametrize("prompts", ["Once upon a time", [5, 6, 7] * 40, ["Once", "a" * 130], [[9, 8], [7] * 65]])
def test_answers_are_those_of_one_process(open_house, hybrid, prompts):
    each = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
    expected = reference(hybrid, each, max_tokens=12, ignore_eos=True)
    answer = call(open_house.port, COMPLETIONS, {"prompt": prompts, **GREEDY}).json
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * len(each)
    assert answer["usage"]["prompt_tokens"] == sum(output.prompt_tokens for output in expected)
    assert answer["usage"]["completion_tokens"] == 12 * len(each)
    assert answer["object"] == "text_completion" and answer["model"] == open_house.name


@pytest.mark.parametrize("prompts", ["Once upon a time", ["Once", "a" * 130]])
def test_a_stream_brings_what_the_whole_answer_holds(open_house, prompts):
    body = {"prompt": prompts, **GREEDY, "temperature": 1.0, "seed": 5}
    whole = call(open_house.port, COMPLETIONS, body).json
    response = call(open_house.port, COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}})
    *events, last = response.events
    assert response.headers["content-type"].startswith("text/event-stream")
    for choice in whole["choices"]:
        assert streamed_text(events, choice["index"]) == (choice["text"], choice["finish_reason"])
    cached = "prompt_tokens_details"  # the second time its prompt was in the cache
    assert last["choices"] == [] and {**last["usage"], cached: 0} == {**whole["usage"], cached: 0}
    assert all(event["usage"] is None and event["id"] == last["id"] for event in events)


def test_usage_says_what_was_cached(open_house):
    body = {"prompt": [11, 12, 13] * 50, **GREEDY}
    first, second = (call(open_house.port, COMPLETIONS, body).json["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0 < second["prompt_tokens_details"]["cached_tokens"]


def test_characters_that_are_split_over_tokens_arrive_whole(open_house, hybrid):
    """The tokens are bytes: no character beyond ASCII is one token."""
    params = dict(max_tokens=40, temperature=1.0, ignore_eos=True)
    outputs = generate(*hybrid, ["é"] * 16, [SamplingParams(seed=seed, **params) for seed in range(16)])
    seed, text = next((seed, output.text) for seed, output in enumerate(outputs)
                      if any("\x7f" < letter < "\ufffd" for letter in output.text))
    events = call(open_house.port, COMPLETIONS, {"prompt": "é", "seed": seed, "stream": True, **params}).events
    assert streamed_text(events)[0] == text


def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_streamed(open_house, hybrid):
    params = dict(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    text = reference(hybrid, ["Once"], **params)[0].text
    stop = text[12:16]  # four characters, each at least a token
    events = call(open_house.port, COMPLETIONS, {"prompt": "Once", "stop": [stop], "stream": True, **params}).events
    assert streamed_text(events) == (text[:text.index(stop)], "stop")


def test_without_a_seed_each_answer_is_another_one(open_house):
    body = {"prompt": ["Once", "Once"], "max_tokens": 20, "ignore_eos": True}
    one, other = (choice["text"] for choice in call(open_house.port, COMPLETIONS, body).json["choices"])
    assert one != other


def test_one_connection_serves_request_after_request(open_house):
    with connect(open_house.port) as connection:
        connection.sendall(request_bytes(COMPLETIONS, {"prompt": "Once", **GREEDY}) + request_bytes("/v1/models"))
        first = Response(connection)
    assert first.status == 200 and first.headers["connection"] == "keep-alive"
    with connect(open_house.port) as connection:
        for _ in range(3):
            connection.sendall(request_bytes(COMPLETIONS, {"prompt": "Once", **GREEDY, "stream": True}))
            assert len(Response(connection).events) > 1


def test_an_empty_line_before_a_request_says_nothing(open_house):
    with connect(open_house.port) as connection:
        for before in (b"", b"\r\n", b"\r\n"):
            connection.sendall(before + request_bytes("/v1/models"))
            assert Response(connection).status == 200
        connection.sendall(b"\r\n")  # and then nothing: it is no request that did not arrive in time
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_an_old_client_gets_its_stream_without_chunks(open_house):
    response = call(open_house.port, COMPLETIONS, {"prompt": "Once", **GREEDY, "stream": True}, version="HTTP/1.0")
    assert "transfer-encoding" not in response.headers and response.headers["connection"] == "close"
    assert streamed_text(response.events)[1] == "length"


def test_who_expects_to_be_asked_for_the_body_is_asked(open_house):
    body = json.dumps({"prompt": "Once", **GREEDY}).encode()
    with connect(open_house.port) as connection:
        connection.sendall(request_bytes(COMPLETIONS, body, headers=["Expect: 100-continue"])[:-len(body)])
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert Response(connection).status == 200


def streams_at_once(one, hybrid, count, lengths):
    """`count` clients, each with a stream of its own; returns how many tokens they got, all of them right."""
    draw = random.Random(count)
    prompts = [[draw.randrange(1, 257) for _ in range(draw.randrange(*lengths))] for _ in range(count)]
    expected = [output.text for output in reference(hybrid, prompts, max_tokens=12, ignore_eos=True)]
    connections = [connect(one.port) for _ in prompts]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for connection, prompt in zip(connections, prompts):
        connection.sendall(request_bytes(COMPLETIONS, {"prompt": prompt, **GREEDY, **usage}))
    tokens = 0
    for connection, text in zip(connections, expected):
        with connection:
            *events, last = Response(connection).events
        assert streamed_text(events) == (text, "length")
        tokens += last["usage"]["completion_tokens"]
    return tokens


def test_32_streams_at_once_lose_no_token(open_house, hybrid):
    assert streams_at_once(open_house, hybrid, 32, (5, 60)) == 32 * 12


@pytest.mark.heavy
def test_200_streams_at_once_lose_no_token_and_leave_no_memory_behind(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], capacity=200, pool=2000) as one, one.running():
        for _ in range(3):  # pools, buffers and the allocator's arenas have their size then
            assert streams_at_once(one, hybrid, 200, (5, 200)) == 200 * 12
        before = resident_bytes()
        for _ in range(5):
            assert streams_at_once(one, hybrid, 200, (5, 200)) == 200 * 12
        grown = resident_bytes() - before
    print(f"\n1,000 streams, 200 at once: every token came; resident memory grew by {grown:,} bytes")
    assert grown < 1000 * 4096


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")



# ---- clients that leave


@pytest.mark.parametrize("stage", ["waiting", "prefill", "decode"])
@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_client_that_hangs_up_frees_both_sides(still_house, stage, leave):
    one = still_house
    connection = connect(one.port)
    body = {"prompt": [3, 4, 5] * 100, "max_tokens": 150, "ignore_eos": True, "stream": True}
    connection.sendall(request_bytes(COMPLETIONS, body))
    if stage == "waiting":
        wait_until(lambda: one.door.in_flight == 1)
    elif stage == "prefill":
        one.step_until(lambda: any(journey.prefilled_tokens > 0 for journey in one.front.journeys.values()))
        assert not one.is_empty
    else:
        one.step_until(lambda: any(journey.output_ids for journey in one.front.journeys.values()))
    if leave == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    wait_until(lambda: one.door.in_flight == 0)
    one.step_until(lambda: one.is_empty)
    drawn = sum(len(journey.output_ids) for journey in one.front.journeys.values())
    assert drawn < 150, "it was given up, not finished"
    assert 'minprfaas_requests_total{state="aborted"' in one.door.metrics.text()


def test_a_client_that_does_not_read_its_answer_is_given_up(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], limits=Limits(9, stall_s=0.3)) as one:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", one.port))
        body = {"prompt": [[3, 4], [5, 6]], "max_tokens": 200, "ignore_eos": True, "stream": True}
        connection.sendall(request_bytes(COMPLETIONS, body))
        wait_until(lambda: one.door.in_flight == 2)
        one.step_until(lambda: one.door.in_flight == 0)
        one.step_until(lambda: one.is_empty)
        connection.close()


# ---- clients that are slow, and clients that are many


@pytest.mark.parametrize("limit, sent, answer", [
    ("idle_s", b"", b""), ("head_s", b"GET / HT", b"HTTP/1.1 408 "),
    ("body_s", request_bytes(COMPLETIONS, b"{" + b" " * 50)[:-20], b"HTTP/1.1 408 ")])
def test_a_request_that_does_not_come_to_its_end_is_given_up(hybrid, checkpoints, limit, sent, answer):
    limits = Limits(9, **{limit: 0.2})
    with house(*hybrid, checkpoints["kimi_linear"], limits=limits) as one, connect(one.port) as connection:
        connection.sendall(sent)
        assert connection.makefile("rb").read(13) == answer


def test_a_full_house_says_when_to_come_again(still_house, hybrid):
    one, body = still_house, {"prompt": "Once", **GREEDY}
    with connect(one.port) as first, connect(one.port) as second:
        first.sendall(request_bytes(COMPLETIONS, {**body, "prompt": ["Once", "Twice", "Thrice"]}))
        wait_until(lambda: one.door.in_flight == 3)
        response = call(one.port, COMPLETIONS, {**body, "prompt": ["a", "b"]})
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert response.json["error"]["code"] == "full_house"
        second.sendall(request_bytes(COMPLETIONS, body))
        wait_until(lambda: one.door.in_flight == 4)
        assert call(one.port, COMPLETIONS, body).status == 429
        one.step_until(lambda: one.door.in_flight == 0)
        answers = [choice["text"] for client in (first, second) for choice in Response(client).json["choices"]]
    expected = reference(hybrid, ["Once", "Twice", "Thrice", "Once"], max_tokens=12, ignore_eos=True)
    assert answers == [output.text for output in expected]


def test_more_connections_than_the_house_takes_are_turned_away(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], limits=Limits(2, linger_s=DEADLINE_S)) as one:
        with connect(one.port) as first, connect(one.port):
            first.sendall(request_bytes("/v1/models"))
            assert Response(first).status == 200
            with connect(one.port) as third:
                assert Response(third).status == 429
        wait_until(lambda: call(one.port, "/v1/models").status == 200)


def test_large_bodies_have_a_limit_that_all_of_them_share(hybrid, checkpoints):
    limits = Limits(9, bodies_bytes=1000, linger_s=DEADLINE_S)
    body = json.dumps({"prompt": "x" * 300, **GREEDY}).encode()
    body += b" " * (600 - len(body))
    with house(*hybrid, checkpoints["kimi_linear"], limits=limits) as one, connect(one.port) as first:
        first.sendall(request_bytes(COMPLETIONS, body)[:-1])
        wait_until(lambda: call(one.port, COMPLETIONS, body).status == 429)
        with one.running():
            first.sendall(body[-1:])
            assert Response(first).status == 200 == call(one.port, COMPLETIONS, body).status
