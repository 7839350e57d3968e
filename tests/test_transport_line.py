"""The emulated line: the rate, never above it for a second, and the weather as scheduled. Time is an argument.

Chapter 07.
"""

import json
import random

import pytest

from minprfaas.config import LineConfig
from minprfaas.config import WeatherChange
from minprfaas.errors import UserError
from minprfaas.transport.wan import line as line_module
from minprfaas.transport.wan.line import EmulatedLine, load_weather


def begun(*arguments, **options) -> EmulatedLine:
    line = EmulatedLine(LineConfig(*arguments, **options))
    line.begin(0.0)
    return line


def carry_backlog(line: EmulatedLine, seconds: float, lateness=lambda: 0.0) -> list[tuple[float, int]]:
    """Keep the line busy with frames queued at 0, served by a thread that wakes late; returns (left at, bytes)."""
    now, left = 0.0, []
    while now < seconds:
        nbytes = min(256 * 1024, line.chunk_limit(now) or 256 * 1024)
        now = max(now, line.start_of(0.0, now)) + lateness()
        if line.start_of(0.0, now) > now:  # a stall began meanwhile
            continue
        arrival = line.carry(nbytes, 0.0, now)
        left.append((max(arrival, now), nbytes))
    return left


def busiest_second(left: list[tuple[float, int]]) -> int:
    """The most bytes in any window of one second."""
    best = total = first = 0
    for at, nbytes in left:
        total += nbytes
        while left[first][0] <= at - 1.0:
            total -= left[first][1]
            first += 1
        best = max(best, total)
    return best


@pytest.mark.parametrize("gbps", [0.01, 0.1, 1.0])
def test_goodput_is_at_least_98_percent_and_no_second_is_above_102_on_an_unpunctual_machine(gbps):
    generator = random.Random(1)
    hiccups = iter([0.2, 0.1, 0.3])
    lateness = lambda: next(hiccups, 0) if generator.random() < 0.005 else generator.random() * 0.002  # noqa: E731
    line = begun(gbps=gbps)
    left = carry_backlog(line, 30.0, lateness)
    rate = gbps * 1e9 / 8
    assert sum(nbytes for _, nbytes in left) >= 0.98 * rate * left[-1][0]
    assert busiest_second(left) <= 1.02 * rate


@pytest.mark.parametrize("late_s, most_s, lost_s", [(0.25, 1.0, 0.0), (3.0, 0.2, 2.8)])
def test_what_the_machine_kept_from_the_line_is_caught_up_by_half_a_percent_up_to_a_limit(
        monkeypatch, late_s, most_s, lost_s):
    assert line_module.MAX_LAG_S == 1.0
    monkeypatch.setattr(line_module, "MAX_LAG_S", most_s)
    line, late = begun(gbps=0.008), iter([late_s])  # 1 MB/s
    left = carry_backlog(line, late_s + 60.0, lambda: next(late, 0.0))
    carried = lambda until: sum(nbytes for at, nbytes in left if at <= until)  # noqa: E731
    assert carried(late_s + 60.0) == pytest.approx(1e6 * (late_s + 60.0 - lost_s), abs=30_000)
    assert carried(late_s + 30.0) == pytest.approx(1.005e6 * 30.0, abs=30_000)


def test_a_line_says_how_old_its_weather_is_and_when_it_is_free():
    line = EmulatedLine(LineConfig(gbps=0.008))
    assert (line.age_s(7.0), line.rate(7.0)) == (0.0, 1e6)
    line.begin(5.0)
    line.begin(6.0)  # by another link: it is up already
    assert line.age_s(7.0) == 2.0 and line.free_at_s() == 5.0
    line.carry(10_000, 7.0, 7.0)
    assert line.free_at_s() == pytest.approx(7.01)
    assert begun(gbps=1e-6).chunk_limit(0.0) == 1024, "a chunk has a kilobyte at least"


def test_a_frame_arrives_half_a_round_trip_after_its_last_bit():
    line = begun(gbps=0.008, rtt_ms=40)  # 1 MB/s
    assert line.carry(10_000, 5.0, 5.0) == pytest.approx(5.0 + 0.010 + 0.020)
    assert line.carry(10_000, 5.0, 5.01) == pytest.approx(5.0 + 0.020 + 0.020)
    assert line.carry(10_000, 9.0, 9.0) == pytest.approx(9.0 + 0.010 + 0.020), "an idle line saves nothing up"


def test_a_line_without_a_rate_only_delays():
    line = begun(rtt_ms=10)
    assert line.chunk_limit(1.0) is None
    assert [line.carry(10**6, 1.0, 1.0) for _ in range(3)] == [pytest.approx(1.005)] * 3


def test_the_weather_changes_rate_and_delay_and_a_stall_passes_nothing():
    weather = (WeatherChange(10.0, gbps=0.1), WeatherChange(20.0, stall_s=5.0), WeatherChange(30.0, rtt_ms=100))
    line = begun(gbps=1.0, weather=weather)
    left = carry_backlog(line, 40.0)
    carried = lambda a, b: sum(n for at, n in left if a <= at < b) * 8 / 1e9 / (b - a)  # noqa: E731
    assert carried(1, 10) == pytest.approx(1.0, rel=0.02)
    assert carried(11, 20) == pytest.approx(0.1, rel=0.03)
    assert carried(20.1, 25) == 0
    assert carried(25, 29) == pytest.approx(0.1, rel=0.03), "what a stall cost is not caught up"
    assert line.carry(1000, 50.0, 50.0) == pytest.approx(50.05, abs=1e-3)


def test_a_frame_that_waited_through_a_stall_begins_when_it_ends():
    line = begun(gbps=0.008, weather=(WeatherChange(10.0, stall_s=5.0),))  # 1 MB/s
    line.carry(10_000, 9.0, 9.0)
    assert line.start_of(10.5, 12.0) == 15.0
    assert line.carry(10_000, 10.5, 15.0) == pytest.approx(15.010), "what the stall cost is lost, and not caught up"
    assert line.carry(10_000, 10.5, 15.010) == pytest.approx(15.020)


def test_a_chunk_takes_the_line_for_at_most_ten_milliseconds():
    assert begun(gbps=0.01).chunk_limit(0.0) == 12_500


@pytest.mark.parametrize("content, complaint", [
    ("{", "cannot be read as JSON"), ("{}", "holds no list"), ("[]", "holds no list"),
    ("[1]", "change 1: 1 is no object"),
    ('[{"gbps": 1}]', "is no object with at_s"), ('[{"at_s": 0, "speed": 1}]', "is no object with at_s"),
    ('[{"at_s": "0"}]', "at_s is '0'; it must be a number"),
    ('[{"at_s": 0, "gbps": 0}]', "bandwidth in Gbps is 0"),
    ('[{"at_s": -1}]', "at_s is -1"), ('[{"at_s": NaN}]', "at_s is nan"),
    ('[{"at_s": 0, "stall_s": true}]', "stall_s is True"),
    ('[{"at_s": 0, "rtt_ms": 99999}]', "round-trip time in ms is 99999"),
    ('[{"at_s": 5, "stall_s": 2}, {"at_s": 6}]', "change 2: at_s 6 lies before the end of the change before it")])
def test_a_malformed_weather_file_is_one_line_that_names_the_change(tmp_path, content, complaint):
    path = tmp_path / "weather.json"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_weather(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_weather_file_is_read_in_order(tmp_path):
    path = tmp_path / "weather.json"
    path.write_text(json.dumps([{"at_s": 1, "gbps": 0.5, "rtt_ms": 20}, {"at_s": 4, "stall_s": 1.5},
                                {"at_s": 5.5, "gbps": 1}]))
    assert load_weather(path) == (WeatherChange(1, 0.5, 20), WeatherChange(4, stall_s=1.5), WeatherChange(5.5, 1))
    with pytest.raises(UserError, match="missing.json is missing"):
        load_weather(tmp_path / "missing.json")
