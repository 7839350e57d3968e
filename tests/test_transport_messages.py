"""Messages as long as a prompt or an inventory can be cross beside KV, within the receiver's window. Chapter 07."""

import random

import pytest
from transport_support import DEADLINE_S, Cargo, connected, event, gated

from minprfaas.config import LinkConfig
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import LinkRestored, MessageReceived, StreamDone
from minprfaas.transport.wan import parts as parts_module
from minprfaas.transport.wan.frames import HEADER_BYTES, Frame, FrameError, Header, Kind, Slot, StreamRecord
from minprfaas.transport.wan.parts import (CONTROL_LIMIT_BYTES, MESSAGE_LIMIT_BYTES, MESSAGE_WINDOW, PartsIn, PartsOut,
                                           encode_message)
from minprfaas.transport.wan.send_queue import MESSAGE_LEAD_BYTES, SendQueue


def test_a_prompt_of_600_000_tokens_and_an_inventory_of_60_000_prefixes_cross():
    generator = random.Random(1)
    prompt = {"type": "order", "token_ids": [generator.randrange(128_000) for _ in range(600_000)]}
    inventory = {"type": "inventory", "keys": [generator.randbytes(32).hex() for _ in range(60_000)],
                 "tokens": [generator.randrange(10**6) for _ in range(60_000)]}
    with connected(LinkConfig(lanes=3)) as (sender, receiver):
        for message in (prompt, inventory, {"small": 1}):
            sender.send_message(message)
        for message in (prompt, inventory, {"small": 1}):
            assert event(receiver, MessageReceived).message == message


def test_a_message_of_64_mib_shares_the_line_with_a_stream_and_overruns_nothing():
    cargo, text, lanes = Cargo(tokens=3000), "x" * 64 * 2**20, gated(3)
    with connected(LinkConfig(lanes=3), sender_lanes=lanes) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        sender.send_message({"text": text})
        cargo.put_all(sender.open(cargo.plan), chunk_tokens=1000)
        lanes.permits.release(10_000)
        found = []
        while not any(isinstance(one, MessageReceived) for one in found):
            found.append(receiver.receive(DEADLINE_S))
            assert found[-1] is not None
        assert [type(one) for one in found] == [StreamDone, MessageReceived], "KV that was queued later came first"
        assert found[1].message == {"text": text} and cargo.is_identical
        sender.send_message({"still": "there"})
        assert not isinstance(receiver.receive(DEADLINE_S), LinkRestored)


def test_a_dead_link_raises_link_down_and_nothing_else():
    with connected() as (sender, _):
        sender.close()
        for message in ({}, [1], {"text": object()}):
            with pytest.raises(LinkDown):
                sender.send_message(message)


def test_never_more_parts_are_under_way_than_the_receiver_takes_ahead_of_a_missing_one():
    out, received = PartsOut(), PartsIn()
    out.push(encode_message({"text": "x" * (3 * MESSAGE_WINDOW * CONTROL_LIMIT_BYTES)}), 0.0)
    waiting, messages, generator = [], [], random.Random(2)
    while not messages:
        while out.queued_at_s is not None:
            waiting.append(out.pop())
        assert 0 < len(waiting) <= MESSAGE_WINDOW
        in_order = len(waiting) == 1 or generator.random() < 0.1
        taken = waiting.pop(0 if in_order else generator.randrange(1, len(waiting)))
        header = taken.header
        messages += received.add(header.stream, header.start, bytes(taken.slot.view[HEADER_BYTES:]))
        out.settled(header.stream)
    assert len(messages) == 1 and not waiting


def test_parts_that_no_sound_peer_sends_end_the_lane():
    for number, parts_left in ((MESSAGE_WINDOW, 0), (0, MESSAGE_LIMIT_BYTES // CONTROL_LIMIT_BYTES + 1)):
        with pytest.raises(FrameError):
            PartsIn().add(number, parts_left, b"{}")
    parts = PartsIn()
    assert [parts.add(0, 0, b"{}") for _ in range(2)] == [[{}], []], "one that comes again is no other message"


def test_a_message_may_be_as_long_as_the_limit_and_no_longer_at_either_end(monkeypatch):
    monkeypatch.setattr(parts_module, "MESSAGE_LIMIT_BYTES", 3 * CONTROL_LIMIT_BYTES)
    longest = {"text": "x" * (3 * CONTROL_LIMIT_BYTES - len('{"text":""}'))}
    out, received = PartsOut(), PartsIn()
    out.push(encode_message(longest), 0.0)
    frames = [out.pop() for _ in range(3)]
    assert out.queued_at_s is None and not out.is_settled
    heard = [received.add(one.header.stream, one.header.start, bytes(one.slot.view[HEADER_BYTES:])) for one in frames]
    assert heard == [[], [], [longest]]
    for part in range(3):
        out.settled(part)
    assert out.is_settled
    with pytest.raises(ValueError, match="above the limit"):
        encode_message({"text": longest["text"] + "x"})
    with pytest.raises(FrameError, match="longer than"):  # a peer that says less than it sends
        for number in range(3, 7):
            received.add(number, 1, bytes(CONTROL_LIMIT_BYTES))
    with pytest.raises(FrameError, match="longer than"):
        received.add(7, 4, b"")


def test_a_short_message_overtakes_chunks_and_a_long_one_takes_turns_with_them():
    queue, stream = SendQueue(2**24, 0.0), StreamRecord(1)
    for _ in range(40):
        queue.push_chunk(Frame(Header(Kind.CHUNK, nbytes=64 * 1024), Slot(64 * 1024), stream), 1.0)
    queue.push_message(encode_message({"short": 1}), 2.0)
    queue.push_message(encode_message({"long": "x" * 2**20}), 3.0)
    queue.push_ack(7, 4.0)
    left = []
    while queue.queued_at_s() is not None:
        left.append(queue.pop(5.0))
    assert [frame.header.kind for frame in left[:2]] == [Kind.ACK, Kind.MESSAGE]
    ahead = 0
    for frame in left[1:80]:
        ahead += frame.nbytes if frame.header.kind == Kind.MESSAGE else -frame.nbytes
        assert ahead <= MESSAGE_LEAD_BYTES + CONTROL_LIMIT_BYTES + HEADER_BYTES
    last_message = max(number for number, frame in enumerate(left) if frame.header.kind == Kind.MESSAGE)
    assert any(frame.header.kind == Kind.CHUNK for frame in left[:last_message])
