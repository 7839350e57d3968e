"""Plans and what a receiver accepts: nothing outside the plan, nothing twice, nothing after it gave up. Chapter 08."""

import random
import threading

import pytest
import torch
from transport_support import DEADLINE_S, stands_in, wait_until

from minprfaas.config import StateKind
from minprfaas.transport.base import LayerPlan, StreamAborted, StreamPlan
from minprfaas.transport.events import EventQueue, StreamFailed
from minprfaas.transport.streams import Coverage, ExpectedStreams, IncomingStream, Piece

PLAN = StreamPlan(5, (LayerPlan(0, 0, StateKind.TOKEN, 4), LayerPlan(1, 1, StateKind.REQUEST, 10)), 8, 16)


def receiver():
    calls = []
    return IncomingStream(PLAN, lambda layer, start, end, data: calls.append((layer, start, end, data.tolist()))), calls


def chunk(**fields) -> Piece:
    return Piece(**{"group": 0, **fields})


@pytest.mark.parametrize("fields", [
    dict(layer=2, start=8, end=9, nbytes=4), dict(layer=0, group=1, start=8, end=9, nbytes=4),
    dict(layer=0, start=7, end=9, nbytes=8), dict(layer=0, start=15, end=17, nbytes=8),
    dict(layer=0, start=8, end=8, nbytes=0),
    dict(layer=0, start=8, end=9, nbytes=3), dict(layer=0, start=8, end=9, offset=4, nbytes=4),
    dict(layer=1, group=1, start=8, end=15, nbytes=10), dict(layer=1, group=1, start=8, end=16, offset=1, nbytes=10),
    dict(layer=1, group=1, start=8, end=16, nbytes=0)])
def test_a_chunk_that_is_not_in_the_plan_writes_nothing(fields):
    stream, calls = receiver()
    with pytest.raises(StreamAborted):
        stream.accept(chunk(**fields), torch.zeros(fields["nbytes"], dtype=torch.uint8), 0.0)
    assert calls == []


def test_the_stream_is_complete_with_the_last_byte_in_any_order():
    stream, calls = receiver()
    rows = torch.arange(32, dtype=torch.uint8)
    assert not stream.accept(chunk(layer=1, group=1, start=8, end=16, offset=4, nbytes=6), rows[4:10], 1.0)
    assert not stream.accept(chunk(layer=0, start=12, end=16, nbytes=16), rows[16:], 2.0)
    assert calls == [(0, 12, 16, list(range(16, 32)))], "request-level state waits until it is whole"
    assert not stream.accept(chunk(layer=1, group=1, start=8, end=16, offset=0, nbytes=4), rows[:4], 3.0)
    assert stream.accept(chunk(layer=0, start=8, end=12, nbytes=16), rows[:16], 4.0)
    assert calls[1:] == [(1, 8, 16, list(range(10))), (0, 8, 12, list(range(16)))]
    assert (stream.report().bytes, stream.report().first_byte_at_s, stream.report().last_byte_at_s) == (42, 1.0, 4.0)


def test_the_same_tokens_twice_are_written_once_and_beside_others_refused():
    stream, calls = receiver()
    for again in range(3):
        assert not stream.accept(chunk(layer=0, start=8, end=12, nbytes=16), torch.zeros(16, dtype=torch.uint8), 0.0)
    with pytest.raises(StreamAborted, match="there already"):
        stream.accept(chunk(layer=0, start=11, end=13, nbytes=8), torch.zeros(8, dtype=torch.uint8), 0.0)
    assert len(calls) == 1


def test_layers_of_a_group_may_come_as_one_piece_and_count_as_each_of_them():
    def entry(layer, group, encoding="exact", row_bytes=4):
        return LayerPlan(layer, group, StateKind.TOKEN, row_bytes, encoding)

    entries = (entry(0, 0), entry(1, 1), entry(2, 0), entry(3, 0), entry(4, 0, "fp8"), entry(5, 0, "fp8"),
               entry(6, 1, row_bytes=8))
    calls, rows = [], torch.arange(48, dtype=torch.uint8)
    stream = IncomingStream(StreamPlan(5, entries, 8, 16), lambda *call: calls.append((*call[:3], call[3].tolist())))
    for layer, layers in ((0, 4), (1, 2), (4, 2), (0, 0)):
        with pytest.raises(StreamAborted):
            stream.accept(chunk(layer=layer, group=int(layer == 1), start=8, end=9, nbytes=4 * layers, layers=layers),
                          rows[:4 * layers], 0.0)
    stream.accept(chunk(layer=0, start=8, end=12, nbytes=48, layers=3), rows, 0.0)
    assert calls == [(0, 8, 12, list(range(48)))]
    with pytest.raises(StreamAborted, match="there already"):
        stream.accept(chunk(layer=0, start=8, end=12, nbytes=48, layers=3), rows, 0.0)


def test_a_run_that_is_refused_counts_for_none_of_its_layers():
    plan = StreamPlan(5, tuple(LayerPlan(layer, 0, StateKind.TOKEN, 4) for layer in range(2)), 8, 16)
    stream = IncomingStream(plan, lambda *call: None)
    stream.accept(chunk(layer=1, start=8, end=12, nbytes=16), torch.zeros(16, dtype=torch.uint8), 0.0)
    with pytest.raises(StreamAborted, match="there already"):
        stream.accept(chunk(layer=0, start=8, end=12, nbytes=32, layers=2), torch.zeros(32, dtype=torch.uint8), 0.0)
    assert stream.close() == 8, "rows of layer 0 were never written"


def test_after_close_nothing_is_written_and_the_arrived_prefix_is_known():
    stream, calls = receiver()
    stream.accept(chunk(layer=0, start=8, end=11, nbytes=12), torch.zeros(12, dtype=torch.uint8), 0.0)
    stream.accept(chunk(layer=0, start=12, end=13, nbytes=4), torch.zeros(4, dtype=torch.uint8), 0.0)
    assert stream.close() == 11
    with pytest.raises(StreamAborted, match="given the stream up"):
        stream.accept(chunk(layer=0, start=11, end=12, nbytes=4), torch.zeros(4, dtype=torch.uint8), 0.0)
    assert len(calls) == 2


def test_coverage_agrees_with_a_set_of_tokens():
    generator = random.Random(3)
    for _ in range(200):
        coverage, there = Coverage(10, 60), set()
        for _ in range(80):
            start = generator.randrange(5, 62)
            end = start + generator.randrange(0, 8)
            tokens = set(range(start, end))
            assert coverage.has(start, end) == (bool(tokens) and tokens <= there)
            fits = tokens and not tokens & there and start >= 10 and end <= 60
            if fits:
                coverage.add(start, end)
                there |= tokens
            else:
                with pytest.raises(ValueError):
                    coverage.add(start, end)
            prefix = next(token for token in range(10, 61) if token not in there)
            assert coverage.prefix_end == prefix and coverage.complete == (len(there) == 50)


@pytest.mark.parametrize("fields", [
    dict(stream_id=-1), dict(stream_id=2**64), dict(start=16), dict(start=-1), dict(end=2**32), dict(entries=()),
    dict(entries=(LayerPlan(0, 0, StateKind.TOKEN, 4),) * 2), dict(entries=(LayerPlan(0, 0, StateKind.TOKEN, 0),)),
    dict(entries=(LayerPlan(2**16, 0, StateKind.TOKEN, 4),)), dict(entries=(LayerPlan(-1, 0, StateKind.TOKEN, 4),)),
    dict(entries=(LayerPlan(0, 2**16, StateKind.TOKEN, 4),)), dict(entries=(LayerPlan(0, -1, StateKind.TOKEN, 4),)),
    dict(entries=(LayerPlan(0, 0, StateKind.TOKEN, 2**32),))])
def test_an_impossible_plan_is_refused(fields):
    with pytest.raises(ValueError):
        StreamPlan(**{"stream_id": 5, "entries": PLAN.entries, "start": 8, "end": 16, **fields})


def test_a_plan_may_reach_the_limits_of_its_fields():
    least = StreamPlan(0, (LayerPlan(0, 0, StateKind.TOKEN, 1),), 0, 1)
    most = StreamPlan(2**64 - 1, (LayerPlan(2**16 - 1, 2**16 - 1, StateKind.TOKEN, 2**32 - 1),), 2**32 - 2, 2**32 - 1)
    assert (least.total_bytes, most.total_bytes) == (1, 2**32 - 1)


def test_a_piece_that_waits_for_its_turn_while_the_stream_is_given_up_is_not_written():
    writing, may_end, calls, refused = threading.Event(), threading.Event(), [], []

    def slow_sink(layer, start, end, data):
        writing.set()
        assert may_end.wait(30)
        calls.append(start)

    stream = IncomingStream(PLAN, slow_sink)

    def accept(start):
        try:
            stream.accept(chunk(layer=0, start=start, end=start + 1, nbytes=4), torch.zeros(4, dtype=torch.uint8), 0.0)
        except StreamAborted as error:
            refused.append(str(error))

    threads = [threading.Thread(target=accept, args=(8,), daemon=True)]
    threads[0].start()
    assert writing.wait(30)
    for target, arguments in ((accept, (9,)), (stream.close, ())):  # the piece was there before
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        threads[-1].start()
        wait_until(lambda: stands_in(threads[-1], IncomingStream.close if target == stream.close else stream.accept))
        threads[-1].join(0.05)
        assert threads[-1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert calls == [8] and refused == ["the receiver has given the stream up"]


def test_a_sink_that_stands_still_is_waited_for_so_long_when_its_stream_is_given_up(monkeypatch):
    """The blocks that it writes cannot be another's; a node that waited for ever would answer nobody any more."""
    monkeypatch.setattr("minprfaas.transport.streams.SINK_WITHIN_S", 0.01)
    begins, may_go_on = threading.Event(), threading.Event()
    stream = IncomingStream(PLAN, lambda *_: begins.set() or may_go_on.wait(DEADLINE_S))
    piece, data = chunk(layer=0, start=8, end=9, nbytes=4), torch.zeros(4, dtype=torch.uint8)
    writing = threading.Thread(target=stream.accept, args=(piece, data, 0.0))
    writing.start()
    assert begins.wait(DEADLINE_S)
    with pytest.raises(RuntimeError, match="stream 5: its sink has stood still for 0.01 s"):
        stream.close()
    may_go_on.set()
    writing.join(DEADLINE_S)
    assert stream.close() == 9


def test_a_stream_that_is_given_up_while_it_fails_is_not_written_any_more():
    """A node that gives up what its link is about to end uses the blocks again at once."""
    events, began, may_end, written, found = EventQueue(), threading.Event(), threading.Event(), [], []
    streams = ExpectedStreams(events)
    streams.expect(PLAN, lambda *_: began.set() or written.append(may_end.wait(DEADLINE_S)))
    piece, data = chunk(layer=0, start=8, end=9, nbytes=4), torch.zeros(4, dtype=torch.uint8)
    calls = [lambda: streams.take(5, piece, data), lambda: streams.fail(5, "aborted by the sender"),
             lambda: found.append((streams.forget(5), len(written)))]
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    threads[0].start()
    assert began.wait(DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
        wait_until(lambda: stands_in(thread, IncomingStream.close))
    may_end.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    failed = [] if events.empty() else [events.get()]
    assert (found, failed) in (([(9, 1)], []), ([(None, 1)], [StreamFailed(5, "aborted by the sender", 9)]))
