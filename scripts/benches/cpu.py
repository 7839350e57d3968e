"""Prefill and decode of two 30M-parameter models on this machine's cores, beside Transformers. Chapters 04, 05.

    python scripts/bench.py cpu                        a dense and a hybrid model, float32

Ours and the peer's runs take turns, and each reading is the median. Without Transformers only ours is printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from minprfaas.engine.engine import Engine
from minprfaas.engine.generate import pool_for
from minprfaas.engine.sampling import SamplingParams
from minprfaas.errors import exit_on_user_error
from minprfaas.model.families import config_from_hf
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import table

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
PEERED = ("qwen3",)  # Transformers knows the hybrid's family under other names; it is read without a peer
STEPS = 12


@exit_on_user_error
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/bench.py cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt (2048)")
    parser.add_argument("--context", type=int, default=1024, help="of a decoding request (1024)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each takes (3)")
    args = parser.parse_args(argv)
    rows = []
    for name, shape in SHAPES.items():
        model = Transformer(config_from_hf(shape)).requires_grad_(False)
        peer = transformers_model(shape) if name in PEERED else None
        rows.append(row(f"{name} prefill, {args.tokens} tokens", args.repeats, lambda: prefill_ms(model, args.tokens),
                        peer and (lambda: peer_prefill_ms(peer, args.tokens))))
        for batch in (1, 8):
            rows.append(row(f"{name} decode, batch {batch} at {args.context}", args.repeats,
                            lambda: decode_ms(model, batch, args.context),
                            peer and (lambda: peer_decode_ms(peer, batch, args.context))))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {time.strftime('%Y-%m-%d')}\n")
    print(table(["case", "ours ms", "Transformers ms", "ours is faster by"], rows))
    return 0


def row(case: str, repeats: int, ours: Callable[[], float], peer: Callable[[], float] | None) -> list[str]:
    """Medians of both, run in turns."""
    readings = [(ours(), peer() if peer else None) for _ in range(repeats)]
    ours_ms = statistics.median(reading for reading, _ in readings)
    print(f"  {case}: {ours_ms:.1f} ms", flush=True)
    if peer is None:
        return [case, f"{ours_ms:.1f}", "–", "–"]
    peer_ms = statistics.median(reading for _, reading in readings)
    return [case, f"{ours_ms:.1f}", f"{peer_ms:.1f}", f"{peer_ms / ours_ms:.2f}x"]


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


def transformers_model(shape: dict):
    """The same shape in Transformers, or None where that is not installed."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    options = dict(shape)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).eval()


@torch.inference_mode()
def peer_prefill_ms(peer, tokens: int) -> float:
    began = time.perf_counter()
    peer(torch.ones(1, tokens, dtype=torch.int64), use_cache=True, logits_to_keep=1)
    return (time.perf_counter() - began) * 1e3


@torch.inference_mode()
def peer_decode_ms(peer, batch: int, context: int) -> float:
    out, times = peer(torch.ones(batch, context, dtype=torch.int64), use_cache=True, logits_to_keep=1), []
    for _ in range(STEPS):
        began = time.perf_counter()
        out = peer(out.logits[:, -1:].argmax(dim=-1), past_key_values=out.past_key_values, use_cache=True)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)
