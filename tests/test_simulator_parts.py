"""The simulator's parts by themselves: clock, fluid link, prefill and decode nodes, arrivals, traces. Chapter 12."""

import json
import random
import statistics

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling.directory import Directory
from minprfaas.scheduling.paper_case import h200_profile, paper_lengths
from minprfaas.simulator.arrivals import (bursty, day_lengths, diurnal, drawn, from_trace, poisson, read_trace,
                                          write_conversations)
from minprfaas.simulator.clock import Clock
from minprfaas.simulator.fluid_link import FluidLink
from minprfaas.simulator.nodes import DecodeNode, PrefixCache, SimRequest

GBPS = 1.25e8  # bytes per second


def test_events_happen_in_order_of_time_and_then_of_planning():
    clock, seen = Clock(), []
    clock.at(2.0, seen.append, "c")
    clock.at(1.0, seen.append, "a")
    clock.at(1.0, clock.after, 0.5, seen.append, "b")
    clock.at(2.0, seen.append, "d")
    clock.run()
    assert (seen, clock.now_s) == (["a", "b", "c", "d"], 2.0)


# The link


def arrivals_of(link: FluidLink, clock: Clock):
    """(callback, list it fills with (label, time))."""
    seen = []
    return (lambda label: seen.append((label, pytest.approx(clock.now_s)))), seen


def test_a_stream_slower_than_the_link_ends_with_its_prefill_and_half_a_round_trip():
    clock = Clock()
    link = FluidLink(clock, 10.0, rtt_s=0.2)
    arrived, seen = arrivals_of(link, clock)
    clock.at(1.0, link.open_stream, 4 * GBPS)
    clock.at(3.0, link.close_stream, 4 * GBPS)
    clock.at(3.0, link.send, 0, arrived, "kv")
    clock.run()
    assert seen == [("kv", 3.1)]
    sample = link.sample()
    assert link.bytes_sent == pytest.approx(8 * GBPS) and sample.queued_bytes == 0
    assert sample.gbps / sample.utilization == pytest.approx(10.0)


def test_streams_faster_than_the_link_queue_and_leave_in_order():
    clock = Clock()
    link = FluidLink(clock, 10.0, rtt_s=0.0)
    arrived, seen = arrivals_of(link, clock)
    for label, end_s in (("first", 2.0), ("second", 4.0)):
        clock.at(0.0, link.open_stream, 15 * GBPS)
        clock.at(end_s, link.close_stream, 15 * GBPS)
        clock.at(end_s, link.send, 0, arrived, label)
    clock.run()  # 60 Gb are in after 2 s, 90 Gb after 4 s, and 10 leave each second
    assert seen == [("first", 6.0), ("second", 9.0)]


def test_bandwidth_that_drops_and_returns_delays_what_is_under_way_by_exactly_that():
    clock = Clock()
    link = FluidLink(clock, 10.0, rtt_s=0.0)
    arrived, seen = arrivals_of(link, clock)
    clock.at(0.0, link.send, 40 * GBPS, arrived, "bulk")
    clock.at(1.0, link.set_gbps, 1.0)
    clock.at(11.0, link.set_gbps, 0.0)
    clock.at(20.0, link.set_gbps, 10.0)
    clock.run()  # 10 Gb in the first second, 10 in the next ten, none in nine, and the last 20 in two
    assert seen == [("bulk", 22.0)]


def test_every_byte_that_enters_leaves_whatever_the_weather():
    rng, clock = random.Random(3), Clock()
    link = FluidLink(clock, 10.0, rtt_s=0.01)
    arrived, seen = arrivals_of(link, clock)
    total = 0.0
    for number in range(300):
        start_s, seconds, rate = rng.uniform(0, 100), rng.uniform(0.1, 5), rng.uniform(0.1, 6) * GBPS
        total += seconds * rate
        clock.at(start_s, link.open_stream, rate)
        clock.at(start_s + seconds, link.close_stream, rate)
        clock.at(start_s + seconds, link.send, 0, arrived, number)
    for _ in range(60):
        clock.at(rng.uniform(0, 100), link.set_gbps, rng.choice([0.0, 1.0, 10.0, 40.0]))
    clock.at(101.0, link.set_gbps, 10.0)
    clock.run()
    assert sorted(label for label, _ in seen) == list(range(300))
    assert link.bytes_sent == pytest.approx(total, rel=1e-6) and link.queued_bytes < 1


# Nodes


def decode_node(clock: Clock, done) -> DecodeNode:
    return DecodeNode(clock, h200_profile(), done)


def test_a_full_batch_takes_the_profiles_step_time_and_a_lone_request_its_fixed_share():
    for count in (1, 20):
        clock, finished = Clock(), []
        node = decode_node(clock, finished.append)
        for _ in range(count):
            clock.at(0.0, node.admit, SimRequest(0.0, 1000, 400))
        clock.run()
        assert finished[0].finished_at_s == pytest.approx(400 * 0.025 * {1: 0.525, 20: 1.0}[count])


def test_a_request_beyond_the_batch_waits_for_a_place_and_joins_between_steps():
    clock, finished = Clock(), []
    node = decode_node(clock, finished.append)
    for number in range(21):
        clock.at(0.0, node.admit, SimRequest(0.0, 1000, 100 if number == 7 else 400))
    clock.run()
    last = max(finished, key=lambda request: request.first_token_at_s)
    assert last.first_token_at_s == pytest.approx(100 * 0.025)  # when the short one left
    assert len(finished) == 21 and not node.running and not node.waiting


def test_a_prefix_cache_forgets_tails_first_and_tells_the_directory():
    directory, cache = Directory(), PrefixCache("a0", 4)
    directory.add_node("a0")
    directory.apply(cache.inventory())
    assert directory.apply(cache.store([1, 2, 3]))
    assert directory.apply(cache.store([1, 4, 5]))  # one block too many: block 3 is the oldest, and a tail
    assert (cache.match([1, 2, 3]), cache.match([1, 4, 5]), cache.match([9])) == (1024, 1536, 0)
    assert directory.match([1, 2, 3]) == {"a0": 1024} and directory.match([1, 4, 5]) == {"a0": 1536}
    assert cache.inventory().sequence == 6  # five blocks stored, one evicted
    assert cache.store([1, 4, 5]) is None  # nothing new


# Arrivals


@pytest.mark.parametrize("process", [poisson, bursty, lambda rate, rng: diurnal(rate, rng, 500.0)])
def test_arrivals_are_seeded_rising_and_as_many_as_asked_for(process):
    def times(seed):
        requests = drawn(process(5.0, random.Random(seed)), 20_000, paper_lengths(), 10, random.Random(1))
        return [request.arrived_at_s for request in requests]
    first = times(1)
    assert first == times(1) and first != times(2) and first == sorted(first)
    assert 20_000 / first[-1] == pytest.approx(5.0, rel=0.05)


def test_bursts_are_burstier_than_poisson_and_days_have_a_noon():
    def per_window(process):
        counts = [0] * 400
        for at_s in process:
            if at_s >= 4000:
                return counts
            counts[int(at_s // 10)] += 1
    calm = per_window(poisson(5.0, random.Random(1)))
    burst = per_window(bursty(5.0, random.Random(1)))
    day = per_window(diurnal(5.0, random.Random(1), 4000.0))
    assert statistics.pvariance(calm) < 1.5 * statistics.mean(calm)
    assert statistics.pvariance(burst) > 2 * statistics.mean(burst)
    assert sum(day[:200]) > 1.5 * sum(day[200:])


def test_drawn_lengths_are_the_planners_and_stretch_as_the_day_goes():
    lengths = paper_lengths()
    requests = list(drawn(poisson(5.0, random.Random(1)), 20_000, lengths, 10, random.Random(1)))
    assert statistics.mean(request.input_tokens for request in requests) == pytest.approx(lengths.mean(float), rel=0.02)
    scale = day_lengths(4000.0)
    assert scale(1000.0) < 0.6 < 1.0 == scale(0.0) < 1.8 < scale(3000.0)


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_that_is_not_positive_is_refused(rate):
    for process in (poisson, bursty):
        with pytest.raises(UserError, match="arrival rate"):
            next(process(rate, random.Random(1)))


# Traces


def test_a_made_up_trace_is_read_back_and_repeats_with_its_seed(tmp_path):
    path, again = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_conversations(path, 500, 4.0, seed=3)
    write_conversations(again, 500, 4.0, seed=3)
    trace = read_trace(path)
    assert path.read_bytes() == again.read_bytes() and len(trace) == 500
    assert all(-(-request.input_tokens // 512) == len(request.keys) for request in trace)
    blocks, seen, hits = sum(len(request.keys) for request in trace), set(), 0
    for request in trace:
        hits += len(seen.intersection(request.keys))
        seen.update(request.keys)
    assert 0.3 < hits / blocks < 0.9
    fast = list(from_trace(trace, speed=2.0))
    assert fast[-1].arrived_at_s == trace[-1].arrived_at_s / 2 and fast[-1].keys == trace[-1].keys


GOOD = {"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}


@pytest.mark.parametrize("line, complaint", [
    ("{", "not JSON"), ("[1]", "not an object"), (json.dumps({"timestamp": 1}), "not an object with"),
    (json.dumps({**GOOD, "input_length": 0}), "input_length is 0"),
    (json.dumps({**GOOD, "timestamp": "now"}), "timestamp is 'now'"),
    (json.dumps({**GOOD, "output_length": True}), "output_length is True"),
    (json.dumps({**GOOD, "hash_ids": [1, None]}), "hash_ids")])
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"trace\.jsonl, line 2: .*{complaint}"):
        read_trace(path)


def test_an_empty_a_missing_a_binary_and_a_sparse_trace_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with open(tmp_path / "sparse.jsonl", "wb") as sparse:
        sparse.truncate(10**12)
    for name, complaint in (("empty", "is empty"), ("missing", "cannot be read"), ("binary", "cannot be read"),
                            ("sparse", "too large")):
        with pytest.raises(UserError, match=complaint):
            read_trace(tmp_path / f"{name}.jsonl")
