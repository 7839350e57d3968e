"""A link carries messages and KV streams, stripes, pushes back, and ends in a named event. Chapter 07."""

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transport_support import (DEADLINE_S, IDENTITY, Cargo, connected, event, gated, new_store, stands_in,
                               wait_until)

from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import LayerPlan, LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.events import LinkLost, MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.wan.frames import HEADER_BYTES, Kind
from minprfaas.transport.wan.lanes import SENDERS, Lane
from minprfaas.transport.wan.link import Link

HERE = Path(__file__).resolve().parent


def test_a_stream_arrives_identical_and_both_sides_report_it():
    cargo = Cargo(tokens=1000)
    with connected(LinkConfig(lanes=3, chunk_bytes=4096)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        report = stream.finish(DEADLINE_S)
        done = event(receiver, StreamDone)
    assert cargo.is_identical
    assert report.bytes == done.report.bytes == cargo.plan.total_bytes == 3 * 1000 * 96 + 20_001
    assert report.first_put_at_s <= report.last_put_at_s <= report.acked_at_s
    assert report.chunks > 70, "chunks of at most 4096 bytes"


def test_on_an_emulated_line_a_chunk_is_no_longer_than_its_time():
    """10 MB/s, of which ten milliseconds are 100 kB: a layer of 384 kB leaves in four pieces, and not in two."""
    cargo = Cargo(tokens=4000)
    with connected(LinkConfig(), LineConfig(gbps=0.08)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream, chunk_tokens=4000)
        assert stream.finish(DEADLINE_S).chunks == 3 * 4 + 1
    assert cargo.is_identical


def test_request_level_state_reaches_the_sink_whole_and_once():
    cargo = Cargo(state_bytes=50_000)
    with connected(LinkConfig(lanes=4, chunk_bytes=4096)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        stream.finish(DEADLINE_S)
    assert [call for call in cargo.calls if call[0] == 3] == [(3, 64, 320)]
    assert cargo.is_identical


def test_messages_arrive_once_and_in_order_whatever_their_size():
    sent = [{"number": number, "tokens": list(range(number * 997))} for number in range(20)]
    with connected(LinkConfig(lanes=4)) as (sender, receiver):
        for message in sent:
            sender.send_message(message)
            receiver.send_message(message)
        assert [event(receiver, MessageReceived).message for _ in sent] == sent
        assert [event(sender, MessageReceived).message for _ in sent] == sent
        assert receiver.receive(0.0) is None


def test_a_message_that_is_too_long_or_no_object_is_refused_by_name():
    with connected() as (sender, receiver):
        with pytest.raises(ValueError, match="above the limit of 268435456"):
            sender.send_message({"text": "x" * 2**28})
        with pytest.raises(ValueError, match="is a dict, not list"):
            sender.send_message([1])


def test_put_pushes_back_while_nothing_is_acknowledged():
    """The receiver's sink stands still: no more than `max_inflight_bytes` may pile up on the sender."""
    gate, cargo = threading.Event(), Cargo(tokens=4000)

    def slow_sink(*arguments):
        assert gate.wait(DEADLINE_S)
        cargo.sink(*arguments)

    with connected(LinkConfig(chunk_bytes=4096, max_inflight_bytes=40_000)) as (sender, receiver):
        receiver.expect(cargo.plan, slow_sink)
        stream = sender.open(cargo.plan)
        putting = threading.Thread(target=cargo.put_all, args=(stream,), daemon=True)
        putting.start()
        wait_until(lambda: stands_in(putting))
        putting.join(0.5)
        assert putting.is_alive(), "put returned although nothing had been acknowledged"
        stats = sender.stats()
        assert 0 < stats.queued_bytes + stats.inflight_bytes <= 40_000
        gate.set()
        putting.join(DEADLINE_S)
        assert stream.finish(DEADLINE_S).stalled_s > 0.3
    assert cargo.is_identical


class SlowLane(Lane):
    """Each sending thread of lane 0 takes a frame and sends it when the gate opens; the others begin once all have."""

    held: list[int]
    all_hold: threading.Event
    gate: threading.Event

    def post(self, frame):
        if frame.header.kind != Kind.HEARTBEAT:
            if self.index == 0:
                self.held.append(frame.header.seq)
                if len(self.held) == SENDERS:
                    self.all_hold.set()
            assert (self.gate if self.index == 0 else self.all_hold).wait(DEADLINE_S)
        return super().post(frame)


def test_a_slow_lane_does_not_stall_the_others():
    SlowLane.held, SlowLane.all_hold, SlowLane.gate = [], threading.Event(), threading.Event()
    cargo = Cargo(tokens=2000)
    with connected(LinkConfig(lanes=3, chunk_bytes=4096), sender_lanes=SlowLane) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        held_bytes = SENDERS * (HEADER_BYTES + 4096)
        wait_until(lambda: sender.stats().queued_bytes + sender.stats().inflight_bytes <= held_bytes)
        with pytest.raises(TimeoutError, match=f"{SENDERS} chunks are not acknowledged"):
            stream.finish(0.1)
        SlowLane.gate.set()
        stream.finish(DEADLINE_S)
    assert cargo.is_identical


def test_a_control_message_overtakes_queued_bulk():
    """The whole stream is queued first; the message leaves after at most the chunk on the line."""
    cargo, lane = Cargo(tokens=2000), gated()
    with connected(LinkConfig(chunk_bytes=4096), sender_lanes=lane) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        sender.send_message({"first": True})
        lane.permits.release(1000)
        assert isinstance(receiver.receive(DEADLINE_S), MessageReceived), "the stream was done before the message came"
        event(receiver, StreamDone)


def test_streams_share_a_line_in_turns():
    long, short, lane = Cargo(1, tokens=3000), Cargo(2, tokens=60, state_bytes=100), gated()
    with connected(LinkConfig(chunk_bytes=4096), sender_lanes=lane) as (sender, receiver):
        for cargo in (long, short):
            receiver.expect(cargo.plan, cargo.sink)
        for cargo in (long, short):
            cargo.put_all(sender.open(cargo.plan))
        lane.permits.release(1000)
        assert [event(receiver, StreamDone).stream_id for _ in range(2)] == [2, 1]
    assert long.is_identical and short.is_identical


def test_a_stream_that_nobody_expects_is_refused_and_writes_nothing():
    cargo = Cargo()
    with connected() as (sender, receiver):
        stream = sender.open(cargo.plan)
        with pytest.raises(StreamAborted, match="refused by the receiver"):
            cargo.put_all(stream)
            stream.finish(DEADLINE_S)
        _until_settled(sender)
        again = Cargo(2)  # the link itself is well
        receiver.expect(again.plan, again.sink)
        stream = sender.open(again.plan)
        again.put_all(stream)
        stream.finish(DEADLINE_S)
    assert cargo.calls == [] and again.is_identical


def test_a_forgotten_stream_is_never_written_again():
    cargo, lane = Cargo(tokens=3000), gated(20)
    with connected(LinkConfig(chunk_bytes=4096), sender_lanes=lane) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        wait_until(lambda: cargo.calls)
        receiver.forget(1)
        written = len(cargo.calls)
        lane.permits.release(1000)
        with pytest.raises(StreamAborted):
            stream.finish(DEADLINE_S)
        assert len(cargo.calls) == written


def test_an_aborted_stream_fails_on_the_receiver_with_what_had_arrived():
    cargo = Cargo(tokens=256)
    with connected() as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        for layer in range(3):
            stream.put(layer, 64, 128, cargo.sent[layer][:64].reshape(-1))
        stream.put(0, 128, 192, cargo.sent[0][64:128].reshape(-1))
        _until_settled(sender)
        stream.abort()
        failed = event(receiver, StreamFailed)
        with pytest.raises(StreamAborted, match="aborted by the sender"):
            stream.put(1, 128, 192, cargo.sent[1][64:128].reshape(-1))
    assert (failed.stream_id, failed.reason, failed.arrived_end) == (1, "aborted by the sender", 128)


def _until_settled(link):
    wait_until(lambda: link.stats().queued_bytes + link.stats().inflight_bytes == 0)


def test_a_sink_that_fails_fails_its_stream_and_not_the_link():
    def broken_sink(*_):
        raise RuntimeError("no such block")

    cargo = Cargo()
    with connected() as (sender, receiver):
        receiver.expect(cargo.plan, broken_sink)
        stream = sender.open(cargo.plan)
        with pytest.raises(StreamAborted):
            cargo.put_all(stream)
            stream.finish(DEADLINE_S)
        failed = event(receiver, StreamFailed)
        assert "no such block" in failed.reason and failed.arrived_end == cargo.plan.start
        sender.send_message({"alive": True})
        event(receiver, MessageReceived)


def test_a_link_counts_its_meetings_and_has_had_none_before_the_first():
    link = Link("a-b", new_store(), 0, LinkConfig(), IDENTITY)
    assert link.epoch == 0 and not link.is_up
    link.close()
    with pytest.raises(LinkDown, match="the link is closed on this side"):
        link.send_message({})
    with connected() as ends:
        assert [(end.epoch, end.is_up) for end in ends] == [(1, True), (1, True)]
        with pytest.raises(LinkDown, match="link a-b was connected before; a lost link is replaced by a new one"):
            ends[0].connect(DEADLINE_S)
        waiting = threading.Thread(target=ends[1].wait_until_lost, daemon=True)
        waiting.start()
        waiting.join(0.02)
        assert waiting.is_alive()
        ends[0].close()
        assert isinstance(ends[0].receive(0.0), LinkLost), "its last event is there when `close` returns"
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive() and [(end.epoch, end.is_up) for end in ends] == [(1, False), (1, False)]


def test_what_is_not_in_the_plan_cannot_be_put():
    cargo = Cargo()
    with connected() as (sender, receiver):
        stream = sender.open(cargo.plan)
        data = torch.zeros(64 * 96, dtype=torch.uint8)
        with pytest.raises(ValueError, match="layer 9 is not in the plan"):
            stream.put(9, 64, 128, data)
        with pytest.raises(ValueError, match="expected 6144 contiguous uint8, got 6143"):
            stream.put(0, 64, 128, data[1:])
        with pytest.raises(ValueError, match="outside"):
            stream.put(0, 0, 64, data)
        stream.put(0, 64, 128, data)
        with pytest.raises(ValueError, match="there already"):
            stream.put(0, 64, 128, data)
        with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\] were not put completely"):
            stream.finish(1.0)
        sender.open(StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, sender.config.chunk_bytes),), 0, 1))
        wide = StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, sender.config.chunk_bytes + 1),), 0, 1)
        for begin in (lambda: sender.open(wide), lambda: receiver.expect(wide, lambda *_: None)):
            with pytest.raises(ValueError, match="does not fit into a chunk"):
                begin()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_memory_may_be_reused_as_soon_as_put_returns():
    """The copy runs on a side stream behind the work queued so far; what the GPU computes next must not change it."""
    cargo = Cargo(tokens=20_000)
    with connected(LinkConfig(lanes=2)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        for layer, data in cargo.sent.items():
            scratch = data.cuda().reshape(-1)
            stream.put(layer, cargo.plan.start, cargo.plan.end, scratch)
            del scratch
            torch.full((data.numel(),), 255, dtype=torch.uint8, device="cuda")  # the allocator offers the same memory
        stream.finish(DEADLINE_S)
    assert cargo.is_identical


def test_what_was_said_before_a_goodbye_arrives_before_it():
    with connected(line=LineConfig(rtt_ms=50)) as (sender, receiver):
        sender.send_message({"text": "x" * 300_000})
        sender.close()
        assert len(event(receiver, MessageReceived).message["text"]) == 300_000
        assert event(receiver, LinkLost).reason == "closed by the peer"


def test_closing_one_side_ends_the_other_and_its_streams_at_once():
    cargo = Cargo()
    with connected(LinkConfig(timeout_s=60)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        stream.put(0, 64, 128, cargo.sent[0][:64].reshape(-1))
        sender.close()
        assert event(receiver, StreamFailed).reason == "closed by the peer"
        assert event(receiver, LinkLost).reason == "closed by the peer"
        with pytest.raises(LinkDown):
            stream.put(0, 128, 192, cargo.sent[0][64:128].reshape(-1))
        with pytest.raises(LinkDown, match="closed by the peer"):
            receiver.send_message({})


def test_a_link_that_dies_ends_its_own_streams_and_no_others():
    doomed, sound, events = Cargo(1), Cargo(2), queue.SimpleQueue()
    with connected(events=events) as (dying, one), connected(events=events, name="c-d") as (living, other):
        one.expect(doomed.plan, doomed.sink)
        other.expect(sound.plan, sound.sink)
        stream, lost = living.open(sound.plan), dying.open(doomed.plan)
        dying.close()
        assert event(one, StreamFailed).stream_id == 1
        assert event(one, LinkLost).link == "a-b"
        with pytest.raises(LinkDown):
            doomed.put_all(lost)
        sound.put_all(stream)
        stream.finish(DEADLINE_S)
        assert event(other, StreamDone).stream_id == 2 and sound.is_identical
        with pytest.raises(LinkDown):
            one.open(doomed.plan)


def test_a_peer_that_never_comes_is_a_named_error_within_the_deadline():
    with pytest.raises(LinkDown, match="the peer did not come"):
        Link("a-b", new_store(), 0, LinkConfig(), IDENTITY).connect(0.2)


def test_the_timeline_shows_each_chunk_on_its_lane():
    cargo, timeline = Cargo(), Timeline("prefill")
    with connected(LinkConfig(lanes=2, chunk_bytes=4096), timeline=timeline) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        report = stream.finish(DEADLINE_S)
        sender.send_message({})
        event(receiver, MessageReceived)
    spans = [entry for entry in timeline.events() if entry["ph"] == "X" and "layer" in entry["name"]]
    assert len(spans) == report.chunks
    assert all(report.first_put_at_s <= span["ts"] / 1e6 <= report.acked_at_s for span in spans)


BUSY = """
import itertools, os, threading
import torch
from transport_support import *
store = new_store()
is_busy = threading.Event()
links = [Link("a-b", store, rank, LinkConfig(lanes=4), IDENTITY) for rank in (0, 1)]
in_parallel(*(lambda link=link: link.connect(DEADLINE_S) for link in links))

cargo, image, weights = Cargo(), torch.zeros(2, 16, 64, 64), torch.zeros(16, 16, 3, 3)
def count_threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
def sink(layer, start, end, data):
    torch.conv2d(image, weights)  # oneDNN's, as the digest is on most servers: with a team of threads if it may
links[1].expect(cargo.plan, sink)
stream, threads = links[0].open(cargo.plan), count_threads()
cargo.put_all(stream)
stream.finish(DEADLINE_S)
assert count_threads() <= threads, "a lane computes with threads of its own"

def talk(link):
    try:
        for number in itertools.count():
            link.send_message({"number": number})
            link.receive(DEADLINE_S)
            if number == 10:
                is_busy.set()
    except LinkDown:
        pass  # as the process ends

for link in links * 4:
    threading.Thread(target=talk, args=(link,), daemon=True).start()
assert is_busy.wait(DEADLINE_S)
"""


def test_lanes_compute_with_one_thread_each_and_a_process_may_end_while_its_links_are_busy():
    """The interpreter goes while threads come back from C++ all the time, which ends a process by SIGABRT."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "6",
                   "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    ended = subprocess.run([sys.executable, "-c", BUSY], env=environment, capture_output=True, text=True,
                           timeout=2 * DEADLINE_S)
    assert (ended.returncode, ended.stderr) == (0, "")
