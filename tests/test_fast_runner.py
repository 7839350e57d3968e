"""Decode in steps of fixed shape: what the graphs capture is held against the eager runner, on a CPU uncaptured.

Chapter 05.
"""

import copy
import random
import time

import pytest
import torch
from kv_oracle import KVOracle
from step_support import FIXTURES, decoding, rows_of, step_logits

from minprfaas import SamplingParams
from minprfaas.config import CacheConfig
from minprfaas.engine.cpu_runner import CPURunner, InPlaceLayer
from minprfaas.engine.decode_graphs import bucket_of
from minprfaas.engine.engine import Engine
from minprfaas.engine.fast_runner import FastRunner, chunk_for, runner_for, shared_tokens_for, what_must_run_eagerly
from minprfaas.engine.runner import Runner
from minprfaas.kvcache.layout import KVGroup
from minprfaas.model.attention import attend
from minprfaas.model.checkpoint import load
from minprfaas.model.layers import Positions, Projecting
from minprfaas.model.paged_attention import (
    attend_to_copied_pages, attend_to_each_page, attend_to_pages, attend_to_runs, flash_can_read, merge_pages,
    page_index, page_runs, pieces_of_pages)
from minprfaas.model.spec import Pages, TokenContext
from minprfaas.observe.timeline import Timeline

SAMPLED = dict(temperature=1.0, top_k=20, top_p=0.9)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def answers(model, tokenizer, fast: bool | None, blocks: int = 60) -> tuple[list[list[int]], Engine]:
    """Tokens of six requests, greedy and sampled in turn, which end at different steps."""
    engine = Engine(model, tokenizer, CacheConfig(blocks, 8, snapshot_every=2), prefill_chunk=16, fast=fast)
    oracle = KVOracle(model)
    oracle.watch(engine.kvcache, engine.runner.settle if fast else lambda: None)
    rng, requests = random.Random(0), []
    for number, length in enumerate((5, 40, 17, 8, 64, 23)):
        params = SamplingParams(max_tokens=8 + 4 * number, seed=number, **(SAMPLED if number % 2 else {}))
        prompt = [rng.randrange(1, 257) for _ in range(length)]
        requests.append(engine.add(engine.request(str(number), prompt, params)))
    while engine.has_work:
        engine.step()
        engine.kvcache.check()
    assert oracle.compared >= 6 and not oracle.wrong, oracle.wrong[:3]
    return [request.token_ids for request in requests], engine


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "kimi_linear"])
def test_steps_of_fixed_shape_give_the_eager_runners_tokens(models, family, device):
    model, tokenizer = models[family]
    model = model.to(device)
    try:
        expected, _ = answers(model, tokenizer, fast=False)
        tokens, engine = answers(model, tokenizer, fast=True)
    finally:
        model.to("cpu")
    assert tokens == expected
    assert isinstance(engine.runner, FastRunner) and len(engine.runner._steps) >= 3
    assert not engine.kvcache.pool.bytes[engine.kvcache.pool.null_block].any()


@pytest.mark.gpu
def test_delta_rules_by_graphs_draw_the_eager_runners_tokens(checkpoints, monkeypatch):
    monkeypatch.setattr("minprfaas.engine.prefill_graphs.STEP_TOKENS", 16)  # as many as a chunk of this engine has
    expected, _ = answers(*load(checkpoints["kimi_linear"], device="cuda"), fast=False)
    assert answers(*load(checkpoints["kimi_linear"], device="cuda"), fast=True)[0] == expected


def read_in_place(monkeypatch) -> None:
    """On a CPU, however small and scattered the pages are."""
    monkeypatch.setattr("minprfaas.engine.cpu_runner.PAGE_BYTES", 0)
    monkeypatch.setattr("minprfaas.engine.cpu_runner.RUN_BYTES", 0)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_step_of_fixed_shape_or_in_place_gives_every_familys_logits_and_leaves_its_kvcache(name, monkeypatch):
    read_in_place(monkeypatch)
    eager, *others = (decoding(name, fast, torch.float32, "cpu") for fast in (False, True, None))
    for _ in range(4):
        expected = step_logits(*eager)
        for engine, requests in others:
            torch.testing.assert_close(step_logits(engine, requests), expected, atol=1e-4, rtol=0)
    others[0][0].runner.settle()
    kvcache = [torch.cat(rows_of(*each)) for each in (eager, *others)]
    for rows in kvcache[1:]:
        torch.testing.assert_close(rows, kvcache[0], atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIXTURES)
def test_every_family_is_captured_and_a_replay_is_the_step_it_was_captured_from(name):
    """In bfloat16, in which a MoE's experts are one product: the same logits, and the same bytes in pool and state."""
    engine, requests = decoding(name, None, torch.bfloat16, "cuda")
    assert isinstance(engine.runner, FastRunner) and not what_must_run_eagerly(engine.model)
    step_logits(engine, requests)
    (step,) = engine.runner._steps.values()
    captured, live = step.logits, step.live.tensors.values()
    touched = [engine.kvcache.pool.bytes, *(tensor for tensors in live for tensor in tensors)]
    for turn in range(3):
        with torch.inference_mode():
            before = [tensor.clone() for tensor in touched]
            step.run(requests)
            replayed, after = captured.clone(), [tensor.clone() for tensor in touched]
            for tensor, earlier in zip(touched, before):
                tensor.copy_(earlier)
            step._forward()
        assert torch.equal(step.logits[:3], replayed[:3])
        for ours, theirs, earlier in zip(touched, after, before):
            assert torch.equal(ours[:3], theirs[:3]) and (ours is not touched[0] or torch.equal(ours, theirs))
            assert turn or not torch.equal(theirs, earlier), "the first step has changed every layer's state"
        step.logits = captured
        step_logits(engine, requests)


def test_a_conversation_goes_on_from_the_state_that_a_decode_step_left_at_a_blocks_end(models):
    """While an answer grows its state is kept at the latest boundary, for the next turn: it must be that of the batch's
    rows, not what the blocks held when decoding began."""
    model, tokenizer = models["kimi_linear"]
    found, oracle = [], KVOracle(model)
    for fast in (False, True):
        engine, token_ids = Engine(model, tokenizer, CacheConfig(60, 8), prefill_chunk=16, fast=fast), []
        oracle.watch(engine.kvcache, engine.runner.settle if fast else lambda: None)
        for turn in ([3] * 20, [7] * 5):
            request = engine.add(engine.request("0", token_ids + turn, SamplingParams(max_tokens=15, ignore_eos=True)))
            while engine.has_work:
                engine.step()
            token_ids = list(request.token_ids)
        found.append((token_ids, request.cached_tokens))
    assert found[0] == found[1] and found[0][1] >= 32, "the second turn began inside the first answer"
    assert oracle.compared == 4 and not oracle.wrong, oracle.wrong


def test_on_a_cpu_the_eager_runner_takes_chunks_of_1024_and_the_fast_one_draws_its_steps_too(models):
    cpu, timeline = torch.device("cpu"), Timeline("fast")
    assert (chunk_for(cpu, None), chunk_for(cpu, 7), shared_tokens_for(cpu)) == (1024, 7, 128)
    assert not isinstance(Engine(*models["llama"], CacheConfig(20, 8)).runner, FastRunner)
    engine = Engine(*models["llama"], CacheConfig(20, 8), fast=True, timeline=timeline)
    engine.add(engine.request("a", [1, 2, 3], SamplingParams(max_tokens=3)))
    while engine.has_work:
        engine.step()
    assert "step of 1" in {event["name"] for event in timeline.events()}


def test_steps_of_fixed_shape_survive_preemption(models):
    expected, _ = answers(*models["kimi_linear"], fast=False)
    tokens, engine = answers(*models["kimi_linear"], fast=True, blocks=36)
    assert tokens == expected


def test_on_a_cpu_steps_in_place_give_the_eager_runners_tokens_with_preemption_too(models, monkeypatch):
    read_in_place(monkeypatch)
    expected, _ = answers(*models["qwen3"], fast=False)
    for blocks in (60, 20):
        tokens, engine = answers(*models["qwen3"], fast=None, blocks=blocks)
        assert tokens == expected and type(engine.runner) is CPURunner


def test_a_row_without_a_request_writes_into_no_block_that_anyone_holds(models):
    """After a step of four comes a step of three in the same bucket: the fourth's blocks must stay as they are."""
    model, tokenizer = models["llama"]
    engine = Engine(model, tokenizer, CacheConfig(40, 8), fast=True)
    requests = [engine.add(engine.request(str(n), [n + 1] * 9, SamplingParams(max_tokens=20))) for n in range(4)]
    while engine.waiting or engine.prefilling:
        engine.step()
    engine.runner.decode(requests)
    before = engine.kvcache.pool.bytes[list(requests[3].cache.block_tables[0])].clone()
    for request in requests[:3]:
        request.token_ids.append(1)
    engine.runner.decode(requests[:3])
    assert torch.equal(engine.kvcache.pool.bytes[list(requests[3].cache.block_tables[0])], before)


def test_a_bucket_holds_what_it_is_for_and_wastes_little():
    for requests in range(1, 200):
        for pages in (1, 8, 9, 12, 13, 64, 65, 97, 640):
            batch, room = bucket_of(requests, pages)
            assert requests <= batch < max(2 * requests, requests + 8) and pages <= room <= max(8, 1.5 * pages)
    assert bucket_of(64, 64) == (64, 64)


def paged(lengths, kv_heads, dim, dtype=torch.float32, device="cpu", block_tokens=16):
    """Pages of requests of these lengths, scattered over a pool in which everything else is NaN, as rows too."""
    torch.manual_seed(0)
    most = -(-max(lengths) // block_tokens) + 1
    view = torch.full((most * len(lengths) + 1, block_tokens, 2 * kv_heads * dim), float("nan"), dtype=dtype)
    table = torch.randperm(len(view) - 1)[:most * len(lengths)].view(len(lengths), most)
    rows = torch.randn(len(lengths), max(lengths), view.shape[2]).to(dtype)
    for blocks, request_rows, length in zip(table, rows, lengths):
        for token in range(length):
            view[blocks[token // block_tokens], token % block_tokens] = request_rows[token]
    pages = Pages(view.to(device), table.to(device), torch.tensor(lengths, device=device))
    k, v = rows.to(device).unflatten(-1, (2, kv_heads, dim)).unbind(2)
    return pages, k, v


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
def test_attention_page_by_page_is_attention(heads, kv_heads):
    lengths, dim = [1, 16, 17, 50], 8
    pages, k, v = paged(lengths, kv_heads, dim)
    view = pages.view.nan_to_num(0.0)  # the copy multiplies what is masked by 0
    q = torch.randn(4, 1, heads, dim)
    index = page_index(pages, heads // kv_heads)
    outputs = attend_to_copied_pages(q, Pages(view, *pages[1:]), index.row_counts, 0.3, kv_heads)
    expected = attend(q, k, v, Positions(torch.tensor(lengths) - 1, 1), 0.3)
    torch.testing.assert_close(merge_pages(*outputs), expected)
    empty = (index.row_counts == 0)[:, :, None, None, None]
    outputs = outputs._replace(out=outputs.out.masked_fill(empty, float("nan")))
    torch.testing.assert_close(merge_pages(*outputs), expected)
    large = outputs._replace(log_sum=outputs.log_sum + 300)  # whose exponentials would overflow
    torch.testing.assert_close(merge_pages(*large), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(merge_pages(*(each[3:] for each in large)), expected[3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_of_pages_are_a_requests_rows_in_their_order(pieces):
    pages, _, _ = paged([1, 16, 17, 50], kv_heads=1, dim=2)
    index, rows = page_index(pages, 3, pieces), pages.view.flatten(0, 1)
    first_rows = index.first_rows[:-1].view(4, -1)
    for begins, counts, length, table in zip(first_rows, index.row_counts, pages.lengths, pages.block_table):
        read = torch.cat([rows[begin:begin + count] for begin, count in zip(begins, counts)])
        assert torch.equal(read, pages.view[table].flatten(0, 1)[:length])
    assert index.first_queries.tolist() == list(range(0, 3 * first_rows.numel() + 1, 3))


def test_few_pages_are_read_in_pieces_and_many_whole():
    pages = Pages(torch.zeros(9, 256, 4), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([1000]))
    assert [pieces_of_pages(pages, kv_heads) for kv_heads in (1, 8, 16, 32)] == [4, 4, 2, 1]
    assert pieces_of_pages(pages._replace(view=torch.zeros(9, 64, 4)), 1) == 1


@pytest.mark.parametrize("heads, kv_heads, v_dim", [(4, 4, 8), (8, 2, 8), (6, 1, 4)])
def test_a_chunks_attention_in_two_parts_is_attention(heads, kv_heads, v_dim):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 70, heads, 8), torch.randn(1, 70, kv_heads, 8), torch.randn(1, 70, kv_heads, v_dim)
    whole = attend(q, k, v, Positions(torch.tensor([0]), 70), 0.3)
    for new in (2, 33, 69):
        chunk = attend(q[:, -new:], k, v, Positions(torch.tensor([70 - new]), new), 0.3)
        torch.testing.assert_close(chunk, whole[:, -new:])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
def test_attention_to_pages_where_they_lie_is_attention(heads, kv_heads):
    """Scattered pages, one that two requests share; what no request holds is NaN: a block that was read would show."""
    lengths, dim = [1, 16, 17, 50], 8
    pages, k, v = paged(lengths, kv_heads, dim)
    pages.view[pages.block_table[3, 0]] = float("nan")
    pages.block_table[3, 0] = pages.block_table[2, 0]
    k[3, :16], v[3, :16] = k[2, :16], v[2, :16]
    for blocks, length in zip(pages.block_table, lengths):
        last = blocks[(length - 1) // 16]
        pages.view[last] = pages.view[last].nan_to_num(0.0)  # a block is zeroed when it is handed out
    q = torch.randn(4, 1, heads, dim)
    runs = page_runs(pages)
    assert sum(count for _, count in runs.runs) == 1 + 1 + 2 + 4
    expected = attend(q, k, v, Positions(torch.tensor(lengths) - 1, 1), 0.3)
    for by_page in (None, attend_to_each_page):
        torch.testing.assert_close(attend_to_runs(q, pages.view, runs, 0.3, by_page), expected)


def test_small_or_scattered_pages_are_copied_and_large_neighbours_are_not():
    class Layer:
        group = KVGroup(0, None, (), {}, 0)

        def __init__(self, page_width: int, blocks: list[int]):
            view, lengths = torch.zeros(20, 64, page_width), torch.tensor([64 * len(blocks)])
            self.pages = Pages(view, torch.tensor([blocks]), lengths)

        def append(self, rows):
            return TokenContext(self.pages, len(rows))

    def is_copied(*layer) -> bool:
        return InPlaceLayer(Layer(*layer), {}, None).append([]).attend is None

    assert not is_copied(128, [3, 1, 2]) and is_copied(64, [3, 1, 2])  # pages of 32 KiB, of 16
    assert is_copied(128, [3, 1, 5]) and not is_copied(1024, [3, 1, 5])  # runs of 32 and 64 KiB, of 256 and 512


def test_neighbours_are_one_run_whoever_holds_them_and_a_shared_block_is_in_two():
    view, lengths = torch.zeros(20, 4, 2), torch.tensor([12, 9])
    assert page_runs(Pages(view, torch.tensor([[5, 4, 8], [3, 7, 6]]), lengths)).runs == [(3, 6)]
    assert page_runs(Pages(view, torch.tensor([[1, 2, 3], [1, 2, 9]]), lengths)).runs == [(1, 3), (9, 1), (1, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens, pieces", [(16, 1), (64, 1), (256, 1), (256, 4)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 64), (32, 8, 128), (6, 1, 256)])
def test_the_flash_kernel_reads_each_page_and_nothing_beyond_it(heads, kv_heads, dim, block_tokens, pieces):
    """Every row of the pool that is no request's is NaN: one that was read would show."""
    lengths = [1, 700, 64, 65, 255]
    pages, k, v = paged(lengths, kv_heads, dim, torch.bfloat16, "cuda", block_tokens)
    assert flash_can_read(pages.view, dim, kv_heads)
    q = torch.randn(len(lengths), 1, heads, dim, device="cuda", dtype=torch.bfloat16)
    out = merge_pages(*attend_to_pages(q, pages.view, page_index(pages, heads // kv_heads, pieces), dim**-0.5))
    exact = attend(q.double(), k.double(), v.double(), Positions(pages.lengths - 1, 1), dim**-0.5)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("family", ["llama", "kimi_linear"])
def test_joined_projections_give_what_they_gave_and_share_their_weights(models, family):
    model, token_ids = copy.deepcopy(models[family][0]), torch.arange(1, 40)[None]
    joined = [module for module in model.modules() if isinstance(module, Projecting)]
    with torch.no_grad():
        apart = model(token_ids)
        for module in joined:
            module.join()
        torch.testing.assert_close(model(token_ids), apart, atol=1e-4, rtol=0)
        for module in joined:
            module.get_submodule(module.JOINED[-1]).weight.zero_()
        assert (model(token_ids) - apart).abs().max() > 0.1, "the whole is made of the weights themselves"
    assert len(joined) > len(model.model.layers)


def runner_beside_no_cpu(model):
    """What a model gets that is on another device: here "meta", which has shapes and computes nothing."""
    kvcache = Engine(model, None, CacheConfig(20, 8)).kvcache
    return runner_for(copy.deepcopy(model).to("meta"), kvcache, time.monotonic, None, fast=None, max_batch=4)


def test_a_model_with_a_part_that_is_not_known_runs_eagerly(models):
    model = models["llama"][0]
    assert what_must_run_eagerly(model) == set() and type(runner_beside_no_cpu(model)) is FastRunner
    known, model.model.layers[0].mlp = model.model.layers[0].mlp, torch.nn.Identity()
    try:
        assert what_must_run_eagerly(model) == {"Identity"} and type(runner_beside_no_cpu(model)) is Runner
    finally:
        model.model.layers[0].mlp = known
