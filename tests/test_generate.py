"""`generate`: prompts in, answers out, in one process, whatever the pool and the chunks; conversations go on.

Chapter 04.
"""

import json
import tracemalloc

import pytest
import torch

import minprfaas
from minprfaas import SamplingParams, UserError, generate
from minprfaas.__main__ import main
from minprfaas.config import MAX_OUTPUT_TOKENS, CacheConfig
from minprfaas.engine.engine import model_layout
from minprfaas.engine.prompts import Prompt
from minprfaas.engine.reference import RequestOutput, answer_prompts, logit_gap, longest_prompts, pool_for
from minprfaas.engine.request import Request
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.spec import model_state_specs


def test_answers_come_in_the_order_of_the_prompts_whatever_finished_first(hybrid):
    prompts = ["a long prompt, which is prefilled first", "short", [7, 8, 9]]
    each = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)]
    together = generate(*hybrid, prompts, each)
    assert [output.prompt_tokens for output in together] == [39, 5, 3]
    assert [len(output.token_ids) for output in together] == [12, 2, 5]
    alone = [generate(*hybrid, [prompt], params)[0] for prompt, params in zip(prompts, each)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    for output in together:  # an answer cut in the middle of a character has no text for its first half
        assert output.text.rstrip("\ufffd") == hybrid[1].decode(output.token_ids).rstrip("\ufffd")
    assert any(output.text for output in together)


def test_greedy_answers_are_what_recomputing_the_whole_context_gives(hybrid):
    model, tokenizer = hybrid
    (output,) = generate(model, tokenizer, ["Once"], SamplingParams(max_tokens=10))
    tokens = tokenizer.encode("Once")
    for expected in output.token_ids:
        assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == expected
        tokens.append(expected)


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(hybrid):
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (output.token_ids for output in generate(*hybrid, ["Once"] * 3, params))
    assert first == again != other


def test_the_prefill_chunk_and_the_pool_change_no_answer(hybrid):
    prompts, params = ["x" * 90, "y" * 30, "x" * 90], SamplingParams(max_tokens=8, temperature=0.8)
    usual = [output.token_ids for output in generate(*hybrid, prompts, params)]
    layout = plan_layout(model_state_specs(hybrid[0].config, "float32"), 4)
    narrow = generate(*hybrid, prompts, params, CacheConfig(layout.blocks_for(98), block_tokens=4), prefill_chunk=7)
    assert [output.token_ids for output in narrow] == usual


def test_on_token_sees_every_token_and_piece_of_text(hybrid):
    tokens, pieces = [], []
    (output,) = generate(*hybrid, ["Once"], SamplingParams(max_tokens=12, temperature=1.0),
                         on_token=lambda update: (tokens.append(update.token_id), pieces.append(update.new_text)))
    assert tokens == output.token_ids and "".join(pieces) == output.text


def test_a_prompt_that_does_not_fit_is_refused_before_any_answer_is_computed(hybrid):
    seen = []
    with pytest.raises(UserError, match="600 prompt tokens; the model's context holds 512"):
        generate(*hybrid, ["fine", "x" * 600], on_token=seen.append)
    assert not seen


def test_parameters_are_one_for_all_or_one_for_each(hybrid):
    with pytest.raises(UserError, match="2 sampling parameters for 3 prompts"):
        generate(*hybrid, ["a", "b", "c"], [SamplingParams()] * 2)
    assert generate(*hybrid, []) == []


def test_the_default_pool_has_room_for_all_prompts_side_by_side_up_to_its_limit(hybrid):
    model = hybrid[0]
    layout = plan_layout(model_state_specs(model.config, "float32"), 64)
    both, snapshots = layout.blocks_for(100) + layout.blocks_for(200), 2 * layout.state_blocks
    assert pool_for(model, [100, 200]).num_blocks == both + 2 * snapshots
    assert pool_for(model, [10**9]).num_blocks == layout.blocks_for(512) + snapshots  # no more than the context
    longest_alone = layout.blocks_for(100) + snapshots
    assert pool_for(model, [100] * 99, limit_bytes=1).num_blocks == longest_alone  # the longest always fits


# Conversations: lines of a prompts file that come after others

TURNS = [Prompt("a", "Once", SamplingParams(max_tokens=9)), Prompt("b", "Twice", SamplingParams(max_tokens=4)),
         Prompt("c", " And then?", SamplingParams(max_tokens=7, temperature=1.0, seed=3), after="a"),
         Prompt("d", " Why?", SamplingParams(max_tokens=5), after="c"),
         Prompt("e", " Who?", SamplingParams(max_tokens=5), after="a")]


def test_a_line_that_comes_after_another_continues_its_prompt_and_answer(hybrid):
    """Each against the same tokens given as one prompt, by hand."""
    answers = dict(zip("abcde", answer_prompts(*hybrid, TURNS)))
    whole = {}
    for turn in TURNS:
        token_ids = whole.get(turn.after, []) + hybrid[1].encode(turn.text)
        (alone,) = generate(*hybrid, [token_ids], turn.params)
        assert answers[turn.id].token_ids == alone.token_ids and answers[turn.id].prompt_tokens == len(token_ids)
        whole[turn.id] = token_ids + alone.token_ids
    assert [answers[id].id for id in "abcde"] == list("abcde")


def test_the_generate_command_continues_conversations(checkpoints, hybrid, tmp_path, capsys):
    path = tmp_path / "turns.jsonl"
    path.write_text('{"id": "a", "prompt": "Once", "max_tokens": 9}\n'
                    '{"id": "b", "prompt": " And?", "max_tokens": 5, "after": "a"}\n')
    main(["generate", "--model", str(checkpoints["kimi_linear"]), "--prompts", str(path), "--json"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    token_ids = hybrid[1].encode("Once") + first["token_ids"] + hybrid[1].encode(" And?")
    assert second["prompt_tokens"] == len(token_ids) == 4 + 9 + 5
    assert second["token_ids"] == generate(*hybrid, [token_ids], SamplingParams(max_tokens=5))[0].token_ids


def test_a_conversation_that_may_outgrow_the_context_is_refused_before_any_answer_is_computed(hybrid):
    seen = []
    long = Prompt("long", "x" * 480, SamplingParams(max_tokens=MAX_OUTPUT_TOKENS))
    more = Prompt("more", "y", SamplingParams(max_tokens=3), after="long")
    assert longest_prompts([long, more], hybrid[1], 512) == {"long": 480, "more": 513}
    with pytest.raises(UserError, match="request 'more' has 513 prompt tokens; the model's context holds 512"):
        answer_prompts(*hybrid, [long, more], on_token=seen.append)
    assert not seen


def test_an_answer_of_a_million_tokens_ends_with_the_context_and_costs_no_memory_before(hybrid):
    prompt = Prompt("a", "x" * 490, SamplingParams(max_tokens=MAX_OUTPUT_TOKENS, ignore_eos=True))
    tracemalloc.start()
    (output,) = answer_prompts(*hybrid, [prompt])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(output.token_ids), output.finish_reason, output.length_limit) == (22, "length", "context")
    assert peak < 5_000_000


def test_a_prompt_of_spaces_is_a_prompt_like_any_other(checkpoints, hybrid, capsys):
    main(["generate", "--model", str(checkpoints["llama"]), "--max-tokens", "3", "   "])
    assert "3" in capsys.readouterr().err
    (output,) = generate(*hybrid, ["   "], SamplingParams(max_tokens=3))
    assert output.prompt_tokens == 3 and len(output.token_ids) == 3


def test_a_prompt_that_the_tokenizer_makes_nothing_of_is_refused(hybrid):
    class Silent:
        def encode(self, text):
            return []

    with pytest.raises(UserError, match="request 'a' has an empty prompt; it needs at least 1 token"):
        answer_prompts(hybrid[0], Silent(), [Prompt("a", "   ", SamplingParams())])


def test_an_output_says_how_long_its_first_token_took_and_how_fast_the_others_came():
    request = Request("a", [1, 2, 3], SamplingParams())
    request.token_ids += [4, 5, 6, 7, 8]
    request.arrived_at_s, request.first_token_at_s, request.finished_at_s = 1.0, 3.0, 5.0
    output = RequestOutput.of(request)
    assert (output.prompt_tokens, output.token_ids) == (3, [4, 5, 6, 7, 8])
    assert (output.ttft_s, output.decode_tokens_per_s) == (2.0, 4 / 2)
    request.finished_at_s = 3.0
    assert RequestOutput.of(request).decode_tokens_per_s == 0.0


def test_a_pool_holds_every_request_with_two_snapshots_or_past_its_limit_the_longest_at_least(hybrid):
    layout = model_layout(hybrid[0], 16)
    needs = [layout.blocks_for(tokens) + 2 * layout.state_blocks for tokens in (100, 512, 33)]  # the context is 512
    assert pool_for(hybrid[0], [100, 9999, 33], 16) == CacheConfig(sum(needs), 16)
    assert pool_for(hybrid[0], [100, 9999, 33], 16, limit_bytes=1) == CacheConfig(needs[1], 16)
    limit = (needs[1] + 3) * layout.block_bytes + layout.block_bytes - 1
    assert pool_for(hybrid[0], [100, 9999, 33], 16, limit) == CacheConfig(needs[1] + 3, 16)
    assert pool_for(hybrid[0], []).block_tokens == 64 and pool_for(hybrid[0], []).num_blocks > 0
    assert pool_for(hybrid[0], [512] * 50_000, 16).num_blocks == 2 * 2**30 // layout.block_bytes


# A tie, or damage?


def test_the_gap_of_two_logits_is_what_the_whole_context_gives(hybrid):
    model, tokenizer = hybrid
    token_ids = tokenizer.encode("Once upon a time, " * 5)
    logits = model(torch.tensor([token_ids]))[0, -1]
    best, second = logits.topk(2).indices.tolist()
    for chunk in (7, 1024):
        gap = logit_gap(model, token_ids, best, second, chunk)
        assert gap == pytest.approx(float(logits[best] - logits[second]), abs=1e-4) and gap > 0
        assert logit_gap(model, token_ids, second, best, chunk) == gap
    assert logit_gap(model, token_ids, best, best) == 0


def test_the_package_offers_its_public_names_and_no_others():
    assert all(getattr(minprfaas, name) for name in minprfaas.__all__)
    with pytest.raises(AttributeError):
        minprfaas.nonsense
