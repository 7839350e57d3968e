"""A whole house inside one test: front end, both PD roles, and the HTTP service on a port that the system chooses."""

import json
import queue
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from cluster_support import pd_process

from minprfaas import SamplingParams, generate
from minprfaas.cluster.processes import control_settings
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.errors import RequestError
from minprfaas.scheduling.control import ControlPlane
from minprfaas.serving.openai import Served
from minprfaas.serving.service import Service, listen

DEADLINE_S = 60
HOST = "127.0.0.1"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


class House:
    """`step` is the loop's, to be called by one thread at a time: by the test, or inside `running` by a thread."""

    def __init__(self, model, tokenizer, directory, capacity=64, pool=400, limits=None, chat_template=None,
                 prefill_chunk=48, starts=True):
        engines = [Engine(model, tokenizer, CacheConfig(pool, 16), prefill_chunk) for _ in range(2)]
        plane = ControlPlane(control_settings(0, None, engines[0].layout))
        self.process = pd_process(*engines, {}, queue.SimpleQueue(), plane, DEADLINE_S)
        self.front = self.process.front
        self.listener = listener = listen(HOST, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that does not read is noticed soon
        served = Served.of(directory, model.config, tokenizer, chat_template)
        self.service = Service(served, listener, capacity, self.process.node.mail.events, limits)
        self.door, self.port, self.name = self.service.door, self.service.port, served.name
        if starts:
            self.service.start()

    def step(self):
        self.process.node.step()
        self.door.step(self.front, self.front.take_updates())

    def step_until(self, condition):
        until_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < until_s, "the condition did not come to hold by its deadline"
            self.step()

    @contextmanager
    def running(self):
        """A thread steps the house meanwhile."""
        ended, failures = threading.Event(), []

        def run():
            try:
                while not ended.is_set():
                    self.step()
            except Exception as error:  # shown by the test, not lost in the thread
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join(DEADLINE_S)
        assert not failures, failures

    @property
    def is_empty(self):
        """Whether no request is in the house, and no block is in use for one, on either side."""
        workers = self.process.workers
        return self.door.is_idle and not self.front.has_work and not any(worker.has_work for worker in workers) and \
            all(worker.engine.kvcache.stats().in_use == 0 for worker in workers)

    def close(self):
        """End the service, if it has not ended yet, and check that nothing is left in the house."""
        if self.service.is_serving:
            self.service.refuse_new()
            self.service.end()
        while self.service.is_serving:
            self.door.end_all(self.front, RequestError("shutting_down", "the test has ended"))
            self.service.join(0.01)
        self.step_until(lambda: self.is_empty)
        for worker in self.process.workers:
            worker.engine.kvcache.check()


@contextmanager
def house(*args, **options):
    """A `House`, closed and checked at the end."""
    one = House(*args, **options)
    try:
        yield one
    finally:
        one.close()


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


def wait_until(condition):
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s, "the condition did not come to hold by its deadline"
        time.sleep(0.002)


def connect(port):
    """A client's connection."""
    return socket.create_connection((HOST, port), timeout=DEADLINE_S)


def request_bytes(path, body=None, method=None, headers=(), version="HTTP/1.1"):
    """A request as it goes over the wire; `body` is bytes, or made to JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    method = method or ("GET" if body is None else "POST")
    lines = [f"{method} {path} {version}", "Host: test", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


class Response:
    """One response, read from a client's connection: status, headers, body; `events` of a stream."""

    def __init__(self, connection):
        file = connection.makefile("rb")
        first = file.readline()
        assert first.endswith(b"\r\n"), f"the connection ended: {first!r}"
        self.status = int(first.split()[1])
        self.headers = {}
        while (line := file.readline().strip()):
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        if self.headers.get("transfer-encoding") == "chunked":
            pieces = []
            while size := int(file.readline(), 16):
                pieces.append(file.read(size))
                assert file.read(2) == b"\r\n"
            assert file.readline() == b"\r\n"
            self.body = b"".join(pieces)
        elif "content-length" in self.headers:
            self.body = file.read(int(self.headers["content-length"]))
        else:
            self.body = file.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The data of each event but the last, which says that it is."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def call(port, path, body=None, **options):
    """One request over a connection of its own."""
    with connect(port) as connection:
        connection.sendall(request_bytes(path, body, **options))
        return Response(connection)


def streamed_text(events, index=0):
    """The text that a stream's events bring for one choice, and its finish reason."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    text = "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == 1 and choices[-1]["finish_reason"], "it ends once, with its last event"
    return text, reasons[0]
