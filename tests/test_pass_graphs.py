"""The graphs of prefill passes, held against passes that are computed as they are. Chapters 04, 08."""

import gc
import random
import weakref
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from step_support import PARITY, rows_of, step_logits

from minprfaas import SamplingParams
from minprfaas.config import StateKind
from minprfaas.engine.decode_graphs import captured, uncollected
from minprfaas.engine.engine import Engine
from minprfaas.engine.pass_graphs import PassGraphs
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.prefill_graphs import GraphedMixer, graph_delta_rules
from minprfaas.engine.reference import pool_for
from minprfaas.engine.request import Request
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.delta_segments import delta_rule_in_segments
from minprfaas.model.families import config_from_hf, read_config
from minprfaas.model.kda import KDA
from minprfaas.model.layers import DenseConfig
from minprfaas.model.transformer import Transformer


class Sizes(NamedTuple):
    """Of a pass, of what it is padded to a multiple of, and of a block, in tokens."""

    chunk: int
    unit: int
    block: int


def prefilled(model: Transformer, sizes: Sizes, lengths: tuple[int, ...], is_fast: bool, is_captured: bool = True,
              ) -> tuple[Engine, list, list]:
    """The engine, what each prompt gave (first token, rows and states, snapshots), and what listeners heard. Some
    requests stay, so that the blocks of later ones lie elsewhere."""
    engine = engine_for(model, sizes, lengths, is_fast, is_captured)
    rng, given, heard, kept = random.Random(0), [], [], []
    for number, tokens in enumerate(lengths):
        prompt = [rng.randrange(1, model.config.vocab_size) for _ in range(tokens)]
        request = engine.add(engine.request(str(number), prompt, SamplingParams(1), prefill_only=True))
        while engine.has_work:
            engine.step(lambda request, *what: heard.append((request.id, *what)))
        given.append((request.output_ids, state_of(engine, request), snapshots_of(engine, request)))
        if number % 2:
            engine.release(request)
        else:
            kept.append((request, given[-1][1]))
    assert all(torch.equal(state_of(engine, request), state) for request, state in kept), "a pass wrote elsewhere"
    return engine, given, heard


def state_of(engine: Engine, request: Request) -> torch.Tensor:
    """The bytes of all rows and states."""
    return torch.cat([rows.view(torch.uint8) for rows in rows_of(engine, [request])])


def engine_for(model: Transformer, sizes: Sizes, lengths: tuple[int, ...], is_fast: bool, is_captured: bool) -> Engine:
    """Passes are captured, or computed with the same padding, or computed as the eager runner does. A state is kept
    twice in a chunk."""
    room = pool_for(model, [2 * max(lengths)] * (len(lengths) + 3), sizes.block)
    cache = replace(room, snapshot_every=max(sizes.chunk // sizes.block // 2, 1))
    engine = Engine(model, None, cache, prefill_chunk=sizes.chunk, fast=is_fast)
    if is_fast:
        memory = engine.runner._passes._memory if model.device.type == "cuda" else None
        engine.runner._passes = PassGraphs(model, engine.kvcache, memory, sizes.unit, sizes.chunk)
        engine.runner._passes._most_shapes *= is_captured
    return engine


def assert_same(found: list, expected: list) -> None:
    """The same first tokens, and all the same bytes."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) and {*ours[2]} == {*theirs[2]}
        assert all(torch.equal(ours[2][place], theirs[2][place]) for place in ours[2])


def snapshots_of(engine: Engine, request: Request) -> dict[tuple[int, int], torch.Tensor]:
    """The bytes of each layer's state at each boundary of the prompt at which it was kept."""
    layout, pool, found = engine.layout, engine.kvcache.pool, {}
    for tokens in range(layout.block_tokens, request.cache.num_tokens + 1, layout.block_tokens):
        tables = engine.kvcache.snapshots.hold(request.cache, tokens)
        for group in layout.request_groups if tables else ():
            for layer in group.layers:
                found[tokens, layer] = pool.read_bytes(layer, tables[group.index], 0, tokens)
    return found


def fixture(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", is_compiled: bool = False):
    """The model of a fixture."""
    model = load_checkpoint(PARITY / name, read_config(PARITY / name), dtype, device)
    if is_compiled:
        compile_pieces(model)
    return model


def without_experts(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """A fixture's model with random weights and the same small MLP in every layer."""
    config = read_config(PARITY / name)
    layers = tuple(replace(layer, mlp=DenseConfig(48)) for layer in config.layers)
    return random_model(replace(config, layers=layers), dtype, device)


def random_model(config, dtype: torch.dtype, device: str) -> Transformer:
    """With weights that let every earlier token sway the next one."""
    torch.manual_seed(7)
    model = Transformer(config).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 1 if "embed" in name else weight.shape[1] ** -0.5)
    return model.to(dtype).to(device)


@pytest.mark.parametrize("name, is_captured", [("qwen3", True), ("llama", True), ("qwen3_moe", False)])
def test_passes_from_graphs_leave_what_computed_ones_leave(name, is_captured):
    """From a shape's second time on: wherever the request's blocks lie, however much of the pass is padding, and layer
    by layer for who listens."""
    (_, expected, expected_heard), (engine, found, heard) = (
        prefilled(fixture(name), Sizes(32, 8, 16), (64, 38, 64, 35, 37, 16, 3), is_fast) for is_fast in (False, True))
    assert heard == expected_heard
    for (tokens, rows, _), (expected_tokens, expected_rows, _) in zip(found, expected):
        assert tokens == expected_tokens
        torch.testing.assert_close(rows.view(torch.float32), expected_rows.view(torch.float32), atol=1e-5, rtol=0)
    graphs = engine.runner._passes._graphs
    assert {*graphs} == ({(32, 0, False, ()), (32, 32, False, ()), (8, 32, True, ())} if is_captured else set())


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid", "qwen3_next", "minimax", "mimo_v2_flash"])
def test_passes_from_graphs_leave_a_hybrids_states_and_their_snapshots(name):
    """Whole chunks and padded ends, which store a state wherever a prompt's last boundary may be. Of other mixers they
    are computed as they come."""
    sizes, lengths = Sizes(256, 128, 64), (330, 306, 300, 100, 384, 500, 70, 384, 510, 330)
    (_, expected, expected_heard), (_, computed, _), (engine, found, heard) = (
        prefilled(without_experts(name), sizes, lengths, *kind) for kind in ((False,), (True, False), (True, True)))
    assert heard == expected_heard
    assert_same(found, computed)
    assert_same(found[4:8:3], expected[4:8:3])  # nothing of these was padded
    for ours, theirs in zip(found, expected):
        assert ours[0] == theirs[0] and len(ours[2]) == len(theirs[2]) > 0
        for one, other in zip((ours[1], *ours[2].values()), (theirs[1], *theirs[2].values())):
            torch.testing.assert_close(one.view(torch.float32), other.view(torch.float32), atol=1e-4, rtol=0)
    shapes = {(256, 0, False, (128,)), (128, 256, True, (64,)), (128, 0, True, (64,)), (128, 256, False, (64,)),
              (256, 256, True, (128, 192))}
    assert {*engine.runner._passes._graphs} == (shapes if name in ("kimi_linear", "bailing_hybrid") else set())


@pytest.mark.parametrize("name, is_fast, chunk", [("qwen3", False, 8), ("qwen3", True, 8), *(
    (name, is_fast, 32) for is_fast in (False, True)
    for name in ("qwen3", "bailing_hybrid", "kimi_linear", "mimo_v2_flash", "qwen3_next", "minimax"))])
def test_nothing_is_read_that_was_in_a_pool_before(name, is_fast, chunk):
    """In prefill, alone and together, padded or not, from a cached prefix, in chunks that end inside a block,
    and in decode steps."""
    model, logits = load_checkpoint(PARITY / name, read_config(PARITY / name), torch.float32, "cpu"), []
    for byte in (0, 255):  # 255: NaN in every dtype
        engine = Engine(model, None, pool_for(model, [120] * 8, block_tokens=16), prefill_chunk=chunk, fast=is_fast)
        engine.kvcache.pool.bytes[:engine.kvcache.pool.num_blocks] = byte
        if is_fast:
            engine.runner._passes = PassGraphs(model, engine.kvcache, engine.runner._memory, 32, 32)
        requests = []
        for number, tokens in enumerate((70, 70, 37, 40, 30, 3)):
            prompt = [1 + (number // 2 * 7 + at) % 50 for at in range(tokens)]  # two begin alike
            requests.append(engine.add(engine.request(str(number), prompt, SamplingParams(1), prefill_only=True)))
            while engine.has_work and number < 3:
                engine.step()
        while engine.has_work:
            engine.step()
        for request in requests:
            engine.kvcache.reserve(request.cache, len(request.token_ids) + 40)  # further than a step needs
        logits.append([step_logits(engine, requests[:count]) for count in (6, 1)])
    assert all(one.isfinite().all() and torch.equal(one, other) for one, other in zip(*logits))


def test_when_there_are_shapes_enough_others_are_computed_as_they_come(monkeypatch):
    monkeypatch.setattr("minprfaas.engine.pass_graphs.MOST_SHAPES", 1)
    model = fixture("qwen3")
    engine = Engine(model, None, pool_for(model, [16]))
    passes = PassGraphs(model, engine.kvcache, None, 2, 8)
    request = engine.request("new", [1] * 16, SamplingParams(1))
    request.cache = engine.kvcache.open(request.token_ids)
    found = [passes.of(PrefillChunk(request, start, start + 8), 8) is not None for start in (0, 8, 0, 8, 8, 0)]
    assert found == [False, False, True, False, False, True]  # (8) was met before (0) was captured: it took no place


def test_engines_that_follow_each_other_on_one_model_share_their_graphs_memory(monkeypatch):
    """A warm-up's, and the one that then serves."""
    handles = iter(range(3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    model = without_experts("kimi_linear")
    assert graph_delta_rules(model) == graph_delta_rules(model) != graph_delta_rules(without_experts("qwen3_next"))


@pytest.mark.gpu
def test_a_pass_for_whose_graphs_there_is_no_memory_is_computed_as_it_comes():
    """Computed it has room: what the allocator keeps from before is given back."""
    model = load_checkpoint(PARITY / "qwen3", read_config(PARITY / "qwen3"), torch.bfloat16, "cuda")
    engine = Engine(model, None, pool_for(model, [2048] * 3))
    drawn, total = [], torch.cuda.mem_get_info()[1]
    try:
        for number in range(3):
            if number == 1:
                kept = [torch.empty(2**28, dtype=torch.uint8, device="cuda") for _ in range(2)]
                del kept  # 512 MiB that are kept for later, and no more than that is allowed
                torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
            request = engine.add(engine.request(str(number), [7] * 2047, SamplingParams(1), prefill_only=True))
            while engine.has_work:
                engine.step()
            drawn.append(request.output_ids)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert drawn[0] == drawn[1] == drawn[2] and not engine.runner._passes._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "llama-scaled_biased_tied"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_captured_passes_leave_what_the_eager_runners_leave(name, is_compiled):
    """As the kernels of long prompts compute it, in bfloat16."""
    lengths = (2048, 1030, 2048, 1027, 1029, 512, 3)
    (_, expected, expected_heard), (engine, found, heard) = (
        prefilled(fixture(name, torch.bfloat16, "cuda", is_compiled), Sizes(1024, 256, 16), lengths, is_fast)
        for is_fast in (False, True))
    assert heard == expected_heard
    for (_, rows, _), (_, expected_rows, _) in zip(found, expected):
        rows, expected_rows = rows.view(torch.bfloat16).float(), expected_rows.view(torch.bfloat16).float()
        assert ((rows - expected_rows).norm() / expected_rows.norm()).item() < 2e-2
    assert [len(graph._graphs) for graph in engine.runner._passes._graphs.values()] == (
        [len(engine.model.model.layers) + 1] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_a_hybrids_captured_passes_leave_the_bits_of_computed_ones(name):
    """A delta rule that has a graph of its own becomes a part of the pass's."""
    sizes, lengths = Sizes(2048, 1024, 256), (2748, 2348, 2148, 500, 3072, 4095, 900, 3072, 4095, 2748)
    (_, expected, _), (engine, found, _) = (
        prefilled(without_experts(name, torch.bfloat16, "cuda"), sizes, lengths, True, is_captured)
        for is_captured in (False, True))
    assert_same(found, expected)
    assert {*engine.runner._passes._graphs} == {
        (2048, 0, False, (1024,)), (1024, 2048, True, (256, 512, 768)), (1024, 0, True, (256, 512, 768)),
        (1024, 2048, False, (768,)), (2048, 2048, True, (1024, 1280, 1536, 1792))}


SMALL_HYBRID = dict(
    model_type="kimi_linear", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, eos_token_id=0, first_k_dense_replace=4, model_max_length=65536, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, linear_attn_config=dict(
        num_heads=2, head_dim=32, short_conv_kernel_size=4, kda_layers=[1, 2, 3], full_attn_layers=[4]))


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
def test_two_requests_take_turns_through_captured_passes_while_their_layers_leave(is_compiled):
    """Beside each pass another stream copies what a layer holds when word of it comes. Compiled, a delta rule goes in
    two segments, which run beside each other; the first round compiles, and other kernels for its first size than that
    has once there is a second."""
    found = []
    for is_captured in (False, False, True):
        model = random_model(config_from_hf(SMALL_HYBRID), torch.bfloat16, "cuda")
        if is_compiled:
            compile_pieces(model)
        engine = engine_for(model, Sizes(4096, 1024, 256), (12288,) * 4, True, is_captured)
        beside = torch.cuda.Stream()
        pool, kvcache, left, logits = engine.kvcache.pool, engine.kvcache, [], []
        requests = [Request(str(number), [(number * 7 + at * at) % 500 + 1 for at in range(11000)], SamplingParams(1),
                            prefill_only=True) for number in range(4)]
        forward = engine.runner._forward
        engine.runner._forward = lambda *given: logits.append(forward(*given).clone()) or logits[-1]

        def copy(request, layer, start, end):
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                table = request.cache.block_tables[engine.layout.group_of_layer[layer].index]
                is_rows = engine.layout.specs[layer].kind is StateKind.TOKEN
                left.append(pool.read_bytes(layer, table, start if is_rows else 0, end))

        assert all(engine.scheduler.open_cache(request) for request in requests)
        while pairs := [request for request in requests if request.cache.num_tokens < 11000]:
            for request in pairs:
                end = kvcache.plan_chunk(request.cache, 11000, 4096)
                engine.runner.prefill([PrefillChunk(request, request.cache.num_tokens, end)], copy)
        torch.cuda.synchronize()
        found.append((logits, left, [state_of(engine, request) for request in requests]))
    assert [len(graph._graphs) for graph in engine.runner._passes._graphs.values()] == [5, 5, 5]
    for computed, captured in zip(*found[1:]):
        assert len(computed) == len(captured) and all(torch.equal(*pair) for pair in zip(computed, captured))


@pytest.mark.gpu
def test_memory_may_end_while_the_streams_of_a_delta_rule_are_captured():
    """They come back, so that the capture ends and the allocator is as before."""
    model = random_model(config_from_hf(SMALL_HYBRID), torch.bfloat16, "cuda")
    graphs, total = {}, torch.cuda.mem_get_info()[1]
    engine = Engine(model, None, replace(pool_for(model, [8192] * 3), prefix_cache=False))
    for module in model.modules():
        if isinstance(module, KDA):  # in segments, as if it were compiled
            module.mixed = GraphedMixer(module, delta_rule_in_segments, graphs, torch.cuda.graph_pool_handle())

    def drawn() -> list[int]:
        request = engine.add(engine.request("a", [7] * 8191 + [1], SamplingParams(1), prefill_only=True))
        while engine.has_work:
            engine.step()
        engine.release(request)
        return request.output_ids

    expected, captured = drawn(), []
    for mib in (*range(0, 200, 20), 4000):
        engine.runner._passes = PassGraphs(model, engine.kvcache, torch.cuda.graph_pool_handle())
        torch.cuda.empty_cache()
        drawn()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * 2**20) / total)
        try:
            assert drawn() == expected
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        captured.append(len(engine.runner._passes._graphs))
        torch.cuda.empty_cache()
        reserved, large = torch.cuda.memory_reserved(), torch.empty(2**28, dtype=torch.uint8, device="cuda")
        del large
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved
    assert captured[0] == captured[2] == 0 and captured[-1] == 1


def test_nothing_is_collected_until_a_capture_has_ended():
    cycle = [torch.nn.Identity()]
    part = weakref.ref(cycle[0])
    cycle.append(cycle)
    with uncollected():
        del cycle
        made = [[] for _ in range(100_000)]  # so many objects that a collection is due
        assert part() is not None
    made += [[] for _ in range(100_000)]
    assert part() is None and gc.isenabled()


@pytest.mark.gpu
@pytest.mark.parametrize("is_pass", [False, True])
def test_a_graph_that_nobody_has_is_not_collected_while_another_is_captured(is_pass):
    """It is part of a cycle, and so many objects are made that a collection is due. CUDA would refuse to destroy it."""
    x, device, memory = torch.zeros(8, device="cuda"), torch.device("cuda"), torch.cuda.graph_pool_handle()
    left, made = [captured(lambda: x.add_(1), device, memory)], []

    def litter(*_) -> None:
        if torch.cuda.is_current_stream_capturing() and left:
            cycle = [left.pop()]
            cycle.append(cycle)
            del cycle
            made.extend([] for _ in range(100_000))
        x.add_(1)

    if not is_pass:
        captured(litter, device, memory)
    else:
        model = fixture("qwen3", torch.bfloat16, "cuda")
        model.model.layers[1].self_attn.register_forward_pre_hook(litter)
        prefilled(model, Sizes(32, 8, 16), (32, 32), True)
    assert made and not left
    captured(lambda: x.add_(1), device, memory).replay()
