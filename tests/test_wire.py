"""Rows that cross between datacenters in fewer bytes: what arrives, what it may be used for, what is said.

Chapter 15.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster_support import nothing_in_use, serve, step_until, two_datacenters
from test_prefix_shipping import LONGER, PREFIX, THRESHOLD, abundant, prefix_only_there
from test_two_datacenters import GREEDY, prompts_of, reference, tokens

from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.kv_send import KVSend, SendingThreads
from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.stream_plans import snapshot_plan, stream_plan
from minprfaas.commands.answers import wire_share
from minprfaas.config import CacheConfig, Encoding, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.model.checkpoint import load
from minprfaas.model.spec import kv_bytes
from minprfaas.transport.encoding import Wire, row_codec
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, Header, Kind, Slot

ROUNDED = [Encoding.BF16, Encoding.FP8, Encoding.INT8, Encoding.INT4]
DEADLINE_S = 60
ROOT = Path(__file__).resolve().parent.parent


def new_engine(model, tokenizer, block_tokens=16, prefix_cache=True):
    return Engine(model, tokenizer, CacheConfig(200, block_tokens, prefix_cache), prefill_chunk=48)


class HandOver:
    """A prompt prefilled in one engine and decoded in another, its KVCache handed over by a wire."""

    def __init__(self, model, tokenizer, prompt, wire, params=GREEDY, block_tokens=(16, 16), receiver=None,
                 prefix_cache=True):
        sender = new_engine(model, tokenizer, block_tokens[0], prefix_cache)
        self.receiver = new_engine(*(receiver or (model, tokenizer)), block_tokens[1], prefix_cache)
        self.sent = sender.add(sender.request("sent", prompt, params, prefill_only=True))
        while sender.has_work and self.sent.first_token_at_s is None:
            sender.step()
        self.request = self.receiver.request("request", prompt, params)
        assert self.receiver.reserve_remote(self.request)
        loopback = Loopback()
        plans = [stream_plan(engine.layout, 7, 0, len(prompt), wire) for engine in (sender, self.receiver)]
        self.plan = plans[0]
        assert plans[0].total_bytes == plans[1].total_bytes
        self.arriving = KVReceive(self.receiver.kvcache, loopback, plans[1], self.request.cache.block_tables)
        stream = KVSend(sender.kvcache, loopback, self.plan, self.sent.cache.block_tables, SendingThreads("test"),
                        DEADLINE_S)
        stream.finish()
        stream.outcome.result(DEADLINE_S)
        self.sides = [(sender, self.sent), (self.receiver, self.request)]

    def bytes_of(self, layer):
        """The layer's state in the sender's and in the receiver's blocks."""
        found = []
        for engine, one in self.sides:
            table = one.cache.block_tables[engine.layout.group_of_layer[layer].index]
            found.append(engine.kvcache.pool.read_bytes(layer, table, 0, self.plan.end).reshape(-1))
        return found

    def tensors_of(self, layer):
        """The same as tensors: of token state the rows, of request-level state each of its own."""
        sides = []
        for (engine, _), data in zip(self.sides, self.bytes_of(layer)):
            spec = engine.layout.specs[layer]
            parts = data.split([one.nbytes for one in spec.tensors]) if spec.kind is StateKind.REQUEST else [data]
            sides.append([part.clone().view(one.torch_dtype) for part, one in zip(parts, spec.tensors)])
        return sides

    def answer(self):
        """The tokens, decoded by the receiver."""
        self.request.cache.is_exact = self.arriving.is_exact
        self.receiver.admit_remote(self.request, self.sent.token_ids[-1])
        while self.receiver.has_work:
            self.receiver.step()
        return self.request.output_ids


@pytest.mark.parametrize("encoding", ROUNDED)
@pytest.mark.parametrize("family", ["kimi_linear", "mimo_v2_flash"])
def test_rows_arrive_as_their_encoding_says_and_request_level_state_to_the_last_bit(models, family, encoding):
    handed = HandOver(*models[family], prompts_of(77)[0], Wire(encoding))
    kinds = set()
    for layer, spec in enumerate(handed.receiver.layout.specs):
        sent, received = handed.bytes_of(layer)
        kinds.add(spec.kind)
        if spec.kind is StateKind.REQUEST:
            assert torch.equal(sent, received)
        else:
            codec = row_codec(spec, encoding)
            assert not torch.equal(sent, received)
            assert torch.equal(codec.decode(codec.encode(sent)), received)
    assert len(kinds) == 2  # rows and a state beside them
    assert handed.arriving.received_bytes == handed.plan.total_bytes < kv_bytes(handed.receiver.layout.specs, 77)
    assert not handed.arriving.is_exact


def test_request_level_state_crosses_in_bf16_where_that_is_asked_for(models):
    handed = HandOver(*models["kimi_linear"], prompts_of(77)[0], Wire(state=Encoding.BF16))
    layout = handed.receiver.layout
    for layer, spec in enumerate(layout.specs):
        for sent, received in zip(*handed.tensors_of(layer)):
            is_state = spec.kind is StateKind.REQUEST
            assert torch.equal(received, sent.bfloat16().to(sent.dtype) if is_state else sent)
            assert torch.equal(received, sent) != is_state
    assert not handed.arriving.is_exact and handed.plan.total_bytes < kv_bytes(layout.specs, 77)
    wires = Wire(state=Encoding.BF16), Wire()
    here, there = (link_identity(models["kimi_linear"][0], layout, wire) for wire in wires)
    assert here.difference(there.as_json()) == "wire is exact, state in bf16 here and exact there"


@pytest.mark.parametrize("encoding", Encoding)
def test_a_plan_counts_the_rows_that_a_stream_has(models, encoding):
    """By it a live run's profile is read (`Profile.encoded`), so that its threshold follows what really crosses."""
    layout = new_engine(*models["kimi_linear"]).layout
    one, many = (stream_plan(layout, 1, 0, end, Wire(encoding)).total_bytes for end in (16, 32))
    exact = [stream_plan(layout, 1, 0, end).total_bytes for end in (16, 32)]
    assert (many - one) / (exact[1] - exact[0]) == pytest.approx(wire_share(layout, Wire(encoding)))


def test_a_snapshot_crosses_exactly_for_a_prefill_begins_with_it(models):
    layout = new_engine(*models["mimo_v2_flash"]).layout
    assert {entry.encoding for entry in snapshot_plan(layout, 1, 64).entries} == {"exact"}


def test_bf16_of_a_bf16_cache_is_exact_from_end_to_end_and_stays_prefix_cache(checkpoints):
    model, tokenizer = load(checkpoints["mimo_v2_flash"], torch.bfloat16, "cpu")
    (prompt,) = prompts_of(77)
    handed = HandOver(model, tokenizer, prompt, Wire(Encoding.BF16))
    for layer in range(len(handed.receiver.layout.specs)):
        assert torch.equal(*handed.bytes_of(layer))
    assert handed.answer() == HandOver(model, tokenizer, prompt, Wire()).answer()
    assert handed.receiver.kvcache.ledger.common(handed.receiver.kvcache.keys(prompt)) == 4


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.INT4])
def test_what_crosses_a_link_in_many_pieces_is_what_one_hand_over_brings(models, encoding):
    model, tokenizer = models["mimo_v2_flash"]
    prompts = prompts_of(200, 20, 130)
    with two_datacenters(model, tokenizer, threshold=100, wire=Wire(encoding)) as (local, _):
        journeys = serve(local, prompts, GREEDY)
        step_until(local, lambda: nothing_in_use(local))
    assert [journey.route for journey in journeys] == ["prfaas", "pdp", "prfaas"]
    handed = [HandOver(model, tokenizer, prompt, Wire(encoding)) for prompt in (prompts[0], prompts[2])]
    assert [journeys[0].output_ids, journeys[2].output_ids] == [one.answer() for one in handed]
    assert [journeys[0].kv_bytes, journeys[2].kv_bytes] == [one.plan.total_bytes for one in handed]
    assert journeys[1].output_ids == reference(model, tokenizer, prompts[1:2], GREEDY)[0]  # did not cross


def test_rounded_rows_are_no_ones_prefix_and_exact_ones_stay_everyones(hybrid):
    """Else a prefill inside the PD cluster would begin with them, and its answer would no longer be the reference's."""
    (whole,) = prompts_of(200)
    params = [GREEDY] * 3
    with two_datacenters(*hybrid, threshold=100, wire=Wire(Encoding.INT4)) as (local, _):
        kvcache = local.decode.engine.kvcache
        first, = serve(local, [whole], GREEDY)
        assert first.route == "prfaas" and kvcache.ledger.common(kvcache.keys(whole)) == 0
        begun, = serve(local, [whole[:96]], GREEDY)  # all of it was in the first request's blocks
        assert begun.route == "pdp" and begun.held_tokens == 0
        again, = serve(local, [whole], GREEDY)  # what was computed here need not cross, and keeps its place
        assert again.route == "prfaas" and again.held_tokens == 96 and 0 < again.kv_bytes < first.kv_bytes
        assert kvcache.ledger.common(kvcache.keys(whole)) == 6
        step_until(local, lambda: nothing_in_use(local))
    assert tokens([begun]) == reference(*hybrid, [whole[:96]], params[:1])


def test_a_prefix_is_shipped_exactly_over_a_lossy_wire_for_others_will_begin_with_it(models):
    model, tokenizer = models["qwen3"]
    with two_datacenters(model, tokenizer, THRESHOLD[prefix_only_there], ship_prefixes=True,
                         wire=Wire(Encoding.INT4)) as (local, _):
        prefix_only_there(local)
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        exact = stream_plan(local.decode.engine.layout, 1, 0, 192)
    assert journey.route == "pdp" and journey.prefix_bytes == exact.total_bytes
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    assert LONGER[:len(PREFIX)] == PREFIX


def test_a_damaged_scale_is_noticed_by_the_frames_digest(hybrid):
    layout = new_engine(*hybrid).layout
    spec = next(spec for spec in layout.specs if spec.kind is StateKind.TOKEN)
    for encoding in ROUNDED[1:]:
        codec = row_codec(spec, encoding)
        wire = codec.encode(torch.randn(codec.width).to(codec.dtype).view(torch.uint8))
        frames, slot = Codec(4096, b"k" * 32, b"k" * 32), Slot(4096)
        slot.view[HEADER_BYTES:HEADER_BYTES + wire.numel()] = bytes(wire.tolist())
        header = Header(Kind.CHUNK, 1, 1, 0, 0, 0, 1, 0, wire.numel())
        frames.seal(header, slot.view)
        assert frames.payload_is_intact(frames.open(slot.view), slot.view)
        for byte in range(wire.numel()):  # the scales are among them
            slot.view[HEADER_BYTES + byte] ^= 1
            assert not frames.payload_is_intact(frames.open(slot.view), slot.view), (encoding, byte)
            slot.view[HEADER_BYTES + byte] ^= 1


@pytest.mark.heavy
def test_the_program_says_that_the_promise_is_suspended_and_its_check_tells_what_changed(checkpoints, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": f"p{size}", "prompt": "abcd fgh " * (size // 9), "max_tokens": 24})
                                 for size in (405, 18, 306)))
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "two_datacenters.py"), "--model", str(checkpoints["kimi_linear"]),
         "--prompts", str(prompts), "--threshold", "100", "--block-tokens", "16", "--wire", "int4", "--check",
         "--json", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "rows of attention state cross in int4" in done.stdout and "arrive rounded" in done.stdout
    assert "of 3 answers are identical" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["route"] for row in rows] == ["prfaas", "pdp", "prfaas"]
    assert all(0 < row["kv_bytes"] < row["kv_bytes_without_cache"] for row in rows if row["route"] == "prfaas")
