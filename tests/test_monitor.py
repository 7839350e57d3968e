"""The congestion monitor: regimes with hysteresis, and the capacity that a link really has. Chapter 11."""

import math

import pytest

from minprfaas.config import LinkSample
from minprfaas.scheduling import congestion
from minprfaas.scheduling.congestion import HOLD_S, CongestionMonitor


def feed(monitor: CongestionMonitor, start_s: int, seconds: int, utilization: float, gbps: float, queued=0.0) -> None:
    for second in range(start_s, start_s + seconds):
        monitor.observe(LinkSample(float(second), gbps, utilization, queued))


def test_high_utilization_is_scarce_and_low_utilization_is_abundant_again():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 20, 0.3, 30.0)
    assert monitor.regime(19) == "abundant"
    feed(monitor, 20, 20, 0.95, 95.0)
    assert monitor.regime(39) == "scarce"
    feed(monitor, 40, 20, 0.3, 30.0)
    assert monitor.regime(59) == "abundant"


def test_between_the_marks_nothing_changes():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 30, 0.7, 70.0)
    assert monitor.regime(29) == "abundant"
    feed(monitor, 30, 20, 0.95, 95.0)
    feed(monitor, 50, 300, 0.7, 70.0)
    assert monitor.regime(349) == "scarce"


def test_a_queue_alone_makes_bandwidth_scarce():
    monitor = CongestionMonitor(8.0)  # 1 GB/s
    feed(monitor, 0, 5, 0.5, 4.0, queued=0.4e9)
    assert monitor.regime(4) == "abundant"
    feed(monitor, 5, 1, 0.5, 4.0, queued=0.6e9)
    assert monitor.regime(5) == "scarce"


def test_bandwidth_that_swings_fast_does_not_swing_the_regime():
    monitor, changes, before = CongestionMonitor(100.0), 0, "abundant"
    for second in range(600):
        high = second // 4 % 2
        monitor.observe(LinkSample(float(second), 95.0 if high else 20.0, 0.95 if high else 0.2, 0.0))
        changes += monitor.regime(second) != before
        before = monitor.regime(second)
    assert changes <= 600 / HOLD_S / 2


def test_the_capacity_is_what_a_busy_link_delivers():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 30, 0.5, 5.0)
    assert monitor.gbps == pytest.approx(10.0, rel=0.01)


def test_a_link_that_hardly_carries_anything_says_nothing_of_its_capacity_unless_something_waits():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 100, 0.02, 0.5)
    assert monitor.gbps == 100.0
    feed(monitor, 100, 100, 0.021, 0.5)
    assert monitor.gbps == pytest.approx(0.5 / 0.021)
    feed(monitor, 200, 100, 0.02, 0.5, queued=1.0)
    assert monitor.gbps == pytest.approx(0.5)


def test_the_averages_follow_with_their_time_constants():
    monitor = CongestionMonitor(10.0)
    monitor.observe(LinkSample(0.0, 2.0, 0.5, 0.0))
    assert (monitor.utilization, monitor.gbps) == (0.5, 4.0), "the first sample counts alone"
    monitor.observe(LinkSample(3.0, 8.0, 1.0, 0.0))
    assert (monitor.utilization, monitor.gbps) == (pytest.approx(0.5 + 0.5 * (1 - math.exp(-1))),
                                                   pytest.approx(4.0 + 4.0 * (1 - math.exp(-1))))
    before = monitor.gbps
    monitor.observe(LinkSample(63.0, 0.0, 0.0, 0.0))
    assert monitor.gbps == pytest.approx(before + (10.0 - before) * (1 - math.exp(-1))), "an idle one returns slowly"


def test_a_line_that_carries_nothing_is_down():
    assert CongestionMonitor(1.0).up and not CongestionMonitor(0.0).up


def test_a_stalled_link_loses_its_capacity_and_an_idle_one_is_worth_trying_again():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 60, 0.0, 0.0, queued=1e6)
    assert monitor.gbps < 0.01 and monitor.regime(59) == "scarce"
    feed(monitor, 60, 600, 0.0, 0.0)
    assert monitor.gbps > 99


def test_without_recent_samples_bandwidth_counts_as_scarce():
    monitor = CongestionMonitor(100.0)
    assert monitor.regime(0) == "scarce"
    feed(monitor, 0, 10, 0.1, 10.0)
    assert (monitor.regime(12), monitor.regime(60)) == ("abundant", "scarce")


def test_a_sample_out_of_order_is_ignored():
    monitor = CongestionMonitor(100.0)
    feed(monitor, 0, 10, 0.1, 10.0)
    before = monitor.utilization
    monitor.observe(LinkSample(3.0, 99.0, 0.99, 1e12))
    assert (monitor.utilization, monitor.queued_bytes) == (before, 0.0)


@pytest.fixture
def no_memory(monkeypatch):
    """Each sample counts alone."""
    monkeypatch.setattr(congestion, "SMOOTH_S", 1e-3)


def test_a_regime_lasts_its_time_before_bandwidth_is_abundant_again(no_memory):
    monitor = CongestionMonitor(100.0)
    for began_s in (0, 100):
        feed(monitor, began_s, 1, 0.95, 95.0)
        feed(monitor, began_s + 1, 9, 0.2, 20.0)
        assert monitor.regime(began_s + 9) == "scarce", "it has been so for nine seconds, and holds for ten"
        feed(monitor, began_s + 10, 1, 0.2, 20.0)
        assert monitor.regime(began_s + 10) == "abundant"
        feed(monitor, began_s + 11, 1, 0.95, 95.0)
        assert monitor.regime(began_s + 11) == "scarce", "the other way it turns at once"
        feed(monitor, began_s + 12, 11, 0.2, 20.0)


def test_bandwidth_is_abundant_again_only_when_the_queue_is_short_too(no_memory):
    monitor = CongestionMonitor(8.0)  # 1 GB/s
    feed(monitor, 0, 1, 0.95, 7.6, queued=0.6e9)
    feed(monitor, 1, 60, 0.3, 2.4, queued=0.3e9)
    assert monitor.regime(60) == "scarce"
    feed(monitor, 61, 1, 0.3, 2.4, queued=0.05e9)
    assert monitor.regime(61) == "abundant"


def test_what_all_senders_put_on_the_line_adds_up_until_one_is_silent(no_memory):
    monitor = CongestionMonitor(8.0)
    for name in ("prfaas-0", "prfaas-1"):
        monitor.hear(name, LinkSample(5e6, 4.0, 0.5, 0.3e9, link=f"to {name}"), 1.0)  # its clock is its own
    monitor.hear("prfaas-1", LinkSample(5e6, 4.0, 0.5, 0.3e9, link="to prfaas-1"), 2.0)
    assert (monitor.queued_bytes, monitor.utilization) == (0.6e9, pytest.approx(1.0))
    assert monitor.gbps == pytest.approx(8.0) and monitor.regime(2.0) == "scarce"
    monitor.hear("prfaas-1", LinkSample(5e6, 1.6, 0.2, 0.0, link="to prfaas-1"), 16.0)
    assert monitor.queued_bytes == 0.3e9, "the other one was heard fifteen seconds ago"
    monitor.hear("prfaas-1", LinkSample(5e6, 1.6, 0.2, 0.0, link="to prfaas-1"), 17.0)
    assert (monitor.queued_bytes, monitor.utilization) == (0.0, pytest.approx(0.2))
    for name in ("one", "two"):
        monitor.hear(name, LinkSample(5e6, 8.0, 0.7, 0.0), 18.0 + 0.001 * len(name))
    monitor.hear("two", LinkSample(5e6, 8.0, 0.7, 0.0), 19.0)
    assert monitor.utilization == pytest.approx(1.0), "a line is never more than full"
