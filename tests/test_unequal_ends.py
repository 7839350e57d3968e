"""Nodes with other block sizes or number formats at the two ends: streams speak of tokens and layers only.

Chapter 15.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cluster_support import step_until, two_datacenters
from test_two_datacenters import GREEDY, prompts_of
from test_wire import HandOver
from transport_support import in_parallel, new_store

from minprfaas import UserError
from minprfaas.cluster.launch import link_identity
from minprfaas.commands.answers import wire_between
from minprfaas.commands.machines import machine_at
from minprfaas.commands.two_datacenters import parser
from minprfaas.config import CacheConfig, Encoding, LinkConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.model.checkpoint import load
from minprfaas.scheduling.directory import CacheChanged, Directory
from minprfaas.transport.base import LinkRefused
from minprfaas.transport.encoding import Wire
from minprfaas.transport.wan.link import Link

ROOT = Path(__file__).resolve().parent.parent
RECAST = Wire(recast="float32 in datacenter A and bfloat16 in B", same_blocks=False)


@pytest.mark.parametrize("family", ["kimi_linear", "mimo_v2_flash"])
@pytest.mark.parametrize("sizes", [(16, 40), (48, 8)])
def test_blocks_of_another_size_hold_what_their_own_prefill_would_have_put_there(models, family, sizes):
    (prompt,) = prompts_of(77)  # without snapshots: a prefill stops where one is wanted, which is at a block's end
    handed = HandOver(*models[family], prompt, Wire(same_blocks=False), block_tokens=sizes, prefix_cache=False)
    alone = HandOver(*models[family], prompt, Wire(), block_tokens=sizes[1:] * 2, prefix_cache=False)
    for layer in range(len(alone.receiver.layout.specs)):
        assert torch.equal(handed.bytes_of(layer)[1], alone.bytes_of(layer)[0])
    assert handed.arriving.is_exact and handed.answer() == alone.answer()


@pytest.mark.parametrize("family", ["kimi_linear", "mimo_v2_flash"])
@pytest.mark.parametrize("formats", [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("encoding", [Encoding.EXACT, Encoding.INT8])
def test_between_number_formats_rows_are_rounded_once_and_state_to_the_receivers_own_format(
        checkpoints, family, formats, encoding):
    (prompt,) = prompts_of(77)
    ends = [load(checkpoints[family], getattr(torch, dtype), "cpu") for dtype in formats]
    wire = Wire(encoding, RECAST.recast, same_blocks=False)
    handed = HandOver(*ends[0], prompt, wire, block_tokens=(16, 40), receiver=ends[1])
    for layer, spec in enumerate(handed.receiver.layout.specs):
        sent, arrived = handed.tensors_of(layer)
        for name, tensor, there in zip((one.name for one in spec.tensors), sent, arrived, strict=True):
            assert there.dtype == getattr(torch, "float32" if name == "memory" else formats[1])
            if spec.kind is StateKind.REQUEST:
                assert torch.equal(tensor.to(there.dtype), there), (layer, name)
            elif encoding is Encoding.EXACT:
                assert torch.equal(tensor.bfloat16().to(there.dtype), there), (layer, name)
            else:
                assert (tensor.float() - there.float()).abs().max() <= tensor.float().abs().max() / 100
    assert not handed.arriving.is_exact, "another request's prefix must not begin with it"
    assert len(handed.answer()) == GREEDY.max_tokens


def test_what_a_receiver_holds_of_its_own_is_nearly_what_arrives_from_another_format(checkpoints):
    """Beside rounding, the same numbers at the same places: against the receiver's own prefill of the prompt."""
    (prompt,) = prompts_of(77)
    ends = [load(checkpoints["kimi_linear"], dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)]
    handed = HandOver(*ends[0], prompt, RECAST, block_tokens=(16, 40), receiver=ends[1])
    alone = HandOver(*ends[1], prompt, Wire(), block_tokens=(40, 40))
    for layer in range(len(alone.receiver.layout.specs)):
        for arrived, own in zip(handed.tensors_of(layer)[1], alone.tensors_of(layer)[0], strict=True):
            assert (arrived.float() - own.float()).abs().max() <= 0.05 * own.float().abs().max()


@pytest.mark.parametrize("same_blocks", [True, False])
def test_no_snapshot_is_waited_for_where_the_other_ends_blocks_end_at_other_tokens(models, same_blocks):
    """It has none there: room for one would be kept for nothing."""
    with two_datacenters(*models["kimi_linear"], threshold=50, wire=Wire(same_blocks=same_blocks)) as (local, _):
        journey = local.front.submit("0", prompts_of(300)[0], GREEDY)
        step_until(local, lambda: local.decode.servings)
        (serving,) = local.decode.servings.values()
        step_until(local, lambda: serving.kv is not None)
        tables, pool = serving.request.cache.block_tables, local.decode.engine.kvcache.stats()
        assert (pool.in_use > sum(map(len, tables))) is same_blocks
        step_until(local, lambda: not local.front.has_work)
    assert journey.route == "prfaas" and len(journey.output_ids) == GREEDY.max_tokens


@pytest.mark.parametrize("there, named", [
    ("qwen3", "model fingerprint is"), ("same, exact", "dtype is"), (None, None)])
def test_ends_that_cannot_agree_are_refused_in_one_line_and_those_that_can_are_not(models, checkpoints, there, named):
    model, other = models["kimi_linear"][0], load(checkpoints["kimi_linear"], torch.bfloat16, "cpu")[0]
    wire, store, link = RECAST, new_store(), LinkConfig()
    other, theirs = (models["qwen3"][0], wire) if there == "qwen3" else (other, Wire() if there else wire)
    identities = [link_identity(each, Engine(each, None, CacheConfig(8, size)).layout, said)
                  for each, size, said in ((model, 16, wire), (other, 64, theirs))]
    links = [Link("unequal", store, rank, link, identity) for rank, identity in enumerate(identities)]
    try:
        with nullcontext() if named is None else pytest.raises(LinkRefused, match=named):
            in_parallel(*(lambda one=one: one.connect(20.0) for one in links))
    finally:
        for one in links:
            one.close()


def test_no_block_is_anothers_whose_blocks_hold_another_number_of_tokens(models):
    """A key is a digest over a whole block's tokens: nothing of one size equals anything of another in a directory."""
    (prompt,), directory = prompts_of(192), Directory()
    keys = {size: [key.hex() for key in Engine(*models["qwen3"], CacheConfig(8, size)).kvcache.keys(prompt)]
            for size in (16, 32, 64)}
    for size in keys:
        directory.add_node(f"of {size}")
        held = [(key, (number + 1) * size) for number, key in enumerate(keys[size])]
        directory.apply(CacheChanged(f"of {size}", 1, held, inventory=True))
    assert {size: directory.match(keys[size]) for size in keys} == {size: {f"of {size}": 192} for size in keys}


@pytest.mark.parametrize("options, named", [
    ("--block-tokens prfaas=64", "--block-tokens is 'prfaas=64'"),
    ("--block-tokens prfaas=0,pd=8", "--block-tokens is 0"),
    ("--dtype prfaas=int8,pd=float32", "--dtype is 'int8'"),
    ("--device pd=cpu,elsewhere=cpu", "--device is 'pd=cpu,else")])
def test_a_machine_that_cannot_be_is_refused_by_the_name_of_its_option(options, named):
    args = parser().parse_args(["--prompts", "P", *options.split()])
    with pytest.raises(UserError, match=named):
        [machine_at(args, site) for site in ("prfaas", "pd")]


@pytest.mark.parametrize("device, tokens", [("cpu", 64), ("cuda", 256), ("prfaas=cuda,pd=cpu", 64)])
def test_blocks_that_nobody_sizes_are_large_on_gpus_and_equal_at_both_ends(device, tokens):
    args = parser().parse_args(["--prompts", "P", "--device", device])
    assert [machine_at(args, site).block_tokens for site in ("prfaas", "pd")] == [tokens] * 2


def test_one_value_is_for_all_and_the_wire_between_equals_is_exact():
    args = parser().parse_args(["--prompts", "P", "--block-tokens", "32"])
    assert machine_at(args, "prfaas") == machine_at(args, "pd") and machine_at(args, "pd").block_tokens == 32
    assert wire_between(args) == Wire()


@pytest.mark.heavy
@pytest.mark.parametrize("options", ["--block-tokens prfaas=48,pd=16", "--dtype prfaas=bfloat16,pd=float32"])
def test_the_program_runs_with_unequal_datacenters_and_its_check_holds(checkpoints, tmp_path, options):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(json.dumps({"id": f"p{size}", "prompt": "abcd fgh " * (size // 9), "max_tokens": 24})
                                 for size in (405, 18, 306)))
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "two_datacenters.py"), "--model", str(checkpoints["kimi_linear"]),
         "--prompts", str(prompts), "--threshold", "100", *options.split(), "--check", "--json", str(out)],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert ("arrive rounded" in done.stdout) == ("dtype" in options)
    assert [json.loads(line)["route"] for line in out.read_text().splitlines()] == ["prfaas", "pdp", "prfaas"]
