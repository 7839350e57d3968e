"""Chapter 03: the paged KVCache. State in equal blocks of one pool, and attention through block tables (paper 3.2).

    python tutorials/03_paged_kvcache.py
"""

import random
import time

import torch

from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)

kda = KDAConfig(num_heads=4, head_dim=32)
mla = MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_dim=32, qk_shared_dim=16, v_dim=32)
layers = tuple(LayerConfig(mixer, DenseConfig(256)) for mixer in (kda, kda, kda, mla) * 2)
config = ModelConfig("kimi_linear", 512, 128, layers, norm_eps=1e-6, tie_embeddings=True,
                     max_context_tokens=8192)
model = Transformer(config).eval()  # random weights: this chapter is about where state lies, not about answers
specs = model_state_specs(config, "float32")

print("""1. Why pages

A request's KVCache grows by a row a token and nobody knows how long it will get. One tensor a request must be as long
as the longest answer could be; blocks are taken one by one as tokens come. Sixteen requests, limit 8,192 tokens:
""")
rng = random.Random(0)
lengths = [min(int(rng.lognormvariate(6.5, 1.0)), 8192) for _ in range(16)]
layout = plan_layout(specs, block_tokens=64)
needed = sum(kv_bytes(specs, length) for length in lengths)
as_tensors = len(lengths) * kv_bytes(specs, 8192)
in_blocks = sum(layout.blocks_for(length) for length in lengths) * layout.block_bytes
print(table(["kept as", "memory", "of it used"], [
    ("one tensor each, as long as the limit", human_bytes(as_tensors), f"{needed / as_tensors:.0%}"),
    ("blocks of 64 tokens", human_bytes(in_blocks), f"{needed / in_blocks:.0%}")]))

print(f"""
2. One pool, several groups

Six of this model's eight layers are linear (KDA): one state a request, whatever its length. Two are full attention
(MLA): a row a token. Layers of one kind form groups of equally many layers, and every group draws on the same pool of
equal blocks of {layout.block_bytes:,} bytes:
""")
rows = []
for group in layout.groups:
    holds, needs = "64 tokens of both layers", "1 for 64 tokens"
    if group.spec.kind is not StateKind.TOKEN:
        holds, needs = f"{1 / group.state_blocks:.2f} of both layers' state", group.state_blocks
    rows.append((group.index, str(list(group.layers)), holds, needs))
print(table(["group", "layers", "a block holds", "blocks a request"], rows))

print("""
3. Block tables

Two requests take turns to grow, so their blocks interleave. A block table lists a request's blocks in token order; it
is all that attention needs to find the rows again. The full-attention group's tables:
""")
cache_config = CacheConfig(num_blocks=120, block_tokens=64)
kvcache = KVCacheManager(layout, cache_config, "cpu", root=b"chapter 03")
prompts = [torch.randint(0, 512, (length,)).tolist() for length in (300, 180)]
requests, token_group = [kvcache.open(prompt) for prompt in prompts], layout.token_groups[0].index
rows = []
for end in (60, 120, 180, 240, 300):
    for name, prompt, request in zip("AB", prompts, requests):
        if end > len(prompt):
            continue
        if not kvcache.reserve(request, end):
            raise SystemExit("the pool is full")
        chunk = torch.tensor([prompt[request.num_tokens:end]])
        model(chunk, kvcache.state([request]))
        kvcache.advance(request, prompt[:end])
        rows.append((name, end, str(list(request.block_tables[token_group]))))
print(table(["request", "tokens", "its block table"], rows))
stats = kvcache.stats()
print(f"\n  blocks: {stats.free} free + {stats.cached} cached + {stats.in_use} in use = {stats.total}")

print("""
4. The model cannot tell

The same tokens through blocks (in chunks, then one by one) and through whole tensors that grow:
""")
contiguous = ContiguousState(config, "float32")
tokens = torch.tensor([prompts[0]])
expected = model(tokens, contiguous)[:, -1]
contiguous.advance(len(prompts[0]))
rows, sequence = [], list(prompts[0])
for step in range(4):
    sequence.append(int(expected.argmax()))
    token = torch.tensor([sequence[-1:]])
    expected = model(token, contiguous)[:, -1]
    contiguous.advance(1)
    kvcache.reserve(requests[0], len(sequence))
    got = model(token, kvcache.state([requests[0]]))[:, -1]
    kvcache.advance(requests[0], sequence)
    rows.append((len(sequence), int(expected.argmax()), int(got.argmax()), f"{(got - expected).abs().max():.1e}"))
print(table(["context", "next token, contiguous", "next token, paged", "largest difference of logits"], rows))

print("""
5. And if a block is not what it should be

One block of request A is overwritten with zeros, as if it had been lost on its way between two datacenters:
""")
layer = layout.token_groups[0].layers[-1]
width = specs[layer].tensors[0].shape[0]
kvcache.pool.write_tokens(layer, requests[0].block_tables[token_group], 64, torch.zeros(64, width))
damaged = model(token, kvcache.state([requests[0]]))[:, -1]
print(f"  largest difference of logits: {(damaged - got).abs().max():.1e}")

print("""
6. What the detour costs

One decode step's attention state at a context of 4,096 tokens: append a row, and get the whole context back.
Growing a tensor copies the old one; pages write one row and gather the blocks. This run:
""")


def median_ms(step, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2] * 1e3


long = kvcache.open([0] * 4096)
if not kvcache.reserve(long, 4097):
    raise SystemExit("the pool is full")
kvcache.advance(long, [0] * 4096)
row, whole = torch.randn(1, 1, width), torch.randn(1, 4096, width)
grown = median_ms(lambda: torch.cat([whole, row], dim=1))
paged = median_ms(lambda: kvcache.state([long]).layer(layer).append(row))
print(table(["append and read 4,096 rows", "ms"], [
    ("a tensor that grows", f"{grown:.2f}"), ("blocks", f"{paged:.2f}")]))

print("""
7. A full pool says no

`reserve` either makes the room or changes nothing; what then happens (wait, or preempt the youngest) is the engine's
decision, in chapter 05.
""")
another = kvcache.open([1] * 4096)
print(f"  reserve(4,096 more tokens) -> {kvcache.reserve(another, 4096)}, {kvcache.stats().free} blocks still free")
kvcache.check()

print(f"""
Shown: blocks use {needed / in_blocks:.0%} of their memory where whole tensors use {needed / as_tensors:.0%}, and the
model computes the same through them.
Next, chapter 04: prefill and decode are different machines.""")
