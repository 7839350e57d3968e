"""Congestion signals: utilization, queue, acknowledgement delay and its trend, stalls. Time is an argument."""

import pytest
from transport_support import DEADLINE_S, Cargo, connected

from minprfaas.config import LinkConfig
from minprfaas.transport.monitor import RING_SAMPLES, Monitor


def test_utilization_is_the_share_of_the_emulated_rate_that_left():
    monitor = Monitor(0.0)
    for step in range(100):
        now = step * 0.01
        monitor.queued(500, now)
        monitor.sent(500, now)
        monitor.settled(500, 0.005, now + 0.005)
        monitor.tick(now, 100_000.0)
    sample = monitor.samples[-1]
    assert sample.utilization == pytest.approx(0.5, rel=0.05) and sample.egress_gbps == pytest.approx(0.0004, rel=0.05)
    unthrottled = Monitor(0.0)
    unthrottled.queued(1000, 0.0)
    unthrottled.sent(1000, 0.0)
    unthrottled.settled(1000, 0.1, 0.1)
    assert unthrottled.tick(0.4, None).utilization == pytest.approx(0.25), "in flight for a quarter of the time"


def test_the_trend_is_the_slope_of_a_growing_delay():
    monitor = Monitor(0.0)
    for step in range(1, 400):
        now = step * 0.05
        monitor.queued(1, now)
        monitor.sent(1, now)
        monitor.settled(1, 0.1 + 0.02 * now, now)
        monitor.tick(now, None)
    stats = monitor.stats()
    assert stats.ack_delay_trend == pytest.approx(0.02, rel=0.1)
    assert stats.ack_delay_s == pytest.approx(0.1 + 0.02 * 20, rel=0.05)


def test_bytes_in_flight_without_progress_are_one_stall_until_something_is_acknowledged():
    monitor = Monitor(0.0)
    for start in (0.0, 10.0):
        monitor.queued(300, start)
        monitor.sent(200, start)
        monitor.settled(100, 0.05, start + 0.05)
        for step in range(40):
            monitor.tick(start + 0.1 * step, None)
        monitor.sent(100, start + 4.0)
        monitor.settled(200, 4.0, start + 4.0)
        monitor.tick(start + 5.0, None)
    assert monitor.stats().stalls == 2


def test_the_ring_keeps_the_latest_minute():
    monitor = Monitor(0.0)
    for step in range(1, 1000):
        monitor.tick(step * 0.25, None)
    samples = monitor.stats().samples
    assert len(samples) == RING_SAMPLES and samples[-1].time_s == 999 * 0.25


def test_a_full_emulated_link_reports_itself_as_full():
    cargo = Cargo(tokens=15_000)
    with connected(LinkConfig(gbps=0.03, lanes=2)) as (sender, receiver):
        receiver.expect_stream(cargo.plan, cargo.sink)
        stream = sender.open_stream(cargo.plan)
        cargo.put_all(stream, chunk_tokens=5000)
        stream.finish(DEADLINE_S)
        stats = sender.stats()
    assert max(sample.utilization for sample in stats.samples) > 0.9
    assert max(sample.queued_bytes for sample in stats.samples) > 1_000_000
    assert stats.egress_bytes >= cargo.plan.total_bytes and stats.inflight_bytes == stats.queued_bytes == 0
