"""Chapter 04: prefill and decode are different machines. One is bound by arithmetic, one by memory (paper 2.1).

    python tutorials/04_prefill_and_decode.py [DIRECTORY]     (no directory: the embedded model, in part 4)
"""

import sys
import time
from collections.abc import Callable

import torch

from minprfaas import SamplingParams, load
from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, RopeConfig
from minprfaas.documents import make_document
from minprfaas.engine.engine import Engine
from minprfaas.errors import exit_on_user_error
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
tiny, tokenizer = exit_on_user_error(load)(sys.argv[1] if len(sys.argv) > 1 else None)
CONTEXT = 128  # tokens before the measured ones


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The quickest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


print("""1. What this core can do

Two numbers bound everything: how fast it multiplies, and how fast it reads memory. One core, float32:
""")
matrix, column, memory = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(32 * 2**20)
peak_flops = 2 * 1024**3 / seconds(lambda: matrix @ column)
peak_bytes = memory.nbytes / seconds(lambda: memory.sum())
balance = peak_flops / peak_bytes
print(table(["what", "measured"], [
    ("product of two 1024 x 1024 matrices", f"{peak_flops / 1e9:.0f} GFLOP/s"),
    (f"reading {human_bytes(memory.nbytes)}", f"{peak_bytes / 1e9:.1f} GB/s"),
    ("so one byte read pays for", f"{balance:.0f} FLOP")]))
del memory

mixer = GQAConfig(num_heads=12, num_kv_heads=4, head_dim=64, rope=RopeConfig())
config = ModelConfig("example", vocab_size=4096, hidden_size=768, layers=(LayerConfig(mixer, DenseConfig(2304)),) * 5,
                     norm_eps=1e-6, tie_embeddings=True, max_context_tokens=4096)
model = Transformer(config).eval()
weights = sum(parameter.numel() for parameter in model.parameters())
attention_flops = 4 * len(config.layers) * mixer.num_heads * mixer.head_dim  # per new token and token of context
row_bytes = 2 * mixer.num_kv_heads * mixer.head_dim * 4 * len(config.layers)


def measure(batch: int, new: int) -> tuple:
    """One forward pass of `new` tokens for each of `batch` requests with `CONTEXT` tokens behind them; a table row."""
    state = ContiguousState(config, "float32", batch)
    model(torch.randint(config.vocab_size, (batch, CONTEXT)), state, last_only=True)
    state.advance(CONTEXT)
    kept = [layer.tensors for layer in state.layers]
    token_ids = torch.randint(config.vocab_size, (batch, new))

    def forward() -> None:
        for layer, tensors in zip(state.layers, kept):
            layer.tensors = tensors  # as before the pass
        model(token_ids, state)

    pass_s = seconds(forward)
    tokens = batch * new
    flops = tokens * (2 * weights + attention_flops * (CONTEXT + new / 2))
    read = 4 * weights + batch * row_bytes * (CONTEXT + new)
    return (tokens, f"{tokens / pass_s:,.0f}", f"{1e3 * pass_s / tokens:.2f}", f"{flops / read:.1f}",
            f"{flops / pass_s / 1e9:.1f}", f"{flops / pass_s / peak_flops:.0%}",
            f"{read / pass_s / 1e9:.1f}", f"{read / pass_s / peak_bytes:.0%}")


HEADERS = ["tokens", "tokens/s", "ms/token", "FLOP/byte", "GFLOP/s", "of peak", "GB/s", "of peak"]
print(f"""
2. One request: from one token at a time to many

A dense model of {weights / 1e6:.0f}M random weights ({human_bytes(4 * weights)}, more than the caches hold).
A forward pass reads every weight once, however many tokens are in it. All tokens of a prompt can share a pass
(prefill); an answer's cannot, for each depends on the one before (decode: one token a pass):
""")
prefill_rows = [measure(1, new) for new in (1, 4, 16, 64, 256)]
print(table(HEADERS, prefill_rows))
one, many = prefill_rows[0], prefill_rows[-1]
print(f"""
With 1 token the core reads at {one[7]} of its peak and computes at {one[5]} of its peak: it waits for memory.
With 256 tokens it reads at {many[7]} and computes at {many[5]}: it waits for arithmetic.""")

print("""
3. Many requests: decode's only way out

One token of each of many requests shares a pass just as well, as far as the weights go. Each request's own KVCache
still has to be read for it alone:
""")
decode_rows = [measure(batch, 1) for batch in (1, 2, 4, 8, 16, 32)]
print(table(["requests", *HEADERS[1:]], decode_rows))
gain = float(decode_rows[-1][1].replace(",", "")) / float(decode_rows[0][1].replace(",", ""))
print(f"""
32 requests at once get {gain:.1f} times the tokens a second of one. So a prefill machine wants arithmetic, and a decode
machine wants memory: bandwidth for the weights, room for many requests' KVCache.""")

print("""
4. Both on one machine: chunked prefill

On one machine they share steps. While a long prompt is prefilled, everyone who is being answered waits; cutting the
prompt into chunks lets a decode step through after each. A request is being answered when a prompt of 1,500 tokens
arrives (the embedded model, one core):
""")
document = make_document(seed=10**9 + 4, tokens=1500, encode=tokenizer.encode)
prompt, rows, answers = document.prompt(document.questions[0]), [], set()
for chunk in (2048, 512, 128, 32):
    engine = Engine(tiny, tokenizer, CacheConfig(num_blocks=1024), prefill_chunk=chunk)
    talker = engine.add(engine.request("talker", "The Chronicle of", SamplingParams(max_tokens=400, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    reader = engine.add(engine.request("reader", prompt, SamplingParams(max_tokens=8)))
    pauses = []
    while not reader.output_ids:
        began = time.perf_counter()
        engine.step()
        pauses.append(time.perf_counter() - began)
    while reader.finish_reason is None:
        engine.step()
    answers.add(tuple(reader.output_ids))
    ttft_s = reader.first_token_at_s - reader.arrived_at_s
    rows.append((chunk, len(pauses), f"{ttft_s:.2f}", f"{1e3 * max(pauses):.0f}"))
print(table(["chunk, tokens", "steps", "first token after, s", "longest wait of the other, ms"], rows))
verdict = "The answer is the same every time" if len(answers) == 1 else "THE ANSWERS DIFFER"
drawn = list(answers.pop())
end = next((position for position, token in enumerate(drawn) if token in tiny.config.eos_token_ids), len(drawn))
print(f"""
{verdict}: {tokenizer.decode(drawn[:end]).strip()!r} (the document: {document.questions[0].answer!r}).
Small chunks are kind to the one who is talking and cost the one who waits: each step then waits for memory again.

Shown: a token costs {one[2]} ms alone and {many[2]} ms among 256, because prefill is bound by arithmetic and decode by
memory. They want different machines, which is why serving splits them. Next: tutorials/05_continuous_batching.py.""")
