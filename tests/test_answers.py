"""What `--check` calls identical, a tie, cut short and different; and what a request that says it crossed must show.

Chapter 13.
"""

import copy

import pytest

from minprfaas import SamplingParams, generate
from minprfaas.cluster.journey import Journey
from minprfaas.commands.answers import TIE_GAP, answer_lines, check
from minprfaas.config import Role
from minprfaas.engine.prompts import Prompt
from minprfaas.engine.reference import logit_gap
from minprfaas.errors import RequestError
from minprfaas.scheduling.router import Decision

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = Prompt("a", "who is there?", PARAMS)


@pytest.fixture
def right(hybrid):
    """A finished journey with the reference's answer, prefilled in the PD cluster."""
    model, tokenizer = hybrid
    (answer,) = generate(model, tokenizer, [PROMPT.text], PARAMS)
    journey = Journey("a", tokenizer.encode(PROMPT.text), PARAMS, [], 0.0)
    journey.token_ids += answer.token_ids
    journey.finish_reason = "length"
    journey.decision = Decision(Role.PDP, "p", "d", 0.0, 0, 0, 0, None, "")
    return journey


def verdict(journey, hybrid):
    lines, is_well = check([journey], [PROMPT], *hybrid, prefill_chunk=64)
    return " ".join(lines), is_well


def test_the_references_own_tokens_are_identical(right, hybrid):
    said, is_well = verdict(right, hybrid)
    assert is_well and "1 of 1 answers are identical" in said and "Different" not in said


def test_another_token_at_a_wide_gap_is_damage_and_at_a_narrow_one_a_tie(right, hybrid):
    model, _ = hybrid
    before, drawn = right.token_ids[:right.prompt_tokens + 2], right.output_ids[2]
    other = max(range(model.config.vocab_size),
                key=lambda token: (token != drawn) * logit_gap(model, before, drawn, token))
    right.token_ids[right.prompt_tokens + 2] = other
    said, is_well = verdict(right, hybrid)
    assert not is_well and "Different: a: another answer" in said
    assert logit_gap(model, before, drawn, other) > TIE_GAP

    tied = copy.deepcopy(model)  # two rows of the head alike: their logits are equal at every position
    tied.lm_head.weight.data[other] = tied.lm_head.weight.data[drawn]
    (wanted,) = generate(tied, hybrid[1], [PROMPT.text], PARAMS)
    right.token_ids[right.prompt_tokens:] = wanted.token_ids
    at = wanted.token_ids.index(min(wanted.token_ids, key=lambda token: token not in (drawn, other)))
    if wanted.token_ids[at] in (drawn, other):
        right.token_ids[right.prompt_tokens + at] = drawn + other - wanted.token_ids[at]
        said, is_well = verdict(right, (tied, hybrid[1]))
        assert is_well and "Ties" in said and "logits 0.0e+00 apart" in said and "0 of 1" in said


def test_an_answer_that_a_small_pool_cut_short_is_told_from_damage(right, hybrid):
    del right.token_ids[-2:]
    right.length_limit = "pool"
    said, is_well = verdict(right, hybrid)
    assert not is_well and "cut short by a pool too small" in said and "another answer" not in said


def test_a_route_that_says_prfaas_and_no_byte_that_crossed_is_a_failure(right, hybrid):
    right.decision = right.decision._replace(route=Role.PRFAAS)
    said, is_well = verdict(right, hybrid)
    assert not is_well and "no KVCache crossed" in said
    right.kv_bytes = 1
    assert verdict(right, hybrid)[1]


def test_a_request_without_an_answer_is_a_failure_with_its_reason(right, hybrid):
    right.error = RequestError("no_room", "no room in time")
    said, is_well = verdict(right, hybrid)
    assert not is_well and "no_room" in said and "no_room" in answer_lines(right, PROMPT)


def test_behind_a_lossy_wire_an_offloaded_answer_may_change_and_no_other(right, hybrid):
    right.token_ids[right.prompt_tokens + 2] = 1 + right.output_ids[2] % 256
    right.kv_bytes = 1

    def lossy(journey, prompt=PROMPT):
        lines, is_well = check([journey], [prompt], *hybrid, prefill_chunk=64, is_lossy=True)
        return " ".join(lines), is_well

    assert not lossy(right)[1]  # prefilled beside its decode node, where nothing is rounded
    right.decision = right.decision._replace(route=Role.PRFAAS)
    said, is_well = lossy(right)
    assert is_well and "0 of 1" in said and "Changed by the rounding on the wire: a: another answer" in said
    assert "The largest gap where one changed" in said
    assert not verdict(right, hybrid)[1]  # an exact wire excuses nothing
    right.kv_bytes = 0
    assert not lossy(right)[1]
    right.kv_bytes, right.error = 1, RequestError("lost", "gone")
    assert not lossy(right)[1]


def test_what_continues_a_changed_answer_may_differ_with_it(right, hybrid):
    changed = copy.deepcopy(right)
    changed.token_ids[-1] = 1 + changed.output_ids[-1] % 256
    changed.kv_bytes, changed.decision = 1, right.decision._replace(route=Role.PRFAAS)
    turn = Prompt("b", " and now?", PARAMS, after="a")
    (answer,) = generate(*hybrid, [changed.token_ids + hybrid[1].encode(turn.text)], PARAMS)
    second = Journey("b", changed.token_ids + hybrid[1].encode(turn.text), PARAMS, [], 0.0)
    second.token_ids += answer.token_ids
    second.decision, second.finish_reason = right.decision, "length"  # prefilled exactly, after another history
    second.token_ids[-1] = 1 + second.output_ids[-1] % 256  # certainly not what follows the right history
    _, is_well = check([changed, second], [PROMPT, turn], *hybrid, prefill_chunk=64, is_lossy=True)
    assert is_well
    second.token_ids = right.token_ids + hybrid[1].encode(turn.text) + second.output_ids
    _, is_well = check([right, second], [PROMPT, turn], *hybrid, prefill_chunk=64, is_lossy=True)
    assert not is_well
