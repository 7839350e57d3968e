"""What arrives is taken once, whatever a bad line does with it: `minprfaas.transport.wan.inbox`. Chapter 07."""

import queue

import pytest
import torch
from transport_support import DEADLINE_S, Cargo, in_parallel, next_event

from minprfaas.config import LinkConfig
from minprfaas.transport.base import StreamAborted
from minprfaas.transport.events import EventQueue, MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.wan import gpu_sums
from minprfaas.transport.wan.frames import (
    HEADER_BYTES, Codec, Frame, FrameError, Header, Kind, Slot, StreamRecord, decode_acks, encode_acks)
from minprfaas.transport.wan.inbox import Inbox
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import CONTROL_LIMIT_BYTES, encode_message
from minprfaas.transport.wan.send_queue import MOST_TIMES_DAMAGED

CODEC = Codec(256 * 1024)


class Side:
    """A receiving side without lanes: frames go in by hand, answers are taken from its outbox."""

    def __init__(self):
        self.events = EventQueue()
        self.outbox = Outbox("a-b", LinkConfig(), None, None)
        self.outbox.begin_epoch(1)
        self.inbox = Inbox("a-b", self.outbox, self.events)

    def take(self, header, payload=b"", damaged=False, parts=None):
        """One frame as a lane would bring it; one that began when the messages' `parts` were others, or began now."""
        slot = Slot(max(len(payload), 1))
        slot.view[HEADER_BYTES:HEADER_BYTES + len(payload)] = payload
        header.nbytes = len(payload)
        CODEC.seal(header, slot.view)
        if damaged:
            slot.view[HEADER_BYTES + len(payload) // 2] ^= 1
        self.inbox.handle(CODEC.open(slot.view), slot, CODEC, parts or self.inbox.parts)

    def next_frame(self):
        """What leaves next; it is an error when nothing does."""
        (frame,) = in_parallel(lambda: self.outbox.next_frame(1))
        return frame

    def answer(self):
        """What the side says next: (kind, the sequence numbers that it names)."""
        frame = self.next_frame()
        if frame.header.kind == Kind.ACK:
            return Kind.ACK, decode_acks(frame.slot.view[HEADER_BYTES:])
        return frame.header.kind, [frame.header.seq]


def rows_of(cargo, seq, layer, start, end):
    """The frame that carries rows `[start, end)` of a layer of the cargo."""
    first = cargo.plan.start
    payload = bytes(cargo.sent[layer][start - first:end - first].flatten().tolist())
    return Header(Kind.CHUNK, seq, cargo.plan.stream_id, layer, 0, start, end), payload


def test_a_chunk_is_written_once_and_acknowledged_as_often_as_it_comes():
    side, cargo = Side(), Cargo()
    side.inbox.streams.expect(cargo.plan, cargo.sink)
    for _ in range(3):
        side.take(*rows_of(cargo, 1, 0, 64, 128))
        assert side.answer() == (Kind.ACK, [1])
    assert cargo.calls == [(0, 64, 128)]
    assert torch.equal(cargo.arrived[0][:64], cargo.sent[0][:64]) and not cargo.arrived[0][64:].any()


def test_what_the_peer_says_of_a_chunk_reaches_the_books_of_its_sender():
    side, stream = Side(), StreamRecord(1)
    for seq in (1, 2, 3):
        side.outbox.wait_for_room(HEADER_BYTES, stream)
        side.outbox.send_chunk(Frame(Header(Kind.CHUNK, stream=1), Slot(1), stream))
        assert side.next_frame().header.seq == seq
    side.take(Header(Kind.ACK), encode_acks([1]))
    assert (stream.outstanding, stream.resent_chunks, stream.failure) == (2, 0, None)
    side.take(Header(Kind.DAMAGED, 2))
    assert side.next_frame().header.seq == 2 and stream.resent_chunks == 1
    side.take(Header(Kind.REFUSE, 3))
    assert (stream.outstanding, stream.failure) == (1, "refused by the receiver")


def test_a_chunk_that_never_arrives_whole_ends_its_stream_and_no_other():
    side, stream, other = Side(), StreamRecord(1), StreamRecord(2)
    for seq, of in ((1, stream), (2, stream), (3, other)):
        side.outbox.wait_for_room(HEADER_BYTES, of)
        side.outbox.send_chunk(Frame(Header(Kind.CHUNK, stream=of.stream_id), Slot(1), of))
        side.next_frame()
    for _ in range(MOST_TIMES_DAMAGED - 1):
        side.take(Header(Kind.DAMAGED, 1))
        assert side.next_frame().header.kind == Kind.CHUNK and stream.failure is None
    side.take(Header(Kind.DAMAGED, 1))
    assert (stream.failure, other.failure) == (f"a chunk was damaged {MOST_TIMES_DAMAGED} times", None)
    abort = side.next_frame().header
    assert (abort.kind, abort.stream) == (Kind.ABORT, 1), "the receiver is told"
    with pytest.raises(StreamAborted, match="damaged 16 times"):
        side.outbox.wait_until_settled(stream, DEADLINE_S)
    side.take(Header(Kind.ACK), encode_acks([2, 3, abort.seq]))
    assert (stream.outstanding, other.outstanding, side.outbox.stats().inflight_bytes) == (0, 0, 0)


def test_a_damaged_chunk_is_asked_for_again_and_nothing_of_it_is_written():
    side, cargo = Side(), Cargo()
    side.inbox.streams.expect(cargo.plan, cargo.sink)
    side.take(*rows_of(cargo, 1, 0, 64, 128), damaged=True)
    assert side.answer() == (Kind.DAMAGED, [1]) and not cargo.calls
    side.take(*rows_of(cargo, 1, 0, 64, 128))
    assert side.answer() == (Kind.ACK, [1]) and cargo.calls == [(0, 64, 128)]


def test_a_chunk_that_nobody_expects_is_refused():
    side, cargo = Side(), Cargo()
    side.take(*rows_of(cargo, 1, 0, 64, 128))
    assert side.answer() == (Kind.REFUSE, [1])


def test_a_chunk_that_finds_no_place_to_land_on_its_gpu_ends_its_stream(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(gpu_sums, "_streams", {gpu: queue.LifoQueue()})  # all are taken, by sinks that have stopped
    monkeypatch.setattr(gpu_sums, "WITHIN_S", 0.01)
    side, cargo = Side(), Cargo()
    side.inbox.streams.expect(cargo.plan, cargo.sink, gpu)
    side.take(*rows_of(cargo, 1, 0, 64, 128))
    assert side.answer() == (Kind.REFUSE, [1]) and not cargo.calls
    failed = next_event(side)
    assert isinstance(failed, StreamFailed) and "none of 8 places to land came free in 0.01 s" in failed.reason


def test_a_stream_is_done_with_its_last_byte_whatever_the_order_of_its_chunks():
    side, cargo = Side(), Cargo()
    side.inbox.streams.expect(cargo.plan, cargo.sink)
    state = bytes(cargo.sent[3].flatten().tolist())
    pieces = [(Header(Kind.CHUNK, 4, 1, 3, 1, 64, 320, offset=10_000), state[10_000:]),
              rows_of(cargo, 3, 2, 64, 320), rows_of(cargo, 1, 0, 64, 320),
              (Header(Kind.CHUNK, 5, 1, 3, 1, 64, 320), state[:10_000]), rows_of(cargo, 2, 1, 64, 320)]
    for number, (header, payload) in enumerate(pieces):
        assert next_event(side) is None, f"done after {number} of 5 chunks"
        side.take(header, payload)
    done = next_event(side)
    assert isinstance(done, StreamDone) and done.report.bytes == cargo.plan.total_bytes
    assert cargo.is_identical


def test_an_abort_of_the_sender_ends_its_stream_once():
    side, cargo = Side(), Cargo()
    side.inbox.streams.expect(cargo.plan, cargo.sink)
    for _ in range(2):
        side.take(Header(Kind.ABORT, 1, stream=cargo.plan.stream_id))
        assert side.answer() == (Kind.ACK, [1])
    assert isinstance(next_event(side), StreamFailed) and next_event(side) is None


def test_parts_of_messages_come_out_as_whole_messages_in_the_order_in_which_they_were_sent():
    side = Side()
    long = encode_message({"long": "x" * (2 * CONTROL_LIMIT_BYTES)})
    parts = [long[at:at + CONTROL_LIMIT_BYTES] for at in range(0, len(long), CONTROL_LIMIT_BYTES)]
    short = encode_message({"short": 1})
    for number in (3, 1, 2, 1, 0, 3):  # the short one overtakes the long one, and two come twice
        payload, left = (short, 0) if number == 3 else (parts[number], 2 - number)
        side.take(Header(Kind.MESSAGE, number + 1, stream=number, start=left), payload)
        assert side.answer() == (Kind.ACK, [number + 1])
    assert [next_event(side) for _ in range(3)] == [
        MessageReceived({"long": "x" * (2 * CONTROL_LIMIT_BYTES)}, "a-b"), MessageReceived({"short": 1}, "a-b"), None]


def test_a_chunk_of_a_stream_that_is_done_is_acknowledged_and_one_that_was_forgotten_refused():
    """The last acknowledgement may be lost with the line: the sender must not hear that its stream was refused."""
    side, cargo, other = Side(), Cargo(), Cargo(stream_id=2)
    for one in (cargo, other):
        side.inbox.streams.expect(one.plan, one.sink)
    state = bytes(cargo.sent[3].flatten().tolist())
    frames = [rows_of(cargo, seq, layer, 64, 320) for seq, layer in ((1, 0), (2, 1), (3, 2))]
    for frame in [*frames, (Header(Kind.CHUNK, 4, 1, 3, 1, 64, 320), state)] * 2:
        side.take(*frame)
    assert isinstance(next_event(side), StreamDone) and next_event(side) is None
    assert side.answer() == (Kind.ACK, [1, 2, 3, 4] * 2) and len(cargo.calls) == 4 and cargo.is_identical
    side.take(*rows_of(other, 5, 0, 64, 128))
    assert side.inbox.streams.forget(2) == 64
    side.take(*rows_of(other, 5, 0, 64, 128))
    assert [side.answer(), side.answer()] == [(Kind.ACK, [5]), (Kind.REFUSE, [5])]


def test_a_new_peer_begins_to_count_anew():
    side = Side()
    for text in ("of the old one", "of the new one"):
        side.take(Header(Kind.MESSAGE, 1, stream=0), encode_message({"text": text}))
        side.take(Header(Kind.MESSAGE, 2, stream=1), encode_message({"text": text}))
        assert [next_event(side).message for _ in range(2)] == [{"text": text}] * 2
        side.inbox.forget_peer()


def test_what_a_late_thread_still_brings_of_an_old_peer_does_not_count_as_the_new_ones():
    side, cargo = Side(), Cargo()
    old = side.inbox.parts
    side.inbox.streams.expect(cargo.plan, cargo.sink)
    side.inbox.forget_peer()
    for seq, number in ((7, 0), (8, 1)):
        side.take(Header(Kind.MESSAGE, seq, stream=number), encode_message({"text": "of the old one"}), parts=old)
    side.take(*rows_of(cargo, 9, 0, 64, 128), parts=old)
    for number in (0, 1):
        side.take(Header(Kind.MESSAGE, number + 1, stream=number), encode_message({"number": number}))
        assert next_event(side).message == {"number": number} and side.answer() == (Kind.ACK, [number + 1])
    assert cargo.calls == []


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.ACK, Kind.ABORT])
def test_of_anything_but_a_chunk_a_wrong_digest_ends_the_lane(kind):
    side = Side()
    with pytest.raises(FrameError, match="wrong payload digest"):
        side.take(Header(kind, 1), encode_acks([1]), damaged=True)
