"""Compile a model's pieces before the first request comes (`--compile`). Chapters 04, 15."""

import sys
import time

from tqdm import tqdm

from minprfaas.config import SamplingParams
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.reference import generate
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer


def compile_and_warm_up(model: Transformer, tokenizer: Tokenizer) -> None:
    """Compile the pieces by running each phase in the shapes that give them different code; says how long it took."""
    compile_pieces(model)
    began_at_s = time.monotonic()
    rounds = [(1, 65), (1, 130), (2, 65)]  # requests, tokens of a prompt: one token at once, several, a batch
    for requests, tokens in tqdm(rounds, desc="compiling", unit="shape", disable=None, leave=False):
        prompts = [[number] * min(tokens, model.config.max_context_tokens - 4) for number in range(requests)]
        generate(model, tokenizer, prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    print(f"compiled in {time.monotonic() - began_at_s:.1f} s", file=sys.stderr)
