"""Chapter 04: prefill and decode are different machines. One is bound by arithmetic, one by memory.

    python tutorials/04_prefill_and_decode.py [DIRECTORY]     (no directory: the embedded model, in sections 4 and 5)

Modules: engine/engine.py, engine/runner.py, engine/request.py, engine/reference.py, engine/
Tests: test_engine.py, test_engine_edges.py, test_generate.py, test_warm_up.py, test_pass_graphs.py,
       test_bench_peers.py
Paper: 2.1
"""
import helper

args = helper.begin(__doc__, {"directory": dict(nargs="?", metavar="DIRECTORY", help="a Hugging Face directory")})

import time
from collections.abc import Callable

import torch

from minprfaas import SamplingParams, load
from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, RopeConfig
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import generate
from minprfaas.engine.request import Request, Status
from minprfaas.engine.runner import Runner
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
tiny, tokenizer = load(args.directory)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The quickest of a few runs."""
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began_s)
    return min(times_s)


# %% [markdown]
# ## 1. Two limits
#
# Two numbers bound whatever a machine computes: how fast it multiplies, and how fast it reads memory. A piece of work
# with F multiplications and additions (FLOP) and B bytes takes at least
#
# > T ≥ max(F / arithmetic, B / bandwidth)
#
# so what counts is how many FLOP it does for each byte that it reads. The two limits, measured on one core, float32:
#
# *Guess first:* how many FLOP can this core do while it reads one byte: 1, 5, or 50? (An H100: some 300 in
# bfloat16, by its data sheet.)

# %%
square, memory = torch.randn(2, 1024, 1024), torch.randn(32 * 2**20)
peak_flops = 2 * 1024**3 / seconds(lambda: square[0] @ square[1], repeats=5)
peak_bytes = memory.nbytes / seconds(lambda: memory.sum(), repeats=5)
balance = peak_flops / peak_bytes
print("1. Two limits\n")
print(table(["what", "measured"], [
    ("product of two 1024 x 1024 matrices", f"{peak_flops / 1e9:.0f} GFLOP/s"),
    (f"reading {human_bytes(memory.nbytes)}", f"{peak_bytes / 1e9:.1f} GB/s"),
    ("so while it reads a byte", f"{balance:.1f} FLOP")]))
del memory

# %% [markdown]
# *Why measure, and not look it up?* A busy machine has less of both, and not in proportion. All that is said below is
# relative to these two.
#
# *Change this line:* `1024, 1024` → `64, 64` (and `1024**3`). A small product does not reach the limit. Remember it.

# %% [markdown]
# ## 2. One request: a token at a time, or many
#
# A forward pass reads every weight once, however many tokens are in it. With W weights of 4 bytes and n tokens it does
# about 2 W n FLOP for 4 W bytes, n / 2 FLOP a byte. All tokens of a prompt can share a pass: that is
# [prefill](../docs/glossary.md#prefill). An answer's cannot, for each depends on the one before:
# [decode](../docs/glossary.md#decode) is one token a pass.
#
# *Guess first:* by the line above, at which n does a pass change from the one limit to the other on this core?

# %%
mixer = GQAConfig(num_heads=8, num_kv_heads=4, head_dim=64, rope=RopeConfig())
config = ModelConfig("example", vocab_size=2048, hidden_size=640, layers=(LayerConfig(mixer, DenseConfig(1920)),) * 4,
                     norm_eps=1e-6, tie_embeddings=True, max_context_tokens=4096)
model = Transformer(config).eval()
weights = sum(parameter.numel() for parameter in model.parameters())
CONTEXT = 128  # tokens before the measured ones
ATTENTION_FLOPS = 4 * len(config.layers) * mixer.num_heads * mixer.head_dim  # a new token and a token of context
ROW_BYTES = 2 * mixer.num_kv_heads * mixer.head_dim * 4 * len(config.layers)  # of KVCache, a token


def flops_and_bytes(batch: int, new: int, context: int, number_bytes: int = 4) -> tuple[float, float]:
    """What a pass of `new` tokens for each of `batch` requests must do and read, with `context` tokens behind each."""
    flops = batch * new * (2 * weights + ATTENTION_FLOPS * (context + new / 2))
    return flops, (4 * weights + batch * ROW_BYTES * (context + new)) * number_bytes / 4


class Measured:
    """Such a pass, run with CONTEXT tokens behind each request."""

    def __init__(self, batch: int, new: int):
        state = ContiguousState(config, "float32", batch)
        state.advance(CONTEXT)
        context = torch.randn(batch, CONTEXT, 2 * mixer.num_kv_heads * mixer.head_dim)  # what is there does not matter
        token_ids = torch.randint(config.vocab_size, (batch, new))

        def forward() -> None:
            for layer in state.layers:
                layer.tensors = (context,)  # as before the pass
            model(token_ids, state)

        self.tokens, self.seconds = batch * new, seconds(forward)
        flops, nbytes = flops_and_bytes(batch, new, CONTEXT)
        self.flops_a_byte, self.kvcache_share = flops / nbytes, 1 - 4 * weights / nbytes
        self.arithmetic = flops / self.seconds / peak_flops  # shares of the two limits
        self.reading = nbytes / self.seconds / peak_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """The limit that it comes nearer to."""
        return "memory" if self.reading > self.arithmetic else "arithmetic"


COUNTS = (1, 4, 16, 64, 256)
prefill = {new: Measured(1, new) for new in COUNTS}
print(f"\n2. One request, and a model of {weights / 1e6:.0f}M weights ({human_bytes(4 * weights)})\n")
print(table(["tokens a pass", "tokens/s", "ms a token", "FLOP a byte", "of arithmetic", "of reading", "nearer"], [
    (new, f"{run.tokens_per_s:,.0f}", f"{1e3 / run.tokens_per_s:.2f}", f"{run.flops_a_byte:.1f}",
     f"{run.arithmetic:.0%}", f"{run.reading:.0%}", run.limit) for new, run in prefill.items()]))
one, many = prefill[1], prefill[256]
by_arithmetic = [new for new, run in prefill.items() if run.limit == "arithmetic"]
found = f"the nearer one at {', '.join(map(str, by_arithmetic))}" if by_arithmetic else "never the nearer one"
print(f"""
   By the two limits, arithmetic should be the nearer one from about {2 * balance:.0f} tokens a pass on;
   measured, it was {found}.
   A token costs {one.seconds * 1e3:.1f} ms alone and {1e3 / many.tokens_per_s:.2f} ms among 256.
""")

# %% [markdown]
# *Why is a limit seldom reached?* Only large steps come near it. One token is many small steps, and each has to be
# started; and multiplying a matrix with a single vector reads memory less well than adding up a long row of numbers
# does. (A share above 100% means that the machine was busier when the limit was measured.) So the table only says which
# limit is *nearer*, and it says that from this run's numbers.
#
# *Change this line:* `hidden_size=640` → `128` and `DenseConfig(1920)` → `DenseConfig(384)`: now the weights fit the
# core's caches. Which column changes most at one token a pass?

# %% [markdown]
# ## 3. Many requests: decode's way out
#
# If an answer's tokens cannot share a pass, tokens of *many answers* can: one token of each. They share the weights.
# They do not share the [KVCache](../docs/glossary.md#kvcache): each request's own is read for it alone.
#
# *Guess first:* 64 requests at once: how many times the tokens a second of one? (64 tokens of one prompt: see above.)

# %%
decode = {batch: prefill[1] if batch == 1 else Measured(batch, 1) for batch in COUNTS[:-1]}
print("3. Many requests, a token of each\n")
print(table(["at once", "tokens/s", "gain", "gain of one prompt", "KVCache of the bytes", "FLOP a byte", "nearer"], [
    (batch, f"{run.tokens_per_s:,.0f}", f"{run.tokens_per_s / one.tokens_per_s:.1f}x",
     f"{prefill[batch].tokens_per_s / one.tokens_per_s:.1f}x",
     f"{run.kvcache_share:.0%}", f"{run.flops_a_byte:.1f}", run.limit) for batch, run in decode.items()]))
most = COUNTS[-2]
shared = decode[most].tokens_per_s / one.tokens_per_s
print(f"\n   {most} requests at once draw {shared:.1f} times the tokens a second of one, {most} tokens of one prompt "
      f"{prefill[most].tokens_per_s / one.tokens_per_s:.1f} times.\n"
      f"   Each request brings {human_bytes(ROW_BYTES * CONTEXT)} of KVCache with it, to be read, and to have room.\n")

# %% [markdown]
# *Why is a batch of requests not a prompt?* With each request there is more to read, as the bytes' column says, and not
# only more to compute; and attention is a small product of its own for each. This core does few FLOP while it reads a
# byte (section 1), so its arithmetic is soon used up, and the last column may say so even of decode. A GPU is another
# machine. Its numbers of 2 bytes, this model, by arithmetic:
#
# *Guess first:* the more requests, the more FLOP a byte. With 8,192 tokens behind each, how many does it take to reach
# the 300 of an H100: 640, 6,400, or more?

# %%
H100_FLOPS_A_BYTE = 300
passes = {f"{batch:,} requests, {context:,} tokens behind each": flops_and_bytes(batch, 1, context, 2)
          for batch, context in ((64, 128), (64, 8192), (640, 8192), (6400, 8192))}
passes["a prompt of 8,192 tokens"] = flops_and_bytes(1, 8192, 0, 2)
print(table(["pass", "FLOP a byte", "bound on an H100 by"], [
    (name, f"{flops / nbytes:,.1f}", "memory" if flops / nbytes < H100_FLOPS_A_BYTE else "arithmetic")
    for name, (flops, nbytes) in passes.items()]))
print()

# %% [markdown]
# *Why does no batch get there?* Once the KVCache outweighs the weights, each request adds as many bytes as it adds
# work. A token of context takes 4 FLOP for each channel of each query head, and has 2 numbers of 2 bytes for each
# channel of each KV head: heads / KV heads FLOP a byte, 2 here, whatever the batch. (The new token's own way through
# the weights is the rest, and a longer context outweighs that, too.) So the two kinds of work want different machines.
# Prefill wants arithmetic. Decode wants bandwidth, and memory for many requests' KVCache. That is the case for [PD
# disaggregation](../docs/glossary.md#pd), and it is why the paper puts H200s to prefill and cheaper cards to decode.
#
# *Change this line:* `num_kv_heads=4` in section 2 → `1`. What do 6,400 requests reach now?

# %% [markdown]
# ## 4. Both on one machine: chunked prefill
#
# On one machine they get in each other's way. While a long prompt is read, everybody who is being answered waits. The
# engine cuts the prompt into *chunks*: a step is one chunk, and one token for each running request. (What runs next is
# the scheduler's business, chapter 05; the tensors are the `Runner`'s: `prefill` a chunk, `decode` a batch.)
#
# *Guess first:* one request is being answered, a prompt of 900 tokens comes. With chunks of 64 instead of 1,024, how
# many times as long does the one wait at most, and the other for its first token?

# %%
document = make_document(EVALUATION_SEEDS + 4, tokens=900, encode=tokenizer.encode)
prompt, rows, answers, waits_ms, ttfts_s = document.prompt(document.questions[0]), [], set(), {}, {}
for chunk in (1024, 256, 64):
    engine = Engine(tiny, tokenizer, CacheConfig(num_blocks=1024), prefill_chunk=chunk)
    assert isinstance(engine.runner, Runner)  # on a GPU a faster one stands behind the same two methods
    talker = engine.add(engine.request("talker", "The Chronicle of", SamplingParams(max_tokens=400, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    reader = engine.add(engine.request("reader", prompt, SamplingParams(max_tokens=8)))
    pauses_s = []
    while not reader.output_ids:
        began_s = time.perf_counter()
        engine.step()
        pauses_s.append(time.perf_counter() - began_s)
    while reader.finish_reason is None:
        engine.step()
    answers.add(tuple(reader.output_ids))
    ttfts_s[chunk], waits_ms[chunk] = reader.first_token_at_s - reader.arrived_at_s, max(pauses_s) * 1e3
    rows.append((chunk, len(pauses_s), f"{ttfts_s[chunk]:.2f}", f"{waits_ms[chunk]:.0f}"))
print("4. Both on one machine: chunked prefill\n")
print(table(["chunk, tokens", "steps", "first token after, s", "longest wait of the other, ms"], rows))
print(f"""
   From chunks of 1,024 to chunks of 64 the longest wait becomes {waits_ms[64] / waits_ms[1024]:.2f} times as long,
   the time to the first token {ttfts_s[64] / ttfts_s[1024]:.2f} times.
   With each of the three the answer is {'the same' if len(answers) == 1 else 'DIFFERENT'}.
""")

# %% [markdown]
# *Why can small chunks cost the reader?* Each step reads all weights again for few tokens (section 2), and stops for a
# token of the other. It is a trade, and no size is right for both: another reason for two machines.
#
# *Change this line:* `(1024, 256, 64)` → add 16. Where does the wait of the talker stop getting shorter?

# %% [markdown]
# ## 5. Two machines, and the baton
#
# Here are two engines, each with a pool of its own. One reads and draws the first token; then each layer's state is
# taken out of its blocks as bytes, and put into the other's, which goes on. In this chapter they share a process; in
# chapter 13 there is an ocean between them, and what crosses is the same bytes.
#
# *Guess first:* of the prompt's tokens, how many does the engine that writes compute?

# %%
params = SamplingParams(max_tokens=8)
reads, writes = (Engine(tiny, tokenizer, CacheConfig(num_blocks=1024)) for _ in range(2))
order: Request = reads.add(reads.request("reader", prompt, params, prefill_only=True))
while order.status is not Status.HELD:
    reads.step()

going_on = writes.request("writer", prompt, params)
if not writes.reserve_remote(going_on):
    raise SystemExit("the pool is full")
kv_bytes, tokens = 0, order.prompt_tokens
for layer, group in enumerate(reads.layout.group_of_layer):
    from_blocks, into_blocks = (request.cache.block_tables[group.index] for request in (order, going_on))
    data = reads.kvcache.pool.read_bytes(layer, from_blocks, 0, tokens)
    writes.kvcache.pool.write_bytes(layer, into_blocks, 0, tokens, data)
    kv_bytes += data.numel()
reads.release(order)
writes.admit_remote(going_on, order.output_ids[0])
while writes.has_work:
    writes.step()
(alone,) = generate(tiny, tokenizer, [prompt], params)
same = going_on.output_ids == alone.token_ids
print("5. Two machines, and the baton\n")
print(table(["engine", "prompt tokens computed", "answer tokens drawn"], [
    ("reads", reads.prefilled_tokens, len(order.output_ids)),
    ("writes", writes.prefilled_tokens, len(going_on.output_ids) - len(order.output_ids))]))
print(f"\n   {human_bytes(kv_bytes)} of KVCache for {tokens} tokens were handed over. The answer is "
      f"{'the same' if same else 'NOT the same'}, token by token, as\n   with one engine: {going_on.text.strip()!r}.\n")

# %% [markdown]
# *Why does the writer reserve first?* Only it knows where the bytes must go, into blocks of its own; and when it has no
# room, it is better not to have read. That order (reserve, then ask) is kept throughout: it is called *pull*.
#
# *Change this line:* leave out one layer (`if layer == 3: continue`). Is there an error?

# %%
print(f"A token costs {one.seconds * 1e3:.1f} ms alone, {1e3 / many.tokens_per_s:.2f} ms among 256 of a prompt, "
      f"{1e3 / decode[most].tokens_per_s:.2f} ms among {most} of as many answers.\n"
      "Next: tutorials/05_continuous_batching.py, many answers at once.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_04.py`, then `python tutorials/04_prefill_and_decode.py --check 1`.
# 1. `least_seconds`: the least time that a forward pass can take on a machine, by its two limits.
# 2. `requests_that_fit`: how many requests' KVCache the memory of a decode machine holds beside the weights.
# 3. `prefill_chunks`: the chunks in which the engine reads a prompt.
