"""Compile a model's pieces before the first request comes (`--compile`). Chapters 04, 15."""

import sys
import time

from tqdm import tqdm

from minprfaas.config import SamplingParams
from minprfaas.engine.decode_graphs import LEAST_PAGES
from minprfaas.engine.engine import Engine
from minprfaas.engine.pieces import ROWS, compile_pieces
from minprfaas.engine.reference import pool_for
from minprfaas.model.attention import PLANNED_TOKENS
from minprfaas.model.recurrent import CHUNK_TOKENS
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer


def compile_and_warm_up(model: Transformer, tokenizer: Tokenizer, block_tokens: int | None = None,
                        fast: bool | None = None) -> None:
    """Compile the pieces by running each phase in the shapes that give them different code, so that no request compiles
    anything; says how long it took. `block_tokens` and `fast` are those of the engines to come (None: `pool_for`'s,
    `Engine`'s)."""
    compile_pieces(model)
    began_at_s = time.monotonic()
    block = block_tokens or pool_for(model, [1]).block_tokens
    chunk = PLANNED_TOKENS if model.device.type == "cuda" else 2 * CHUNK_TOKENS
    long = max(2 * chunk, LEAST_PAGES * block) + 20  # tokens: three chunks, and more pages than the least bucket has
    # The tokens of each round's prompts. One request, one token and one chunk have code of their own; other sizes
    # become symbolic when a second one is met. Sizes that are equal by chance would be taken for one.
    rounds = [[65], [130], [long], [1], [long] + [block + 50] * 7, [40, 30, 20], [block + 1] * 3, [1] * 2]
    if model.device.type == "cpu":
        rounds.append([1] * (ROWS + 1))  # a step whose products are no sums any more
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for lengths in tqdm(rounds, desc="compiling", unit="round", disable=None, leave=False):
        lengths = [min(tokens, model.config.max_context_tokens - 5) for tokens in lengths]
        cache = pool_for(model, [tokens + 5 for tokens in lengths], block)
        engine = Engine(model, tokenizer, cache, chunk, fast=fast)
        for _ in range(2):  # the second time from a prefix that is cached
            for number, tokens in enumerate(lengths):
                engine.add(engine.request(str(number), [number] * tokens, params))
            while engine.has_work:
                engine.step()
    print(f"compiled in {time.monotonic() - began_at_s:.1f} s", file=sys.stderr)
