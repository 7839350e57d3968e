"""`generate`: prompts in, answers out, in one process."""

import pytest
import torch

import minprfaas
from minprfaas import SamplingParams, UserError, generate
from minprfaas.config import CacheConfig
from minprfaas.engine.generate import pool_for
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
        assert output.text and output.text.rstrip("\ufffd") == hybrid[1].decode(output.token_ids).rstrip("\ufffd")


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
    assert pool_for(model, [100, 200]).num_blocks == layout.blocks_for(100) + layout.blocks_for(200) + 4 * layout.state_blocks
    assert pool_for(model, [10**9]).num_blocks == layout.blocks_for(512) + 2 * layout.state_blocks  # no more than the context
    assert pool_for(model, [100] * 99, limit_bytes=1).num_blocks == layout.blocks_for(100) + 2 * layout.state_blocks  # the longest always fits


def test_the_package_offers_its_public_names_and_no_others():
    assert all(getattr(minprfaas, name) for name in minprfaas.__all__)
    with pytest.raises(AttributeError):
        minprfaas.nonsense
