"""A lane: when it is silent, how often it says that it lives, and under which number two ends meet. Chapter 07."""

import threading
import time
from itertools import count
from types import SimpleNamespace

import pytest
from transport_support import DEADLINE_S, IDENTITY, connected, event, in_parallel, new_store, wait_until

from minprfaas.config import LineConfig, LinkConfig
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import LinkLost, MessageReceived
from minprfaas.transport.wan import lanes, supervision
from minprfaas.transport.wan.frames import Kind, control_frame
from minprfaas.transport.wan.lanes import LOOKED_AT_BYTES, Lane, in_time
from minprfaas.transport.wan.link import Link


def two_lanes():
    store = new_store()
    return in_parallel(*(lambda rank=rank: Lane(store, 0, rank, 2 * LOOKED_AT_BYTES, DEADLINE_S) for rank in (0, 1)))


def test_a_lane_whose_threads_are_all_at_a_frame_is_not_silent():
    (near, far), handling, may_end = two_lanes(), threading.Event(), threading.Event()

    def handle(lane, slot):
        assert lane.codec.open(slot.view).seq == 7
        handling.set()
        assert may_end.wait(DEADLINE_S)

    def receive():
        with pytest.raises(RuntimeError):
            far.receive_frames(handle)

    assert far.silent_since() is None, "nobody listens yet"
    receiving = threading.Thread(target=receive, daemon=True)
    receiving.start()
    wait_until(lambda: far.silent_since() is not None)
    began = far.silent_since()
    sent = near.post(control_frame(Kind.HEARTBEAT, seq=7))
    assert handling.wait(DEADLINE_S) and far.silent_since() is None
    may_end.set()
    wait_until(lambda: far.silent_since() is not None)
    assert far.silent_since() > began
    began = far.silent_since()
    assert far.silent_since() == began
    (slot,) = far._waiting.values()
    slot.view[LOOKED_AT_BYTES] ^= 1  # Gloo writes as bytes come: a long frame that is on its way is no silence
    assert far.silent_since() > began
    sent.wait()
    near.cut()
    receiving.join(DEADLINE_S)
    assert not receiving.is_alive()


class Beating(Lane):
    """Notes when a heartbeat was sent."""

    beats_s: list[float]

    def post(self, frame):
        if frame.header.kind == Kind.HEARTBEAT:
            self.beats_s.append(time.monotonic())
        return super().post(frame)


def test_heartbeats_come_five_in_a_silence_and_no_more_often():
    Beating.beats_s, began_s = [], time.monotonic()
    with connected(LinkConfig(silence_s=2.0), sender_lanes=Beating):
        wait_until(lambda: len(Beating.beats_s) >= 5)
    beats_s = list(Beating.beats_s)
    assert beats_s[-1] - began_s >= 0.4 * (len(beats_s) - 1)  # the first is due at once; all may be late, none early


def test_an_end_that_meets_nobody_under_a_number_tries_the_next(monkeypatch):
    """Somebody knocked and died: whoever answers connects to nobody, once."""
    timeout = "minprfaas.transport.wan.rendezvous.LANE_TIMEOUT_S"
    monkeypatch.setattr(timeout, 0.3)
    store = new_store()
    store.set("a-b/knock", "of the dead")
    tried = threading.Event()

    def new_lane(*arguments):
        tried.set()
        return Lane(*arguments)

    ends = [Link("a-b", store, rank, LinkConfig(), IDENTITY, lane_type=new_lane) for rank in (0, 1)]

    def connect_late():
        wait_until(lambda: store.check(["a-b/answer/of the dead"]))
        assert tried.wait(DEADLINE_S)
        monkeypatch.setattr(timeout, DEADLINE_S)  # for the two who live
        ends[1].connect(DEADLINE_S)

    in_parallel(lambda: ends[0].connect(DEADLINE_S), connect_late)
    assert [end.epoch for end in ends] == [2, 2]
    in_parallel(*(end.close for end in ends))


class Dying:
    """The store of a process that is killed when it has read a knock, before it has answered."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def clone(self):
        return self

    def set(self, key, value):
        raise RuntimeError("killed")


def test_who_knocked_at_an_end_that_died_before_its_answer_is_answered_by_its_successor():
    store = new_store()
    dying, waiting, successor = (Link("a-b", at, rank, LinkConfig(), IDENTITY)
                                 for rank, at in ((0, Dying(store)), (1, store), (0, store)))

    def serve():
        with pytest.raises(LinkDown, match="killed"):
            dying.connect(DEADLINE_S)
        successor.connect(DEADLINE_S)

    in_parallel(serve, lambda: waiting.connect(DEADLINE_S))
    assert successor.epoch == waiting.epoch == 2
    in_parallel(successor.close, waiting.close)


def test_what_connecting_returns_or_raises_comes_at_once_and_its_deadline_is_kept():
    def refused():
        raise ConnectionError("refused")

    assert in_time(lambda: "connected", DEADLINE_S) == "connected"
    with pytest.raises(ConnectionError, match="refused"):
        in_time(refused, 5.0)
    never = threading.Event()
    with pytest.raises(TimeoutError):
        in_time(never.wait, 0.01)
    never.set()


def test_a_machine_that_stands_still_breaks_no_link_and_cuts_no_goodbye_short(monkeypatch):
    """Which is a clock that leaps between two looks at it: both ends have heard nothing for longer than a lane may be
    silent, or a goodbye may take."""
    leaps, now = count(), time.monotonic
    leaping = SimpleNamespace(monotonic=lambda: now() + 10.0 * next(leaps), sleep=time.sleep)
    with connected(line=LineConfig(rtt_ms=50)) as (sender, receiver):
        for module in (lanes, supervision):
            monkeypatch.setattr(module, "time", leaping)
        wait_until(lambda: next(leaps) > 500)
        sender.send_message({"text": "still there"})
        assert event(receiver, MessageReceived).message["text"] == "still there" and sender.epoch == 1
        sender.close()
        assert event(receiver, LinkLost).reason == "closed by the peer"
