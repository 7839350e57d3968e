"""The cases of `bench.py gpu`: each yields readings, of ours first and then, once the card is free, of the peers."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from random_checkpoint import SHAPES

from benches.peers import OF_FAMILY, Peer
from benches.reading import Machine, Reading, median_ms
from minprfaas.cluster.kv_send import KVSend
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import CacheConfig, SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.pieces import compile_pieces
from minprfaas.engine.prefill_graphs import DeltaGraph, compiled_segments
from minprfaas.engine.reference import pool_for
from minprfaas.engine.request import Request, Status
from minprfaas.model.delta import delta_rule_chunked, delta_rule_recurrent
from minprfaas.model.delta_segments import by_tokens, for_segments
from minprfaas.model.families import config_from_hf
from minprfaas.model.spec import model_state_specs
from minprfaas.model.transformer import Transformer
from minprfaas.transport.loopback import Loopback

LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
            "max_position_embeddings": 131072, "eos_token_id": 128001}
MODELS = {"llama-3-8b": LLAMA_8B, "qwen3-0.6b": SHAPES["qwen3-0.6b"], "hybrid-1b": SHAPES["hybrid-1b"]}
STEPS = 24
Readings = Iterator[Reading]


@dataclass(frozen=True)
class Chosen:
    """What of it all is run, and how."""

    models: list[str]
    batches: list[int]
    compiled: bool
    peers: str | None  # the folder with their checkouts
    without: list[str]  # peers that are left out


def random_model(shape: dict, compiled: bool, device: str = "cuda") -> Transformer:
    """In bfloat16 on the device, drawn there."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Transformer(config_from_hf(shape))
    torch.set_default_dtype(torch.float32)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02)
    if compiled:
        compile_pieces(model)
        print("  (pieces are compiled when they first run: a minute or so a model)", flush=True)
    return model


def decode(machine: Machine, chosen: Chosen) -> Readings:
    """A decode step as the engine runs it, host and all."""
    for name in chosen.models:
        model, found = random_model(MODELS[name], chosen.compiled), []
        for batch in chosen.batches:
            context = 4096 if name == "llama-3-8b" and batch > 1 else 1024
            floor_ms = machine.decode_floor_ms(model, model_state_specs(model.config, "bfloat16"), batch, context)
            reading = said(Reading(f"{name} decode, batch {batch} at {context // 1024}K",
                                   decode_ms(model, batch, context), floor_ms))
            found.append((reading, {"phase": "decode", "batch": batch, "context": context - STEPS}))
        del model
        yield from beside_peers(found, MODELS[name], OF_FAMILY[MODELS[name]["model_type"]], chosen)


def said(reading: Reading) -> Reading:
    """The reading, of which ours is said at once: the next one, or a peer, may take minutes to compile what it runs."""
    print(f"  {reading.case}: {reading.ours_ms:.2f} ms", flush=True)
    return reading


def beside_peers(found: list[tuple[Reading, dict]], shape: dict, names: tuple[str, ...], chosen: Chosen) -> Readings:
    """The readings, with those of the peers: a process each, when ours has given the card's memory back."""
    gc.collect()
    torch.cuda.empty_cache()
    for name in names:
        if name in chosen.without:
            continue
        with Peer(name, shape, "cuda", chosen.peers) as peer:
            for reading, case in found:
                if (ms := peer.ms(case)) is not None:
                    reading.peers_ms[name] = ms
    for reading, _ in found:
        yield reading


def decode_ms(model: Transformer, batch: int, context: int) -> float:
    """The median step, after a few that capture graphs."""
    engine, ms = decoding_engine(model, batch, context), []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        ms.append((time.perf_counter() - began) * 1e3)
    return statistics.median(ms[4:])


def decoding_engine(model: Transformer, batch: int, context: int, steps: int = STEPS,
                    others: list[int] = ()) -> Engine:
    """An engine before `steps` steps of `batch` answers, whose contexts were never computed and then reach `context`;
    its pool has room for `others` of these lengths too."""
    cache = pool_for(model, [context + STEPS] * batch + list(others), limit_bytes=2**36)
    engine = Engine(model, None, replace(cache, prefix_cache=False), max_batch=batch)
    for number in range(batch):
        request = Request(str(number), [number + 1] * (context - steps), SamplingParams(2 * steps, ignore_eos=True))
        if not engine.scheduler.open_cache(request):
            raise RuntimeError("the pool is too small")
        engine.kvcache.advance(request.cache, request.token_ids)
        request.token_ids.append(1)
        request.status, request.first_token_at_s = Status.DECODE, 0.0
        engine.running.append(request)
        engine._texts[request] = _NoText()
    values = engine.kvcache.pool.bytes.view(torch.bfloat16)
    for first in range(0, len(values) - 2, 64):
        values[first:first + 64].normal_(0, 0.1)
    engine.kvcache.pool.bytes[-2:] = 0
    return engine


class _NoText:
    """Stands where an answer's text would be: there is no tokenizer here."""

    text, stopped = "", False

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def prefill(machine: Machine, chosen: Chosen) -> Readings:
    """A prompt as the engine prefills it, in its default chunks."""
    for name in small(chosen):
        model, found = random_model(MODELS[name], chosen.compiled), []
        for tokens in (8192, 32768):
            reading = said(Reading(f"{name} prefill, {tokens // 1024}K", prefill_ms(model, tokens),
                                   machine.prefill_floor_ms(model, tokens)))
            found.append((reading, {"phase": "prefill", "tokens": tokens}))
        del model
        yield from beside_peers(found, MODELS[name], OF_FAMILY[MODELS[name]["model_type"]], chosen)


def small(chosen: Chosen) -> list[str]:
    """The models of which long prompts are timed."""
    return [name for name in chosen.models if name != "llama-3-8b"]


def prefill_ms(model: Transformer, tokens: int, stream: bool = False) -> float:
    """Median milliseconds from the first chunk to the drawn token; with `stream`, while its KVCache leaves."""
    cache = CacheConfig(pool_for(model, [tokens + 1]).num_blocks, 256, prefix_cache=False)
    engine, ms, link = Engine(model, None, cache), [], Loopback()
    landing = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)

    def sink(layer: int, start: int, end: int, data: torch.Tensor) -> None:
        landing[:len(data)].copy_(data)

    with ThreadPoolExecutor(1) as threads:
        for run in range(5):
            prompt = torch.randint(0, model.config.vocab_size, (tokens,)).tolist()
            request = engine.add(engine.request(str(run), prompt, SamplingParams(1), prefill_only=True))
            plan, sends = stream_plan(engine.layout, run, 0, tokens), []
            link.expect(plan, sink)

            def on_kv(request: Request, layer: int, start: int, end: int) -> None:
                if not sends:
                    sends.append(KVSend(engine.kvcache, link, plan, request.cache.block_tables, threads, 60.0))
                sends[0].ready(layer, end)

            torch.cuda.synchronize()
            began = time.perf_counter()
            while engine.has_work:
                engine.step(on_kv if stream else None)
            ms.append((time.perf_counter() - began) * 1e3)
            for send in sends:
                send.finish()
                send.outcome.result(60.0)
            engine.release(request)
    return statistics.median(ms[2:])


def streams(machine: Machine, chosen: Chosen) -> Readings:
    """Prefill of 8K while its KVCache leaves for pinned memory, layer by layer; the floor is the prefill alone."""
    for name in small(chosen):
        model = random_model(MODELS[name], chosen.compiled)
        alone_ms = prefill_ms(model, 8192)
        yield Reading(f"{name} prefill, 8K, streaming (floor: alone)", prefill_ms(model, 8192, stream=True), alone_ms)
        del model


@torch.inference_mode()
def kda(machine: Machine, chosen: Chosen) -> Readings:
    """The delta rule of KDA as the engine runs it for a bfloat16 model, 32 heads of 128, 8,192 tokens at a time: q, k
    and v lie in 16 bits where a layer's projections write them, and outputs are in float16 as a layer reads them. The
    floor is all that read and written once. A further 8,192 tokens are the same ones, after another memory. The error
    is that of the first against the recurrence in float64 of what float16 has not yet rounded:
    |difference| / |exact|."""
    found, heads, dim, shape = [], 32, 128, (1, 8192, 32, 128)
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(shape, device="cuda"), dim=-1) for _ in range(2))
    v = torch.randn(shape, device="cuda")
    g = -(torch.rand(shape, device="cuda") * 8 - 7).exp()  # from forgetting in a thousand tokens to forgetting in one
    beta, before = torch.rand(shape[:3], device="cuda"), torch.zeros(1, heads, dim, dim, device="cuda")
    exact = delta_rule_recurrent(*(tensor.double() for tensor in (q, k, v, g, beta, before)))[0]
    given = q.half(), k.half(), v.half(), g.half(), beta
    given = for_segments(*given) if chosen.compiled else [x[0] for x in given]
    torch.set_float32_matmul_precision("high")
    rule = compiled_segments() if chosen.compiled else lambda *x: delta_rule_chunked(*(y[None] for y in x[:-1]), x[-1])
    core = DeltaGraph(rule, [x.contiguous() for x in given], before, torch.cuda.graph_pool_handle())
    outputs, _, memories = core(before)
    outputs = by_tokens(outputs, memories.scale, shape[1]) if chosen.compiled else outputs
    error = float((outputs - exact).norm() / exact.norm())
    del exact, outputs

    def work(count: int) -> None:
        memory = before
        for _ in range(count):
            memory = core(memory)[1]

    for count in (1, 4):
        floor_ms = count * 5 * given[0].nbytes / machine.copy_bytes_per_s * 1e3
        reading = said(Reading(f"KDA core, {8 * count}K, error {error:.0e}",
                               median_ms(lambda: work(count), "cuda", repeats=4), floor_ms))
        found.append((reading, {"phase": "kda", "tokens": count * shape[1]}))
    torch.set_float32_matmul_precision("highest")
    del q, k, v, g, given, core
    yield from beside_peers(found, {"num_heads": heads, "head_dim": dim}, ("flash-linear-attention",), chosen)


CASES = {"decode": decode, "prefill": prefill, "kda": kda, "streams": streams}
