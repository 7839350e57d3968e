"""Chapter 03: the paged KVCache. State in equal blocks of one pool, and attention through block tables.

    python tutorials/03_paged_kvcache.py

Modules: kvcache/layout.py, kvcache/pool.py, kvcache/paged.py, kvcache/request_cache.py, model/paged_attention.py
Tests: test_kvcache_layout.py, test_kvcache_pool.py, test_kvcache_paged.py, test_fast_runner.py
Paper: 3.2
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import random
import time
from collections.abc import Callable

import torch

from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.paged_attention import attend_to_copied_pages, merge_pages, page_index
from minprfaas.model.spec import Pages, kv_bytes, model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)

# %% [markdown]
# ## 1. Why pages
#
# A request's [KVCache](../docs/glossary.md#kvcache) grows by a row a token, and nobody knows how long it will get. One
# tensor a request would have to be as long as the longest answer could become. So memory is cut into equal
# [blocks](../docs/glossary.md#block), as an operating system cuts it into pages, and a request takes one when it needs
# one.
#
# *Guess first:* sixteen requests of quite different lengths, at most 8,192 tokens each. With one tensor a request, what
# share of the memory is ever used? And with blocks of 64 tokens?

# %%
BLOCK_TOKENS, LIMIT = 64, 8192
rng = random.Random(0)
lengths = [min(int(rng.lognormvariate(6.5, 1.0)), LIMIT) for _ in range(16)]
in_tensors = sum(lengths) / (len(lengths) * LIMIT)
in_blocks = sum(lengths) / sum(-(-length // BLOCK_TOKENS) * BLOCK_TOKENS for length in lengths)
print("1. Why pages\n")
print(table(["kept as", "of its rows used"], [("a tensor each, as long as the limit", f"{in_tensors:.0%}"),
                                              (f"blocks of {BLOCK_TOKENS} tokens", f"{in_blocks:.0%}")]))
print()

# %% [markdown]
# *Why not blocks of one token, and waste nothing?* Each block is an entry in a table that somebody must look up, hash
# (chapter 06) and send (chapter 08).
#
# *Change this line:* `BLOCK_TOKENS` = 64 → 16, 256, 1024. Where would you stop?

# %% [markdown]
# ## 2. A block table, by hand
#
# The whole idea is three things: a *pool* of blocks, a list of the *free* ones, and for each request a *block table*,
# the blocks that it has, in token order. Token t of a request is row t % 64 of block `table[t // 64]`.
#
# *Guess first:* two requests grow in turns, 40 tokens at a time. Which blocks has the first one after 160 tokens?

# %%
width, size = 80, 64
pool, free, tables, counts = torch.zeros(12, size, width), list(range(12)), {}, {}


def append(name: str, rows: torch.Tensor) -> None:
    """Store `rows` `[tokens, width]` after what the request has; take blocks where it needs them."""
    blocks, start = tables.setdefault(name, []), counts.get(name, 0)
    while len(blocks) * size < start + len(rows):
        blocks.append(free.pop(0))
    for place, row in enumerate(rows, start):
        pool[blocks[place // size], place % size] = row
    counts[name] = start + len(rows)


def rows_of(name: str) -> torch.Tensor:
    """All its rows in token order, `[tokens, width]`: a copy out of the blocks."""
    return pool[tables[name]].flatten(0, 1)[:counts[name]]


whole = {"A": torch.randn(160, width), "B": torch.randn(160, width)}
for begin in range(0, 160, 40):
    for name, rows in whole.items():
        append(name, rows[begin:begin + 40])
same = all(torch.equal(rows_of(name), rows) for name, rows in whole.items())
print("2. A block table, by hand\n")
print(table(["request", "tokens", "its block table"], [(name, counts[name], str(tables[name])) for name in whole]))
print(f"\n   Read back in token order, the rows are {'the same' if same else 'DIFFERENT'}.\n")

# %% [markdown]
# *Why take the blocks in turn?* Nobody reserved them: each took the next free one when it had to. When A ends, its
# blocks go back to `free`, and no hole is ever too small for anybody, because all are of one size.
#
# *Change this line:* `torch.zeros(12, …), list(range(12))` → `5` in both places. The sixth block is not there, and
# Python says so with a traceback; section 7 shows what the package says.

# %% [markdown]
# ## 3. One pool for two kinds of state
#
# A hybrid model has rows a token in some layers, and in the others one state a request (chapter 02). The package keeps
# both in *one* pool of equal blocks: layers that need the same state form *groups* of equally many layers, each
# group with a block table of its own. A token group's block holds 64 tokens of all its layers; a request group's state
# fills a few whole blocks, once.
#
# *Guess first:* eight layers, every fourth full attention. How many groups? And how many blocks has a request of 300
# tokens?

# %%
kda = KDAConfig(num_heads=4, head_dim=32)
mla = MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_dim=32, qk_shared_dim=16, v_dim=32)
layers = tuple(LayerConfig(mixer, DenseConfig(256)) for mixer in (kda, kda, kda, mla) * 2)
config = ModelConfig("kimi_linear", 512, 128, layers, norm_eps=1e-6, tie_embeddings=True, max_context_tokens=LIMIT)
model = Transformer(config).eval()  # random weights: this chapter is about where state lies, not about answers
specs = model_state_specs(config, "float32")
layout = plan_layout(specs, BLOCK_TOKENS)
print("3. One pool for two kinds of state\n")
print(table(["group", "layers", "kind", "blocks a request", "left empty"], [
    (group.index, str(list(group.layers)), group.spec.kind.value,
     "1 for 64 tokens" if group.spec.kind is StateKind.TOKEN else group.state_blocks, f"{layout.waste(group):.0%}")
    for group in layout.groups]))
print(f"\n   Blocks of {layout.block_bytes:,} bytes. A request of 300 tokens has {layout.blocks_for(300)} "
      f"({human_bytes(layout.blocks_for(300) * layout.block_bytes)} for {human_bytes(kv_bytes(specs, 300))} of state), "
      f"of 3,000 {layout.blocks_for(3000)}.\n")

# %% [markdown]
# `PagedState` is what the model sees of it: each layer appends rows, or loads and stores its one state, and never hears
# of a block. Two requests are run in turns, and each against whole tensors of its own.

# %%
kvcache = KVCacheManager(layout, CacheConfig(num_blocks=120, block_tokens=BLOCK_TOKENS), "cpu", root=b"chapter 03")
block_pool: BlockPool = kvcache.pool
prompts = {"A": torch.randint(512, (300,)).tolist(), "B": torch.randint(512, (180,)).tolist()}
requests: dict[str, RequestCache] = {name: kvcache.open(prompt) for name, prompt in prompts.items()}
(token_group,), rows = layout.token_groups, []
for end in (100, 180, 300):
    for name, prompt in prompts.items():
        request = requests[name]
        if end > len(prompt):
            continue
        if not kvcache.reserve(request, end):
            raise SystemExit("the pool is full")
        new = torch.tensor([prompt[request.num_tokens:end]])
        paged = PagedState(block_pool, [request.block_tables], [request.num_tokens])  # `kvcache.state([request])`
        logits = model(new, paged)[0, -1]
        kvcache.advance(request, prompt[:end])
        alone = model(torch.tensor([prompt[:end]]))[0, -1]
        rows.append((name, end, str(list(request.block_tables[token_group.index])),
                     f"{(logits - alone).abs().max():.0e}"))
print(table(["request", "tokens", "block table of the rows", "logits, to whole tensors"], rows))
stats = kvcache.stats()
print(f"\n   {stats.free} free + {stats.cached} cached + {stats.in_use} in use = {stats.total} blocks.\n")

# %% [markdown]
# *Why one pool, and not one for each kind?* Then somebody would have to say beforehand how long requests will be: long
# ones want rows, many short ones want states. In one pool the blocks go where they are needed.
#
# *Change this line:* `(kda, kda, kda, mla) * 2` → `(mla,) * 8`: a dense model. What does a request of 300 tokens take?

# %% [markdown]
# ## 4. Attention without the copy
#
# `rows_of` copied everything, only to read it once. The copy is not needed, because softmax over all tokens is a
# weighted sum of softmaxes over parts. Keep each page's output and the logarithm of its denominator,
# L = log Σ exp(score); then
#
# > o = Σ_pages softmax(L)_page · o_page
#
# *Guess first:* with 65 pages, how many numbers cross from the pages into the sum, for one head of 32?

# %%
dim, context = 32, 4128
k_and_v = torch.randn(70, size, 2 * dim)  # a pool: each row a key, then a value
blocks = torch.randperm(70)[:65]
q = torch.randn(dim)
outputs, log_sums = [], []
for position, block in enumerate(blocks):
    rows = k_and_v[block][:context - position * size]  # the last page is not full
    scores = rows[:, :dim] @ q / dim**0.5
    outputs.append(scores.softmax(dim=0) @ rows[:, dim:])
    log_sums.append(scores.logsumexp(dim=0))
by_page = torch.stack(log_sums).softmax(dim=0) @ torch.stack(outputs)

rows = k_and_v[blocks].flatten(0, 1)[:context]
at_once = (rows[:, :dim] @ q / dim**0.5).softmax(dim=0) @ rows[:, dim:]
pages = Pages(k_and_v, blocks[None], torch.tensor([context]))
row_counts = page_index(pages, groups=1).row_counts
query = q.view(1, 1, 1, dim)
of_package = merge_pages(*attend_to_copied_pages(query, pages, row_counts, dim**-0.5, kv_heads=1)).flatten()
print("4. Attention without the copy\n")
print(table(["over 4,128 tokens in 65 pages", "largest difference to one softmax"], [
    ("page by page, by hand", f"{(by_page - at_once).abs().max():.0e}"),
    ("by `merge_pages` of the package", f"{(of_package - at_once).abs().max():.0e}")]))
print(f"\n   {len(blocks)} pages give {len(blocks) * (dim + 1):,} numbers; the rows have {context * 2 * dim:,}.\n")

# %% [markdown]
# *Why is that how GPUs do it?* The pages are read side by side, each once, where they lie. The package's decode does so
# on GPUs and on CPUs (`model/paged_attention.py`); its eager runner gathers the rows, which is the readable way and the
# reference.
#
# *Change this line:* `log_sums` all zero (`torch.zeros(())`): every page counts the same. Which pages suffer most?

# %% [markdown]
# ## 5. What the detour costs
#
# One decode step of one layer with 4,096 tokens behind it: append a row, and have the whole context to read. Three ways
# to keep it, measured:
#
# *Guess first:* both a tensor that grows and the gathering of blocks move the same megabyte. Which takes
# longer, and by how many times?


# %%
def median_ms(step: Callable[[], object], repeats: int = 30) -> float:
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - began_s)
    return sorted(times_s)[repeats // 2] * 1e3


for request in requests.values():
    kvcache.close(request)
long = kvcache.open([0] * 4096)
if not kvcache.reserve(long, 4097):
    raise SystemExit("the pool is full")
kvcache.advance(long, [0] * 4096)
layer = token_group.layers[-1]
row, grown, roomy = torch.randn(1, 1, width), torch.randn(1, 4096, width), torch.randn(1, LIMIT, width)


def in_place() -> torch.Tensor:
    roomy[:, 4096] = row[:, 0]
    return roomy[:, :4097]


paged = kvcache.state([long])
rows_in_blocks = paged.layer(layer).append(row)
parts = {"look up the blocks": median_ms(lambda: kvcache.state([long]).token_index(token_group, 1)),
         "write the row": median_ms(lambda: paged.layer(layer).append(row)),
         "gather the rows": median_ms(rows_in_blocks.rows)}
grow_ms, room_ms = median_ms(lambda: torch.cat([grown, row], dim=1)), median_ms(in_place)
blocks_ms = sum(parts.values())
print("5. What the detour costs (4,096 rows of 80 numbers)\n")
print(table(["kept as", "ms"], [("a tensor as long as the limit", f"{room_ms:.3f}"),
                                ("a tensor that grows: copy all, and one more", f"{grow_ms:.3f}"),
                                ("blocks", f"{blocks_ms:.3f}"),
                                *((f"  {part}", f"{part_ms:.3f}") for part, part_ms in parts.items())]))
dearest = max(parts, key=parts.get)
print(f"\n   Blocks take {blocks_ms / grow_ms:.1f} times what the growing tensor takes; the largest part, "
      f"{parts[dearest] / blocks_ms:.0%}, is to {dearest}.\n")

# %% [markdown]
# *Why so?* Looking up is Python, and costs the same for one token as for ten thousand; all layers of a group and all
# requests of a step share it. Gathering copies block by block from a view with gaps (the block's other layer lies
# between), where the growing tensor is one straight copy. Neither is arithmetic, and section 4 is how the copy goes
# away. What blocks buy with it is the first table of this chapter.
#
# *Change this line:* `[0] * 4096` and `4097` → 512. Which part of the three has not changed?

# %% [markdown]
# ## 6. If a block is not what it should be
#
# One block of a request is overwritten with zeros, as if it had been lost between two datacenters.
#
# *Guess first:* of 300 tokens in eight layers, 64 tokens of one layer are gone. By how much does a logit change at
# most: 1e-6, 0.01 or 0.4? And who raises an error?

# %%
request = kvcache.open(prompts["A"])
if not kvcache.reserve(request, 301):
    raise SystemExit("the pool is full")
model(torch.tensor([prompts["A"]]), kvcache.state([request]))
kvcache.advance(request, prompts["A"])
contiguous = ContiguousState(config, "float32")
model(torch.tensor([prompts["A"]]), contiguous)
contiguous.advance(300)
token, kept = torch.tensor([[7]]), block_pool.bytes.clone()
expected = model(token, contiguous)[0, -1]
intact = model(token, kvcache.state([request]))[0, -1]
block_pool.bytes.copy_(kept)  # as before the step, which has moved the linear layers' state on
block_pool.write_tokens(layer, request.block_tables[token_group.index], 64, torch.zeros(64, width))
damaged = model(token, kvcache.state([request]))[0, -1]
print("6. If a block is not what it should be\n")
print(table(["the request's blocks", "logits, largest difference to whole tensors"], [
    ("as they were", f"{(intact - expected).abs().max():.0e}"),
    ("64 rows of one layer zeroed", f"{(damaged - expected).abs().max():.0e}")]))
print()

# %% [markdown]
# *Why does nobody notice?* Zeros are numbers, attention reads them, and an answer comes out: fluent, and wrong. So what
# crosses a link carries a check sum (chapter 07), and this project's tests compare blocks byte for byte.
#
# *Change this line:* zero the rows from 256 on instead (`256, torch.zeros(44, width)`).

# %% [markdown]
# ## 7. A full pool says no
#
# `reserve` either makes the room or changes nothing. What follows (wait, or give something back) is for the engine to
# decide: chapter 05.
#
# *Guess first:* two requests have most of the 120 blocks. A third asks for 4,096 tokens. How many blocks does it get?

# %%
before, another = kvcache.stats().free, kvcache.open([1] * 4096)
got = kvcache.reserve(another, 4096)
print("7. A full pool says no\n")
print(f"   It needs {layout.blocks_for(4096)} blocks, {before} are free: reserve gives {got}, and "
      f"{kvcache.stats().free} are free still.")
kvcache.check()  # recounts every block, and raises if one is lost or has two owners

# %% [markdown]
# *Why not hand out those that are free?* Two requests that each hold half of what they need would wait for each other,
# and neither would ever give anything back. Who gets all or nothing can always be asked to wait.
#
# *Change this line:* `reserve(another, 4096)` → `1024`. How many are free afterwards?

# %%
print(f"\nBlocks use {in_blocks:.0%} of their rows where whole tensors use {in_tensors:.0%}; through them the model "
      "computes the same.\nNext: tutorials/04_prefill_and_decode.py, why two machines.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_03.py`, then `python tutorials/03_paged_kvcache.py --check 1`.
# 1. `place_of`: where a token of a request lies in the pool.
# 2. `blocks_to_reserve`: how many blocks a request lacks before it can go on.
# 3. `merge_two`: one attention out of two parts of a context.
