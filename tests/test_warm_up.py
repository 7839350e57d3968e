"""The warm-up of `--compile`: what requests need is compiled before the first of them. Chapters 04, 15."""

import copy
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from minprfaas import SamplingParams
from minprfaas.cluster.launch import StoreAddress
from minprfaas.cluster.topology import Topology
from minprfaas.commands import cluster
from minprfaas.commands.live_options import checked
from minprfaas.commands.live_run import Seat, engines_of, phases_of
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.pieces import Phase, compile_pieces, suit_products_to
from minprfaas.engine.warm_up import compile_and_warm_up
from minprfaas.model.gqa import GQA
from minprfaas.model.kda import KDA
from minprfaas.model.transformer import Layer


@pytest.fixture
def graphs(traced, caplog):
    """How many graphs were traced so far."""
    caplog.set_level("CRITICAL", "torch.__trace")  # else it writes down every step for the log
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def traced_for(traced, monkeypatch):
    """Of each graph that was traced, the shape of the first activation that it takes."""
    shapes = []

    def note(graph, inputs, options):
        tensors = [one for one in inputs if isinstance(one, torch.Tensor) and not isinstance(one, torch.nn.Parameter)]
        shapes.append(tuple(map(int, tensors[0].shape)))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    return shapes


CASES = [("qwen3", True, phase, False) for phase in Phase]
CASES += [pytest.param(family, fast, phase, True, marks=pytest.mark.heavy)
          for family in ("qwen3", "kimi_linear") for fast in (True, None) for phase in (*Phase, None)]
LENGTHS = [[1], [100, 180, 200], [20, 30], [64], [1, 40], [17] * 8, [9] * 10, [300] * 2, [5, 6, 7]]


@pytest.mark.parametrize("family, fast, phase, whole", CASES)
def test_after_the_warm_up_no_request_compiles_anything(
        models, graphs, traced_for, monkeypatch, family, fast, phase, whole):
    """Prompts of a token, of several chunks, side by side, from a cached prefix; steps of many batches and pages. What
    would be compiled if anything were is a pass over one token a request, in its last layer or as a whole."""
    if not whole:  # a graph takes a third of a second
        monkeypatch.setattr(GQA, "PIECES", ())
        monkeypatch.setattr(Layer, "PIECES", ("feed", "pass_on"))
    model, tokenizer = copy.deepcopy(models[family][0]), models[family][1]
    phases = {phase} if phase else {*Phase}
    compile_and_warm_up(model, tokenizer, block_tokens=16, fast=fast, phases=phases)
    before, engine = graphs(), Engine(model, tokenizer, CacheConfig(300, 16), prefill_chunk=64, fast=fast)
    assert before == len(traced_for) > 0
    ask(engine, phases, LENGTHS[:1])
    assert graphs() == before
    torch.compiler.set_stance("default")
    ask(engine, phases, LENGTHS if whole else LENGTHS[:2])
    more = traced_for[before:]
    assert all(shape[1] == 1 for shape in more) and (phase is Phase.DECODE) == (not more), more


def ask(engine, phases, lengths_asked):
    """Requests of these lengths, of which the engine computes these phases."""
    rng = random.Random(0)
    for lengths in lengths_asked:
        prompts = [[rng.randrange(1, 257) for _ in range(length)] for length in lengths]
        for tail in ([], [2] * 7):
            requests = [engine.request(str(number), prompt + tail, SamplingParams(max_tokens=9, ignore_eos=True),
                                       prefill_only=Phase.DECODE not in phases)
                        for number, prompt in enumerate(prompts)]
            for request in requests:
                if Phase.PREFILL in phases:
                    engine.add(request)
                else:
                    assert engine.reserve_remote(request)
                    engine.admit_remote(request, first_token=1)
            while engine.has_work:
                engine.step()
            for request in requests if Phase.DECODE not in phases else []:
                engine.release(request)


BOTH = {*Phase}


@pytest.mark.parametrize("relay, converts, expected", [
    ([], False, [{Phase.PREFILL}, {Phase.PREFILL}, {Phase.DECODE}]), (["--relay"], False, [BOTH, BOTH, BOTH]),
    ([], True, [{Phase.PREFILL}, BOTH, BOTH])])
def test_a_node_compiles_what_its_roles_compute(tmp_path, relay, converts, expected):
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "b", "max_tokens": 1}')
    args = cluster.parser().parse_args(["--prompts", str(tmp_path / "prompts.jsonl"), *relay])
    topology = Topology(prfaas=1, pd=2)
    run = replace(checked(args, topology), policy={"convert_roles": converts})
    assert [phases_of(run, place) for place in topology.places() if place.roles] == expected


@pytest.mark.parametrize("phases, device, users, expected", [
    ([Phase.PREFILL], "cuda", None, ":0:0"), (BOTH, "cuda", None, None), ([Phase.DECODE], "cuda", None, None),
    ([], "cuda", None, None), ([Phase.PREFILL], "cpu", None, None), ([Phase.PREFILL], "cuda", ":16:8", ":16:8")])
def test_only_a_process_that_does_nothing_but_prefill_multiplies_without_workspaces(
        monkeypatch, phases, device, users, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", users or "")  # so that it is put back
    if users is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    suit_products_to(phases, torch.device(device))
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_node_suits_its_products_to_its_roles(tmp_path, monkeypatch, device):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "b", "max_tokens": 1}')
    args = cluster.parser().parse_args(["--prompts", str(tmp_path / "prompts.jsonl"), "--device", device])
    topology, address, found = Topology(prfaas=1, pd=2), StoreAddress("localhost", 1, "a test"), {}
    for place in topology.places():
        if place.roles:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
            engines_of(checked(args, topology), Seat(topology.places(), place, address), None)
            found[place.name] = "CUBLAS_WORKSPACE_CONFIG" in os.environ
    assert list(found.values()) == [device == "cuda", device == "cuda", False], found


KERNELS_OF_A_PRODUCT = """
import sys, torch
from minprfaas.engine.pieces import Phase, suit_products_to
suit_products_to([Phase(name) for name in sys.argv[1:]], torch.device("cuda"))
a, b = torch.ones(8192, 1024, device="cuda").bfloat16(), torch.ones(1024, 3072, device="cuda").bfloat16()
a @ b
torch.cuda.synchronize()
before = torch.cuda.memory_allocated()
with torch.cuda.stream(torch.cuda.Stream()), torch.profiler.profile() as seen:
    product = a @ b
    torch.cuda.synchronize()
assert "Memset" not in str([event.name for event in seen.events()]), "counts tiles"
assert torch.cuda.memory_allocated() - before == product.nbytes, "a stream has memory of its own"
"""


@pytest.mark.gpu
@pytest.mark.parametrize("phases, complaint", [(["prefill"], ""), (["prefill", "decode"], "counts tiles")])
def test_a_product_without_workspaces_is_one_kernel_and_takes_no_memory(phases, complaint):
    run = subprocess.run([sys.executable, "-c", KERNELS_OF_A_PRODUCT, *phases], capture_output=True, text=True,
                         timeout=120)
    assert (run.returncode == 0) == (not complaint) and complaint in run.stderr, run.stderr


def test_a_compiled_step_on_a_cpu_is_sums_alone_and_gives_the_eager_runners_logits(models, graphs):
    """Over pages that lie more and more between those of other requests."""
    seen = []
    for fast in (False, None):
        model, tokenizer = copy.deepcopy(models["llama"][0]), models["llama"][1]
        engine = Engine(model, tokenizer, CacheConfig(60, 4), fast=fast)
        for number in range(3):
            params = SamplingParams(max_tokens=10, ignore_eos=True)
            engine.add(engine.request(str(number), list(range(1, 9 * number + 2)), params))
        while engine.waiting or engine.prefilling:
            engine.step()
        if fast is None:
            compile_pieces(model)
        finish = engine.runner._finish_step
        engine.runner._finish_step = lambda batch, logits, greedy: seen.append(logits) or finish(batch, logits, greedy)
        for _ in range(6):
            engine.step()
        with torch.profiler.profile() as last_step:
            engine.step()
    called = {event.key for event in last_step.key_averages()}
    assert not called & {"aten::mm", "aten::linear", "aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert len(seen) == 14 and graphs() == 7, "layers that are alike share their graphs"
    torch.testing.assert_close(torch.stack(seen[7:]), torch.stack(seen[:7]), atol=1e-4, rtol=0)


def test_what_takes_a_cpu_minutes_to_compile_is_compiled_for_a_gpu_alone(models, graphs):
    model = copy.deepcopy(models["kimi_linear"][0])
    compile_pieces(model)
    mixers = [module for module in model.modules() if isinstance(module, KDA)]
    assert mixers and all({*KDA.PIECES} <= vars(mixer).keys() for mixer in mixers)
    assert not any(name in vars(mixer) for mixer in mixers for name in KDA.GPU_PIECES)
