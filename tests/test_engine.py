"""The engine: the same tokens however a request is batched, chunked, queued, preempted or reused.

Chapters 04 and 05.
"""

import ast
import inspect
import random
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from kv_oracle import KVOracle

from minprfaas import SamplingParams, load
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.fast_runner import FastRunner
from minprfaas.engine.request import Status
from minprfaas.engine.sampling import sample
from minprfaas.engine.scheduler import Scheduler
from minprfaas.model.state import ContiguousState
from minprfaas.observe.timeline import Timeline

BLOCK = 8
FAMILIES = ("qwen3", "kimi_linear", "mimo_v2_flash")  # rows, state of one size and windows


@lru_cache(maxsize=None)
def naive_tokens(model, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    """The answer as a dozen lines would compute it: one request, contiguous state, no chunks, no batches."""
    state, tokens, answer = ContiguousState(model.config, "float32"), prompt, []
    while len(answer) < params.max_tokens and len(prompt) + len(answer) < model.config.max_context_tokens:
        logits = model(torch.tensor([tokens]), state, last_only=True)
        state.advance(len(tokens))
        answer.append(sample(logits[0, -1], params, len(answer)))
        if answer[-1] in model.config.eos_token_ids and not params.ignore_eos:
            break
        tokens = answer[-1:]
    return answer


def new_engine(hybrid, blocks=100, prefill_chunk=16, prefix_cache=True, **options) -> Engine:
    cache = CacheConfig(blocks, BLOCK, prefix_cache, snapshot_every=2)
    return watched(Engine(*hybrid, cache, prefill_chunk, **options))


def watched(engine) -> Engine:
    """The engine; what its requests hold is compared with a forward pass over their tokens when they let go of it."""
    engine.oracle = KVOracle(engine.model)
    settle = engine.runner.settle if isinstance(engine.runner, FastRunner) else lambda: None
    engine.oracle.watch(engine.kvcache, settle)
    return engine


def some_requests(engine, lengths=(5, 40, 17, 8, 64, 23), max_tokens=20, **params):
    """Requests with prompts of these lengths, added in that order, each with its own seed."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 257) for _ in range(length)] for length in lengths]
    return [engine.add(engine.request(str(n), prompt, SamplingParams(max_tokens=max_tokens, seed=n, **params)))
            for n, prompt in enumerate(prompts)]


def run(engine, steps=10_000, on_kv=None):
    """Step until no work is left, recounting the pool's blocks after every step. Returns all updates."""
    updates = []
    while engine.has_work:
        updates += engine.step(on_kv)
        engine.kvcache.check()
        steps -= 1
        assert steps, "the engine makes no progress"
    return updates


def assert_answers_are_the_naive_ones(engine, requests):
    assert not engine.oracle.wrong, engine.oracle.wrong[:3]
    for request in requests:
        prompt = tuple(request.token_ids[: request.prompt_tokens])
        assert request.output_ids == naive_tokens(engine.model, prompt, request.params)


def assert_nothing_is_held(engine):
    assert engine.kvcache.stats().in_use == 0 and not engine.waiting and not engine.prefilling and not engine.running
    assert engine.oracle.compared and not engine.oracle.wrong, engine.oracle.wrong[:3]


SAMPLED = dict(temperature=0.9, top_k=50, top_p=0.95)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_requests_gets_the_tokens_that_each_gets_alone(models, family, params):
    engine = new_engine(models[family])
    requests = some_requests(engine, **params)
    run(engine)
    assert_answers_are_the_naive_ones(engine, requests)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("prefill_chunk", [1, 3, 8, 33, 1000])
def test_the_prefill_chunk_changes_no_token(hybrid, prefill_chunk):
    engine = new_engine(hybrid, prefill_chunk=prefill_chunk)
    requests = some_requests(engine, max_tokens=6, **SAMPLED)
    run(engine)
    assert_answers_are_the_naive_ones(engine, requests)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_requests_get_the_same_tokens(models, family, params, prefix_cache):
    layout = new_engine(models[family]).layout
    blocks = max(layout.blocks_for(50), 3 * layout.blocks_for(8) + 1)  # the longest alone, or three that cannot grow
    engine = new_engine(models[family], blocks=blocks, prefix_cache=prefix_cache)
    requests = some_requests(engine, lengths=(7, 7, 7, 20, 7), max_tokens=30, **params)
    run(engine)
    assert sum(request.preemptions for request in requests) > 0
    assert_answers_are_the_naive_ones(engine, requests)
    assert_nothing_is_held(engine)


def test_a_full_pool_queues_requests_in_their_order(hybrid):
    probe = new_engine(hybrid)
    engine = new_engine(hybrid, blocks=2 * probe.layout.blocks_for(40), prefix_cache=False)
    requests = some_requests(engine, lengths=(30,) * 6, max_tokens=10)
    engine.step()
    assert [request.status for request in requests[:2]] != [Status.WAITING] * 2
    assert list(engine.waiting) == requests[2:]
    run(engine)
    assert sum(request.preemptions for request in requests) == 0  # what was admitted had room to its end
    finished = sorted(requests, key=lambda request: request.finished_at_s)
    assert finished == requests
    assert_answers_are_the_naive_ones(engine, requests)


def test_a_preempted_request_waits_ahead_of_those_that_never_ran(hybrid):
    probe = new_engine(hybrid)
    engine = new_engine(hybrid, blocks=3 * probe.layout.blocks_for(8) + 1, prefix_cache=False, max_batch=3)
    requests = some_requests(engine, lengths=(7, 7, 7, 7, 7), max_tokens=30)
    while not any(request.preemptions for request in requests):
        engine.step()
    assert list(engine.waiting) == requests[2:], "the youngest of those that ran, then those that never did"
    run(engine)
    assert_answers_are_the_naive_ones(engine, requests)


def test_who_is_still_being_prefilled_is_preempted_before_anybody_who_runs(hybrid):
    probe = new_engine(hybrid)
    blocks = probe.layout.blocks_for(8) + probe.layout.blocks_for(40)
    engine = new_engine(hybrid, blocks=blocks, prefix_cache=False, prefill_chunk=7)
    running, prefilling = some_requests(engine, lengths=(7, 40), max_tokens=12)
    while not running.preemptions + prefilling.preemptions:
        assert not prefilling.output_ids
        engine.step()
    assert (running.preemptions, prefilling.preemptions) == (0, 1)
    assert running.output_ids and list(engine.waiting) == [prefilling]
    run(engine)
    assert_answers_are_the_naive_ones(engine, [running, prefilling])
    assert_nothing_is_held(engine)


def test_the_youngest_is_preempted_and_the_oldest_never(hybrid):
    probe = new_engine(hybrid)
    engine = new_engine(hybrid, blocks=3 * probe.layout.blocks_for(8) + 1, prefix_cache=False)
    requests = some_requests(engine, lengths=(7, 7, 7), max_tokens=30)
    run(engine)
    oldest, middle, youngest = (request.preemptions for request in requests)
    assert oldest == 0 and youngest >= 1 and youngest >= middle
    assert_answers_are_the_naive_ones(engine, requests)


def test_a_pool_for_one_request_serves_many_one_after_another(hybrid):
    probe = new_engine(hybrid)
    engine = new_engine(hybrid, blocks=probe.layout.blocks_for(50))
    requests = some_requests(engine, lengths=(40, 40, 40, 3), max_tokens=10)
    run(engine)
    assert_answers_are_the_naive_ones(engine, requests)


@pytest.mark.parametrize("snapshot_every", [1, 3, 1000])
def test_the_number_of_forward_passes_of_a_prompt_does_not_depend_on_its_snapshots(hybrid, snapshot_every):
    """400 tokens in chunks of 128, with blocks as long as the delta rule's own chunks: 4 passes, wherever snapshots
    are taken; and a second prompt begins at any of them."""
    engine = watched(Engine(*hybrid, CacheConfig(200, 64, snapshot_every=snapshot_every), prefill_chunk=128))
    passes = []
    hook = engine.model.register_forward_hook(lambda model, inputs, output: passes.append(inputs[0].shape[1]))
    first = engine.add(engine.request("first", [3 + n % 200 for n in range(400)], SamplingParams(max_tokens=1)))
    run(engine)
    assert passes == [128, 128, 128, 16]
    at = {1: 320, 3: 192, 1000: 384}[snapshot_every]  # 384 is the prompt's last boundary
    tail = first.token_ids[:at] + [9] * 10
    second = engine.add(engine.request("second", tail, SamplingParams(max_tokens=6)))
    run(engine)
    hook.remove()
    assert second.cached_tokens == at
    assert_answers_are_the_naive_ones(engine, [first, second])


def test_running_requests_get_a_token_a_step_while_a_long_prompt_is_prefilled(hybrid):
    engine = new_engine(hybrid, prefill_chunk=8)
    first = engine.add(engine.request("first", [5, 6, 7], SamplingParams(max_tokens=30)))
    engine.step()
    long = engine.add(engine.request("long", list(range(1, 101)), SamplingParams(max_tokens=2)))
    while long.status in (Status.WAITING, Status.PREFILL):
        before = len(first.output_ids)
        updates = engine.step()
        assert len(first.output_ids) == before + 1
        assert sum(update.request is first for update in updates) == 1
    assert len(first.output_ids) >= 100 // 8


def test_all_running_requests_decode_in_one_forward_pass(hybrid):
    engine = new_engine(hybrid, blocks=200)
    some_requests(engine, lengths=(4,) * 8, max_tokens=30, ignore_eos=True)
    while engine.waiting or engine.prefilling:
        engine.step()
    shapes = []
    hook = engine.model.register_forward_hook(lambda model, inputs, output: shapes.append(tuple(inputs[0].shape)))
    engine.step()
    hook.remove()
    assert shapes == [(8, 1)]


def test_no_more_requests_than_the_batch_limit_hold_blocks(hybrid):
    engine = new_engine(hybrid, blocks=500, max_batch=3)
    requests = some_requests(engine, lengths=(9,) * 7, max_tokens=5)
    while engine.has_work:
        engine.step()
        assert len(engine.running) + len(engine.prefilling) <= 3
    assert_answers_are_the_naive_ones(engine, requests)


def test_a_repeated_prompt_is_mostly_found_in_the_cache_and_answers_the_same(hybrid):
    engine = new_engine(hybrid)
    prompt = [3 + n % 200 for n in range(60)]
    requests = []
    for name in ("first", "again", "longer"):
        ids = prompt + ([9] * 11 if name == "longer" else [])
        requests.append(engine.add(engine.request(name, ids, SamplingParams(max_tokens=9))))
        run(engine)
    assert [request.cached_tokens for request in requests] == [0, 56, 56]
    assert_answers_are_the_naive_ones(engine, requests)


@pytest.mark.parametrize("steps", [0, 1, 3, 9, 14])
def test_an_aborted_request_frees_everything_and_disturbs_nobody(hybrid, steps):
    engine = new_engine(hybrid)
    requests = some_requests(engine, lengths=(12, 60, 12), max_tokens=12)
    for _ in range(steps):
        engine.step()
    engine.abort(requests[1])
    assert (requests[1].status, requests[1].finish_reason, requests[1].cache) == (Status.FINISHED, "aborted", None)
    engine.kvcache.check()
    run(engine)
    assert_answers_are_the_naive_ones(engine, [requests[0], requests[2]])
    assert_nothing_is_held(engine)


def test_requests_that_come_and_go_at_random_never_break_the_books_or_an_answer(hybrid):
    rng = random.Random(1)
    probe = new_engine(hybrid)
    engine = new_engine(hybrid, blocks=3 * probe.layout.blocks_for(24), prefill_chunk=13)
    everyone, stem = [], [rng.randrange(1, 257) for _ in range(40)]
    for step in range(80):
        if step < 60 and rng.random() < 0.5:
            prompt = stem[: rng.randrange(1, 24)] + [rng.randrange(1, 257) for _ in range(rng.randrange(1, 9))]
            params = SamplingParams(max_tokens=rng.randrange(1, 20), temperature=rng.choice([0.0, 1.0]), seed=step)
            everyone.append(engine.add(engine.request(str(step), prompt, params)))
        if everyone and rng.random() < 0.05:
            request = rng.choice(everyone)
            if request.finish_reason is None:
                engine.abort(request)
        engine.step()
        engine.kvcache.check()
    run(engine)
    assert_nothing_is_held(engine)
    assert any(request.preemptions for request in everyone) and any(request.cached_tokens for request in everyone)
    finished = [request for request in everyone if request.finish_reason != "aborted"]
    assert len(finished) > 15 and len(finished) < len(everyone)
    assert_answers_are_the_naive_ones(engine, finished)


def test_times_are_the_clocks_and_in_order(hybrid):
    ticks = iter(range(1, 10_000))
    engine = new_engine(hybrid, clock=lambda: float(next(ticks)))
    assert (engine.computed_s, engine.prefilled_tokens, engine.decoded_tokens) == (0.0, 0, 0)
    requests = some_requests(engine, max_tokens=5)
    run(engine)
    assert engine.prefilled_tokens == sum(request.prompt_tokens for request in requests)
    assert engine.decoded_tokens == sum(len(request.output_ids) - 1 for request in requests)
    assert 0 < engine.computed_s < next(ticks)
    for request in requests:
        times = [request.arrived_at_s, request.prefill_started_at_s, request.prefill_ended_at_s,
                 request.first_token_at_s, request.finished_at_s]
        assert times == sorted(times) and times[0] >= 1


def test_a_clock_that_begins_at_zero_is_believed(hybrid):
    now_s = [0.0]
    engine = new_engine(hybrid, clock=lambda: now_s[0], prefill_chunk=8)
    (request,) = some_requests(engine, lengths=(20,), max_tokens=3)
    while engine.has_work:
        engine.step()
        now_s[0] += 1
    assert (request.arrived_at_s, request.prefill_started_at_s) == (0.0, 0.0)
    assert (request.prefill_ended_at_s, request.first_token_at_s, request.finished_at_s) == (2.0, 2.0, 3.0)
    noted_before = engine.request("r", [5], SamplingParams(max_tokens=1))
    noted_before.arrived_at_s = 0.0
    assert engine.add(noted_before).arrived_at_s == 0.0


def test_spans_of_the_timeline_are_the_engines_clock_too(hybrid):
    ticks = iter(range(1_000_000, 2_000_000))
    engine = new_engine(hybrid, clock=lambda: float(next(ticks)), timeline=Timeline("engine"))
    some_requests(engine, lengths=(20,), max_tokens=3)
    run(engine)
    spans = [event for event in engine.timeline.events() if event["ph"] == "X"]
    assert {event["name"] for event in spans} == {"layer 0", "layer 1", "layer 2", "layer 3", "step of 1"}
    assert all(1e6 <= event["ts"] / 1e6 < 2e6 and event["dur"] >= 1e6 for event in spans)


def test_the_scheduler_knows_no_tensor():
    """Its file imports no torch: what runs next is decided without a look at a tensor."""
    source = Path(inspect.getfile(Scheduler)).read_text()
    imported = {name for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert "minprfaas.engine.request" in imported and not {name for name in imported if name.startswith("torch")}


def test_a_request_that_waits_for_room_is_not_hashed_again_at_every_step(hybrid):
    engine = new_engine(hybrid, blocks=new_engine(hybrid).layout.blocks_for(80))
    running, waiting = some_requests(engine, lengths=(20, 50), max_tokens=30)
    while running.finish_reason is None:
        engine.step()
        keys = waiting.keys
        if running.finish_reason is None:
            assert waiting.status is Status.WAITING and len(keys) == 6
            assert engine.step() is not None and all(a is b for a, b in zip(keys, waiting.keys))
    run(engine)
    assert_answers_are_the_naive_ones(engine, [running, waiting])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_draws_the_tokens_of_the_cpu(checkpoints, family):
    engine = new_engine(load(checkpoints[family], device="cuda"), blocks=60)
    requests = some_requests(engine) + some_requests(engine, **SAMPLED)
    run(engine)
    assert_answers_are_the_naive_ones(new_engine(load(checkpoints[family])), requests)


@pytest.mark.gpu
def test_bfloat16_on_cuda_answers_every_request(checkpoints):
    engine = new_engine(load(checkpoints["kimi_linear"], dtype=torch.bfloat16, device="cuda"), blocks=40)
    requests = some_requests(engine)
    run(engine)
    assert {request.finish_reason for request in requests} <= {"length", "eos"}
    assert_nothing_is_held(engine)


def test_of_two_tokens_that_one_step_draws_only_the_last_ends_the_request(hybrid):
    model, tokenizer = hybrid
    engine = Engine(model, tokenizer, CacheConfig(32, 16))
    engine.add(engine.request("a", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)))
    updates = engine.step()
    reasons = [update.finish_reason for update in updates]
    assert reasons == [None, "length"], "told after the step, both tokens are known"
