"""Where a request leaves the engine's even path: how answers end, what is refused, KVCache from another engine.

Chapters 04 and 05.
"""

import pytest
from conftest import write_checkpoint
from test_engine import (
    assert_answers_are_the_naive_ones, assert_nothing_is_held, naive_tokens, new_engine, run, some_requests)

from minprfaas import SamplingParams, UserError, load
from minprfaas.engine.request import Status


# How an answer ends


def test_the_end_of_text_ends_an_answer_unless_it_is_to_be_ignored(hybrid, tmp_path):
    prompt = [11, 12, 13]
    answer = naive_tokens(hybrid[0], tuple(prompt), SamplingParams(max_tokens=20, temperature=1.0))
    eos = next(token for token in answer[3:] if hybrid[1].decode([token]).isprintable() and token < 95)
    first = answer.index(eos)
    engine = new_engine(load(write_checkpoint(tmp_path, "kimi_linear", eos_token_id=[0, eos])))
    ended = engine.add(engine.request("ended", prompt, SamplingParams(max_tokens=20, temperature=1.0)))
    going = engine.add(engine.request("going", prompt, SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)))
    run(engine)
    assert (ended.output_ids, ended.finish_reason) == (answer[: first + 1], "eos")
    assert ended.text.rstrip("\ufffd") == hybrid[1].decode(answer[:first]).rstrip("\ufffd")  # and eos has no text
    assert (going.output_ids, going.finish_reason) == (answer, "length")


def test_max_tokens_ends_an_answer_after_exactly_so_many(hybrid):
    engine = new_engine(hybrid)
    requests = [engine.add(engine.request(str(n), [4, 5], SamplingParams(max_tokens=n))) for n in (1, 2, 9)]
    run(engine)
    assert [len(request.output_ids) for request in requests] == [1, 2, 9]
    assert {request.finish_reason for request in requests} == {"length"}
    assert {request.length_limit for request in requests} == {"max_tokens"}


def test_the_context_ends_an_answer(hybrid):
    engine = new_engine(hybrid, blocks=200)
    request = engine.add(engine.request("full", [5] * 505, SamplingParams(max_tokens=100, ignore_eos=True)))
    run(engine)
    assert (len(request.token_ids), request.finish_reason, request.length_limit) == (512, "length", "context")


def test_the_pool_ends_an_answer_that_it_cannot_hold(hybrid):
    engine = new_engine(hybrid, blocks=new_engine(hybrid).layout.blocks_for(40))
    request = engine.add(engine.request("long", [5] * 30, SamplingParams(max_tokens=100, ignore_eos=True)))
    run(engine)
    assert (len(request.token_ids), request.finish_reason, request.length_limit) == (40, "length", "pool")
    assert_nothing_is_held(engine)


def test_a_stop_string_ends_an_answer_and_the_stream_never_shows_it(models):
    model, tokenizer = models["qwen3"]
    free = new_engine((model, tokenizer))
    request = free.add(free.request("free", "Once upon", SamplingParams(max_tokens=40, temperature=1.0, seed=3)))
    run(free)
    visible = [at for at in range(5, len(request.text) - 3) if "\ufffd" not in request.text[at : at + 3]]
    stop = request.text[visible[0] : visible[0] + 3]
    engine = new_engine((model, tokenizer))
    stopped = engine.add(engine.request("stopped", "Once upon", SamplingParams(
        max_tokens=40, temperature=1.0, seed=3, stop=("never written", stop))))
    updates = run(engine)
    assert stopped.finish_reason == "stop" and stopped.text == request.text[: request.text.index(stop)]
    assert "".join(update.new_text for update in updates) == stopped.text
    assert stopped.output_ids == request.output_ids[: len(stopped.output_ids)] and len(stopped.output_ids) < 40


def test_the_streamed_pieces_are_the_text(hybrid):
    engine = new_engine(hybrid, blocks=60)
    requests = some_requests(engine, max_tokens=30, temperature=1.0, stop=("a", "KK"))
    pieces = {request: "" for request in requests}
    for update in run(engine):
        pieces[update.request] += update.new_text
    assert all(pieces[request] == request.text for request in requests)


# What is refused


@pytest.mark.parametrize("prompt, words", [
    ([5] * 512, ["512 prompt tokens", "context holds 512"]),
    ([5] * 45, ["45 prompt tokens", "pool holds 40 tokens"]),
    ([5] * 40, ["40 prompt tokens", "pool holds 40 tokens"]),
    ([], ["empty prompt"]),
    ([1, 257], ["token id 257", "vocabulary holds 257"]),
    ([-1], ["token id -1"]),
])
def test_a_prompt_that_can_never_be_answered_is_refused_with_the_numbers(hybrid, prompt, words):
    engine = new_engine(hybrid, blocks=new_engine(hybrid).layout.blocks_for(40))
    with pytest.raises(UserError) as caught:
        engine.add(engine.request("r1", prompt, SamplingParams()))
    assert all(word in str(caught.value) for word in ["'r1'", *words]), str(caught.value)
    assert not engine.has_work


def test_a_prefill_chunk_of_nothing_is_refused(hybrid):
    with pytest.raises(UserError, match="prefill chunk in tokens is 0; it must be a whole number of at least 1"):
        new_engine(hybrid, prefill_chunk=0)


def test_a_pool_too_small_for_any_state_refuses_every_prompt(hybrid):
    with pytest.raises(UserError, match="pool holds 0 tokens"):
        engine = new_engine(hybrid, blocks=1)
        engine.add(engine.request("r", [5], SamplingParams()))


# Prefill here, decode there


def test_kvcache_copied_to_another_engine_goes_on_with_the_same_tokens(hybrid):
    prefill, decode = new_engine(hybrid, prefill_chunk=10), new_engine(hybrid, blocks=90)
    prompt, params, heard = list(range(1, 46)), SamplingParams(max_tokens=15, temperature=1.0, seed=4), []
    sent = prefill.add(prefill.request("r", prompt, params, prefill_only=True))

    def on_kv(request, layer, start, end):
        assert request is sent
        heard.append((layer, start, end))

    (update,) = run(prefill, on_kv=on_kv)
    assert sent.status is Status.HELD and prefill.kvcache.stats().in_use > 0
    ranges = sorted({(start, end) for _, start, end in heard})
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == 45
    assert heard == [(layer, start, end) for start, end in ranges for layer in range(4)]

    received = decode.request("r", prompt, params)
    assert decode.reserve_remote(received) and received.status is Status.REMOTE and not decode.has_work
    for layer in range(4):
        group = decode.layout.group_of_layer[layer].index
        data = prefill.kvcache.pool.read_bytes(layer, sent.cache.block_tables[group], 0, 45)
        decode.kvcache.pool.write_bytes(layer, received.cache.block_tables[group], 0, 45, data)
    prefill.release(sent)
    decode.admit_remote(received, update.token_id)
    run(decode)
    assert_answers_are_the_naive_ones(decode, [received])
    assert_nothing_is_held(prefill)
    assert_nothing_is_held(decode)


def test_a_reservation_shares_the_longest_run_of_blocks_though_no_prefill_could_begin_there(hybrid):
    engine = new_engine(hybrid)
    (first,) = some_requests(engine, lengths=(45,), max_tokens=2)
    run(engine)
    prompt = first.token_ids[:29] + [7] * 10
    assert engine.kvcache.match(prompt) == 16  # a snapshot every second block of 8
    remote = engine.request("remote", prompt, SamplingParams(max_tokens=5))
    assert engine.reserve_remote(remote) and remote.cached_tokens == 24


def test_what_can_never_fit_is_refused(hybrid):
    engine = new_engine(hybrid, blocks=new_engine(hybrid).layout.blocks_for(40))
    for prompt in ([5] * 60, [5, 257], []):
        with pytest.raises(UserError, match="request 'remote' has"):
            engine.check_fits(engine.request("remote", prompt, SamplingParams(max_tokens=5)))


def test_a_reservation_that_finds_no_room_takes_nothing(hybrid):
    engine = new_engine(hybrid, blocks=new_engine(hybrid).layout.blocks_for(40))
    engine.add(engine.request("running", [5] * 20, SamplingParams(max_tokens=15)))
    engine.step()
    in_use = engine.kvcache.stats().in_use
    remote = engine.request("remote", [6] * 30, SamplingParams(max_tokens=5))
    assert not engine.reserve_remote(remote) and engine.kvcache.stats().in_use == in_use and remote.cache is None
    run(engine)
    assert engine.reserve_remote(remote)
