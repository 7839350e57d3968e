"""Whole requests while links, nodes and clients fail: every one ends in the reference's tokens, and nothing leaks.

Chapter 14. All 200 seeded faults, with their tally: python -m pytest -m heavy -s tests/test_faults.py
"""

import collections
import random
import threading
from dataclasses import replace

import pytest
from cluster_support import nothing_in_use, serve, step_until, two_datacenters
from fault_lanes import DECODE, PREFILL
from fault_support import DEADLINE_S, KINDS, PARAMS, Site, outcome, run_fault, seeded_fault
from programs import process_starter
from transport_support import in_parallel, new_store, stands_in, wait_until

from minprfaas import SamplingParams, UserError, generate
from minprfaas.cluster import messages
from minprfaas.config import LineConfig, LinkConfig
from minprfaas.transport.streams import IncomingStream
from minprfaas.transport.wan.frames import FrameError
from minprfaas.transport.wan.frames import Kind, control_frame, encode_acks
from minprfaas.transport.wan.lanes import Lane

QUICK, ALL = (0, 3), range(10)  # seeds; an even one kills the prefill node and an odd one the local node
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def processes():
    return process_starter()


@pytest.fixture(scope="module")
def tally():
    """(kind, outcome) -> how often; printed at the end."""
    counts = collections.Counter()
    yield counts
    print(f"\n{sum(counts.values())} faults")
    for (kind, how), number in sorted(counts.items()):
        print(f"  {kind:20} {number:3} {how}")


def run_faults(kind, seeds, models, checkpoints, processes, tally):
    for seed in seeds:
        family = ("kimi_linear", "qwen3")[seed // 2 % 2]
        tally[kind, run_fault(kind, seed, *models[family], checkpoints[family], processes)] += 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_ends_well_and_nothing_leaks_whatever_breaks(kind, models, checkpoints, processes, tally):
    run_faults(kind, QUICK, models, checkpoints, processes, tally)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_seeded_faults(kind, models, checkpoints, processes, tally):
    """python -m pytest -m heavy -s tests/test_faults.py"""
    run_faults(kind, ALL, models, checkpoints, processes, tally)


# ---- what had arrived is kept where that is sound


def broken_site(models, family, kind, at, gbps=None, layers=range(9)):
    """Both nodes up; at the prefill node's frame number `at` of these layers' state, `kind` happens."""
    site = Site(*models[family], random.Random(1), LinkConfig(lanes=2, chunk_bytes=2048, timeout_s=1.0), b"secret",
                LineConfig(gbps) if gbps is not None else None)
    site.start_prefill_node()
    site.start_local_node()
    site.fault = seeded_fault(kind, site.draw)
    site.fault.at = at
    site.fault.counts = lambda frame: frame[5] == Kind.CHUNK and int(frame[6]) in layers
    return site


def test_a_dense_model_goes_on_from_the_last_full_block_that_arrived_in_every_layer(models):
    site = broken_site(models, "qwen3", "cut for good", at=12)
    site.fault.is_ready = lambda: all(site.arrived_end(layer) >= 16 for layer in range(2))
    (journey,) = site.serve(site.prompt(330))
    whole = min(site.arrived_end(layer) for layer in range(2))
    assert "did not connect" in journey.fallback and whole >= 16
    assert journey.cached_tokens == journey.held_tokens == whole // 16 * 16
    site.close()


def test_a_hybrid_goes_on_from_the_snapshot_if_that_arrived(models):
    site = broken_site(models, "kimi_linear", "node dies", at=10**9, gbps=2e-4)
    local, prompt, is_killed = site.local, site.prompt(330), threading.Event()
    pool = local.decode.engine.kvcache.pool
    write = pool.write_bytes

    def write_all_but_the_last(layer, table, start, end, data):
        if end == 330 and layer < 3:
            assert is_killed.wait(DEADLINE_S)
        write(layer, table, start, end, data)

    pool.write_bytes = write_all_but_the_last
    journey = local.front.submit("0", prompt, PARAMS)

    def snapshot_and_rows_have_arrived():
        serving = local.decode.servings.get("0#1")
        return serving is not None and site.arrived_end(layer=3) >= 320 and site.states_arrived[320] == 3

    step_until(local, snapshot_and_rows_have_arrived)
    site.kill_prefill_node()
    loses = threading.Thread(target=site.links[DECODE].wait_until_lost, daemon=True)
    loses.start()
    wait_until(lambda: not loses.is_alive() or
               any(stands_in(thread, IncomingStream.close) for thread in threading.enumerate()))
    is_killed.set()
    step_until(local, lambda: not local.front.has_work)
    assert "did not connect" in journey.fallback and journey.cached_tokens == journey.held_tokens == 320
    assert journey.output_ids == generate(*models["kimi_linear"], [prompt], PARAMS)[0].token_ids
    site.close()


def test_a_hybrid_without_its_snapshot_starts_over_because_rows_alone_are_no_state(models):
    site = broken_site(models, "kimi_linear", "cut for good", at=0, layers=range(3))  # the first state, after rows
    site.fault.is_ready = lambda: site.arrived_end(layer=3) >= 16
    for part in (site.local.prefill, site.local.decode):  # the half-arrived state would be taken, if any
        snapshots = part.engine.kvcache.snapshots
        snapshots.config = replace(snapshots.config, snapshot_every=1)
    (journey,) = site.serve(site.prompt(330))
    assert journey.held_tokens == site.arrived_end(layer=3) // 16 * 16 >= 16, "its rows need not be sent again"
    assert journey.cached_tokens == 0
    site.close()


# ---- clients that go away


def computes_on_once_told(role, tokens):
    """The prefill role computes so many tokens and no further before it is told of a client that went away."""
    hear, step, told = role.hear, role.engine.step, threading.Event()

    def heard(sender, message):
        hear(sender, message)
        if isinstance(message, messages.Abort):
            told.set()

    role.hear = heard
    role.engine.step = lambda **options: (
        step(**options) if told.is_set() or role.engine.prefilled_tokens < tokens else [])


@pytest.mark.parametrize("stage", ["queued", "away", "decoding", "finished"])
def test_a_client_that_goes_away_frees_everything_on_both_sides(hybrid, stage):
    gone, stays = [random.Random(2).choices(range(1, 257), k=size) for size in (450, 150)]
    with two_datacenters(*hybrid, threshold=100, overlap=False) as (local, remote):
        journeys = [local.front.submit(*each, LONG) for each in (("gone", gone), ("stays", stays))]
        prefills = remote.prefill.prefills
        if stage == "away":
            computes_on_once_told(remote.prefill, tokens=48)
        reached = {"queued": lambda: True, "away": lambda: prefills, "decoding": lambda: journeys[0].output_ids,
                   "finished": lambda: journeys[0].finish_reason}[stage]
        step_until(local, reached)
        prefill = prefills.get("gone#1")
        local.front.abort("gone")
        step_until(local, lambda: not local.front.has_work and not remote.prefill.has_work and nothing_in_use(local))
        assert not any(id.startswith("gone") for id in local.decode.servings) and nothing_in_use(remote)
    assert stage != "away" or prefill.request.finish_reason == "aborted", "its prefill is not computed to the end"
    assert journeys[0].finish_reason == ("length" if stage == "finished" else "aborted")
    assert journeys[1].output_ids == generate(*hybrid, [stays], LONG)[0].token_ids


def test_an_unknown_id_can_be_aborted_and_one_in_use_not_be_used_again(hybrid):
    with two_datacenters(*hybrid, threshold=100) as (local, _):
        local.front.abort("nobody")
        local.front.submit("0", [1, 2, 3], PARAMS)
        with pytest.raises(UserError, match="request id '0' is in use"):
            local.front.submit("0", [1, 2, 3], PARAMS)
        step_until(local, lambda: not local.front.has_work)


# ---- the node outlives one bad transfer, and the lane one bad frame


def test_acknowledgements_that_are_overdue_end_a_transfer_and_not_the_node(hybrid):
    prompts = [random.Random(3).choices(range(1, 257), k=200) for _ in range(2)]
    slow = LineConfig(gbps=5e-5, rtt_ms=600)  # three seconds: what is all across by its deadline is not lost
    with two_datacenters(*hybrid, threshold=100, line=slow) as (local, remote):
        remote.prefill.upkeep.outgoing.finish_deadline_s = 0.1
        (overdue,) = serve(local, prompts[:1], PARAMS)
        remote.prefill.upkeep.outgoing.finish_deadline_s = DEADLINE_S
        (intime,) = serve(local, prompts[1:], PARAMS)
    assert overdue.fallback is not None and outcome(intime) == "streamed"
    assert [j.output_ids for j in (overdue, intime)] == [o.token_ids for o in generate(*hybrid, prompts, PARAMS)]


@pytest.mark.parametrize("length", [0, 37])
def test_a_truncated_frame_is_not_completed_by_what_came_before_it(length):
    store, opened = new_store(), []
    sender, receiver = in_parallel(
        *(lambda rank=rank: Lane(store.clone(), 0, rank, 4096, DEADLINE_S) for rank in (PREFILL, DECODE)))

    def read():
        with pytest.raises(FrameError):
            receiver.receive_frames(lambda lane, slot: opened.append(lane.codec.open(slot.view)))

    def send():
        frames = [control_frame(Kind.ACK, encode_acks([number])) for number in range(3)]
        works = [sender.post(frame) for frame in frames[:2]]
        sender.codec.seal(frames[2].header, frames[2].slot.view)
        works.append(sender.transmit(frames[2].slot.tensor[:length]))
        for work in works:
            work.wait()

    in_parallel(read, send)
    assert len(opened) == 2
