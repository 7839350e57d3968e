"""Every family prefilled there and decoded here, as in one process: cached prefixes, a second turn, preemption.

Chapters 00, 01 and 13.
"""

from dataclasses import replace

import pytest
import tokenizers
import torch
from cluster_support import nothing_in_use, serve, step_until, two_datacenters
from test_parity import FIXTURES, PARITY

from minprfaas import SamplingParams, generate
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import StateKind
from minprfaas.engine.engine import model_layout
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import FAMILIES, read_config
from minprfaas.model.tokenizer import Tokenizer

ONE_OF_EACH = {FAMILIES[read_config(PARITY / name).family].__name__: name for name in reversed(FIXTURES)}
every_family = pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=80)  # so long that any two that decode at once do not fit, and two do at some time


@pytest.fixture
def loaded(family, tmp_path):
    """The model of a family's fixture, and a tokenizer of as many words as it has tokens."""
    directory = PARITY / ONE_OF_EACH[family]
    config = read_config(directory)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(tmp_path / "tokenizer.json"))
    return load_checkpoint(directory, config, torch.float32, "cpu"), Tokenizer(tmp_path, config)


def prompts_of(*lengths):
    return [torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            for length in lengths]


@every_family
def test_a_family_prefilled_there_answers_as_in_one_process_and_so_does_its_second_turn(loaded):
    model, tokenizer = loaded
    first = prompts_of(140, 30)
    with two_datacenters(model, tokenizer, threshold=60) as (local, remote):
        turns = serve(local, first, GREEDY)
        second = [turn.token_ids + more for turn, more in zip(turns, prompts_of(70, 80))]
        turns += serve(local, second, GREEDY)
        step_until(local, lambda: nothing_in_use(local))
    assert [turn.route for turn in turns] == ["prfaas", "pdp", "prfaas", "prfaas"]
    assert turns[2].cached_tokens > 0, "the prefill node had the first turn in its prefix cache"
    outputs = generate(model, tokenizer, first + second, GREEDY)
    assert [turn.output_ids for turn in turns] == [output.token_ids for output in outputs]
    assert nothing_in_use(remote)


@every_family
def test_requests_of_a_family_that_are_preempted_where_they_decode_get_the_same_tokens(loaded):
    model, tokenizer = loaded
    prompts, layout = prompts_of(62, 63, 64), model_layout(model, 16)
    blocks = 2 * layout.blocks_for(64) + layout.blocks_for(72)  # all begin, not all can end
    with two_datacenters(model, tokenizer, threshold=60, pool_b=blocks) as (local, _):
        running, seen = local.decode.engine.running, set()
        journeys = [local.front.submit(str(number), prompt, LONG) for number, prompt in enumerate(prompts)]
        step_until(local, lambda: seen.update(running) or not local.front.has_work)
    assert sum(request.preemptions for request in seen) > 0
    outputs = generate(model, tokenizer, prompts, LONG)
    assert [journey.output_ids for journey in journeys] == [output.token_ids for output in outputs]


@pytest.mark.parametrize("family", ["mimo_v2_flash"])
@pytest.mark.parametrize("tokens, snapshot_at", [(20, 16), (140, 128)])
def test_of_a_window_no_more_rows_cross_than_the_next_token_sees(loaded, tokens, snapshot_at):
    """Here that is 32 rows: the fixture's authors count the tokens before the one that looks."""
    model, tokenizer = loaded
    with two_datacenters(model, tokenizer, threshold=15) as (local, _):
        (journey,) = serve(local, prompts_of(tokens), GREEDY)
        layout = local.decode.engine.layout
    specs = layout.specs
    row_bytes = sum(spec.nbytes for spec in specs if spec.kind is StateKind.TOKEN)
    window_row_bytes = sum(spec.nbytes // 32 for spec in specs if spec.kind is StateKind.WINDOW)
    assert window_row_bytes > 0
    stream = tokens * row_bytes + min(tokens, 32) * window_row_bytes
    snapshot = min(snapshot_at, 32) * window_row_bytes  # for the next turn; it may come too late to be counted
    assert stream_plan(layout, 1, 0, tokens).total_bytes == stream
    assert stream <= journey.kv_bytes <= stream + snapshot
