"""One emulated line between two datacenters: links, threads and processes share its rate and its weather.

Chapter 07.
"""

import contextlib
import os
import signal
import threading

import pytest
from programs import process_starter
from transport_support import DEADLINE_S, IDENTITY, Cargo, in_parallel, new_store

from minprfaas.config import LineConfig, LinkConfig
from minprfaas.config import WeatherChange
from minprfaas.errors import UserError
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.shared_words import SharedWords, remove_abandoned

LINE = LineConfig(gbps=0.008, weather=(WeatherChange(5.0, gbps=0.004, rtt_ms=100),))  # a kilobyte takes a millisecond
FRAMES = 400


@pytest.fixture(scope="module")
def processes():
    return process_starter()


def carry_frames(path, begin_at: float, ready, arrivals) -> None:
    """A user of the line that is always late by nothing: sends its next frame when the line says so."""
    line = EmulatedLine(LINE, path)
    line.begin(begin_at)
    ready.wait(DEADLINE_S)
    now, found = 0.0, []
    while len(found) < FRAMES:
        now = max(now, line.start_of(0.0, now))
        found.append(line.carry(1000, 0.0, now))
    arrivals.put(found)
    line.close()


def test_processes_and_threads_that_send_at_once_together_carry_the_rate_of_the_line(processes, tmp_path):
    """On the line's own clock: no two frames overlap, and there is no gap between two."""
    path, ready, arrivals = tmp_path / "a-b.line", processes.Barrier(4), processes.Queue()
    mine = EmulatedLine(LINE, path)
    mine.begin(0.0)
    users = [processes.Process(target=carry_frames, args=(path, 3.0, ready, arrivals), daemon=True) for _ in range(2)]
    users += [threading.Thread(target=carry_frames, args=(path, 3.0, ready, arrivals), daemon=True) for _ in range(2)]
    for user in users:
        user.start()
    found = sorted(at for _ in users for at in arrivals.get(timeout=DEADLINE_S))
    for user in users:
        user.join(DEADLINE_S)
    assert found == pytest.approx([0.001 * number for number in range(1, 4 * FRAMES + 1)], rel=1e-6)
    assert mine.free_at_s() == pytest.approx(0.001 * 4 * FRAMES)
    mine.close()


def test_a_weather_change_hits_every_user_at_the_same_moment(tmp_path):
    early, late = (EmulatedLine(LINE, tmp_path / "line") for _ in range(2))
    early.begin(100.0)
    late.begin(104.0)  # the line is up already: its weather does not begin again
    for line in (early, late):
        assert (line.rate(104.9), line.rate(105.1)) == (1e6, 0.5e6)
    assert early.carry(500, 105.5, 105.5) == pytest.approx(105.5 + 0.001 + 0.05)
    assert late.carry(500, 105.5, 105.5) == pytest.approx(105.5 + 0.002 + 0.05), "behind the other one's frame"
    early.close()
    late.close()


def test_the_file_disappears_with_its_last_user(tmp_path):
    lines = [EmulatedLine(LINE, tmp_path / "line") for _ in range(3)]
    for line in lines:
        assert (tmp_path / "line").exists()
        line.close()
        line.close()
    assert list(tmp_path.iterdir()) == []


def open_files_in(folder) -> int:
    """Of this process. Other descriptors may come and go meanwhile, with threads that earlier tests have left."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_who_uses_the_words_no_more_leaves_no_open_file(tmp_path):
    ended = [SharedWords(2, tmp_path / "words") for _ in range(3)]
    assert open_files_in(tmp_path) == 3 * 3
    for words in ended:
        words.close()
    assert open_files_in(tmp_path) == 3, "but for the mapping, which goes with its words"
    with ended[0] as values:  # harmless, and of no meaning to anybody
        assert len(values) == 2


def test_files_whose_users_were_killed_are_removed_and_those_in_use_are_not(tmp_path):
    used, abandoned = tmp_path / "used.line", tmp_path / "abandoned.line"
    user = EmulatedLine(LINE, used)
    for path in (abandoned, tmp_path / "abandoned.line.users"):
        path.touch()  # nobody's lock is on it, as after a kill
    remove_abandoned([used, abandoned, tmp_path / "gone.line"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used.line", "used.line.users"]
    user.close()


def test_a_line_of_another_configuration_does_not_share_the_file(tmp_path):
    line = EmulatedLine(LINE, tmp_path / "line")
    with pytest.raises(UserError, match="line is in use for an emulated line of another rate"):
        EmulatedLine(LineConfig(gbps=1), tmp_path / "line")
    line.close()
    EmulatedLine(LineConfig(gbps=1), tmp_path / "line").close()
    assert list(tmp_path.iterdir()) == []


def _use(path, opened) -> None:
    line = EmulatedLine(LINE, path)
    line.begin(1.0)
    opened.set()
    threading.Event().wait(DEADLINE_S)


def test_one_user_at_a_time_has_the_words_in_hand(tmp_path):
    first, second = (SharedWords(2, tmp_path / "words") for _ in range(2))

    def count():
        with second as words:
            words[0] += 1

    counting = threading.Thread(target=count, daemon=True)
    with first as words:
        before = words[0]
        counting.start()
        counting.join(0.2)
        words[0] = before + 1
        assert counting.is_alive(), "two had them at once"
    counting.join(DEADLINE_S)
    with first as words:
        assert words[0] == 2
    first.close()
    second.close()


def test_what_a_killed_process_left_behind_is_not_taken_for_a_line_that_is_up(processes, tmp_path):
    opened, path = processes.Event(), tmp_path / "line"
    victim = processes.Process(target=_use, args=(path, opened), daemon=True)
    victim.start()
    assert opened.wait(DEADLINE_S)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(DEADLINE_S)
    assert path.exists()
    line = EmulatedLine(LINE, path)
    line.begin(200.0)
    assert line.rate(204.0) == 1e6, "the weather begins with the first user that lives"
    line.close()
    assert list(tmp_path.iterdir()) == []


def test_two_links_over_one_line_take_at_least_as_long_as_it_needs_for_both(tmp_path):
    config, store, cargos = LinkConfig(lanes=2, chunk_bytes=4096), new_store(), [Cargo(1, 3000), Cargo(2, 3000)]
    line = LineConfig(gbps=0.02)
    links = [[Link(name, store, 0, config, IDENTITY, EmulatedLine(line, tmp_path / "a-b")),
              Link(name, store, 1, config, IDENTITY)] for name in ("one", "two")]
    in_parallel(*(lambda end=end: end.connect(DEADLINE_S) for pair in links for end in pair))

    def send(pair, cargo):
        pair[1].expect(cargo.plan, cargo.sink)
        stream = pair[0].open(cargo.plan)
        cargo.put_all(stream)
        return stream.finish(DEADLINE_S)

    reports = in_parallel(*(lambda pair=pair, cargo=cargo: send(pair, cargo) for pair, cargo in zip(links, cargos)))
    in_parallel(*(end.close for pair in links for end in pair))
    elapsed_s = max(report.acked_at_s for report in reports) - min(report.first_put_at_s for report in reports)
    assert elapsed_s >= sum(report.bytes for report in reports) / (1.01 * 0.02e9 / 8)
    assert all(cargo.is_identical for cargo in cargos)
    for sender, _ in links:
        sender.line.close()
    assert list(tmp_path.iterdir()) == []
