"""Open-loop load: who asks does not wait, what is asked can be judged, what a trace shares is shared. Chapter 13."""

import json
import random
from pathlib import Path

import pytest
from programs import run

from minprfaas import generate, load
from minprfaas.cluster.load import LENGTH_SCALE, Load
from minprfaas.errors import UserError
from minprfaas.scheduling.paper_case import OUTPUT_TOKENS, paper_lengths
from minprfaas.simulator.arrivals import bursty, drawn, poisson, read_trace, write_conversations
from minprfaas.simulator.nodes import BLOCK_TOKENS

PROGRAM = Path(__file__).resolve().parent.parent / "scripts" / "cluster.py"
CONTEXT = 16_384


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    write_conversations(path, requests=30, rate_rps=2.0, seed=1)
    return path


@pytest.mark.parametrize("kind, times", [("poisson", poisson), ("bursty", bursty)])
def test_requests_come_when_the_simulators_do_and_a_seed_repeats_them(embedded, kind, times):
    rng = random.Random(3)
    simulated = list(drawn(times(5, rng), 12, paper_lengths(), OUTPUT_TOKENS, rng))
    asked = Load.parse(f"{kind}:5", 12, 3, None, 64)
    arrivals = list(asked.arrivals(embedded[1], CONTEXT))
    assert [arrival.due_s for arrival in arrivals] == [request.arrived_at_s for request in simulated]
    for arrival, request in zip(arrivals, simulated):
        assert len(arrival.prompt.text) == pytest.approx(request.input_tokens * LENGTH_SCALE, rel=0.05, abs=1)
    assert arrivals == list(asked.arrivals(embedded[1], CONTEXT))


def test_prompt_and_answer_share_the_context_in_halves_where_both_are_longer(embedded):
    for arrival in Load.parse("poisson:5", 4, 0, 1.0, 64).arrivals(embedded[1], 241):
        assert arrival.prompt.params.max_tokens == 120 and len(arrival.prompt.text) == 241 - 120
        assert arrival.prompt.params.ignore_eos
    short = list(Load.parse("poisson:5", 3, 0, 1e-6, 64).arrivals(embedded[1], 241))
    assert {(arrival.prompt.params.max_tokens, len(arrival.prompt.text)) for arrival in short} == {(8, 1)}


class Words:
    """The fewest tokens that a text can have: each word is one."""

    def encode(self, text, add_special_tokens):
        return text.split()

    def decode(self, token_ids):
        return " ".join(token_ids)


def test_prompts_are_of_the_length_that_is_asked_for_in_a_vocabulary_of_whole_words_too():
    for arrival in Load.parse("poisson:5", 20, 0, 1.0, 64).arrivals(Words(), 482):
        assert len(arrival.prompt.text) == 482 - 241


def test_the_embedded_model_knows_the_answers_that_are_expected(embedded):
    model, tokenizer = embedded
    prompts = [arrival.prompt for arrival in Load.parse("poisson:5", 6, 0, None, 64).arrivals(tokenizer, 240)]
    answers = generate(model, tokenizer, [prompt.text for prompt in prompts], [prompt.params for prompt in prompts])
    known = [(answer, prompt.expected) for answer, prompt in zip(answers, prompts) if prompt.expected is not None]
    assert len(known) >= 5 and all(len(prompt.text) + prompt.params.max_tokens <= 240 for prompt in prompts)
    assert sum(answer.text.strip().startswith(expected) for answer, expected in known) > 0.8 * len(known)


def test_prompts_share_the_tokens_of_the_blocks_that_their_trace_shares(embedded, trace):
    arrivals = list(Load.parse(f"trace:{trace}:2", None, 0, None, 32).arrivals(embedded[1], CONTEXT))
    recorded = read_trace(trace)
    assert [arrival.due_s for arrival in arrivals] == [request.arrived_at_s / 2 for request in recorded]
    compared = 0
    for one, its in zip(arrivals, recorded):
        assert len(one.prompt.text) == pytest.approx(its.input_tokens * 32 / BLOCK_TOKENS, abs=1)
        for other, theirs in zip(arrivals, recorded):
            if its is not theirs:
                shared = common(its.keys, theirs.keys)
                found = common(one.prompt.text, other.prompt.text)
                room = min(len(one.prompt.text), len(other.prompt.text)) - 50  # where neither asks its question yet
                assert found >= min(32 * shared, room)
                assert found < 32 * (shared + 1) or found > room
                compared += shared > 1
    assert compared > 10


def common(first, second):
    same = [one == other for one, other in zip(first, second)]
    return same.index(False) if False in same else len(same)


@pytest.mark.parametrize("seed", [-1, 2**32 + 1, 1.5])
def test_a_seed_that_is_none_is_named(seed):
    with pytest.raises(UserError, match=f"--seed is {seed}"):
        Load.parse("poisson:1", 5, seed, None, 64)


@pytest.mark.parametrize("text, requests, message", [
    ("poisson", None, "rate of --load poisson is ''; it must be a number above 0"),
    ("poisson:-1", None, "rate of --load poisson is -1.0"), ("bursty:nan", None, "rate of --load bursty is nan"),
    ("flood:3", None, "--load is 'flood:3'; it must be poisson:RATE"), ("trace:", None, "--load is 'trace:'"),
    ("trace:/nowhere", None, "trace /nowhere cannot be read"), ("trace:/nowhere:0", None, "cannot be read"),
    ("poisson:1", 0, "--requests is 0")])
def test_a_load_that_cannot_be_made_is_refused_in_one_line(text, requests, message):
    with pytest.raises(UserError) as error:
        Load.parse(text, requests, 0, None, 64)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_mean_answer_is_that_of_the_paper_or_of_the_trace_in_the_runs_lengths(trace):
    assert Load.parse("poisson:5", None, 0, None, 64).answer_tokens == 16.0
    assert Load.parse("poisson:5", None, 0, 1 / 1024, 64).answer_tokens == 8
    recorded = [request.output_tokens for request in read_trace(trace)]
    played = Load.parse(f"trace:{trace}", 7, 0, 0.5, 64)
    assert played.answer_tokens == 0.5 * sum(recorded[:7]) / 7 and (played.requests, played.rate_rps) == (7, 1.0)
    asked = Load.parse("bursty:2.5", None, 4, None, 64)
    assert (asked.kind, asked.rate_rps, asked.requests, asked.seed, asked.trace) == ("bursty", 2.5, 100, 4, ())


def test_a_load_says_how_its_lengths_are_scaled(trace):
    assert f"times {LENGTH_SCALE:g}" in str(Load.parse("poisson:5", None, 0, None, 64))
    assert "times 0.125, 30 requests" in str(Load.parse(f"trace:{trace}", None, 0, None, 64))


def test_a_cluster_under_load_answers_as_one_process_does_and_says_where_the_time_went(checkpoints, tmp_path):
    """A trace, so that the caches of the nodes are warm for some of it."""
    trace, rows = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    write_conversations(trace, requests=10, rate_rps=20.0, seed=2)
    options = ["--topology", "prfaas=1,pd=1", "--model", str(checkpoints["kimi_linear"]), "--threshold", "60",
               "--load", f"trace:{trace}:1", "--block-tokens", "4", "--prefill-chunk", "64", "--link-gbps", "0.05",
               "--check", "--json", str(rows)]
    done = run(PROGRAM, *options, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "10 of 10 answers are identical" in done.stdout
    rows = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["route"] for row in rows} == {"prfaas", "pdp"} and any(row["cached_tokens"] for row in rows)
    shown = {line[2:24].strip(): line.split() for line in done.stdout.splitlines() if line.startswith("  ")}
    names = ("route", "queue", "prefill", "exposed transfer", "admission, first token")
    parts = [float(shown[name][-2]) for name in names]
    assert sum(parts) == pytest.approx(float(shown["TTFT"][-2]), abs=0.003)
    assert sum(parts) == pytest.approx(sum(row["ttft_s"] for row in rows) / 10, abs=0.003)
    computes = {name: line.split()[2] for line in done.stdout.splitlines()
                for name in ("prfaas-0", "pd-0/pdp", "pd-0/pdd") if line.startswith(f"  {name} ")}
    assert len(computes) == 3 and all(0 < float(share.rstrip("%")) <= 100 for share in computes.values())
