"""Prefill and decode of two 30M-parameter models on this machine's cores, beside Transformers. Chapters 04, 05.

    python scripts/bench.py cpu                        a dense and a hybrid model, float32
    python scripts/bench.py cpu --peers DIR            and with Transformers' checkout, where it is not installed
    python scripts/bench.py cpu --compile              and decode once more, compiled (minutes)

First the cores' ceilings, as in `bench.py gpu`: floors are what they would need for the same bytes and products. Ours
and the peer's runs take turns, and each reading is the median.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benches import at_least_one
from benches.peers import Peer
from benches.reading import Machine, Reading, measure_machine, print_readings, write_readings
from minprfaas.config import SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.reference import pool_for
from minprfaas.errors import ArgumentParser
from minprfaas.model.families import config_from_hf
from minprfaas.model.spec import model_state_specs
from minprfaas.model.transformer import Transformer

COMMON = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
          "num_attention_heads": 8, "tie_word_embeddings": True, "eos_token_id": 1}
SHAPES = {
    "qwen3": {**COMMON, "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 64,
              "max_position_embeddings": 8192},
    "hybrid": {**COMMON, "model_type": "kimi_linear", "first_k_dense_replace": 8, "model_max_length": 8192,
               "num_key_value_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
               "v_head_dim": 64, "linear_attn_config": {
                   "num_heads": 8, "head_dim": 64, "short_conv_kernel_size": 4, "full_attn_layers": [4, 8],
                   "kda_layers": [1, 2, 3, 5, 6, 7]}},
}
STEPS = 12


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=at_least_one, default=2048, help="of the prompt (2048)")
    parser.add_argument("--context", type=at_least_one, default=1024, help="of a decoding request (1024)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="turns that each takes (3)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="the models (both)")
    parser.add_argument("--compile", action="store_true", help="decode with compiled pieces, too: rows of their own")
    parser.add_argument("--peers", metavar="DIR", help="folder with checkouts of other libraries")
    parser.add_argument("--json", metavar="FILE", help="write the readings")
    args = parser.parse_args(argv)
    machine = measure_machine(f"{torch.get_num_threads()} threads, float32", "cpu")
    print(machine, flush=True)
    readings = []
    for name in args.shapes:
        shape = SHAPES[name]
        with Peer("Transformers", shape, "cpu", args.peers) as peer:
            readings += read(name, Transformer(config_from_hf(shape)).requires_grad_(False), machine, peer, args)
    print_readings(readings)
    if args.json:
        write_readings(args.json, machine, readings)
    return 0


def read(name: str, model: Transformer, machine: Machine, peer: Peer, args: argparse.Namespace) -> list[Reading]:
    """A model's cases."""
    found = [in_turns(f"{name} prefill, {args.tokens} tokens", machine.prefill_floor_ms(model, args.tokens),
                      lambda: prefill_ms(model, args.tokens), peer, {"phase": "prefill", "tokens": args.tokens},
                      args.repeats)]
    found += read_decode(name, model, machine, peer, args)
    if args.compile:
        began = time.perf_counter()
        compile_pieces(model)
        for batch in (1, 8):
            decode_ms(model, batch, args.context)
        print(f"  {name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
        found += read_decode(f"{name} compiled", model, machine, peer, args)
    return found


def read_decode(name: str, model: Transformer, machine: Machine, peer: Peer, args: argparse.Namespace) -> list[Reading]:
    """Decode of one request and of eight."""
    found = []
    for batch in (1, 8):
        floor_ms = machine.decode_floor_ms(model, model_state_specs(model.config, "float32"), batch, args.context)
        found.append(in_turns(f"{name} decode, batch {batch} at {args.context}", floor_ms,
                              lambda: decode_ms(model, batch, args.context), peer,
                              {"phase": "decode", "batch": batch, "context": args.context}, args.repeats))
    return found


def in_turns(case: str, floor_ms: float, ours: Callable[[], float], peer: Peer, of_peer: dict, repeats: int) -> Reading:
    """Medians of ours and the peer's, one after the other, `repeats` times."""
    ours_ms, peer_ms = [], []
    for _ in range(repeats):
        ours_ms.append(ours())
        peer_ms.append(peer.ms(of_peer))
    reading = Reading(case, statistics.median(ours_ms), floor_ms)
    if None not in peer_ms:
        reading.peers_ms[peer.name] = statistics.median(peer_ms)
    print("  " + "  ".join(reading.rows()[0]), flush=True)
    return reading


def prefill_ms(model: Transformer, tokens: int) -> float:
    """A prompt through the engine."""
    engine = Engine(model, None, replace(pool_for(model, [tokens + 1]), prefix_cache=False))
    engine.add(engine.request("0", _prompt(model, tokens), SamplingParams(1), prefill_only=True))
    began = time.perf_counter()
    engine.step()
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - began) * 1e3


def decode_ms(model: Transformer, batch: int, context: int) -> float:
    """The median step of the engine's runner, after prefills."""
    engine = Engine(model, None, replace(pool_for(model, [context + STEPS + 1] * batch), prefix_cache=False))
    requests = [engine.add(engine.request(str(number), _prompt(model, context), SamplingParams(1), prefill_only=True))
                for number in range(batch)]
    while engine.has_work:
        engine.step()
    times = []
    for _ in range(STEPS):
        for request in requests:
            engine.kvcache.reserve(request.cache, len(request.token_ids))
        began = time.perf_counter()
        tokens = engine.runner.decode(requests)
        times.append((time.perf_counter() - began) * 1e3)
        for request, token in zip(requests, tokens):
            request.token_ids.append(token)
    return statistics.median(times)


def _prompt(model: Transformer, tokens: int) -> list[int]:
    return torch.randint(0, model.config.vocab_size, (tokens,)).tolist()
