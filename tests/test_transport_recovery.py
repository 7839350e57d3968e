"""When things break below the frames: cut, damaged, doubled, reordered, silenced, killed. Nothing is lost unnamed.

Chapter 14.
"""

import collections
import os
import random
import signal
import struct
import threading
import weakref
from datetime import timedelta

import pytest
import torch
from programs import process_starter
from torch.distributed import TCPStore
from transport_support import (DEADLINE_S, IDENTITY, Cargo, Impostor, Lanes, connected, emulated, event, in_parallel,
                               new_fabric, new_store, wait_until)

from minprfaas.config import LineConfig, LinkConfig
from minprfaas.transport.base import LinkDown, StreamAborted
from minprfaas.transport.events import LinkLost, LinkRestored, MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.pair_group import PairGroup
from minprfaas.transport.wan import supervision
from minprfaas.transport.wan.digest import Digest, row_sums
from minprfaas.transport.wan.frames import HEADER_BYTES, Kind
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.link import Link

CONFIG = LinkConfig(lanes=3, chunk_bytes=4096, timeout_s=10, silence_s=3)


def test_a_cut_link_resumes_from_the_last_acknowledged_chunk():
    cargo, lanes = Cargo(tokens=2000), Lanes()
    config, line = LinkConfig(lanes=2, chunk_bytes=4096), LineConfig(gbps=0.004)
    with connected(config, line, receiver_lanes=lanes) as (sender, receiver):
        half, is_cut = threading.Event(), threading.Event()

        def sink(*arguments):
            cargo.sink(*arguments)
            if len(cargo.calls) == 50:  # this chunk is written and not acknowledged when the link breaks
                half.set()
                assert is_cut.wait(DEADLINE_S)

        receiver.expect(cargo.plan, sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        assert half.wait(DEADLINE_S)
        lanes.made[1].cut()
        wait_until(lambda: sender.epoch == 2)
        is_cut.set()
        report = stream.finish(DEADLINE_S)
        restored = event(receiver, LinkRestored), event(sender, LinkRestored)
        event(receiver, StreamDone)
    assert [(back.epoch, back.peer_restarted) for back in restored] == [(2, False)] * 2
    assert cargo.is_identical and len(set(cargo.calls)) == len(cargo.calls), "each chunk is written once"
    assert 0 < report.resent_chunks < report.chunks - 50


def test_messages_survive_a_cut_once_and_in_order():
    lanes = Lanes()
    with connected(LinkConfig(lanes=3), sender_lanes=lanes) as (sender, receiver):
        for number in range(300):
            sender.send_message({"number": number, "text": "x" * 2000})
            if number % 100 == 50:
                lanes.made[-1 - number % 3].cut()
        assert [event(receiver, MessageReceived).message["number"] for _ in range(300)] == list(range(300))


class Fault:
    """One fault at the `at`-th frame of more than a header that passes any lane of one side. A test may say which
    frames count, and what must have come to pass before: no other frame leaves meanwhile."""

    counts = staticmethod(lambda frame: True)
    is_ready = staticmethod(lambda: True)

    def __init__(self, kind: str, generator: random.Random):
        self.kind, self.generator, self.at = kind, generator, generator.randrange(30)
        self.lock, self.happened = threading.Lock(), False

    def is_due(self, frame: torch.Tensor) -> bool:
        with self.lock:
            if not self.counts(frame):
                return False
            self.at -= 1
            if self.at == -1:
                wait_until(self.is_ready)
                self.happened = True
            return self.at == -1


class _Sent:
    """Stands for a send that the fault does not wait for."""

    def wait(self, _):
        return True


class FaultyLane(Lane):
    """Breaks one frame in the ways of a bad network, or of an enemy on it, below the framing."""

    fault: Fault | None = None
    kept: list = []  # a Gloo send whose Work is dropped before it is done never arrives, and silences its lane

    def keep(self, frame):
        self.kept.append((super().transmit(frame), frame))
        return self.kept[-1][0]

    def transmit(self, tensor):
        if self.fault is None or tensor.numel() <= HEADER_BYTES or not self.fault.is_due(tensor):
            return super().transmit(tensor)
        return getattr(self, f"_{self.fault.kind}")(tensor.clone(), self.fault.generator)

    def _flip(self, frame, generator):
        frame[generator.randrange(len(frame))] ^= 1 << generator.randrange(8)
        return self.keep(frame)

    def _truncate(self, frame, generator):
        return self.keep(frame[:generator.randrange(len(frame))].clone())

    def _cut(self, frame, generator):
        """The connection breaks after a random byte of the frame."""
        self.keep(frame[:generator.randrange(len(frame))].clone())
        self.cut()
        return self.keep(frame)

    def _duplicate(self, frame, _):
        self.keep(frame)
        return self.keep(frame.clone())

    def _reorder(self, frame, _):
        """The frame arrives after others that left later."""
        threading.Timer(0.02, self._late, (frame,)).start()
        return _Sent()

    def _late(self, frame):
        try:
            self.keep(frame)
        except RuntimeError:
            pass  # the epoch is over; recovery sends the frame again

    def _stall(self, frame, generator):
        threading.Event().wait(generator.random() * 0.2)
        return self.keep(frame)

    def _garbage(self, frame, generator):
        self.keep(torch.frombuffer(bytearray(generator.randbytes(generator.randrange(1, 5000))), dtype=torch.uint8))
        return self.keep(frame)

    def _absurd(self, frame, generator):
        """A right checksum over a wrong range or length: what an enemy can send where there is no secret."""
        header = bytearray(frame[:HEADER_BYTES - 16].tolist())
        struct.pack_into("<I", header, 12 + 4 * generator.randrange(4), generator.randrange(2**31, 2**32))
        tag = Digest(None, row_sums(None, False)).of(header)
        frame[:HEADER_BYTES] = torch.tensor(list(header + tag), dtype=torch.uint8)
        return self.keep(frame)

    def _replay(self, frame, _):
        self.keep(frame)
        threading.Timer(0.05, self._late, (frame,)).start()
        return _Sent()


KINDS = ["flip", "truncate", "cut", "duplicate", "reorder", "stall", "garbage", "absurd", "replay"]


@pytest.mark.parametrize("secret", [IDENTITY.secret, None], ids=["keyed", "checksum"])
def test_ninety_seeded_faults_end_in_identical_bytes_or_a_named_error(secret):
    identity = LinkIdentity(IDENTITY.fingerprint, IDENTITY.dtype, IDENTITY.block_layout, secret)
    tally = collections.Counter()
    with connected(CONFIG, identity=identity, sender_lanes=FaultyLane) as (sender, receiver):
        for seed in range(90):
            kind, cargo = KINDS[seed % len(KINDS)], Cargo(stream_id=seed, tokens=400, seed=seed)
            FaultyLane.fault = fault = Fault(kind, random.Random(seed))
            receiver.expect(cargo.plan, cargo.sink)
            stream = sender.open(cargo.plan)
            try:
                cargo.put_all(stream)
                stream.finish(DEADLINE_S)
                outcome = "identical"
            except StreamAborted:
                assert event(receiver, StreamFailed).stream_id == seed
                outcome = "named error"
            assert fault.happened
            assert cargo.is_identical or outcome != "identical", f"seed {seed}: {kind} changed bytes unnoticed"
            assert len(set(cargo.calls)) == len(cargo.calls), f"seed {seed}: {kind} wrote a chunk twice"
            tally[kind, outcome] += 1
        FaultyLane.fault = None
        assert sum(tally[kind, "identical"] for kind in KINDS if kind != "absurd") == 80, tally
        assert secret is None or tally["absurd", "identical"] == 10, "with a secret an enemy cannot even end a stream"
    print(dict(sorted(tally.items())))  # `pytest -s` shows it


# ---- peers that die or fall silent, in their own processes


SLOW = LineConfig(gbps=0.04)  # a stream of 4,000 tokens takes it a quarter of a second


def _peer(port: int, rank: int, started, config: LinkConfig, is_doomed: bool) -> None:
    """Expects a stream and says how it arrived. Whoever is doomed does not get to its last piece: what hits it, hits it
    midway."""
    torch.set_num_threads(1)
    link = Link("a-b", TCPStore("127.0.0.1", port, None, False), rank, config, IDENTITY)
    link.connect(DEADLINE_S)
    cargo = Cargo(tokens=4000)

    def sink(layer, *piece):
        if is_doomed and layer == 3:  # which comes last
            threading.Event().wait(4 * DEADLINE_S)
        cargo.sink(layer, *piece)

    link.expect(cargo.plan, sink)
    started.set()
    while not isinstance(found := link.receive(DEADLINE_S), (LinkLost, type(None))):
        if isinstance(found, StreamDone):
            link.send_message({"identical": cargo.is_identical})


@pytest.fixture(scope="module")
def processes():
    return process_starter()


class Peer:
    def __init__(self, processes, store, config, is_doomed=False):
        self.started = processes.Event()
        arguments = (store.port, 1, self.started, config, is_doomed)
        self.process = processes.Process(target=_peer, args=arguments, daemon=True)
        self.process.start()

    def signal(self, number) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)


@pytest.mark.parametrize("seed", range(6))
def test_a_peer_that_is_killed_at_a_random_moment_is_a_named_error_and_its_successor_is_served(processes, seed):
    generator, store = random.Random(seed), new_store()
    config = LinkConfig(lanes=1 + seed % 3, chunk_bytes=4096, timeout_s=DEADLINE_S, silence_s=DEADLINE_S)
    link = Link("a-b", store, 0, config, IDENTITY, emulated(SLOW))
    first = Peer(processes, store, config, is_doomed=True)
    try:
        link.connect(DEADLINE_S)
        assert first.started.wait(DEADLINE_S)
        cargo = Cargo(tokens=4000)
        stream = link.open(cargo.plan)
        cargo.put_all(stream)
        moment_bytes = generator.random() * 0.6 * cargo.plan.total_bytes
        wait_until(lambda: link.stats().egress_bytes >= moment_bytes)
        first.signal(signal.SIGKILL)
        second = Peer(processes, store, config)
        with pytest.raises(StreamAborted, match="the peer restarted"):
            stream.finish(DEADLINE_S)
        assert event(link, LinkRestored).peer_restarted
        assert second.started.wait(DEADLINE_S)
        again = link.open(cargo.plan)
        cargo.put_all(again)
        again.finish(DEADLINE_S)
        assert event(link, MessageReceived).message == {"identical": True}
    finally:
        link.close()


def test_a_stranger_that_knocks_while_the_peer_is_away_does_not_end_the_link(processes):
    store, config = new_store(), LinkConfig(timeout_s=DEADLINE_S)
    link, first = Link("a-b", store, 0, config, IDENTITY), Peer(processes, store, config)
    try:
        link.connect(DEADLINE_S)
        assert first.started.wait(DEADLINE_S)
        first.signal(signal.SIGKILL)
        Impostor(store, [b"let me in"] * 4)()
        second = Peer(processes, store, config)
        assert event(link, LinkRestored).peer_restarted and second.started.wait(DEADLINE_S)
    finally:
        link.close()


def test_heartbeats_that_have_left_are_forgotten(monkeypatch):
    """Gloo says of no send that it has ended, unless somebody waits for it: a link that kept those which had not grew
    for as long as it lived."""
    beats = []

    class Watched(Lane):
        def post(self, frame):
            if frame.header.kind == Kind.HEARTBEAT:
                beats.append(weakref.ref(frame))
            return super().post(frame)

    monkeypatch.setattr(supervision, "BEATS_IN_SILENCE", 1000)
    with connected(LinkConfig(lanes=2), sender_lanes=Watched) as (sender, _):
        wait_until(lambda: len(beats) > 4 * 2 * supervision.KEPT_BEATS)
        assert sum(beat() is not None for beat in beats) <= 2 * supervision.KEPT_BEATS + 2
        assert sender.epoch == 1


class Broken(PairGroup):
    """Nothing leaves: its first send ends the epoch."""

    def send(self, *arguments):
        raise RuntimeError("the wire was pulled")


def test_a_fabric_whose_store_is_gone_when_it_needs_another_epoch_is_lost_and_not_deaf():
    """Its epochs are numbered at the store. A lost fabric is made anew; one that only stopped to listen would keep its
    link up, and whoever waits for an answer waiting."""
    server, cargo = new_store(), Cargo()
    store = TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=DEADLINE_S))
    ends = [new_fabric(store, rank, group_type=Broken) for rank in (0, 1)]
    try:
        in_parallel(*(lambda end=end: end.connect(DEADLINE_S) for end in ends))
        wait_until(lambda: all(end.epoch for end in ends))
        del server
        ends[1].expect(cargo.plan, cargo.sink)
        stream = ends[0].open(cargo.plan)
        with pytest.raises(StreamAborted):
            cargo.put_all(stream)
            stream.finish(DEADLINE_S)
        for end in ends:
            event(end, LinkLost)
    finally:
        in_parallel(*(end.close for end in ends))


def _serve_store(port) -> None:
    store = new_store()
    port.put(store.port)
    threading.Event().wait(4 * DEADLINE_S)


def test_a_store_that_stands_still_for_longer_than_its_own_timeout_is_awaited_like_a_peer(processes):
    port, lanes, config = processes.Queue(), Lanes(), LinkConfig(timeout_s=DEADLINE_S)
    server = processes.Process(target=_serve_store, args=(port,), daemon=True)
    server.start()
    store = TCPStore("127.0.0.1", port.get(timeout=DEADLINE_S), None, False, timedelta(seconds=1))
    links = [Link("a-b", store, rank, config, IDENTITY, lane_type=lanes) for rank in (0, 1)]
    try:
        in_parallel(*(lambda link=link: link.connect(DEADLINE_S) for link in links))
        os.kill(server.pid, signal.SIGSTOP)
        lanes.made[0].cut()
        with pytest.raises(AssertionError, match="no LinkRestored"):
            event(links[1], LinkRestored, deadline_s=2.0)
        os.kill(server.pid, signal.SIGCONT)
        for link in links:
            assert event(link, LinkRestored).epoch == 2
    finally:
        in_parallel(*(link.close for link in links))
        server.kill()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_peer_that_does_not_come_back_is_a_lost_link_within_the_deadline(processes, blow):
    store, config = new_store(), LinkConfig(lanes=2, chunk_bytes=4096, timeout_s=2.0, silence_s=2.0)
    link = Link("a-b", store, 0, config, IDENTITY, emulated(SLOW))
    peer = Peer(processes, store, config, is_doomed=True)
    try:
        link.connect(DEADLINE_S)
        assert peer.started.wait(DEADLINE_S)
        expected, cargo = Cargo(stream_id=9), Cargo(tokens=4000)
        link.expect(expected.plan, expected.sink)
        stream = link.open(cargo.plan)
        cargo.put_all(stream)
        peer.signal(blow)
        with pytest.raises(LinkDown, match="did not connect"):
            stream.finish(DEADLINE_S)
        assert event(link, StreamFailed).stream_id == 9
        assert "did not connect" in event(link, LinkLost).reason
        with pytest.raises(LinkDown):
            link.open(cargo.plan)
    finally:
        peer.signal(signal.SIGKILL)
        link.close()


def test_a_link_that_is_closed_while_its_ends_meet_says_goodbye_all_the_same():
    store, config = new_store(), LinkConfig(timeout_s=DEADLINE_S)
    closing, staying = (Link("a-b", store, rank, config, IDENTITY) for rank in (0, 1))
    try:
        in_parallel(lambda: closing.connect(DEADLINE_S, met=closing.close), lambda: staying.connect(DEADLINE_S))
        assert event(staying, LinkLost, 5.0).reason == "closed by the peer"
        assert isinstance(event(closing, LinkLost, 5.0), LinkLost)
    finally:
        in_parallel(closing.close, staying.close)
