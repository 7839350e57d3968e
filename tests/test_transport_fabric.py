"""The fabric: KVCache inside a datacenter. On CPUs over Gloo; what is marked `gpu` over NCCL, between two GPUs.

Chapter 09.
"""

import contextlib
import threading

import pytest
import torch
from fabric_peer import LINK, Peer
from transport_support import (DEADLINE_S, IDENTITY, Cargo, connected_fabric, event, in_parallel, new_fabric, new_store,
                               next_event, stands_in, wait_until)

from minprfaas.config import LinkConfig, StateKind
from minprfaas.errors import UserError
from minprfaas.transport.base import LayerPlan, LinkDown, StreamAborted, StreamPlan
from minprfaas.transport.events import LinkLost, LinkRestored, MessageReceived, StreamDone, StreamFailed
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.pair_group import PEER_IS_GONE, WINDOW, PairGroup

BIG = 50_000  # tokens: hundreds of batches
GPUS = [pytest.param(devices, marks=pytest.mark.gpu) for devices in (("cuda:0", "cuda:1"), ("cuda:0", "cuda:0"))]
places = pytest.mark.parametrize("devices", [("cpu", "cpu"), *GPUS], ids=["gloo", "nccl", "one gpu"])


@pytest.fixture(autouse=True)
def enough_gpus(request):
    if "nccl" in request.node.name and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two GPUs")


def ask_for(fabric, stream_id, tokens, device="cpu", may_go_on=None):
    """Expect a stream of the peer process's and ask for it; returns where it arrives. With `may_go_on`, no more than
    its first pieces do before that is set."""
    cargo = Cargo(stream_id, tokens, seed=stream_id, device=device)

    def sink(*piece):
        if may_go_on is not None and len(cargo.calls) > 20:
            assert may_go_on.wait(DEADLINE_S)
        cargo.sink(*piece)

    fabric.expect(cargo.plan, sink)
    fabric.send_message({"stream": stream_id, "tokens": tokens})
    return cargo


def is_written_up_to(cargo, end):
    return all(torch.equal(cargo.arrived[layer][:end - 64], cargo.sent[layer][:end - 64]) for layer in range(3))


@places
def test_streams_in_both_directions_at_once_arrive_identical(devices):
    """Several streams each way, 400 chunks each: neither direction may wait for the other."""
    with connected_fabric(devices) as ends:
        cargos = {}
        for index, end in enumerate(ends):
            for number in range(3):
                there = Cargo(10 * index + number, tokens=6_400, seed=10 * index + number, device=devices[1 - index])
                cargos[index, number] = there
                ends[1 - index].expect(there.plan, there.sink)

        def send(index, number):
            here = Cargo(10 * index + number, tokens=6_400, seed=10 * index + number, device=devices[index])
            stream = ends[index].open(here.plan)
            here.put_all(stream)
            return stream.finish(DEADLINE_S)

        reports = in_parallel(*(lambda key=key: send(*key) for key in cargos))
        assert all(report.chunks >= 301 for report in reports)
        assert all(cargo.is_identical for cargo in cargos.values())
        for end in ends:
            assert {event(end, StreamDone).stream_id % 10 for _ in range(3)} == {0, 1, 2}


@places
def test_a_peer_that_stands_still_or_is_killed_ends_its_streams_and_is_met_again_under_the_next_epoch(devices):
    store = new_store()
    here = new_fabric(store, 0, devices[0], LINK)
    peer = Peer(store, devices[1])
    try:
        here.connect(2 * DEADLINE_S)
        epochs, unfinished, written = [0], [], []

        def it_is_met_again(stream_id):
            wait_until(lambda: here.epoch > epochs[-1])
            sound = ask_for(here, stream_id, 300, devices[0])
            assert event(here, StreamDone).stream_id == stream_id and sound.is_identical
            for cargo, arrived in zip(unfinished, written):
                assert all(map(torch.equal, cargo.arrived.values(), arrived)), "a byte of an ended epoch was written"

        def its_stream_ends(stream_id, how):
            may_go_on = threading.Event()
            cargo = ask_for(here, stream_id, BIG, devices[0], may_go_on)
            cargo.wait_for_rows(1_000)
            epochs.append(here.epoch)
            how()
            may_go_on.set()
            failed = event(here, StreamFailed)
            assert failed.stream_id == stream_id and 64 <= failed.arrived_end < 64 + BIG
            assert is_written_up_to(cargo, failed.arrived_end)
            unfinished.append(cargo)
            written.append([data.clone() for data in cargo.arrived.values()])

        its_stream_ends(1, peer.stop)
        peer.go_on()
        said = [next_event(here, DEADLINE_S) for _ in range(2)]  # in either order: lanes may bring it as they are cut
        restored, told = sorted(said, key=lambda found: isinstance(found, MessageReceived))
        assert not restored.peer_restarted and "aborted" in told.message, "the peer knows that its epoch is over"
        it_is_met_again(2)

        its_stream_ends(3, peer.kill)
        peer = Peer(store, devices[1])
        assert event(here, LinkRestored, 2 * DEADLINE_S).peer_restarted
        it_is_met_again(4)
    finally:
        peer.go_on()
        peer.kill()
        here.close()


def put_in_three_batches(cargo, stream):
    """A layer each; the first two arrive."""
    for layer in range(3):
        wait_until(lambda: len(cargo.calls) == layer)
        stream.put(layer, 64, 320, cargo.sent[layer].reshape(-1))


def finish(cargo, stream):
    stream.put(3, 64, 320, cargo.sent[3].reshape(-1))
    stream.finish(DEADLINE_S)


class Damaging(PairGroup):
    """One bit of the third batch is lost on the way."""

    sends = 0

    def send(self, number, batch):
        self.sends += 1
        if self.sends == 3:
            batch[100] ^= 1
        super().send(number, batch)


def test_bytes_without_the_announced_digest_fail_their_stream_and_are_not_written():
    with connected_fabric(sender_group=Damaging) as (sender, receiver):
        cargo, sound = Cargo(1), Cargo(2, seed=2)
        receiver.expect(cargo.plan, cargo.sink)
        receiver.expect(sound.plan, sound.sink)
        stream = sender.open(cargo.plan)
        put_in_three_batches(cargo, stream)
        failed = event(receiver, StreamFailed)
        assert failed.reason == "its bytes arrived damaged" and failed.arrived_end == 64
        assert [layer for layer, _, _ in cargo.calls] == [0, 1] and not cargo.arrived[2].any()
        with pytest.raises(StreamAborted, match="refused by the receiver"):
            finish(cargo, stream)
        other = sender.open(sound.plan)
        sound.put_all(other)
        other.finish(DEADLINE_S)
        assert sound.is_identical


class LikeNCCL(PairGroup):
    """An operation that is broken off ends like one that succeeded; only the third batch is said to take long."""

    received = 0

    def receive(self, nbytes):
        self.received += 1
        return super().receive(nbytes)

    def oldest_s(self, now_s):
        return super().oldest_s(now_s) if self.received >= 3 else 0.0

    def wait(self, transfer):
        with contextlib.suppress(RuntimeError):
            super().wait(transfer)


class BreakingOff(PairGroup):
    """The third send never leaves: its epoch ends instead."""

    sends = 0

    def send(self, number, batch):
        self.sends += 1
        if self.sends == 3:
            raise RuntimeError("the wire was pulled")
        super().send(number, batch)


class Stalling(PairGroup):
    """The third batch is announced, and does not leave while its epoch lasts."""

    sends = 0

    def oldest_s(self, now_s):
        return 0.0

    def send(self, number, batch):
        self.sends += 1
        if self.sends == 3:
            wait_until(lambda: self.is_over)
            raise RuntimeError("nobody listens")
        super().send(number, batch)


@places
@pytest.mark.parametrize("sender_group, deadline_s, reason", [
    (BreakingOff, DEADLINE_S, "the wire was pulled"), (Stalling, 0.5, "an operation took longer than 0.5 s")])
def test_an_operation_that_was_broken_off_without_a_word_is_never_used(devices, sender_group, deadline_s, reason):
    with connected_fabric(devices, sender_group, receiver_group=LikeNCCL, deadline_s=deadline_s) as ends:
        sender, receiver = ends
        cargo = Cargo(1, device=devices[1])
        cargo.sent = {layer: data.to(devices[0]) for layer, data in cargo.sent.items()}
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        with pytest.raises(StreamAborted) as aborted:
            put_in_three_batches(cargo, stream)
            finish(cargo, stream)
        failed = event(receiver, StreamFailed)
        assert failed.stream_id == 1 and failed.arrived_end == 64
        told = str(aborted.value)
        assert reason in (told if sender_group is BreakingOff else failed.reason), "who notices says it"
        assert reason in told or PEER_IS_GONE in told, "the groups may break before the sender hears why"
        wait_until(lambda: sender.epoch > 1 and sender.epoch == receiver.epoch)
        assert not cargo.arrived[2].any() and [layer for layer, _, _ in cargo.calls] == [0, 1]
        assert next_event(receiver) is None


class Counting(PairGroup):
    """Knows how many batches were sent."""

    sends = 0

    def send(self, number, batch):
        self.sends += 1
        super().send(number, batch)


def test_layers_that_are_ready_together_cross_by_one_operation_as_many_as_fit_and_are_written_at_once():
    with connected_fabric(sender_group=Counting) as (sender, receiver):
        cargo = Cargo(1, tokens=128)  # 12,288 bytes a layer; two fit into a batch
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        stream.put_ready([(layer, 64, 192) for layer in range(4)], cargo.source)
        stream.finish(DEADLINE_S)
        assert cargo.is_identical and sender._group.sends == 3
        assert [layer for layer, _, _ in cargo.calls] == [0, 2, 3], "of two layers the first is named"


def test_a_source_that_fails_fails_its_stream_and_no_place_in_the_window_is_lost():
    def broken(*_):
        raise ValueError("no such block")

    with connected_fabric() as (sender, receiver):
        for _ in range(WINDOW + 1):
            with pytest.raises(ValueError, match="no such block"):
                sender.open(Cargo(1).plan).put_ready([(0, 64, 128)], broken)
        cargo = Cargo(2)
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        cargo.put_all(stream)
        stream.finish(DEADLINE_S)
        assert cargo.is_identical


def test_a_stream_that_is_given_up_while_its_bytes_are_read_sends_none_of_them():
    with connected_fabric(sender_group=Counting) as (sender, _):
        cargo = Cargo(1)
        stream = sender.open(cargo.plan)

        def last_words(*place):
            stream.abort("the client left")
            return cargo.source(*place)

        with pytest.raises(StreamAborted, match="the client left"):
            stream.put_ready([(0, 64, 128)], last_words)
        assert sender._group.sends == 0


def test_a_put_waits_while_a_window_has_not_landed_behind_one_that_is_not_written():
    count = 2 * WINDOW
    with connected_fabric() as (sender, receiver):
        cargo, may_write = Cargo(1, tokens=64 * (count + 1)), threading.Event()

        def slow_sink(*piece):
            assert may_write.wait(DEADLINE_S)
            cargo.sink(*piece)

        def put(start):
            stream.put(0, start, start + 64, cargo.source(0, start, start + 64, None))

        receiver.expect(cargo.plan, slow_sink)
        stream = sender.open(cargo.plan)
        for number in range(count):
            put(64 + 64 * number)
        last = threading.Thread(target=put, args=(64 + 64 * count,), daemon=True)
        last.start()
        wait_until(lambda: stands_in(last, PairGroup.wait))
        last.join(0.2)
        assert last.is_alive(), "there was memory for it, though nothing was written"
        may_write.set()
        last.join(DEADLINE_S)
        stream.put_ready([(layer, 64, 64 * (count + 2)) for layer in (1, 2, 3)], cargo.source)
        assert stream.finish(DEADLINE_S).stalled_s > 0 and cargo.is_identical


class Aborted(PairGroup):
    """Says when it was aborted."""

    was_aborted = threading.Event()

    def abort(self):
        super().abort()
        self.was_aborted.set()


def test_an_epoch_aborts_its_groups_before_its_streams_fail():
    """What a stream waits for when it fails may itself wait for an operation of a dead peer."""
    with connected_fabric(sender_group=BreakingOff, receiver_group=Aborted) as (sender, receiver):
        cargo = Cargo(1)

        def sink(*piece):
            cargo.sink(*piece)
            if len(cargo.calls) == 2:
                assert Aborted.was_aborted.wait(DEADLINE_S)

        receiver.expect(cargo.plan, sink)
        with pytest.raises(StreamAborted, match="the wire was pulled"):
            put_in_three_batches(cargo, sender.open(cargo.plan))
        assert event(receiver, StreamFailed, DEADLINE_S / 2).arrived_end == 64


def test_a_row_that_fits_into_no_batch_is_refused_at_once():
    with connected_fabric() as (sender, receiver):
        sender.open(StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, 24_576),), 0, 10))
        plan = StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, 30_000),), 0, 10)
        for call in (lambda: sender.open(plan), lambda: receiver.expect(plan, print)):
            with pytest.raises(ValueError, match="a row of 30000 bytes does not fit into a batch of 24576"):
                call()


def test_an_environment_in_which_a_dead_peer_would_end_this_process_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    with pytest.raises(UserError, match="TORCH_NCCL_ASYNC_ERROR_HANDLING is '1'; it must be 0 or 2"):
        Fabric("pair", new_store(), 0, LinkConfig(), IDENTITY, "cuda")


def test_a_closed_fabric_leaves_no_thread_behind():
    before = {*threading.enumerate()}
    with connected_fabric() as (sender, receiver):
        cargo = Cargo(1)
        receiver.expect(cargo.plan, cargo.sink)
        stream = sender.open(cargo.plan)
        put_in_three_batches(cargo, stream)
        finish(cargo, stream)
        assert sender.stats().egress_bytes == 0, "KVCache goes another way"
        assert all(thread.daemon for thread in {*threading.enumerate()} - before)
        waiting = threading.Thread(target=receiver.wait_until_lost, daemon=True)
        waiting.start()
        waiting.join(0.02)
        assert waiting.is_alive()
        sender.close()
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive()
        wait_until(lambda: isinstance(next_event(receiver), LinkLost))
        assert sender.epoch == receiver.epoch == 0
        for call in (lambda: sender.open(cargo.plan), lambda: sender.send_message({})):
            with pytest.raises(LinkDown):
                call()
    wait_until(lambda: not any("pd-0+pd-1" in thread.name for thread in {*threading.enumerate()} - before))
