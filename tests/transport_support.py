"""Two ends of a link in one process, over real Gloo on loopback, and streams of seeded bytes to send across."""

import contextlib
import queue
import sys
import threading
import time
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore

from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.transport.base import LayerPlan, LinkDown, StreamPlan
from minprfaas.transport.events import LinkLost
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.pair_group import PairGroup
from minprfaas.transport.wan.frames import Kind
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

DEADLINE_S = 30.0
IDENTITY = LinkIdentity(bytes(32), "float32", "64 tokens", b"a shared secret")


def new_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=DEADLINE_S), wait_for_workers=False)


def in_parallel(*calls):
    """Run the calls in threads; returns their results, raises the first error."""
    results: list = [None] * len(calls)
    errors: list[BaseException] = []

    def run(index, call):
        try:
            results[index] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive(), "a call ran past its deadline"
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def connected(config: LinkConfig = LinkConfig(), line: LineConfig = LineConfig(), identity: LinkIdentity = IDENTITY,
              sender_lanes=Lane, receiver_lanes=Lane, timeline=None, events=None, store=None, name="a-b",
              receiver_timeline=None):
    """A connected pair (sender, receiver), each with its own direction of `line`; the timeline is the sender's, the
    queue of events the receiver's."""
    store = store or new_store()
    sender = Link(name, store, 0, config, identity, emulated(line), timeline=timeline, lane_type=sender_lanes)
    receiver = Link(name, store, 1, config, identity, emulated(line), events, receiver_timeline, receiver_lanes)
    in_parallel(lambda: sender.connect(DEADLINE_S), lambda: receiver.connect(DEADLINE_S))
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith(name)), "it would not end"
    try:
        yield sender, receiver
    finally:
        in_parallel(sender.close, receiver.close)


@contextlib.contextmanager
def connected_fabric(devices=("cpu", "cpu"), sender_group=PairGroup, receiver_group=PairGroup, deadline_s=DEADLINE_S):
    """A connected pair of fabrics (sender, receiver) in one process."""
    store = new_store()
    ends = [new_fabric(store, rank, devices[rank], group_type=group_type, deadline_s=deadline_s)
            for rank, group_type in enumerate((sender_group, receiver_group))]
    in_parallel(*(lambda end=end: end.connect(DEADLINE_S) for end in ends))
    try:
        yield ends
    finally:
        in_parallel(*(end.close for end in ends))
    for end in ends:
        left = (end._outbox._streams, end._outbox._unwritten, end._expected._streams)
        assert not any(left), f"of streams that have ended: {left}"


def new_fabric(store, rank: int, device="cpu", config: LinkConfig = LinkConfig(), **options) -> Fabric:
    """One end, with batches of four chunks of a layer of `Cargo`."""
    return Fabric("pd-0+pd-1", store, rank, config, IDENTITY, device, batch_bytes=24_576, **options)


def emulated(line: LineConfig) -> EmulatedLine | None:
    """A line of this process alone."""
    return EmulatedLine(line) if line != LineConfig() else None


class Lanes:
    """A `lane_type` that keeps what it makes, so that a test can cut it."""

    def __init__(self, lane_type=Lane):
        self.lane_type, self.made = lane_type, []

    def __call__(self, *arguments) -> Lane:
        self.made.append(self.lane_type(*arguments))
        return self.made[-1]


def wait_until(reached, deadline_s: float = DEADLINE_S) -> None:
    """Look every 5 ms whether `reached()`, for what no event tells."""
    until = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < until, "not reached by its deadline"
        time.sleep(0.005)


def stands_in(thread: threading.Thread, function=threading.Condition.wait) -> bool:
    """Whether that is what the thread is doing, when it will not go on by itself: it may have only not come so far."""
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and frame.f_code is function.__code__


class GatedLane(Lane):
    """Heartbeats leave; of other frames as many as there are permits (`gated` gives each test its own)."""

    permits: threading.Semaphore

    def post(self, frame):
        if frame.header.kind != Kind.HEARTBEAT:
            assert self.permits.acquire(timeout=DEADLINE_S)
        return super().post(frame)


def gated(frames: int = 0) -> type[GatedLane]:
    """A lane that lets so many frames pass, and more after `permits.release(count)`: however slow the machine is, it is
    the test that says what has left by when."""
    return type("GatedLane", (GatedLane,), {"permits": threading.Semaphore(frames)})


def next_event(transport, timeout_s: float = 0.0):
    """What a link or a loopback tells next; None when nothing comes within `timeout_s`."""
    try:
        return transport.events.get(timeout=timeout_s)
    except queue.Empty:
        return None


def event(transport, kind: type, deadline_s: float = DEADLINE_S):
    """The next event of `kind`; others are skipped, a lost link ends the wait."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        found = next_event(transport, until - time.monotonic())
        if isinstance(found, kind):
            return found
        assert kind is LinkLost or not isinstance(found, LinkLost), found
    raise AssertionError(f"no {kind.__name__} within {deadline_s} s")


class Cargo:
    """Seeded bytes for one stream: three layers of token state, one of request-level state; and where they arrive."""

    def __init__(self, stream_id: int = 1, tokens: int = 256, state_bytes: int = 20_001, seed: int = 0,
                 device: str = "cpu"):
        layers = [LayerPlan(layer, 0, StateKind.TOKEN, 96) for layer in range(3)]
        layers.append(LayerPlan(3, 1, StateKind.REQUEST, state_bytes))
        self.plan = StreamPlan(stream_id, tuple(layers), 64, 64 + tokens)
        generator = torch.Generator().manual_seed(seed)
        self.sent = {}
        for entry in self.plan.entries:
            shape = (tokens if entry.kind is StateKind.TOKEN else 1, entry.row_bytes)
            data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            self.sent[entry.layer] = data.to(device)
        self.arrived = {layer: torch.zeros_like(data) for layer, data in self.sent.items()}
        self.calls: list[tuple[int, int, int]] = []

    def sink(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        self.calls.append((layer, start, end))
        if self.plan.layers[layer].kind is not StateKind.TOKEN:
            self.arrived[layer][0] = data
            return
        for number, rows in enumerate(data.view(-1, end - start, self.plan.layers[layer].row_bytes), layer):
            self.arrived[number][start - self.plan.start:end - self.plan.start] = rows

    def source(self, layer: int, start: int, end: int, out: torch.Tensor | None) -> torch.Tensor:
        """For `put_ready`."""
        if self.plan.layers[layer].kind is not StateKind.TOKEN:
            rows = self.sent[layer].reshape(-1)
            return rows if out is None else out.copy_(rows)
        size = (end - start) * self.plan.layers[layer].row_bytes
        layers = range(layer, layer + (1 if out is None else out.numel() // size))
        rows = torch.cat([self.sent[number][start - self.plan.start:end - self.plan.start] for number in layers])
        return rows.reshape(-1) if out is None else out.copy_(rows.reshape(-1))

    def wait_for_rows(self, count: int) -> None:
        """Until `count` rows of token state are written, over all layers: lanes bring them in any order."""
        wait_until(lambda: sum(end - start for layer, start, end in list(self.calls) if layer != 3) >= count)

    def put_all(self, sender, chunk_tokens: int = 64) -> None:
        """As prefill does: every layer of a chunk, then the next chunk; request-level state at the end."""
        plan = self.plan
        for start in range(plan.start, plan.end, chunk_tokens):
            end = min(start + chunk_tokens, plan.end)
            for layer in range(3):
                rows = self.sent[layer][start - plan.start:end - plan.start]
                sender.put(layer, start, end, rows.reshape(-1))
        sender.put(3, plan.start, plan.end, self.sent[3].reshape(-1))

    @property
    def is_identical(self) -> bool:
        return all(torch.equal(self.arrived[layer], data) for layer, data in self.sent.items())


class Impostor:
    """A rank 1 without the secret: knocks, connects, and says what it was told to say, then what else it has."""

    def __init__(self, store, words: list[bytes], frames: list[bytes] = ()):
        self._store, self._words, self._frames = store.clone(), words, frames
        self.heard: list[bytes] = []

    def __call__(self):
        knock = f"{time.monotonic_ns()}"
        self._store.set("a-b/knock", knock)
        self._store.wait([f"a-b/answer/{knock}"], timedelta(seconds=DEADLINE_S))
        epoch = int(self._store.get(f"a-b/answer/{knock}"))
        lane = Lane(PrefixStore(f"a-b/{epoch}", self._store), 0, 1, 256 * 1024, DEADLINE_S)
        try:
            for word in self._words:
                self.heard.append(lane.exchange(word))
            for frame in self._frames:
                lane.transmit(torch.frombuffer(bytearray(frame), dtype=torch.uint8)).wait(timedelta(seconds=0.3))
        except (LinkDown, RuntimeError):
            pass
