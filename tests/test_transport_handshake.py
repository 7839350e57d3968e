"""Trust ends at the link: whoever fails the handshake gets no lane, and learns only that it was refused. Chapter 07."""

import dataclasses
import logging

import pytest
from transport_support import (DEADLINE_S, IDENTITY, Cargo, Impostor, Lanes, connected, event, in_parallel,
                               new_store)

from minprfaas.config import LinkConfig
from minprfaas.transport.base import LinkDown, LinkRefused
from minprfaas.transport.events import MessageReceived
from minprfaas.transport.wan.frames import Codec, FrameError, Kind, control_frame
from minprfaas.transport.wan.handshake import INCARNATION_BYTES, shake_hands
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.link import Link


def connect_both(mine, theirs, config=LinkConfig(), other_config=LinkConfig()) -> list[Exception | None]:
    """What `connect` raised on either side."""
    store = new_store()
    links = [Link("a-b", store, 0, config, mine), Link("a-b", store, 1, other_config, theirs)]

    def attempt(link):
        try:
            link.connect(5.0)
        except LinkDown as error:
            return error

    errors = in_parallel(*(lambda link=link: attempt(link) for link in links))
    in_parallel(*(link.close for link in links))
    return errors


@pytest.mark.parametrize("change, reason", [
    (dict(secret=b"another secret"), "the peer does not hold the same secret"),
    (dict(secret=None), "the peer does not hold the same secret"),
    (dict(fingerprint=b"\1" * 32), "model fingerprint is 000000"),
    (dict(dtype="bfloat16"), "dtype is float32 here and bfloat16 there"),
    (dict(wire="int8"), "wire is exact here and int8 there"),
    (dict(block_layout="16 tokens"), "block layout is 64 tokens here and 16 tokens there")])
def test_a_peer_with_another_secret_or_model_is_refused_and_the_log_says_why(caplog, change, reason):
    caplog.set_level(logging.WARNING, "minprfaas.transport")
    errors = connect_both(IDENTITY, dataclasses.replace(IDENTITY, **change))
    assert all(isinstance(error, LinkRefused) for error in errors)
    assert reason in str(errors[0]) and reason in caplog.text


@pytest.mark.parametrize("said, difference", [
    (b"{", "is not JSON"), (b"[1]", "a JSON list, not an object"), (b"", "is not JSON"),
    (b"{}", "dtype is float32 here and None there"), (IDENTITY.as_json() + b" ", "describes itself in other words")])
def test_who_describes_itself_as_nothing_that_is_known_is_another(said, difference):
    assert difference in IDENTITY.difference(said) and IDENTITY.difference(IDENTITY.as_json()) is None


@pytest.mark.parametrize("other", [LinkConfig(chunk_bytes=2**20), LinkConfig(lanes=2)])
def test_ends_that_disagree_on_lanes_or_frame_size_are_refused_before_a_frame_crosses(other):
    errors = connect_both(IDENTITY, IDENTITY, other_config=other)
    assert all(isinstance(error, LinkRefused) for error in errors)
    assert "1 lanes, frames of 262144 bytes" in str(errors[0])


def test_without_a_secret_on_either_side_only_compatibility_is_checked():
    open_identity = dataclasses.replace(IDENTITY, secret=None)
    cargo = Cargo()
    with connected(identity=open_identity) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        stream.finish(DEADLINE_S)
    assert cargo.is_identical


@pytest.mark.parametrize("quick", [(True, True), (True, False), (False, False)])
def test_digests_are_by_bytes_if_both_processors_are_quick_by_bytes(monkeypatch, quick):
    said, lanes, cargo = iter(quick), (Lanes(), Lanes()), Cargo(tokens=4000)
    monkeypatch.setattr("minprfaas.transport.wan.handshake.multiplies_bytes", lambda: next(said))
    with connected(sender_lanes=lanes[0], receiver_lanes=lanes[1]) as (sender, receiver):
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream, chunk_tokens=4000)
        stream.finish(DEADLINE_S)
    assert cargo.is_identical
    assert [side.made[0].codec.row_sums.by_bytes for side in lanes] == [all(quick)] * 2


class RecordingLane(Lane):
    """Keeps what it said in the handshake, as an eavesdropper would."""

    said: list[bytes] = []

    def exchange(self, data: bytes) -> bytes:
        self.said.append(data)
        return super().exchange(data)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stranger_on_any_lane_is_a_stranger(index):
    class Stranger(Lane):
        def exchange(self, data: bytes) -> bytes:
            return super().exchange(b"let me in" if self.index == index else data)

    store, config = new_store(), LinkConfig(lanes=3)
    ends = [Link("a-b", store, rank, config, IDENTITY, lane_type=(Lane, Stranger)[rank]) for rank in (0, 1)]

    def connect(end):
        with pytest.raises(LinkRefused):
            end.connect(5.0)

    in_parallel(*(lambda end=end: connect(end) for end in ends))
    in_parallel(*(end.close for end in ends))


def victim(store, impostor):
    """Rank 0 meets the impostor; returns what connect raised."""
    link = Link("a-b", store, 0, LinkConfig(timeout_s=5), IDENTITY)

    def connect():
        with pytest.raises(LinkDown) as error:
            link.connect(5.0)
        return error.value

    error, _ = in_parallel(connect, impostor)
    link.close()
    return error


def test_a_replayed_handshake_is_refused_because_the_nonce_is_fresh():
    store = new_store()
    RecordingLane.said = []
    ends = [Link("a-b", store, 0, LinkConfig(), IDENTITY),
            Link("a-b", store, 1, LinkConfig(), IDENTITY, lane_type=RecordingLane)]
    in_parallel(*(lambda end=end: end.connect(DEADLINE_S) for end in ends))
    in_parallel(*(end.close for end in ends))
    recorded = [word.replace(b"epoch 1", b"epoch 2") for word in RecordingLane.said]
    assert len(recorded) == 4 and b"epoch 2" in recorded[0]
    impostor = Impostor(store, recorded)
    assert isinstance(victim(store, impostor), LinkRefused)
    assert impostor.heard[1:] and impostor.heard[2:] == [b"", b""], "no identity and no verdict for an impostor"


def test_the_same_two_processes_never_prove_themselves_in_the_same_words():
    """Nothing but the nonces differs from one meeting to the next; a proof of the last one is worth nothing in this."""
    said = []
    for _ in range(2):
        RecordingLane.said, store = [], new_store()
        lanes = in_parallel(*(lambda rank=rank: (Lane, RecordingLane)[rank](store, 0, rank, 256 * 1024, DEADLINE_S)
                              for rank in (0, 1)))
        in_parallel(*(lambda lane=lane: shake_hands(lane, "the same terms", bytes(INCARNATION_BYTES), IDENTITY)
                      for lane in lanes))
        said.append(RecordingLane.said)
    assert [len(words) for words in said] == [4, 4]
    assert not set(said[0]) & set(said[1])


def test_with_a_secret_frames_are_sealed_under_keys_of_this_meeting_and_direction():
    store = new_store()
    ends = in_parallel(*(lambda rank=rank: Lane(store, 0, rank, 256 * 1024, DEADLINE_S) for rank in (0, 1)))
    in_parallel(*(lambda lane=lane: shake_hands(lane, "terms", bytes(INCARNATION_BYTES), IDENTITY) for lane in ends))
    frame = control_frame(Kind.HEARTBEAT, seq=7)
    ends[0].codec.seal(frame.header, frame.slot.view)
    assert ends[1].codec.open(frame.slot.view).seq == 7
    for stranger in (ends[0].codec, Codec(256 * 1024)):
        with pytest.raises(FrameError, match="tag is wrong"):
            stranger.open(frame.slot.view)


def test_an_impostor_that_repeats_what_it_hears_is_refused():
    class Mirror(Impostor):
        def __call__(self):
            self._words = _Echo(self.heard, b"minprfaas link" + bytes(40) + b"version 3, link a-b, epoch 1, 1 lanes, "
                                b"frames of 262144 bytes, lane 0")
            super().__call__()

    store = new_store()
    error = victim(store, Mirror(store, []))
    assert isinstance(error, LinkRefused) and "same secret" in str(error)


class _Echo:
    """Begins with `first`, then says what was heard last."""

    def __init__(self, heard, first):
        self.heard, self.first = heard, first

    def __iter__(self):
        yield self.first
        for _ in range(3):
            yield self.heard[-1]


@pytest.mark.parametrize("words", [[b"GET / HTTP/1.1"], [b""] * 4, [bytes(2000)] * 4, [b"minprfaas link"] * 4])
def test_garbage_in_the_handshake_is_refused_and_no_frame_is_read(words):
    store = new_store()
    error = victim(store, Impostor(store, words, frames=[b"x" * 100]))
    assert isinstance(error, LinkDown)


def test_a_link_serves_its_true_peer_after_an_impostor_came_first():
    store = new_store()
    assert isinstance(victim(store, Impostor(store, [b"let me in"] * 4)), LinkRefused)
    ends = [Link("a-b", store, rank, LinkConfig(), IDENTITY) for rank in (0, 1)]
    in_parallel(*(lambda end=end: end.connect(DEADLINE_S) for end in ends))
    ends[0].send_message({"welcome": True})
    assert event(ends[1], MessageReceived).message == {"welcome": True}
    in_parallel(*(end.close for end in ends))
