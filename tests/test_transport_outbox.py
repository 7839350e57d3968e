"""What leaves, in which order, and until when it is kept: `transport.wan.outbox` and `send_queue`. Chapter 07."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transport_support import DEADLINE_S, in_parallel, stands_in, wait_until

from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.transport.base import LayerPlan, LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.wan.frames import (
    HEADER_BYTES, Frame, Header, Kind, Slot, SlotPool, StreamRecord, control_frame)
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import CONTROL_LIMIT_BYTES, MESSAGE_WINDOW, encode_message
from minprfaas.transport.wan.send_queue import SendQueue
from minprfaas.transport.wan.sending import LinkStream

CHUNK = 1000  # bytes in all, header included


def push(queue, stream, count, now=0.0, nbytes=CHUNK):
    for _ in range(count):
        queue.monitor.queued(nbytes, now)
        queue.push_chunk(chunk(stream, nbytes), now)


def chunk(stream, nbytes=CHUNK):
    return Frame(Header(Kind.CHUNK, stream=stream.stream_id, nbytes=nbytes - HEADER_BYTES), Slot(nbytes), stream)


def pop_all(queue, now=1.0):
    left = []
    while queue.queued_at_s() is not None:
        left.append(queue.pop(now))
    assert queue.pop(now) is None
    return left


# ---- the order

def test_streams_take_turns_chunk_by_chunk_and_everything_else_goes_first():
    queue, one, other = SendQueue(10**6, 0.0), StreamRecord(1), StreamRecord(2)
    push(queue, one, 3)
    push(queue, other, 2)
    queue.push_message(encode_message({"a": 1}), 0.0)
    queue.push_control(control_frame(Kind.REFUSE, seq=9), 0.0)
    queue.push_control(control_frame(Kind.DAMAGED, seq=8), 0.0)
    assert queue.push_ack(7, 0.0) and not queue.push_ack(8, 0.0), "the second goes with the first"
    left = pop_all(queue)
    assert [frame.header.kind.name for frame in left[:4]] == ["ACK", "REFUSE", "DAMAGED", "MESSAGE"]
    assert [frame.header.stream for frame in left[4:]] == [1, 2, 1, 2, 1]
    numbers = [frame.header.seq for frame in left]
    assert numbers == [0, 9, 8, 1, 2, 3, 4, 5, 6], "what must arrive is numbered as it leaves"


def test_the_queue_says_since_when_what_leaves_next_has_waited():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    assert queue.queued_at_s() is None and queue.pop(0.5) is None
    push(queue, stream, 1, now=1.0)
    assert queue.queued_at_s() == 1.0
    queue.push_message(encode_message({"a": 1}), 2.0)
    assert queue.queued_at_s() == 2.0
    queue.push_control(control_frame(Kind.REFUSE, seq=9), 3.0)
    assert queue.queued_at_s() == 3.0
    queue.push_ack(7, 4.0), queue.push_ack(8, 5.0)
    assert queue.queued_at_s() == 4.0
    left = [(queue.queued_at_s(), queue.pop(6.0)) for _ in range(4)]
    assert [since for since, _ in left] == [4.0, 3.0, 2.0, 1.0] and {frame.sent_at_s for _, frame in left} == {6.0}
    queue.send_again(2, 7.0)
    assert queue.queued_at_s() == 1.0, "it has waited since it first came"


def test_a_new_epoch_begins_with_what_was_not_acknowledged_in_its_old_order():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    push(queue, stream, 6)
    for _ in range(5):
        queue.pop(1.0)
    queue.settle(3, True, 2.0)
    queue.send_again(4, 2.0)  # it came damaged, and waits to leave again when the lanes break
    queue.push_ack(1, 2.0)
    queue.push_control(control_frame(Kind.DAMAGED, seq=1), 2.0)
    queue.push_control(control_frame(Kind.ABORT, stream=9), 2.0)
    queue.begin_epoch(3.0)
    left = pop_all(queue, 4.0)
    assert left[0].header.kind == Kind.ABORT, "answers to the old lanes are worth nothing, an abort still is"
    assert [frame.header.seq for frame in left[1:]] == [1, 2, 4, 5, 7]
    assert stream.resent_chunks == 4
    again = [queue.settle(seq, True, 5.0) for seq in (1, 2, 4, 5, 6, 7)]
    assert None not in again
    assert stream.outstanding == queue.monitor.inflight_bytes == queue.monitor.queued_bytes == 0


def test_a_frame_is_sent_again_once_at_a_time_and_only_while_it_is_not_acknowledged():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    push(queue, stream, 2)
    pop_all(queue)
    for _ in range(3):
        queue.send_again(2, 2.0)
    assert [frame.header.seq for frame in pop_all(queue)] == [2]
    queue.settle(2, True, 3.0)
    queue.send_again(2, 3.0)
    assert pop_all(queue) == []


def test_an_acknowledgement_that_comes_while_the_frame_waits_to_leave_again_settles_it():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    push(queue, stream, 1)
    pop_all(queue)
    queue.send_again(1, 2.0)
    assert queue.monitor.queued_bytes == CHUNK
    queue.settle(1, True, 3.0)
    assert pop_all(queue) == [] and stream.outstanding == 0
    assert queue.monitor.queued_bytes == queue.monitor.inflight_bytes == 0


# ---- the books

def test_there_is_room_for_so_many_bytes_queued_or_in_flight_and_for_one_chunk_always():
    queue, stream = SendQueue(3 * CHUNK, 0.0), StreamRecord(1)
    assert queue.has_room(100 * CHUNK), "a chunk above the limit would wait for ever"
    push(queue, stream, 2)
    queue.pop(1.0)
    assert queue.has_room(CHUNK) and not queue.has_room(CHUNK + 1)
    push(queue, stream, 1)
    assert not queue.has_room(1)
    queue.settle(1, True, 2.0)
    assert queue.has_room(CHUNK)


def test_a_stream_that_failed_leaves_no_more_and_its_room_is_free():
    queue, gone, other = SendQueue(10**6, 0.0), StreamRecord(1), StreamRecord(2)
    push(queue, gone, 3)
    push(queue, other, 1)
    queue.pop(1.0)  # one of them is on its way
    queue.fail(gone, "the client left")
    queue.fail(gone, "said later")
    assert gone.failure == "the client left"
    assert [frame.header.stream for frame in pop_all(queue)] == [2]
    assert (queue.monitor.queued_bytes, queue.monitor.inflight_bytes) == (0, 2 * CHUNK)
    queue.settle(1, False, 2.0)
    assert queue.monitor.inflight_bytes == CHUNK


def test_a_refused_chunk_ends_its_stream():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    push(queue, stream, 3)
    queue.pop(1.0)
    queue.settle(1, False, 2.0)
    assert stream.failure == "refused by the receiver" and pop_all(queue) == []


def test_of_a_peer_that_restarted_nothing_is_waited_for():
    queue, stream = SendQueue(10**6, 0.0), StreamRecord(1)
    push(queue, stream, 3)
    queue.push_message(encode_message({"a": 1}), 0.0)
    queue.pop(1.0), queue.pop(1.0)  # the message and a chunk
    queue.push_message(encode_message({"b": 1}), 0.0)
    queue.push_control(control_frame(Kind.REFUSE, seq=9), 1.0)
    assert queue.owes_messages
    queue.forget_peer("the peer restarted", 2.0)
    assert stream.failure == "the peer restarted" and pop_all(queue) == [] and not queue.owes_messages
    assert queue.monitor.queued_bytes == queue.monitor.inflight_bytes == 0


def test_a_message_is_owed_until_it_is_acknowledged():
    queue = SendQueue(10**6, 0.0)
    queue.push_message(encode_message({"a": 1}), 0.0)
    assert queue.owes_messages
    queue.pop(1.0)
    assert queue.owes_messages
    queue.settle(1, True, 2.0)
    assert not queue.owes_messages


# ---- who waits

def open_outbox(config=LinkConfig(timeout_s=DEADLINE_S), line=None, timeline=None):
    outbox = Outbox("a-b", config, line, timeline)
    outbox.begin_epoch(1)
    return outbox


def send(outbox, stream, nbytes=CHUNK):
    outbox.wait_for_room(nbytes, stream)
    outbox.send_chunk(chunk(stream, nbytes))


def test_who_waits_for_room_gets_it_when_something_is_acknowledged():
    config = LinkConfig(chunk_bytes=4096, max_inflight_bytes=4096, timeout_s=DEADLINE_S)
    outbox, stream = open_outbox(config), StreamRecord(1)
    for _ in range(4):
        send(outbox, stream)
    for _ in range(4):
        outbox.next_frame(1)
    in_parallel(lambda: send(outbox, stream), lambda: outbox.settle([1]))
    assert outbox.next_frame(1).header.seq == 5 and outbox.stats().inflight_bytes == 4 * CHUNK


def test_whoever_takes_a_frame_wakes_another_lane_for_the_next_one():
    """One message is told of once, and cut into parts as they leave: two lanes that wait both get one."""
    outbox = open_outbox()
    message = encode_message({"text": "x" * 600_000})
    one, other, _ = in_parallel(lambda: outbox.next_frame(1), lambda: outbox.next_frame(1),
                                lambda: outbox.send_message(message))
    assert {one.header.kind, other.header.kind} == {Kind.MESSAGE} and one.header.seq != other.header.seq


def test_who_waits_for_room_hears_that_its_stream_failed_or_the_link_is_closed():
    outbox = open_outbox(LinkConfig(chunk_bytes=4096, max_inflight_bytes=4096))
    stream, other = StreamRecord(1), StreamRecord(2)
    send(outbox, other, 4096)

    def failing(call, kind):
        with pytest.raises(kind):
            call()

    in_parallel(lambda: failing(lambda: outbox.wait_for_room(CHUNK, stream), StreamAborted),
                lambda: outbox.abort(stream, "the client left"))
    in_parallel(lambda: failing(lambda: outbox.wait_for_room(CHUNK, other), LinkDown), lambda: outbox.close("closed"))
    with pytest.raises(LinkDown, match="closed"):
        outbox.send_message(b"{}")


def test_who_waits_for_room_while_nothing_is_acknowledged_has_a_link_that_is_down():
    outbox = open_outbox(LinkConfig(chunk_bytes=4096, max_inflight_bytes=4096, timeout_s=0.1, silence_s=0.1))
    stream = StreamRecord(1)
    send(outbox, stream, 4096)
    with pytest.raises(LinkDown, match="nothing was acknowledged for 0.1 s"):
        outbox.wait_for_room(1, stream)


def test_who_comes_to_a_link_that_has_long_stood_still_waits_as_long_as_anybody(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("minprfaas.transport.wan.outbox.time", SimpleNamespace(monotonic=lambda: now_s))
    config = LinkConfig(chunk_bytes=4096, max_inflight_bytes=4096, timeout_s=DEADLINE_S)
    outbox, stream, rooms = open_outbox(config), StreamRecord(1), []
    send(outbox, stream, 4096)
    outbox.next_frame(1)
    now_s = 10 * DEADLINE_S
    waiting = threading.Thread(target=lambda: rooms.append(outbox.wait_for_room(CHUNK, stream)))
    waiting.start()
    wait_until(lambda: stands_in(waiting) or not waiting.is_alive())
    outbox.settle([1])
    waiting.join(DEADLINE_S)
    assert rooms == [0.0]


def test_room_that_was_claimed_for_a_stream_that_has_ended_is_given_back():
    class Slots(SlotPool):
        """Where a chunk's bytes are copied to; meanwhile its stream ends."""

        def take(self, nbytes, pinned):
            assert outbox.stats().queued_bytes == HEADER_BYTES + nbytes
            for reason in ("the client left", "said later"):
                stream.abort(reason)
            return super().take(nbytes, pinned)

    outbox, plan = open_outbox(), StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, 96),), 0, 10)
    stream = LinkStream(plan, outbox, Slots(4096), 4096, None, None)
    with pytest.raises(StreamAborted, match="stream 1: the client left"):
        stream.put(0, 0, 10, torch.zeros(960, dtype=torch.uint8))
    assert outbox.stats().queued_bytes == 0
    outbox.send_message(encode_message({"a": 1}))
    assert [outbox.next_frame(1).header.kind for _ in range(2)] == [Kind.ABORT, Kind.MESSAGE], "it is said once"


def test_room_that_was_claimed_for_bytes_that_cannot_be_copied_is_given_back():
    outbox, plan = open_outbox(), StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, 96),), 0, 10)
    stream = LinkStream(plan, outbox, SlotPool(4096), 4096, None, None)
    with pytest.raises(NotImplementedError, match="no data"):
        stream.put(0, 0, 10, torch.empty(960, dtype=torch.uint8, device="meta"))
    assert outbox.stats().queued_bytes == 0


def test_a_goodbye_waits_for_the_last_message_or_for_so_long():
    outbox = open_outbox()
    assert outbox.messages_are_acknowledged_within(DEADLINE_S)
    outbox.send_message(encode_message({"a": 1}))
    outbox.next_frame(1)
    began = time.monotonic()
    assert not outbox.messages_are_acknowledged_within(0.05)
    assert time.monotonic() >= began + 0.05
    in_parallel(lambda: outbox.messages_are_acknowledged_within(DEADLINE_S), lambda: outbox.settle([1]))
    assert time.monotonic() < began + DEADLINE_S
    outbox.send_message(encode_message({"b": 1}))
    in_parallel(lambda: outbox.messages_are_acknowledged_within(DEADLINE_S), lambda: outbox.close("the first reason"))
    outbox.close("a later one")
    with pytest.raises(LinkDown, match="the first reason"):
        outbox.check_open()
    assert time.monotonic() < began + DEADLINE_S


def test_what_was_on_the_line_when_an_epoch_broke_leaves_once_in_the_next():
    line = EmulatedLine(LineConfig(rtt_ms=1.0))
    line.begin(0.0)
    outbox, stream = open_outbox(line=line), StreamRecord(1)
    send(outbox, stream)
    assert outbox.next_frame(1).header.seq == 1
    send(outbox, stream)
    outbox.stats()
    outbox.end_epoch()
    outbox.begin_epoch(2)
    outbox.send_message(encode_message({"a": 1}))
    left = [outbox.next_frame(2) for _ in range(3)]
    assert [(frame.header.kind, frame.header.seq) for frame in left] == [
        (Kind.CHUNK, 1), (Kind.MESSAGE, 2), (Kind.CHUNK, 3)]


def test_a_stream_is_settled_with_its_last_acknowledgement_and_not_before():
    outbox, stream = open_outbox(), StreamRecord(1)
    send(outbox, stream)
    send(outbox, stream)
    outbox.next_frame(1), outbox.next_frame(1)
    outbox.settle([1])
    with pytest.raises(TimeoutError, match="1 chunks are not acknowledged"):
        outbox.wait_until_settled(stream, 0.0)
    in_parallel(lambda: outbox.wait_until_settled(stream, DEADLINE_S), lambda: outbox.settle([2]))
    assert stream.outstanding == 0
    send(outbox, stream)
    outbox.close("closed")
    with pytest.raises(LinkDown, match="closed"):
        outbox.wait_until_settled(stream, 1.0)


def test_a_stream_that_has_ended_gets_no_room_where_there_is_some_and_is_not_settled():
    outbox, stream = open_outbox(), StreamRecord(1)
    outbox.abort(stream, "the client left")
    with pytest.raises(StreamAborted, match="the client left"):
        outbox.wait_for_room(CHUNK, stream)
    with pytest.raises(StreamAborted, match="the client left"):
        outbox.wait_until_settled(stream, 1.0)
    assert outbox.stats().queued_bytes == 0


@pytest.mark.parametrize("tell, kind", [
    (lambda outbox: outbox.send_control(Kind.REFUSE, 3), Kind.REFUSE), (lambda outbox: outbox.acknowledge(3), Kind.ACK),
    (lambda outbox: outbox.send_message(encode_message({})), Kind.MESSAGE),
    (lambda outbox: send(outbox, StreamRecord(9)), Kind.CHUNK), (lambda outbox: outbox.send_again(1), Kind.CHUNK),
    (lambda outbox: outbox.abort(StreamRecord(9), "gone"), Kind.ABORT)])
def test_a_lane_that_waits_is_woken_by_whatever_may_leave(tell, kind):
    outbox, got = open_outbox(), []
    send(outbox, StreamRecord(1))
    outbox.next_frame(1)
    waiting = threading.Thread(target=lambda: got.append(outbox.next_frame(1)), daemon=True)
    waiting.start()
    waiting.join(0.02)
    tell(outbox)
    waiting.join(DEADLINE_S)
    assert [frame.header.kind for frame in got] == [kind]


def test_a_lane_that_waits_for_the_receivers_window_of_messages_is_woken_when_it_moves():
    outbox, got = open_outbox(), []
    outbox.send_message(encode_message({"text": "x" * (MESSAGE_WINDOW * CONTROL_LIMIT_BYTES)}))
    under_way = [outbox.next_frame(1) for _ in range(MESSAGE_WINDOW)]
    waiting = threading.Thread(target=lambda: got.append(outbox.next_frame(1)), daemon=True)
    waiting.start()
    wait_until(lambda: stands_in(waiting))
    outbox.settle([under_way[0].header.seq])
    waiting.join(DEADLINE_S)
    assert [frame.header.kind for frame in got] == [Kind.MESSAGE]


def test_a_lane_of_an_epoch_that_is_over_gets_no_frame():
    outbox, got = open_outbox(), []
    thread = threading.Thread(target=lambda: got.append(outbox.next_frame(1)), daemon=True)
    thread.start()
    outbox.end_epoch()
    thread.join(DEADLINE_S)
    assert got == [None] and outbox.next_frame(1) is None
    assert Outbox("a-b", LinkConfig(), None, None).next_frame(1) is None, "nor before the first has begun"


def test_a_thread_of_an_epoch_that_is_over_keeps_the_time_for_no_lane_of_the_next():
    """It may wake only when the new lanes have looked at the line already, and relied on it."""
    line, stream = EmulatedLine(LineConfig(rtt_ms=100.0)), StreamRecord(1)
    line.begin(0.0)
    outbox, before_s = open_outbox(line=line), sys.getswitchinterval()
    send(outbox, stream)
    late = threading.Thread(target=lambda: outbox.next_frame(1), daemon=True)
    late.start()
    late.join(0.02)  # it waits for the arrival
    given_up = threading.Timer(DEADLINE_S, outbox.end_epoch)
    given_up.start()
    sys.setswitchinterval(DEADLINE_S)  # it is woken, and gets no turn before this thread waits as well
    try:
        outbox.end_epoch()
        outbox.begin_epoch(2)
        frame = outbox.next_frame(2)
    finally:
        sys.setswitchinterval(before_s)
        given_up.cancel()
    assert frame is not None and frame.header.seq == 1
