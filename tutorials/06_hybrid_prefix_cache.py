"""Chapter 06: the hybrid prefix cache pool. What was computed once is not computed again (paper 3.2, figure 4).

    python tutorials/06_hybrid_prefix_cache.py
"""

import random
import time

import torch

from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.kvcache.replay import replay_trace
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import model_state_specs
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
rng = random.Random(0)

kda = KDAConfig(num_heads=4, head_dim=32)
mla = MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_dim=32, qk_shared_dim=16, v_dim=32)
layers = tuple(LayerConfig(mixer, DenseConfig(256)) for mixer in (kda, kda, kda, mla) * 2)
config = ModelConfig("kimi_linear", 512, 128, layers, norm_eps=1e-6, tie_embeddings=True,
                     max_context_tokens=8192)
model = Transformer(config).eval()  # random weights: what is reused matters here, not what is said
layout = plan_layout(model_state_specs(config, "float32"), block_tokens=64)


def node(num_blocks: int, **options) -> KVCacheManager:
    """The KVCache of one node that runs the model."""
    return KVCacheManager(layout, CacheConfig(num_blocks, 64, **options), "cpu", root=b"chapter 06")


def prefill(kvcache: KVCacheManager, tokens: list[int]) -> tuple[RequestCache, torch.Tensor]:
    """Compute what the cache does not hold; returns the request and the logits `[vocab]` after the last token."""
    request = kvcache.open(tokens)
    while request.num_tokens < len(tokens):
        end = kvcache.plan_chunk(request, len(tokens), max_chunk=512)
        if not kvcache.reserve(request, end):
            raise SystemExit("the pool is full")
        chunk = torch.tensor([tokens[request.num_tokens:end]])
        logits = model(chunk, kvcache.state([request]), last_only=True)
        kvcache.advance(request, tokens[:end])
    return request, logits[0, -1]


def decode(kvcache: KVCacheManager, request: RequestCache, tokens: list[int], logits: torch.Tensor,
           count: int) -> list[int]:
    """`count` greedy tokens after `tokens`; returns all of them."""
    for _ in range(count):
        tokens = [*tokens, int(logits.argmax())]
        kvcache.reserve(request, len(tokens))
        logits = model(torch.tensor([tokens[-1:]]), kvcache.state([request]))[0, -1]
        kvcache.advance(request, tokens)
    return tokens


def words(count: int) -> list[int]:
    return [rng.randrange(512) for _ in range(count)]


print("""1. An address for a block

A full block's key is a hash of its tokens and of the key before it, down to the model's fingerprint. So equal keys
mean equal prefixes, and two prompts share keys exactly as far as their tokens agree (block by block):
""")
kvcache = node(400)
document = words(512)
prompts = {"document": document, "document, last token changed": [*document[:-1], 7],
           "document, token 100 changed": [*document[:100], 7, *document[101:]]}
print(table(["prompt of 512 tokens", "keys of its 8 blocks (first 2 bytes)"], [
    (name, " ".join(key[:2].hex() for key in kvcache.keys(prompt))) for name, prompt in prompts.items()]))

print("""
2. When a prefix can be reused

Attention's rows of any prefix are there once they are computed. A linear layer keeps only its latest state, which
belongs to one length. So a match of n tokens needs every full block up to n, and a snapshot of the state at exactly n.
Snapshots are taken every 4 blocks here, and at a prompt's last full boundary. The document is prefilled; then come:
""")
kvcache = node(400, snapshot_every=4)
request, _ = prefill(kvcache, [*document, *words(40)])
kvcache.close(request)
followers = {"the same document, another question": [*document, *words(30)],
             "the first 300 tokens, then other text": [*document[:300], *words(300)],
             "the first 200 tokens, then other text": [*document[:200], *words(300)],
             "another document": words(552)}
print(table(["prompt", "tokens", "blocks in common", "tokens reused"], [
    (name, len(prompt), kvcache.ledger.common(kvcache.keys(prompt)), kvcache.match(prompt))
    for name, prompt in followers.items()]))

print("""
  The third has 3 blocks in common and no snapshot to begin from. Its own prefill leaves one where it parts from the
  document, because a prefix that two prompts share is likely to come again:
""")
third = followers["the first 200 tokens, then other text"]
request, _ = prefill(kvcache, third)
kvcache.close(request)
print(f"  a fourth prompt with those 200 tokens reuses {kvcache.match([*document[:200], *words(50)])} tokens")

print("""
3. A conversation

The decode side keeps a finished request's blocks, and a snapshot at the last full boundary of its answer. Each turn
brings 100 new tokens and 30 of answer. The same tokens come out as without a cache:
""")
kvcache, without = node(600), node(600, prefix_cache=False)
rows, tokens, same = [], words(1200), True
for turn in range(1, 5):
    timings = []
    for cache in (kvcache, without):
        began = time.perf_counter()
        request, logits = prefill(cache, tokens)
        timings.append((time.perf_counter() - began) * 1e3)
        answered = decode(cache, request, tokens, logits, 30)
        cache.close(request)
        same &= cache is kvcache or answered == expected
        expected = answered
        if cache is kvcache:
            reused = request.cached_tokens
    rows.append((turn, len(tokens), reused, f"{timings[0]:.0f}", f"{timings[1]:.0f}"))
    tokens = [*expected, *words(100)]
print(table(["turn", "prompt", "reused", "prefill ms", "without cache ms"], rows))
print(f"\n  answers with and without the cache are identical: {same}")

print("""
4. Only the increment crosses

When another datacenter prefills the turn, its KVCache is shipped; but the decode side still has the last turn's. The
link carries the rows of the missing tokens and each linear layer's final state. To receive, no snapshot is needed: the
state crosses in any case, so the decode side counts on every full block that it has.
""")
prefiller, decoder = node(600), node(600)
rows, tokens = [], words(1200)
for turn in range(1, 5):
    sent, logits = prefill(prefiller, tokens)
    received = decoder.open(tokens, to_receive=True)
    decoder.reserve(received, len(tokens))
    crossed = whole = 0
    for layer, spec in enumerate(layout.specs):
        group = layout.group_of_layer[layer].index
        data = prefiller.pool.read_bytes(layer, sent.block_tables[group], received.cached_tokens, len(tokens))
        decoder.pool.write_bytes(layer, received.block_tables[group], received.cached_tokens, len(tokens), data)
        crossed += data.numel()
        whole += spec.nbytes * (len(tokens) if spec.kind is StateKind.TOKEN else 1)
    decoder.advance(received, tokens)
    prefiller.close(sent)
    rows.append((turn, len(tokens), sent.cached_tokens, received.cached_tokens,
                 human_bytes(crossed), human_bytes(whole)))
    tokens = [*decode(decoder, received, tokens, logits, 70), *words(60)]
    decoder.close(received)
print(table(["turn", "prompt", "in prefill's cache", "in decode's cache", "crossed", "without cache"], rows))

print("""
5. The two lives of a block

Prefix-cache blocks are full, indexed and shared. Transfer-cache blocks, the unaligned tail and the exact-length state,
belong to one request and are freed when its transfer is acknowledged:
""")


def lives(moment: str) -> tuple:
    stats = prefiller.stats()
    return moment, stats.free, stats.cached, stats.in_use, stats.transfer


rows = [lives("before")]
sent, _ = prefill(prefiller, tokens)
rows.append(lives("prefilled"))
prefiller.begin_transfer(sent)
prefiller.close(sent)
rows.append(lives("request closed, bytes on the link"))
prefiller.end_transfer(sent)
rows.append(lives("acknowledged"))
prefiller.check()
print(table(["blocks", "free", "cached", "in use", "of these only in transfer"], rows))

print("""
6. A pool is never large enough

Least recently used goes first, but never out of the middle of a prefix: a request lets go of its blocks from the
tail, so a prefix shrinks from its tail. A snapshot leaves with the block that it ends at, and what is left can still be
begun from the snapshot before. A pool with one prefix of 512 tokens, squeezed by larger and larger requests:
""")
squeezed, rows = node(120, snapshot_every=2), []
request, _ = prefill(squeezed, document)
squeezed.close(request)
for demand in (0, 50, 75, 85, 95, 105, 119):
    blocks = squeezed.ledger.allocate(demand)  # as a large request would; given back at once
    squeezed.ledger.release(blocks)
    stats = squeezed.stats()
    rows.append((demand, stats.cached, stats.evicted_entries, squeezed.match([*document, 0])))
squeezed.check()
print(table(["blocks demanded", "still cached", "evicted", "tokens that can be reused"], rows))

print("""
7. Hit ratio against capacity

Conversations, half of them opening with one of 8 system prompts, through the same index and eviction without any
tensors (the trace is invented here; `python -m minprfaas simulate --cache-only --trace FILE` replays a real one):
""")
trace, chats, fresh = [], [], iter(range(10**9))
openings = [[next(fresh) for _ in range(10)] for _ in range(8)]
for _ in range(4000):
    if chats and rng.random() < 0.6:
        chat = chats[-min(int(rng.expovariate(0.02)) + 1, len(chats))]
    else:
        chats.append(chat := list(rng.choice(openings)) if rng.random() < 0.5 else [])
    chat += [next(fresh) for _ in range(rng.randrange(1, 8))]
    trace.append(list(chat))
capacities = (300, 1000, 3000, 10_000, None)
dense = replay_trace(trace, capacities)
hybrid = replay_trace(trace, capacities, state_blocks=4)
print(table(["blocks", "dense model", "hybrid model, a snapshot is 4 blocks"], [
    (a.capacity_blocks or "unlimited", f"{a.hit_ratio:.1%}", f"{b.hit_ratio:.1%}") for a, b in zip(dense, hybrid)]))

print("""
Shown: a prefix computed once is reused where blocks and a snapshot agree, and only the increment crosses the link.
Next, chapter 07: a link between two processes.""")
