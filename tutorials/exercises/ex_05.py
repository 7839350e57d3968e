"""The exercises of chapter 05. Fill in the functions, then: python tutorials/05_continuous_batching.py --check 1"""

import math

from exercises.checking import first_wrong

from minprfaas.config import CacheConfig, RopeConfig, SamplingParams
from minprfaas.engine.request import Request
from minprfaas.engine.scheduler import Scheduler
from minprfaas.engine.text import StreamedText
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import read_config
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.tokenizer import Tokenizer


def admitted(prompts: list[int], free_blocks: int, block_tokens: int, places: int) -> int:
    """How many of the waiting requests enter now. `prompts` are their tokens, oldest first; each needs blocks of
    `block_tokens` tokens for its whole prompt, of `free_blocks`; there are `places` places. Nobody overtakes."""
    raise NotImplementedError


def kept_by_top_p(probabilities: list[float], top_p: float) -> set[int]:
    """The tokens (indexes into `probabilities`, which add up to 1) that `top_p` keeps: the likeliest, in order, until
    they first add up to `top_p` or more. The likeliest is always kept."""
    raise NotImplementedError


def held_back(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may not be shown yet, because they could be the beginning of one of the
    `stops`. None of them is whole in `text`."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's scheduler."""
    layout = plan_layout((GQAConfig(1, 1, 4, RopeConfig()).state_spec("float32"),), block_tokens=16)
    cases = []
    waiting = [([10, 20, 30], 10, 8), ([100, 20, 30], 6, 8), ([16, 17, 16], 3, 8), ([1] * 9, 100, 4)]
    for prompts, free, places in waiting:
        cache = CacheConfig(free, block_tokens=16, prefix_cache=False)
        kvcache = KVCacheManager(layout, cache, "cpu", root=b"exercise")
        scheduler = Scheduler(kvcache, prefill_chunk=64, max_batch=places, shared_tokens=0)
        for number, tokens in enumerate(prompts):
            scheduler.waiting.append(Request(str(number), list(range(tokens)), SamplingParams()))
        scheduler.next_chunks()
        cases.append(((prompts, free, 16, places), len(scheduler.prefilling)))
    return first_wrong(admitted, cases)


def check_2() -> str | None:
    """Against all sets of likeliest tokens, from the smallest."""

    def expected(probabilities: list[float], top_p: float) -> set[int]:
        order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
        sizes = (size for size in range(1, len(order) + 1)
                 if math.fsum(probabilities[token] for token in order[:size]) >= top_p)
        return set(order[:next(sizes, len(order))])

    cases = [([0.5, 0.25, 0.125, 0.125], 0.75), ([0.125, 0.5, 0.125, 0.25], 0.8), ([0.25, 0.75], 0.1),
             ([0.5, 0.5], 1.0)]
    return first_wrong(kept_by_top_p, [(case, expected(*case)) for case in cases])


def check_3() -> str | None:
    """Against the package's stream of text."""
    tokenizer, cases = Tokenizer(EMBEDDED, read_config(EMBEDDED)), []
    for text, stops in [("the end", ["end of"]), ("the end", ["dot", "end of it"]), ("abab", ["ababc", "bac"]),
                        ("nothing", ["xyz"]), ("nothing", [])]:
        stream = StreamedText(tokenizer, tuple(stops))
        shown = "".join(stream.push(token) for token in tokenizer.encode(text))
        cases.append(((text, stops), len(stream.text) - len(shown)))
    return first_wrong(held_back, cases)
