"""Prefill there, decode here: the answers are those of one process, whatever the route. Chapter 13."""

import random
import threading

import pytest
from cluster_support import serve, step_until, two_datacenters

from minprfaas import SamplingParams, generate
from minprfaas.config import CacheConfig, LineConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import Status
from minprfaas.errors import UserError

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def prompts_of(*lengths, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(1, 257) for _ in range(length)] for length in lengths]


def tokens(journeys):
    return [journey.output_ids for journey in journeys]


def reference(model, tokenizer, prompts, params):
    return [output.token_ids for output in generate(model, tokenizer, prompts, params)]


@pytest.mark.parametrize("family", ["kimi_linear", "qwen3"])
def test_short_and_long_requests_get_the_answers_of_one_process(models, family):
    model, tokenizer = models[family]
    prompts = prompts_of(5, 200, 33, 130, 64, 300)
    with two_datacenters(model, tokenizer, threshold=100) as (local, _):
        journeys = serve(local, prompts, GREEDY)
    assert [journey.route for journey in journeys] == ["pdp", "prfaas", "pdp", "prfaas", "pdp", "prfaas"]
    assert all(journey.fallback is None for journey in journeys)
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_sampled_and_stopped_requests_get_the_answers_of_one_process(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(150, 20, 150, 150)
    free = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    word = generate(model, tokenizer, prompts[2:3], free)[0].text[4:6]
    params = [free, free, SamplingParams(20, 1.0, top_p=0.9, seed=3, ignore_eos=True, stop=(word,)),
              SamplingParams(max_tokens=1)]
    with two_datacenters(model, tokenizer, threshold=100) as (local, _):
        journeys = serve(local, prompts, params)
    alone = generate(model, tokenizer, prompts, params)
    assert tokens(journeys) == [output.token_ids for output in alone]
    assert [j.text for j in journeys] == [output.text for output in alone]
    assert journeys[2].finish_reason == "stop" and journeys[3].finish_reason == "length"


def test_damaging_any_layers_transferred_state_changes_the_answer(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(150)
    wanted = reference(model, tokenizer, prompts, GREEDY)
    for damaged in range(len(model.config.layers)):
        with two_datacenters(model, tokenizer, threshold=100, damaged=True) as (local, _):
            write = local.decode.engine.kvcache.pool.write_bytes

            def write_damaged(layer, table, start, end, data):
                write(layer, table, start, end, data if layer != damaged else data.zero_())

            local.decode.engine.kvcache.pool.write_bytes = write_damaged
            journeys = serve(local, prompts, GREEDY)
        assert tokens(journeys) != wanted, f"layer {damaged} can be damaged unnoticed"


def test_each_layer_is_shipped_while_prefill_still_runs(hybrid):
    model, tokenizer = hybrid
    shipped_during_prefill = []
    with two_datacenters(model, tokenizer, threshold=100) as (local, remote):
        write = local.decode.engine.kvcache.pool.write_bytes

        def watch(layer, table, start, end, data):
            prefill = remote.prefill.prefills["0#1"]
            shipped_during_prefill.append((layer, end, prefill.request.status is Status.PREFILL))
            write(layer, table, start, end, data)

        local.decode.engine.kvcache.pool.write_bytes = watch
        serve(local, prompts_of(480), GREEDY)
    token_layer = 3
    early = [end for layer, end, prefilling in shipped_during_prefill if layer == token_layer and prefilling]
    assert early and min(early) <= 48, "the first prefill chunk's KV arrives before the prompt is done"


def test_without_overlap_nothing_is_shipped_before_prefill_ends(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, overlap=False) as (local, remote):
        write = local.decode.engine.kvcache.pool.write_bytes
        during = []

        def watch(layer, table, start, end, data):
            during.append(remote.prefill.prefills["0#1"].request.status is Status.PREFILL)
            write(layer, table, start, end, data)

        local.decode.engine.kvcache.pool.write_bytes = watch
        prompts = prompts_of(300)
        journeys = serve(local, prompts, GREEDY)
    assert during and not any(during)
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_more_requests_than_the_pools_hold_all_get_their_answers(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(*[150, 20] * 6, seed=1)
    with two_datacenters(model, tokenizer, threshold=100, pool_a=24, pool_b=40) as (local, _):
        journeys = serve(local, prompts, GREEDY)
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_a_prompt_that_the_prefill_node_cannot_hold_is_prefilled_here(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(300)
    with two_datacenters(model, tokenizer, threshold=100, pool_a=12) as (local, _):
        journeys = serve(local, prompts, GREEDY)
    assert journeys[0].route == "pdp" and "pool" in journeys[0].fallback
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_an_overdue_transfer_is_given_up_and_the_prompt_prefilled_here(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(400)
    crawl = LineConfig(gbps=2e-5)  # 20 kbit/s: 40 KiB take 16 s
    with two_datacenters(model, tokenizer, threshold=100, line=crawl, deadline_s=0.5) as (local, _):
        journeys = serve(local, prompts, GREEDY)
    assert "deadline" in journeys[0].fallback
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_when_the_prefill_node_leaves_every_request_is_still_answered(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(300, 250)
    with two_datacenters(model, tokenizer, threshold=100) as (local, remote):
        write = local.decode.engine.kvcache.pool.write_bytes
        leaving = threading.Thread(target=remote.node.mail.links["front"].close)

        def leave_after_first_bytes(layer, table, start, end, data):
            write(layer, table, start, end, data)
            if leaving.ident is None:
                leaving.start()

        local.decode.engine.kvcache.pool.write_bytes = leave_after_first_bytes
        journeys = serve(local, prompts, GREEDY)
        leaving.join(60)
    assert [journey.route for journey in journeys] == ["pdp", "pdp"]
    assert tokens(journeys) == reference(model, tokenizer, prompts, GREEDY)


def test_the_next_turn_sends_only_its_increment_across(hybrid):
    model, tokenizer = hybrid
    (first,) = prompts_of(300)
    with two_datacenters(model, tokenizer, threshold=50) as (local, remote):
        (turn,) = serve(local, [first], GREEDY)
        second = first + turn.output_ids + prompts_of(150, seed=5)[0]
        (next_turn,) = serve(local, [second], GREEDY)
        layout = local.decode.engine.layout
    assert turn.route == next_turn.route == "prfaas"
    assert next_turn.held_tokens == 304, "the decode side kept the first turn and its answer, up to the last full block"
    rows = sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN)
    state = sum(spec.nbytes for spec in layout.specs if spec.kind is not StateKind.TOKEN)
    increment = (len(second) - next_turn.held_tokens) * rows
    least, most = increment + state, increment + 2 * state
    assert least <= next_turn.kv_bytes <= most, "rows of the increment, the state, perhaps a snapshot"
    assert next_turn.cached_tokens >= 288, "the prefill node had the first turn's prompt in its own cache"
    assert tokens([turn, next_turn]) == reference(model, tokenizer, [first, second], GREEDY)


def test_the_directory_knows_what_the_prefill_node_holds(hybrid):
    model, tokenizer = hybrid
    prompts = prompts_of(200)
    with two_datacenters(model, tokenizer, threshold=50) as (local, remote):
        serve(local, prompts, GREEDY)
        keys = [key.hex() for key in local.decode.engine.kvcache.keys(prompts[0])]
        directory = local.front.plane.directory
        step_until(local, lambda: directory.match(keys).get("prfaas-0") == 192)
        journey = serve(local, [prompts[0] + prompts_of(100, seed=9)[0]], GREEDY)[0]
    assert "cached 192" in journey.reason


def test_a_prompt_that_was_prefilled_here_has_its_first_token_before_the_next_prompt_is_begun(hybrid):
    with two_datacenters(*hybrid, threshold=1000) as (local, _):
        prefill, answered = local.prefill.engine.runner.prefill, {}

        def watch(chunks, on_kv):
            for chunk in chunks:
                answered.setdefault(chunk.request.id, [len(journey.output_ids) for journey in journeys])
            return prefill(chunks, on_kv)

        local.prefill.engine.runner.prefill = watch
        journeys = [local.front.submit(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts_of(100, 90, 80))]
        step_until(local, lambda: not local.front.has_work)
    assert [bool(tokens) for tokens in answered["1#2"]] == [True, False, False]
    assert [bool(tokens) for tokens in answered["2#3"]] == [True, True, False]


def test_a_snapshot_that_comes_after_its_request_was_admitted_is_kept_once_it_is_whole(hybrid):
    model, tokenizer = hybrid
    (prompt,) = prompts_of(200)
    with two_datacenters(model, tokenizer, threshold=1000) as (local, _):
        cache, admitted = local.decode.engine.kvcache, threading.Event()
        write = cache.pool.write_bytes

        def hold_the_snapshot_back(layer, table, start, end, data):
            if end == 192 and cache.layout.specs[layer].kind is not StateKind.TOKEN:
                assert admitted.wait(60)
            write(layer, table, start, end, data)

        cache.pool.write_bytes = hold_the_snapshot_back
        journey = local.front.submit("0", prompt, GREEDY)
        step_until(local, lambda: journey.output_ids)
        assert cache.match(prompt[:193]) == 0, "what has not come is not there"
        admitted.set()
        step_until(local, lambda: not local.front.has_work and not local.decode.has_work)
        assert cache.match(prompt[:193]) == 192
        longer = prompt[:192] + prompts_of(40, seed=3)[0]
        again = local.decode.engine.add(local.decode.engine.request("again", longer, GREEDY))
        while local.decode.engine.has_work:
            local.decode.engine.step()
    assert again.cached_tokens == 192 and again.output_ids == reference(model, tokenizer, [longer], GREEDY)[0]


def test_a_snapshot_that_the_prefill_node_does_not_have_is_waited_for_no_longer_than_its_prefill(hybrid):
    """The prompt fills its pool, so that there is no block for a snapshot; the transfer's deadline is an hour."""
    model, tokenizer = hybrid
    (prompt,) = prompts_of(200)
    blocks = next(count for count in range(13, 100) if fits(model, tokenizer, count, prompt))
    with two_datacenters(model, tokenizer, threshold=100, pool_a=blocks, deadline_s=3600) as (local, remote):
        (journey,) = serve(local, [prompt], GREEDY)
        assert journey.route == "prfaas" and journey.error is None
        step_until(local, lambda: not local.decode.has_work, deadline_s=10)


def fits(model, tokenizer, blocks, prompt):
    """Whether a node with so many blocks prefills the prompt, answer aside."""
    engine = Engine(model, tokenizer, CacheConfig(blocks, 16), 48)
    try:
        engine.check_fits(engine.request("0", prompt, GREEDY, prefill_only=True))
    except UserError:
        return False
    return True
