"""Open-loop load for a live cluster: the simulator's arrivals and lengths, with prompts of real text. Chapter 13.

Who asks does not wait for answers: a request is due when it is due, however long the queue has become. Its prompt is
cut out of the invented documents that the embedded model reads, and ends in a question whose answer is known. Requests
that share blocks in a trace share the tokens in their place here, so that prefix caches find what they found there.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import ceil

from minprfaas.config import SamplingParams
from minprfaas.documents import EVALUATION_SEEDS, MIN_TOKENS, Question, make_document
from minprfaas.engine.prompts import Prompt
from minprfaas.errors import UserError, require_number, shown
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.scheduling import paper_case
from minprfaas.simulator.arrivals import bursty, drawn, from_trace, poisson, read_trace
from minprfaas.simulator.nodes import BLOCK_TOKENS, SimRequest

REQUESTS = 100  # by default, where no trace says how many
LENGTH_SCALE = 1 / 64  # of the paper's lengths, 27K tokens in the mean, to those of a small model on a CPU
MIN_ANSWER = 8  # tokens: a name fits
CUT_WORDS = 64  # that a document is longer than what is wanted of it: it leaves room for a question, and is cut


@dataclass(frozen=True)
class Arrival:
    """A prompt, and when it is due, in seconds from the beginning."""

    due_s: float
    prompt: Prompt


@dataclass(frozen=True)
class Load:
    """`poisson:RATE`, `bursty:RATE` (requests a second) or a trace, `speed` times as fast as it was recorded. Lengths
    are the paper's or the trace's, times `length_scale`; answers go on for as long as theirs."""

    kind: str
    rate_rps: float  # of a trace, its speed
    requests: int
    seed: int
    length_scale: float
    trace: tuple[SimRequest, ...] = ()

    @staticmethod
    def parse(text: str, requests: int | None, seed: int, length_scale: float | None, block_tokens: int) -> "Load":
        """Of a command line. Unless said otherwise, a block of a trace becomes one of `block_tokens` tokens. UserError
        names what is out of range."""
        kind, _, rest = text.partition(":")
        require_number("--seed", seed, least=0, most=2**32, whole=True)
        for option, value in (("--requests", requests), ("--length-scale", length_scale)):
            if value is not None:
                require_number(option, value, above=0, most=10**6)
        if kind in ("poisson", "bursty"):
            rate_rps = _number(f"the rate of --load {kind}", rest)
            return Load(kind, rate_rps, requests or REQUESTS, seed, length_scale or LENGTH_SCALE)
        if kind != "trace" or not rest:
            raise UserError(f"--load is {shown(text)}; it must be poisson:RATE, bursty:RATE or trace:FILE[:SPEED]")
        path, _, speed = rest.rpartition(":")
        path, speed = (path, speed) if path and speed.replace(".", "", 1).isdigit() else (rest, "1")
        trace = tuple(read_trace(path)[:requests])
        return Load(kind, _number("the speed of --load trace", speed), len(trace), seed,
                    length_scale or block_tokens / BLOCK_TOKENS, trace)

    @property
    def answer_tokens(self) -> float:
        """Of the mean answer."""
        tokens = [request.output_tokens for request in self.trace] or [paper_case.OUTPUT_TOKENS]
        return max(MIN_ANSWER, self.length_scale * sum(tokens) / len(tokens))

    def __str__(self) -> str:
        what = f"trace at {self.rate_rps:g} times its speed" if self.trace else \
            f"{self.kind}, {self.rate_rps:g} requests/s, lengths of the paper"
        return f"{what} times {self.length_scale:g}, {self.requests:,} requests, seed {self.seed}"

    def arrivals(self, tokenizer: Tokenizer, context_tokens: int) -> Iterator[Arrival]:
        """All of them in order of time; prompt and answer together fit a context of so many tokens."""
        text = _Text(self, tokenizer)
        for number, request in enumerate(self._requests()):
            answer = max(MIN_ANSWER, min(round(request.output_tokens * self.length_scale), context_tokens // 2))
            tokens = min(max(1, round(request.input_tokens * self.length_scale)), context_tokens - answer)
            params = SamplingParams(max_tokens=answer, ignore_eos=True)
            yield Arrival(request.arrived_at_s, text.prompt(number, tokens, request.keys, params))

    def _requests(self) -> Iterator[SimRequest]:
        if self.trace:
            return from_trace(self.trace, self.rate_rps)
        rng = random.Random(self.seed)
        times = {"poisson": poisson, "bursty": bursty}[self.kind](self.rate_rps, rng)
        return drawn(times, self.requests, paper_case.paper_lengths(), paper_case.OUTPUT_TOKENS, rng)


class _Text:
    """Writes a load's prompts."""

    def __init__(self, load: Load, tokenizer: Tokenizer):
        self._seed, self._tokenizer = EVALUATION_SEEDS * (1 + 2 * load.seed), tokenizer
        self._block_tokens = max(1, round(BLOCK_TOKENS * load.length_scale))
        self._block: Callable = lru_cache(maxsize=None)(self._piece)

    def prompt(self, number: int, tokens: int, hash_ids: tuple[int, ...], params: SamplingParams) -> Prompt:
        """Of `tokens` tokens: those of the blocks of a trace, then some of its own, then a question if one is left
        whose fact was not cut."""
        token_ids, questions = [], []
        for hash_id in islice(hash_ids, ceil(tokens / self._block_tokens)):
            block_ids, block_questions = self._block(self._seed + hash_id, self._block_tokens)
            token_ids, questions = token_ids + block_ids, questions + block_questions
        if len(token_ids) < tokens:
            own_ids, own_questions = self._piece(self._seed + EVALUATION_SEEDS + number, tokens - len(token_ids))
            token_ids, questions = token_ids + own_ids, questions + own_questions
        random.Random(self._seed + number).shuffle(questions)
        for question in questions:
            tail = self._tokenizer.encode(question.prompt_tail, add_special_tokens=False)
            kept = token_ids[:max(0, tokens - len(tail))]
            whole_sentences = self._tokenizer.decode(kept).rpartition(".")[0]
            if question.answer in whole_sentences:
                return Prompt(f"r{number}", kept + tail, params, question.answer)
        return Prompt(f"r{number}", token_ids[:tokens], params)

    def _piece(self, seed: int, tokens: int) -> tuple[list[int], list[Question]]:
        """The first `tokens` tokens of a document, and the questions about it. It is measured in words, each of which
        is a token at least: tokens of any vocabulary will do."""
        document = make_document(seed, max(MIN_TOKENS, tokens + CUT_WORDS), str.split)
        token_ids = self._tokenizer.encode(document.text, add_special_tokens=False)
        return token_ids[:tokens], list(document.questions)


def _number(what: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = text
    require_number(what, number, above=0, most=10**6)
    return number
