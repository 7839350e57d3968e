"""One rate, asked of a live cluster by its front end, in the run's units. Chapter 13; paper 4.

The requests come when they are due, however long the queue has become. When every one has its first token, or has had
time enough, the rest is given up: what decode still owes says nothing more about the rate.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from case_study.sustained import Reading, reading
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.processes import Process
from minprfaas.config import Role, SamplingParams
from minprfaas.engine.reference import generate, logit_gap
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.scheduling.control import Action
from minprfaas.simulator.nodes import SimRequest

FIRST_TOKEN = 2  # of random prompts: below it are those that end or begin a text


def ask(made: Process, name: str, requests: Sequence[SimRequest], vocab_size: int, patience_s: float,
        until_done: bool = False, block_tokens: int = 1, on_progress: Callable[[float], object] = lambda seconds: None,
        on_action: Callable[[Action], object] = lambda action: None,
        on_end: Callable[[Journey], object] = lambda journey: None) -> tuple[float, list[Journey]]:
    """Submit each request when it is due; returns the moment at which it began, and their journeys. `patience_s` is
    given to first tokens (with `until_done`, to last ones) after the last arrival; `on_progress` hears of seconds,
    `on_action` of what the loops do, and `on_end` of each request that has ended. Prompts whose `keys` begin alike
    begin alike, `block_tokens` tokens a key."""
    front, rng = made.front, random.Random(name)
    began_at_s = told_at_s = time.monotonic()
    give_up_at_s = began_at_s + requests[-1].arrived_at_s + patience_s
    journeys: list[Journey] = []

    def is_over() -> bool:
        return len(journeys) == len(requests) and all(
            one.is_finished or (one.first_token_at_s and not until_done) for one in journeys)

    while not is_over() and time.monotonic() < give_up_at_s:
        while len(journeys) < len(requests) and began_at_s + requests[len(journeys)].arrived_at_s <= time.monotonic():
            request = requests[len(journeys)]
            prompt = [token for key in request.keys
                      for token in random_tokens(random.Random(f"block {key}"), block_tokens, vocab_size)]
            prompt += random_tokens(rng, max(0, request.input_tokens - len(prompt)), vocab_size)
            prompt = prompt[:request.input_tokens]
            params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            journeys.append(front.submit(f"{name}-{len(journeys)}", prompt, params))
        made.node.step()
        for journey in {update.journey for update in front.take_updates() if update.journey.is_finished}:
            on_end(journey)
        for action in front.take_actions():
            on_action(action)
        now_s = time.monotonic()
        if now_s - told_at_s >= 0.5:
            on_progress(now_s - told_at_s)
            told_at_s = now_s
    for journey in journeys:
        front.abort(journey.id)
    return began_at_s, journeys


def settle(made: Process, deadline_s: float) -> None:
    """Until every node has told that it holds no block any more: what was given up is dropped, and computed to its end
    where it had begun."""
    figures, before = made.front.figures, {**made.front.figures}
    made.run_until(lambda: all(said is not before.get(name) and not said.in_use_blocks
                               for name, said in figures.items()), deadline_s)


def random_tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Of any text but its beginning and end."""
    return [rng.randrange(FIRST_TOKEN, vocab_size) for _ in range(count)]


def read(rate_rps: float, began_at_s: float, requests: Sequence[SimRequest], journeys: Sequence[Journey],
         by_length: bool) -> Reading:
    """What came of the probe. A request that failed counts as one without a first token."""
    firsts = [one.first_token_at_s - began_at_s if one.first_token_at_s else None for one in journeys]
    return reading(rate_rps, [request.arrived_at_s for request in requests], firsts,
                   [one.route == Role.PRFAAS.value for one in journeys], sum(one.kv_bytes for one in journeys),
                   by_length)


@dataclass(frozen=True)
class Answer:
    """What a request was answered, as far as it went; one that failed has no output, and is wrong."""

    prompt: list[int]
    output: list[int]


def sampled(journeys: Sequence[Journey], sample: int, seed: int) -> list[Answer]:
    """A random sample of those that have begun to be answered or have failed."""
    begun = [one for one in journeys if one.output_ids or one.error is not None]
    return [Answer(one.token_ids[:one.prompt_tokens], one.output_ids)
            for one in random.Random(seed).sample(begun, min(sample, len(begun)))]


@dataclass(frozen=True)
class Wrong:
    """An answer that differs from the single-process reference. `logit_gap` is how far apart the logits of the two
    tokens are where they part: near zero it is a tie, which another order of the same sums decides."""

    answer: Answer
    expected: list[int]
    logit_gap: float | None  # None where one ends before they part


def wrong_answers(answers: Sequence[Answer], model: Transformer, tokenizer: Tokenizer) -> list[Wrong]:
    """Those that differ from the single-process reference."""
    given = [one for one in answers if one.output]
    params = [SamplingParams(len(one.output), ignore_eos=True) for one in given]
    expected = generate(model, tokenizer, [one.prompt for one in given], params)
    wrong = [Wrong(one, [], None) for one in answers if not one.output]
    for one, right in zip(given, expected):
        if one.output != right.token_ids:
            parted = [at for at, pair in enumerate(zip(one.output, right.token_ids)) if pair[0] != pair[1]][:1]
            gaps = [logit_gap(model, one.prompt + one.output[:at], one.output[at], right.token_ids[at])
                    for at in parted]
            wrong.append(Wrong(one, right.token_ids, gaps[0] if gaps else None))
    return wrong
