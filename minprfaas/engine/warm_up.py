"""Compile a model's pieces before the first request comes (`--compile`). Chapters 04, 15."""

import sys
import time
from collections.abc import Collection

import torch
from tqdm import tqdm

from minprfaas.config import SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.fast_runner import chunk_for
from minprfaas.engine.pieces import ROWS, CompiledPiece, Phase, compile_pieces
from minprfaas.engine.reference import pool_for
from minprfaas.model.recurrent import CHUNK_TOKENS
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer


def compile_and_warm_up(model: Transformer, tokenizer: Tokenizer, block_tokens: int | None = None,
                        fast: bool | None = None, phases: Collection[Phase] = tuple(Phase)) -> None:
    """Compile the pieces by running these phases in the shapes that give them different code; says how long it took.
    From then on nothing is compiled: what meets another shape runs as it is written. `block_tokens` and `fast` are
    those of the engines to come (None: `pool_for`'s, `Engine`'s)."""
    compile_pieces(model)
    began_at_s = time.monotonic()
    block, on_cpu = block_tokens or pool_for(model, [1]).block_tokens, model.device.type == "cpu"
    chunk = 2 * CHUNK_TOKENS if on_cpu else chunk_for(model.device, None)
    # The tokens of each round's requests. Decoding comes first: what another process that only prefills has compiled
    # meanwhile is then found in the cache.
    rounds = {Phase.DECODE: [[block - 5] * batch for batch in ((1, ROWS - 1, ROWS + 1) if on_cpu else (1, 24))],
              Phase.PREFILL: [[chunk + block + 50], [40, 30, 20], [block + 50] * 3]}
    planned = [(phase, lengths) for phase in rounds if phase in phases for lengths in rounds[phase]]
    try:
        for CompiledPiece.phase, lengths in tqdm(planned, desc="compiling", unit="round", disable=None, leave=False):
            lengths = [min(tokens, model.config.max_context_tokens - 5) for tokens in lengths]
            cache = pool_for(model, [tokens + 5 for tokens in lengths], block)
            (prefill if CompiledPiece.phase is Phase.PREFILL else decode)(
                Engine(model, tokenizer, cache, chunk, fast=fast), lengths)
    finally:
        CompiledPiece.phase = None
    torch.compiler.set_stance("eager_on_recompile")
    print(f"compiled in {time.monotonic() - began_at_s:.1f} s", file=sys.stderr)


def prefill(engine: Engine, lengths: list[int]) -> None:
    """Prompts of these lengths, and then again with a prefix that is cached."""
    for _ in range(2):
        requests = [engine.request(str(number), [number] * tokens, SamplingParams(), prefill_only=True)
                    for number, tokens in enumerate(lengths)]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        for request in requests:
            engine.release(request)


def decode(engine: Engine, lengths: list[int]) -> None:
    """A few steps of requests of these lengths, whose KVCache is whatever is there."""
    for number, tokens in enumerate(lengths):
        request = engine.request(str(number), [number] * tokens, SamplingParams(max_tokens=4, ignore_eos=True))
        if engine.reserve_remote(request):
            engine.admit_remote(request, first_token=0)
    while engine.has_work:
        engine.step()
