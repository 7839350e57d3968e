"""The graphs of prefill passes, held against passes that are computed as they are. Chapters 04, 08."""

import random

import pytest
import torch
from step_support import PARITY, rows_of, step_logits

from minprfaas import SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.pass_graphs import PassGraphs
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.reference import pool_for
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import read_config


def prefilled(name: str, chunk: int, is_fast: bool, dtype: torch.dtype, device: str,
              is_compiled: bool = False) -> tuple[Engine, list, list]:
    """The engine, what each prompt gave (first token, rows), and what listeners heard. Some requests stay, so that the
    blocks of later ones lie elsewhere."""
    directory = PARITY / name
    model = load_checkpoint(directory, read_config(directory), dtype, device)
    if is_compiled:
        compile_pieces(model)
    engine = Engine(model, None, pool_for(model, [4 * chunk] * 8, block_tokens=16), prefill_chunk=chunk, fast=is_fast)
    if is_fast:
        engine.runner._passes = PassGraphs(model, engine.kvcache.pool, engine.runner._memory, chunk // 4, chunk)
    rng, given, heard = random.Random(0), [], []
    for number, tokens in enumerate((2 * chunk, chunk + 6, 2 * chunk, chunk + 3, chunk + 5, chunk // 2, 3)):
        prompt = [rng.randrange(1, model.config.vocab_size) for _ in range(tokens)]
        request = engine.add(engine.request(str(number), prompt, SamplingParams(1), prefill_only=True))
        while engine.has_work:
            engine.step(lambda request, *what: heard.append((request.id, *what)))
        given.append((request.output_ids, torch.cat([rows.view(dtype).float() for rows in rows_of(engine, [request])])))
        if number % 2:
            engine.release(request)
    return engine, given, heard


@pytest.mark.parametrize("name, is_captured", [
    ("qwen3", True), ("llama", True), ("qwen3_next", False), ("qwen3_moe", False)])
def test_passes_from_graphs_leave_what_computed_ones_leave(name, is_captured):
    """From a shape's second time on: wherever the request's blocks lie, however much of the pass is padding, and layer
    by layer for who listens."""
    (_, expected, expected_heard), (engine, found, heard) = (
        prefilled(name, 32, is_fast, torch.float32, "cpu") for is_fast in (False, True))
    assert heard == expected_heard
    for (tokens, rows), (expected_tokens, expected_rows) in zip(found, expected):
        assert tokens == expected_tokens
        torch.testing.assert_close(rows, expected_rows, atol=1e-5, rtol=0)
    graphs = engine.runner._passes._graphs
    assert {*graphs} == ({(32, 0, False), (32, 32, False), (8, 32, True)} if is_captured else set())


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
            engine.runner._passes = PassGraphs(model, engine.kvcache.pool, engine.runner._memory, 32, 32)
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
    model = load_checkpoint(PARITY / "qwen3", read_config(PARITY / "qwen3"), torch.float32, "cpu")
    engine = Engine(model, None, pool_for(model, [16]))
    passes = PassGraphs(model, engine.kvcache.pool, None, 2, 8)
    request = engine.request("new", [1] * 16, SamplingParams(1))
    found = [passes.of(PrefillChunk(request, start, start + 8), 8) is not None for start in (0, 8, 0, 8, 8, 0)]
    assert found == [False, False, True, False, False, True]  # (8) was met before (0) was captured: it took no place


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
    (_, expected, expected_heard), (engine, found, heard) = (
        prefilled(name, 1024, is_fast, torch.bfloat16, "cuda", is_compiled) for is_fast in (False, True))
    assert heard == expected_heard
    for (_, rows), (_, expected_rows) in zip(found, expected):
        assert ((rows - expected_rows).norm() / expected_rows.norm()).item() < 2e-2
    assert [len(graph._graphs) for graph in engine.runner._passes._graphs.values()] == (
        [len(engine.model.model.layers) + 1] * 3)
