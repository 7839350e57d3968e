"""Congestion signals: utilization, queue, acknowledgement delay. Time is an argument. Chapter 07."""

import pytest
import torch
from transport_support import DEADLINE_S, Cargo, connected

from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.transport.base import LayerPlan, StreamPlan
from minprfaas.transport.wan.frames import SlotPool
from minprfaas.transport.wan.monitor import (
    FIRST_CHUNK_BYTES, FIRST_CHUNKS, GROWING_CHUNKS, LEAST_CHUNK_BYTES, RING_SAMPLES, Monitor)
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.send_queue import SendQueue
from minprfaas.transport.wan.sending import LinkStream


def test_utilization_is_the_share_of_the_emulated_rate_that_left():
    monitor = Monitor(0.0)
    for step in range(100):
        now = step * 0.01
        monitor.queued(500, now)
        monitor.sent(500, now)
        monitor.settled(500, 0.005, now + 0.005)
        monitor.tick(now, 100_000.0)
    sample = monitor.stats().samples[-1]
    assert sample.utilization == pytest.approx(0.5, rel=0.05) and sample.gbps == pytest.approx(0.0004, rel=0.05)
    unthrottled = Monitor(0.0)
    unthrottled.queued(1000, 0.0)
    unthrottled.sent(1000, 0.0)
    unthrottled.settled(1000, 0.1, 0.1)
    assert unthrottled.tick(0.4, None).utilization == pytest.approx(0.25), "in flight for a quarter of the time"


def figures(sample):
    return [sample.at_s, sample.gbps, sample.utilization, sample.queued_bytes, sample.inflight_bytes,
            sample.ack_delay_s]


def test_a_sample_says_what_has_left_since_the_last_one_what_waits_and_what_is_under_way():
    monitor = Monitor(10.0)
    monitor.queued(4000, 10.0)
    for _ in range(2):
        monitor.sent(1000, 10.1)
    assert monitor.tick(10.24, None) is None
    assert figures(monitor.tick(10.25, None)) == pytest.approx([10.25, 64e-6, 0.6, 2000, 2000, 0.0])
    monitor.settled(1000, 0.2, 10.3)
    monitor.settled(1000, 0.36, 10.375)
    assert figures(monitor.tick(10.5, None)) == pytest.approx([10.5, 0.0, 0.5, 2000, 0, 0.22]), "an eighth of the way"
    monitor.sent(1000, 10.5)
    monitor.settled(1000, None, 10.6)  # given up: that says nothing of how long an acknowledgement takes
    assert figures(monitor.tick(10.75, None)) == pytest.approx([10.75, 32e-6, 0.4, 1000, 0, 0.22])
    monitor.sent(1000, 10.75)
    assert figures(monitor.tick(11.25, 1000.0)) == pytest.approx([11.25, 16e-6, 1.0, 0, 1000, 0.22]), "never above all"
    stats = monitor.stats()
    assert (stats.egress_bytes, stats.queued_bytes, stats.inflight_bytes, len(stats.samples)) == (4000, 0, 1000, 4)


def test_a_link_has_made_progress_when_it_had_nothing_to_do_and_when_something_was_settled():
    monitor = Monitor(0.0)
    for now in (2.0, 3.0):
        monitor.queued(1000, now)
        monitor.sent(1000, now)
    assert monitor.progress_at_s == 2.0, "what was put meanwhile is no progress"
    monitor.settled(1000, 1.0, 5.0)
    assert monitor.progress_at_s == 5.0


def test_the_ring_keeps_the_latest_minute():
    monitor = Monitor(0.0)
    for step in range(1, 1000):
        monitor.tick(step * 0.25, None)
    samples = monitor.stats().samples
    assert len(samples) == RING_SAMPLES and samples[-1].at_s == 999 * 0.25


def test_a_full_emulated_link_reports_itself_as_full():
    cargo = Cargo(tokens=30_000)
    with connected(LinkConfig(lanes=2), LineConfig(gbps=0.03)) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream, chunk_tokens=5000)
        stream.finish(DEADLINE_S)
        stats = sender.stats()
    assert max(sample.utilization for sample in stats.samples) > 0.9
    assert max(sample.queued_bytes for sample in stats.samples) > 1_000_000
    assert stats.egress_bytes >= cargo.plan.total_bytes and stats.inflight_bytes == stats.queued_bytes == 0


def settle(monitor, nbytes, delay_s):
    monitor.queued(nbytes, 0.0)
    monitor.sent(nbytes, 0.0)
    monitor.settled(nbytes, delay_s, delay_s)
    return monitor.chunk_bytes


def test_chunks_grow_while_the_line_brings_them_soon_and_shrink_when_it_brings_them_late():
    monitor, far_s = Monitor(0.0), 0.2  # a long way is no slow one
    assert [settle(monitor, size * 2**18, far_s + 0.01 * size) for size in (1, 2, 4)] == [2**19, 2**20, 2**21]
    assert settle(monitor, 2**18, far_s) == 2**21, "a small one says nothing of the next size"
    assert settle(monitor, 2**21, far_s + 0.3) == 2**21, "neither soon nor late"
    assert settle(monitor, 2**21, far_s + 0.6) == 2**20
    assert settle(monitor, 2**21, far_s + 9.0) == 2**20, "it was cut before"
    assert [settle(monitor, 2**14, far_s + 9.0) for _ in range(9)][-1] == LEAST_CHUNK_BYTES
    assert settle(monitor, LEAST_CHUNK_BYTES, far_s) == 2 * LEAST_CHUNK_BYTES
    monitor.begin_epoch()
    assert monitor.chunk_bytes == 2 * LEAST_CHUNK_BYTES
    for _ in range(9):
        settle(monitor, monitor.chunk_bytes, 9.0)  # of another line, which is longer
    assert monitor.chunk_bytes > FIRST_CHUNK_BYTES
    monitor.begin_epoch()
    assert monitor.chunk_bytes == FIRST_CHUNK_BYTES
    assert settle(monitor, FIRST_CHUNK_BYTES, 0.002) == 50 * FIRST_CHUNK_BYTES, "such a one should take a tenth second"


def test_little_is_on_its_way_until_the_line_has_shown_its_speed():
    queue = SendQueue(10**9, 0.0)
    queue.monitor.queued(FIRST_CHUNKS * FIRST_CHUNK_BYTES, 0.0)
    assert not queue.has_room(1)
    chunk = settle(queue.monitor, FIRST_CHUNK_BYTES, 0.05)
    assert queue.has_room((GROWING_CHUNKS - FIRST_CHUNKS) * chunk)
    assert not queue.has_room(GROWING_CHUNKS * chunk), "they grow, and few are on their way"
    for _ in range(2 * GROWING_CHUNKS - 1):
        settle(queue.monitor, FIRST_CHUNK_BYTES // 2, 0.05)
    chunk = settle(queue.monitor, chunk, 0.05)
    for _ in range(2 * GROWING_CHUNKS):
        assert not queue.has_room(10**8), "they have grown once more"
        settle(queue.monitor, FIRST_CHUNK_BYTES // 2, 0.05)
    assert queue.has_room(10**8), "they grow no more: nobody puts larger ones"
    settle(queue.monitor, chunk, 0.05)
    assert queue.has_room(10**8), "nor is anybody held up later"
    queue.begin_epoch(9.0)
    assert not queue.has_room(10**8), "it may be another line"


def test_the_chunks_of_a_new_epoch_are_small_until_the_line_has_shown_its_speed():
    limit = 4 * FIRST_CHUNK_BYTES
    outbox, row = Outbox("a-b", LinkConfig(chunk_bytes=limit, max_inflight_bytes=8 * limit), None, None), 2**16
    outbox.begin_epoch(1)
    plan = StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, row),), 0, 12 * limit // row)
    stream = LinkStream(plan, outbox, SlotPool(limit), limit, None, None)

    def sizes(start, nbytes):
        """Of the chunks of a put."""
        stream.put(0, start // row, (start + nbytes) // row, torch.zeros(nbytes, dtype=torch.uint8))
        frames = [outbox.next_frame(1)]
        while outbox.stats().queued_bytes:
            frames.append(outbox.next_frame(1))
        outbox.settle([frame.header.seq for frame in frames])
        return {frame.header.nbytes for frame in frames}

    assert sizes(0, 2 * FIRST_CHUNK_BYTES) == {FIRST_CHUNK_BYTES}
    assert sizes(limit, 2 * limit) == sizes(3 * limit, 2 * limit) == {limit}
    outbox.begin_epoch(1)
    assert sizes(5 * limit, 2 * FIRST_CHUNK_BYTES) == {FIRST_CHUNK_BYTES}
