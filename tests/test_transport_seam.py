"""What every transport does with a KV stream, whatever it is made of: the same tests over loopback, a link, a fabric.

Chapters 07 and 08.
"""

import contextlib
import threading

import pytest
import torch
from transport_support import (DEADLINE_S, Cargo, connected, connected_fabric, event, next_event, stands_in,
                               wait_until)

from minprfaas.config import LinkConfig
from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.streams import IncomingStream


@contextlib.contextmanager
def looped():
    """One object is both ends."""
    loopback = Loopback()
    yield loopback, loopback


@contextlib.contextmanager
def linked():
    with connected(LinkConfig(lanes=2, chunk_bytes=4096)) as ends:
        yield ends


@pytest.fixture(params=[looped, linked, connected_fabric], ids=["loopback", "link", "fabric"])
def ends(request):
    """(sending end, receiving end) of a transport."""
    with request.param() as both:
        yield both


def put_some(cargo, stream):
    """The first 64 tokens of every layer that has rows, and 64 more of the first one."""
    for layer in range(3):
        stream.put(layer, 64, 128, cargo.sent[layer][:64].reshape(-1))
    stream.put(0, 128, 192, cargo.sent[0][64:128].reshape(-1))


def test_a_stream_arrives_identical_in_any_order_and_both_sides_report_it(ends):
    sender, receiver = ends
    cargo = Cargo(tokens=500)
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    stream.put(3, 0, cargo.plan.end, cargo.sent[3].reshape(-1))
    for start, end in ((300, 564), (64, 300)):
        for layer in (2, 0, 1):
            stream.put(layer, start, end, cargo.sent[layer][start - 64:end - 64].reshape(-1))
    report = stream.finish(DEADLINE_S)
    done = event(receiver, StreamDone)
    assert cargo.is_identical and done.stream_id == cargo.plan.stream_id
    assert report.bytes == done.report.bytes == cargo.plan.total_bytes
    assert report.first_put_at_s < report.last_put_at_s <= report.acked_at_s and report.resent_chunks == 0
    assert 0 <= report.stalled_s <= report.acked_at_s - report.first_put_at_s
    # Seven puts; of at most 42 rows or 4,096 bytes on the link, of 256 rows or 24,576 bytes on the fabric.
    assert report.chunks == {"Loopback": 7, "Link": 5 + 3 * 7 + 3 * 6, "Fabric": 1 + 3 * 2 + 3}[type(sender).__name__]
    assert report.first_put_at_s <= done.report.first_byte_at_s < done.report.last_byte_at_s <= report.acked_at_s
    assert [call for call in cargo.calls if call[0] == 3] == [(3, 64, 564)], "request-level state comes whole, once"


def test_what_is_ready_together_arrives_as_if_it_had_been_put_piece_by_piece(ends):
    sender, receiver = ends
    cargo = Cargo(tokens=1_500)
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    stream.put_ready([(1, 64, 128), (0, 64, 200), (2, 64, 128), (3, 0, 1_564)], cargo.source)
    with pytest.raises(ValueError, match="there already"):
        stream.put_ready([(0, 100, 300)], cargo.source)
    stream.put_ready([(0, 200, 1_564)] + [(layer, 128, 1_564) for layer in (1, 2)], cargo.source)  # each long
    report = stream.finish(DEADLINE_S)
    event(receiver, StreamDone)
    assert cargo.is_identical and report.chunks >= 7 and report.bytes == cargo.plan.total_bytes


def test_two_streams_at_once_do_not_mix(ends):
    sender, receiver = ends
    cargos = [Cargo(stream_id, tokens=200, seed=stream_id) for stream_id in (1, 2**63)]
    for cargo in cargos:
        receiver.expect(cargo.plan, cargo.sink)
    streams = [sender.open(cargo.plan) for cargo in cargos]
    for layer in range(3):
        for cargo, stream in zip(cargos, streams):
            stream.put(layer, 64, 264, cargo.sent[layer].reshape(-1))
    for cargo, stream in zip(cargos, streams):
        stream.put(3, 64, 264, cargo.sent[3].reshape(-1))
        stream.finish(DEADLINE_S)
    assert all(cargo.is_identical for cargo in cargos)


def test_the_bytes_may_change_as_soon_as_put_returns(ends):
    sender, receiver = ends
    cargo = Cargo(tokens=2000)
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    for layer, data in cargo.sent.items():
        scratch = data.clone().reshape(-1)
        stream.put(layer, 64, 2064, scratch)
        scratch.fill_(0)
    stream.finish(DEADLINE_S)
    assert cargo.is_identical


def test_what_is_not_in_the_plan_cannot_be_put(ends):
    sender, receiver = ends
    cargo, data = Cargo(), torch.zeros(64 * 96, dtype=torch.uint8)
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    for place, piece, complaint in [
            ((9, 64, 128), data, "layer 9 is not in the plan"),
            ((0, 64, 128), data[1:], "expected 6144 contiguous uint8, got 6143"),
            ((0, 64, 128), data.char(), "got 6144 of torch.int8"),
            ((0, 0, 64), data, "outside"),
            ((3, 64, 128), cargo.sent[3].reshape(-1), "as of token 320, not 128")]:
        with pytest.raises(ValueError, match=complaint):
            stream.put(*place, piece)
    stream.put(0, 64, 128, data)
    with pytest.raises(ValueError, match="there already"):
        stream.put(0, 64, 128, data)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\] were not put completely"):
        stream.finish(1.0)
    assert all(layer == 0 and 64 <= start < end <= 128 for layer, start, end in cargo.calls)


def test_a_stream_can_be_expected_once_at_a_time_and_not_again_when_it_is_done(ends):
    sender, receiver = ends
    cargo = Cargo()
    receiver.expect(cargo.plan, cargo.sink)
    with pytest.raises(ValueError, match="stream 1 is expected already"):
        receiver.expect(cargo.plan, cargo.sink)
    receiver.forget(1)
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    cargo.put_all(stream)
    stream.finish(DEADLINE_S)
    with pytest.raises(ValueError, match="or was received"):  # it would be acknowledged, and not written
        receiver.expect(cargo.plan, cargo.sink)


def test_a_stream_that_nobody_expects_is_refused_and_writes_nothing(ends):
    sender, _ = ends
    cargo = Cargo()
    stream = sender.open(cargo.plan)
    with pytest.raises(StreamAborted, match="stream 1: refused by the receiver"):
        cargo.put_all(stream)
        stream.finish(DEADLINE_S)
    assert cargo.calls == []


def test_over_the_loopback_the_very_put_that_is_refused_says_so_and_its_end_again():
    stream, cargo = Loopback().open(Cargo().plan), Cargo()
    with pytest.raises(StreamAborted, match="stream 1: refused by the receiver"):
        stream.put(0, 64, 128, cargo.sent[0][:64].reshape(-1))
    with pytest.raises(StreamAborted, match="stream 1: refused by the receiver"):
        stream.finish(1.0)


def test_a_forgotten_stream_is_written_no_more_and_no_event_names_it(ends):
    sender, receiver = ends
    cargo = Cargo()
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    put_some(cargo, stream)
    cargo.wait_for_rows(4 * 64)
    assert receiver.forget(1) == 128 and receiver.forget(1) is None
    written = len(cargo.calls)
    with pytest.raises(StreamAborted):
        stream.put(1, 128, 320, cargo.sent[1][64:].reshape(-1))
        stream.put(0, 192, 320, cargo.sent[0][128:].reshape(-1))
        stream.put(2, 128, 320, cargo.sent[2][64:].reshape(-1))
        stream.put(3, 64, 320, cargo.sent[3].reshape(-1))
        stream.finish(DEADLINE_S)
    if sender is not receiver:  # a message that comes after everything else of the link
        sender.send_message({"last": True})
        assert isinstance(next_event(receiver, DEADLINE_S), MessageReceived)
    assert next_event(receiver) is None and len(cargo.calls) == written


def test_an_aborted_stream_fails_on_the_receiver_with_what_had_arrived(ends):
    sender, receiver = ends
    cargo = Cargo()
    receiver.expect(cargo.plan, cargo.sink)
    stream = sender.open(cargo.plan)
    put_some(cargo, stream)
    cargo.wait_for_rows(4 * 64)
    stream.abort("the client went away")
    stream.abort("once is enough")
    failed = event(receiver, StreamFailed)
    assert (failed.stream_id, failed.reason, failed.arrived_end) == (1, "aborted by the sender", 128)
    with pytest.raises(StreamAborted, match="the client went away"):
        stream.put(1, 128, 192, cargo.sent[1][64:128].reshape(-1))
    with pytest.raises(StreamAborted, match="the client went away"):
        cargo.put_all(sender_that_was_aborted(sender, cargo))


def test_a_stream_that_was_aborted_writes_nothing_into_the_one_that_is_expected_in_its_place(ends):
    sender, receiver = ends
    first, second = Cargo(), Cargo()
    receiver.expect(first.plan, first.sink)
    stream = sender.open(first.plan)
    stream.abort("the client went away")
    event(receiver, StreamFailed)
    receiver.expect(second.plan, second.sink)
    with pytest.raises(StreamAborted, match="the client went away"):
        first.put_all(stream)
    assert first.calls == second.calls == []
    again = sender.open(second.plan)
    second.put_all(again)
    again.finish(DEADLINE_S)
    assert second.is_identical and first.calls == []


def sender_that_was_aborted(sender, cargo):
    stream = sender.open(cargo.plan)
    stream.abort("the client went away")
    return stream


def test_a_sink_that_fails_fails_its_stream_and_nothing_else(ends):
    sender, receiver = ends

    def broken_sink(*_):
        raise RuntimeError("no such block")

    broken, sound = Cargo(1), Cargo(2)
    receiver.expect(broken.plan, broken_sink)
    receiver.expect(sound.plan, sound.sink)
    stream, other = sender.open(broken.plan), sender.open(sound.plan)
    with pytest.raises(StreamAborted, match="refused by the receiver"):
        broken.put_all(stream)
        stream.finish(DEADLINE_S)
    failed = event(receiver, StreamFailed)
    assert failed.stream_id == 1 and "no such block" in failed.reason and failed.arrived_end == broken.plan.start
    sound.put_all(other)
    other.finish(DEADLINE_S)
    assert event(receiver, StreamDone).stream_id == 2 and sound.is_identical


def test_forget_waits_for_a_sink_that_is_writing(ends):
    """When `forget` returns, the blocks are the owner's again: no thread may still be writing into them."""
    sender, receiver = ends
    cargo, writing, may_end = Cargo(), threading.Event(), threading.Event()

    def slow_sink(*arguments):
        writing.set()
        assert may_end.wait(DEADLINE_S)
        cargo.sink(*arguments)

    receiver.expect(cargo.plan, slow_sink)
    stream = sender.open(cargo.plan)

    def put():
        with contextlib.suppress(StreamAborted):
            put_some(cargo, stream)

    putting = threading.Thread(target=put, daemon=True)
    forgetting = threading.Thread(target=receiver.forget, args=(1,), daemon=True)
    putting.start()
    assert writing.wait(DEADLINE_S)
    forgetting.start()
    wait_until(lambda: stands_in(forgetting, IncomingStream.close))
    forgetting.join(0.05)
    assert forgetting.is_alive(), "forget returned while the sink was writing"
    may_end.set()
    forgetting.join(DEADLINE_S)
    written = len(cargo.calls)
    putting.join(DEADLINE_S)
    assert not forgetting.is_alive() and not putting.is_alive()
    assert 1 <= len(cargo.calls) == written < 4


def test_a_stream_that_is_forgotten_while_its_last_piece_is_written_is_not_done_too(ends):
    sender, receiver = ends
    cargo, again = Cargo(), Cargo(seed=2)
    forgetting = threading.Thread(target=receiver.forget, args=(1,), daemon=True)

    def sink(layer, start, end, data):
        cargo.sink(layer, start, end, data)
        if cargo.is_identical:  # this was the last piece, on whatever lane it came
            forgetting.start()
            wait_until(is_forgotten)

    def is_forgotten():
        with contextlib.suppress(ValueError):  # expected already, still
            receiver.expect(again.plan, again.sink)
            return True

    receiver.expect(cargo.plan, sink)
    cargo.put_all(sender.open(cargo.plan))
    wait_until(lambda: forgetting.ident is not None and not forgetting.is_alive())
    stream = sender.open(again.plan)
    again.put_all(stream)
    stream.finish(DEADLINE_S)
    event(receiver, StreamDone)
    assert again.is_identical and next_event(receiver) is None, "one stream is done, and it is the second"


def test_messages_arrive_in_order_and_say_which_link_brought_them():
    with linked() as (sender, receiver):
        for number in range(50):
            sender.send_message({"number": number})
        received = [event(receiver, MessageReceived) for _ in range(50)]
        assert [one.message["number"] for one in received] == list(range(50))
        assert {one.link for one in received} == {receiver.name}
        with pytest.raises(ValueError, match="is a dict, not list"):
            sender.send_message([1])
        assert receiver.receive(0.0) is None


def test_several_transports_report_into_one_queue():
    loopback = Loopback()
    with connected(events=loopback.events) as (sender, _):
        sender.send_message({"from": "outside"})
        assert event(loopback, MessageReceived).link == "a-b"
        cargo = Cargo()
        loopback.expect(cargo.plan, cargo.sink)
        cargo.put_all(loopback.open(cargo.plan))
        assert event(loopback, StreamDone).stream_id == 1
