"""The HTTP door: what a client gets is what one process would have said, and what it does wrong costs nobody else.

Chapter 13.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import byte_tokenizer, write_checkpoint
from serving_support import DEADLINE_S, Response, call, connect, house, request_bytes, streamed_text

from minprfaas import SamplingParams, generate
from minprfaas.__main__ import main
from minprfaas.commands import cluster
from minprfaas.errors import UserError
from minprfaas.model.checkpoint import load
from minprfaas.serving import api
from minprfaas.serving.chat import ChatTemplate, find_template, recognised
from minprfaas.serving.http import Limits
from minprfaas.serving.metrics import TTFT_PARTS
from minprfaas.serving.service import serve

ROOT = Path(__file__).resolve().parent.parent
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def open_house(models, checkpoints):
    """A house that a thread steps, for all tests that only ask it something."""
    with house(*models["kimi_linear"], checkpoints["kimi_linear"]) as one, one.running():
        yield one


@pytest.fixture
def still_house(hybrid, checkpoints):
    """A house that only the test steps."""
    with house(*hybrid, checkpoints["kimi_linear"], prefill_chunk=16, capacity=4) as one:
        yield one


def reference(hybrid, prompts, **params):
    return generate(*hybrid, prompts, SamplingParams(**params))


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
    assert grown < 1000 * 4096, f"1,000 streams left {grown:,} bytes behind"


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


def wait_until(condition):
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s, "the condition did not come to hold by its deadline"
        time.sleep(0.002)


# ---- clients that are slow, and clients that are many


@pytest.mark.parametrize("sent, answer", [
    (b"", b""), (b"GET / HT", b"HTTP/1.1 408 "), (request_bytes(COMPLETIONS, b"{" + b" " * 50)[:-20], b"HTTP/1.1 408 ")])
def test_a_request_that_does_not_come_to_its_end_is_given_up(hybrid, checkpoints, sent, answer):
    limits = Limits(9, idle_s=0.2, head_s=0.2, body_s=0.2, linger_s=0.2)
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
    with house(*hybrid, checkpoints["kimi_linear"], limits=Limits(2, linger_s=0.2)) as one:
        with connect(one.port) as first, connect(one.port):
            first.sendall(request_bytes("/v1/models"))
            assert Response(first).status == 200
            with connect(one.port) as third:
                assert Response(third).status == 429
        wait_until(lambda: call(one.port, "/v1/models").status == 200)


def test_large_bodies_have_a_limit_that_all_of_them_share(hybrid, checkpoints):
    limits, body = Limits(9, bodies_bytes=1000, linger_s=0.2), json.dumps({"prompt": "x" * 300, **GREEDY}).encode()
    body += b" " * (600 - len(body))
    with house(*hybrid, checkpoints["kimi_linear"], limits=limits) as one, connect(one.port) as first:
        first.sendall(request_bytes(COMPLETIONS, body)[:-1])
        wait_until(lambda: call(one.port, COMPLETIONS, body).status == 429)
        with one.running():
            first.sendall(body[-1:])
            assert Response(first).status == 200 == call(one.port, COMPLETIONS, body).status


# ---- mistakes


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
    (b"GET /health HTTP/2.0\r\n\r\n", 505, "HTTP/2.0"),
    (b"GET health HTTP/1.1\r\n\r\n", 400, "begin with /"),
    (request_bytes(COMPLETIONS, b"{nonsense"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b"\xff\xfe"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b"[" * 100_000), 400, "no JSON"),
    (request_bytes(COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'), 400, "NaN"),
    (request_bytes(COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"), 400, "no JSON"),
    (request_bytes(COMPLETIONS, [1]), 400, "must be an object"),
    (request_bytes(COMPLETIONS, {}), 400, "prompt is None"),
    (post(prompt=""), 400, "has 0 tokens"), (post(prompt=[]), 400, "0 prompts"), (post(prompt=[[]]), 400, "prompt is []"),
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


def test_a_client_that_is_refused_while_it_still_sends_can_read_why(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], limits=Limits(9, linger_s=DEADLINE_S)) as one, connect(one.port) as connection:
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


# ---- chats

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": " Hi\n"}]},
         {"role": "assistant", "content": "<think>\nA guest.\n</think>\n\nYes?"}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture
def chat_house(tmp_path):
    """A checkpoint whose tokenizer has ChatML's marks, and whose configuration has its template."""
    write_checkpoint(tmp_path, "kimi_linear", vocab_size=259)
    marked = byte_tokenizer()
    marked.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    marked.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    model, tokenizer = load(tmp_path)
    with house(model, tokenizer, tmp_path) as one, one.running():
        yield one, (model, tokenizer)


def test_a_chat_is_answered_as_its_template_puts_it(chat_house):
    one, loaded = chat_house
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    token_ids = loaded[1].encode(prompt)
    assert token_ids[0] == 257 and len(token_ids) == len(prompt) - 11 - 9 - 11
    expected = reference(loaded, [token_ids], max_tokens=12, ignore_eos=True)[0]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = call(one.port, CHAT, body).json
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["usage"]["prompt_tokens"] == len(token_ids) and answer["object"] == "chat.completion"
    first, *events = call(one.port, CHAT, {**body, "stream": True}).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed_text(events) == (expected.text, "length") and first["object"] == "chat.completion.chunk"


def test_a_chat_that_is_none_is_refused_by_name(chat_house):
    user = {"role": "user", "content": "Hi"}
    for messages, said in [
            ([], "messages is []"), ("Hi", "messages is 'Hi'"), ([{"content": "Hi"}], "must have a role"),
            ([{"role": "tool", "content": "Hi"}], "must have a role"), ([{"role": "user"}], "content of message 0 is None"),
            ([user, {"role": "user", "content": [{"type": "image_url"}]}], "content of message 1"),
            ([{**user, "tool_calls": [1]}], "'tool_calls'"), ([user, {"role": "assistant", "content": "Yes?"}], "the last message"),
            ([{"role": "user", "content": "\ud800"}], "message 0 has '\\ud800'")]:
        response = call(chat_house[0].port, CHAT, {"messages": messages})
        assert response.status == 400 and said in response.json["error"]["message"], messages


@pytest.mark.parametrize("template, expected", [
    (ChatTemplate("chatml"), "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n"
     "<think>\nA guest.\n</think>\n\nYes?<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
    (ChatTemplate("qwen3"), "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n"
     "Yes?<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
    (ChatTemplate("llama3", bos="<|begin_of_text|>"), "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<think>\nA guest.\n"
     "</think>\n\nYes?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
])
def test_each_known_template_puts_a_chat_as_its_jinja_text_does(template, expected):
    assert template.text(TURNS) == expected


def test_a_system_message_that_the_template_brings_stands_back_for_one_of_the_chat():
    template = ChatTemplate("chatml", system="Help.")
    assert template.text(TURNS[3:]).startswith("<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nWho")
    assert template.text(TURNS).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_a_template_is_recognised_by_its_whole_text_however_it_spells_line_ends():
    assert recognised(CHATML) == recognised(CHATML.replace("\\n", "\n") + "\n") == ChatTemplate("chatml")
    assert recognised(CHATML.replace("user", "human")) == recognised(CHATML)  # which says neither
    assert recognised(CHATML.replace("<|im_end|>' + '\\n'", "<|im_end|>'")) is None


def test_a_template_can_be_named_where_the_tokenizer_has_its_marks(chat_house, checkpoints, hybrid, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tokenizer = chat_house[1][1]
    assert "not one of those that are known here" in find_template(tmp_path, tokenizer)
    assert find_template(tmp_path, tokenizer, "qwen3") == ChatTemplate("qwen3")
    with pytest.raises(UserError, match=r"llama3 needs <\|start_header_id\|>, which is no token of this model"):
        find_template(tmp_path, tokenizer, "llama3")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert find_template(tmp_path, tokenizer) == ChatTemplate("chatml")
    assert "is no token of this model" in find_template(tmp_path, hybrid[1])


# ---- what others see of the house


def test_metrics_count_what_happened(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"]) as one:
        with one.running():
            for _ in range(3):
                usage = call(one.port, COMPLETIONS, {"prompt": [7] * 100, **GREEDY}).json["usage"]
            call(one.port, COMPLETIONS, {"prompt": 7})
            response = call(one.port, "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in response.body.decode().splitlines() if not line.startswith("#"))
    values = {name.removeprefix("minprfaas_"): float(value) for name, value in values.items()}
    assert values['requests_total{state="length",route="pdp"}'] == 3
    assert values["prompt_tokens_total"] == 300 and values["output_tokens_total"] == 36
    assert values["cached_tokens_total"] == 2 * usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert values['http_responses_total{path="/v1/completions",status="400"}'] == 1
    assert values['node_blocks{node="pd-0/pdd",role="pdd",device="cpu"}'] == 400
    total, parts = values['ttft_seconds_sum{part="ttft"}'], [part for part in TTFT_PARTS if part != "ttft_s"]
    assert sum(values[f'ttft_seconds_sum{{part="{part[:-2]}"}}'] for part in parts) == pytest.approx(total) and total > 0
    buckets = [values[f'ttft_seconds_bucket{{part="ttft",le="{limit}"}}'] for limit in ("0.01", "1", "60", "+Inf")]
    assert buckets == sorted(buckets) and buckets[-1] == values['ttft_seconds_count{part="ttft"}'] == 3


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


@pytest.mark.parametrize("options, said", [
    (["--port", "-1"], "--port is -1"), (["--port", "65536"], "--port is 65536"), (["--max-requests", "0"], "--max-requests is 0"),
    (["--drain-s", "-1"], "--drain-s is -1"), (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    (["--pool-blocks", "0"], "--pool-blocks is 0"), (["--port", "0", "--model", "/no/such"], "/no/such"),
    (["--port", "0", "--chat-template", "llama3"], "no token of this model")])
def test_a_mistake_on_the_command_line_is_named(options, said):
    with pytest.raises(SystemExit) as exit:
        main(["serve", *options])
    assert exit.value.code == 2


def test_a_port_that_is_taken_is_said_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit:
        main(["serve", "--port", str(taken.getsockname()[1])])
    assert exit.value.code == 2 and "cannot listen on 127.0.0.1 port" in capsys.readouterr().err


@pytest.mark.parametrize("signals, drain_s, cut", [
    ([signal.SIGTERM], 60, 0), ([signal.SIGTERM], 0, 2), ([signal.SIGTERM, signal.SIGINT], 60, 2)])
def test_a_signal_lets_requests_end_or_ends_them_in_a_named_error(hybrid, checkpoints, signals, drain_s, cut):
    """The test's thread is the program's; the client is a thread."""
    body = {"prompt": [[3, 4, 5] * 20, [6, 7]], "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    with house(*hybrid, checkpoints["kimi_linear"], starts=False) as one, ThreadPoolExecutor(1) as client:

        def stream():
            with connect(one.port) as connection:
                connection.sendall(request_bytes(COMPLETIONS, body))
                connection.recv(1, socket.MSG_PEEK)  # the stream has begun
                for number in signals:
                    os.kill(os.getpid(), number)
                return Response(connection)

        response = client.submit(stream)
        assert serve(one.service, one.front, one.process_step, drain_s) == cut
        response = response.result(DEADLINE_S)
    if cut:
        *_, error, end = response.body.decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down" and end == ""
    else:
        assert [streamed_text(response.events, index)[1] for index in (0, 1)] == ["length", "length"]


def test_when_the_loop_fails_every_stream_ends_in_a_named_error(hybrid, checkpoints):
    with house(*hybrid, checkpoints["kimi_linear"], starts=False) as one, ThreadPoolExecutor(1) as client:
        response = client.submit(call, one.port, COMPLETIONS, {"prompt": "Once", **GREEDY, "max_tokens": 400})

        def step():
            assert not any(len(journey.output_ids) > 3 for journey in one.front.journeys.values()), "a bug"
            return one.process_step()

        with pytest.raises(AssertionError, match="a bug"):
            serve(one.service, one.front, step, 60)
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
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "cluster.py"), "--topology", "prfaas=1,pd=1", "--model", str(checkpoints["kimi_linear"]),
         "--threshold", "100", "--prefill-chunk", "64", "--block-tokens", "16", "--lanes", "1", "--serve", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = next(int(found[1]) for line in program.stdout if (found := re.search(r":(\d+)/v1", line)))
        answer = call(port, COMPLETIONS, {"prompt": prompts, **GREEDY}).json
        assert [choice["text"] for choice in answer["choices"]] == expected
        wait_until(lambda: b'route="prfaas"} 1.0' in (text := call(port, "/metrics").body) and b'route="pdp"} 1.0' in text)
        crossed = re.search(r"\nminprfaas_kv_bytes_total (\S+)", call(port, "/metrics").body.decode())
        assert float(crossed[1]) > 0 and b"\nminprfaas_link_utilization " in call(port, "/metrics").body
        program.send_signal(signal.SIGTERM)
        said, errors = program.communicate(timeout=DEADLINE_S)
    finally:
        program.kill()
    assert (program.returncode, errors) == (0, "") and said.endswith("ended: every request has its answer\n")


@pytest.mark.parametrize("options, said", [
    ([], "nothing is asked"), (["--serve", "0", "--check"], "--check is about a file of prompts"),
    (["--serve", "70000"], "--serve is 70000"), (["--serve", "0", "--max-requests", "0"], "--max-requests is 0")])
def test_a_cluster_has_prompts_or_clients(options, said):
    with pytest.raises(UserError, match=said):
        cluster.main(options)
