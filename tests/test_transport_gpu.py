"""A link from GPU memory and to it: bytes are summed where they lie, and none reaches a sink unchecked. Chapter 07."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transport_support import DEADLINE_S, Cargo, Lanes, connected, event, wait_until

from minprfaas.config import LinkConfig
from minprfaas.transport.events import LinkRestored, StreamDone
from minprfaas.transport.wan import gpu_sums, monitor
from minprfaas.transport.wan.digest import RowSums, multiplies_bytes, row_sums
from minprfaas.transport.wan.frames import HEADER_BYTES
from minprfaas.transport.wan.gpu_sums import SUMMERS, queue_sums
from minprfaas.transport.wan.lanes import Lane

CHUNK_BYTES = 2**20
CONFIG = LinkConfig(lanes=2, chunk_bytes=CHUNK_BYTES)
TOKENS = 30_000  # in chunks of a mebibyte, of which the last is no short one

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(autouse=True)
def first_chunks_are_as_long_as_others(monkeypatch):
    monkeypatch.setattr(monitor, "FIRST_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def cores_sum_nothing(monkeypatch):
    """What is longer than a row is summed by a GPU, or the test fails."""
    if not multiplies_bytes():
        pytest.skip("this processor digests by words, and no GPU does")

    def of_matrix(self, matrix):
        raise AssertionError(f"a core summed {len(matrix)} rows")

    monkeypatch.setattr(RowSums, "of_matrix", of_matrix)


class Arrivals(Cargo):
    """A cargo whose sink looks at each piece: what is damaged must not even reach it."""

    def __init__(self, source: str, target: str, **options):
        super().__init__(tokens=TOKENS, state_bytes=1_500_001, device=source, **options)
        self.target = torch.device(target)
        self.arrived = {layer: data.to(self.target) for layer, data in self.arrived.items()}
        self.wrong = []
        torch.cuda.synchronize()  # sinks work on other CUDA streams

    def sink(self, layer, start, end, data):
        assert data.device.type == self.target.type
        sent = self.sent[layer] if layer == 3 else self.sent[layer][start - self.plan.start:end - self.plan.start]
        if not torch.equal(data.cpu(), sent.flatten().cpu()):
            self.wrong.append((layer, start, end))
        super().sink(layer, start, end, data)

    @property
    def is_identical(self):
        return all(torch.equal(self.arrived[layer].cpu(), data.cpu()) for layer, data in self.sent.items())


def send(cargo, sender):
    """As it is done; returns its report."""
    stream = sender.open(cargo.plan)
    cargo.put_all(stream, chunk_tokens=TOKENS)
    return stream.finish(DEADLINE_S)


@pytest.mark.parametrize("source, target", [("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_a_stream_arrives_identical_from_either_memory_in_either(source, target):
    cargo = Arrivals(source, target)
    with connected(CONFIG) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink, cargo.target)
        report = send(cargo, sender)
        event(receiver, StreamDone)
    assert cargo.is_identical and not cargo.wrong and not report.resent_chunks


class DamagingLane(Lane):
    """Flips a bit of every other chunk that leaves, near its beginning or its end."""

    count = 0
    kept: list = []

    def transmit(self, tensor):
        if tensor.numel() > HEADER_BYTES + CHUNK_BYTES // 4:
            DamagingLane.count += 1
            if DamagingLane.count % 2:
                tensor = tensor.clone()  # the frame that is sent again is whole
                tensor[-7 if DamagingLane.count % 4 == 1 else HEADER_BYTES + 7] ^= 1
                self.kept.append(tensor)
        return super().transmit(tensor)


def test_damaged_bytes_are_asked_for_again_and_never_reach_the_sink(cores_sum_nothing):
    cargo, DamagingLane.count = Arrivals("cuda:0", "cuda:0"), 0
    with connected(CONFIG, sender_lanes=DamagingLane) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink, cargo.target)
        report = send(cargo, sender)
        event(receiver, StreamDone)
    assert cargo.is_identical and not cargo.wrong
    assert report.resent_chunks >= report.chunks // 2 > 3


def test_what_a_cut_lane_carried_is_sent_again_with_the_sums_that_it_has(cores_sum_nothing):
    cargo, lanes, first, is_cut = Arrivals("cuda:0", "cuda:0"), Lanes(), threading.Event(), threading.Event()

    def sink(*arguments):
        cargo.sink(*arguments)
        first.set()
        assert is_cut.wait(DEADLINE_S)  # this piece is written, and not acknowledged when the link breaks

    with ThreadPoolExecutor(1) as pool, connected(CONFIG, receiver_lanes=lanes) as (sender, receiver):
        receiver.expect(cargo.plan, sink, cargo.target)
        stream = sender.open(cargo.plan)
        putting = pool.submit(cargo.put_all, stream, chunk_tokens=TOKENS)  # it waits until a piece is acknowledged
        assert first.wait(DEADLINE_S)
        lanes.made[1].cut()
        wait_until(lambda: sender.epoch == 2)
        is_cut.set()
        putting.result(DEADLINE_S)
        report = stream.finish(DEADLINE_S)
        event(receiver, LinkRestored)
        event(receiver, StreamDone)
    assert cargo.is_identical and not cargo.wrong and report.resent_chunks
    assert len(set(cargo.calls)) == len(cargo.calls), "each piece is written once"


def test_a_gpu_lends_its_memory_to_a_few_pieces_at_once(monkeypatch, cores_sum_nothing):
    monkeypatch.setattr(gpu_sums, "AT_ONCE", 1)
    monkeypatch.setattr(gpu_sums, "_streams", {})
    cargo, streams = Arrivals("cuda:0", "cuda:0"), set()

    def sink(*arguments):
        streams.add(torch.cuda.current_stream())
        cargo.sink(*arguments)

    with connected(CONFIG) as (sender, receiver):
        receiver.expect(cargo.plan, sink, cargo.target)
        send(cargo, sender)
        event(receiver, StreamDone)
    assert cargo.is_identical and len(streams) == 1 and torch.cuda.default_stream() not in streams


def test_many_threads_with_many_cuda_streams_take_the_memory_of_the_few_that_sum():
    data, sums = torch.zeros(2**22, dtype=torch.uint8, device="cuda"), row_sums(b"the link's", by_bytes=True)
    queue_sums(data, sums)  # the keys are there
    before = torch.cuda.memory_allocated()

    def sum_on_four():
        for _ in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                queue_sums(data, sums)

    threads = [threading.Thread(target=sum_on_four) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < SUMMERS * 2**26, "cuBLAS keeps 2**25 a pair on an H100"


def test_nothing_is_written_once_a_stream_is_forgotten(cores_sum_nothing):
    """What a sink has queued on its CUDA stream is done by then: the blocks are another request's."""
    cargo, arrived = Arrivals("cuda:0", "cuda:0"), threading.Event()

    def sink(layer, start, end, data):
        torch.cuda._sleep(2**27)  # some 70 ms
        cargo.arrived[layer].fill_(1)
        arrived.set()

    with connected(CONFIG) as (sender, receiver):
        receiver.expect(cargo.plan, sink, cargo.target)
        stream = sender.open(cargo.plan)
        stream.put(0, 64, 64 + TOKENS, cargo.sent[0].reshape(-1))
        assert arrived.wait(DEADLINE_S)
        receiver.forget(1)
        with torch.cuda.stream(torch.cuda.Stream()):  # waits for no other
            cargo.arrived[0].zero_()
        torch.cuda.synchronize()
        stream.abort()
    assert not cargo.arrived[0].any()
