"""Chapter 06: the hybrid prefix cache pool. What was computed once is not computed again.

    python tutorials/06_hybrid_prefix_cache.py [--plots DIRECTORY]

Modules: kvcache/ledger.py, kvcache/manager.py, kvcache/snapshots.py, kvcache/request_cache.py, kvcache/replay.py,
observe/simulation_plots.py
Tests: test_kvcache_ledger.py, test_kvcache_manager.py, test_kvcache_streams.py,
       test_kvcache_random.py, test_kvcache_replay.py
Paper: 3.2, figure 4
"""
import helper

args = helper.begin(__doc__, {"--plots": dict(metavar="DIRECTORY", help="draw section 7 there, as a picture")})

import hashlib
import random
import time
from array import array

import torch
from made_up import conversations, small_hybrid

from minprfaas.config import CacheConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.ledger import KEY_BYTES, root_key
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.replay import replay_trace
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.kvcache.snapshots import ExpectedSnapshot
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.observe.plots import prepare_plots
from minprfaas.observe.simulation_plots import draw_hit_ratios
from minprfaas.observe.tables import human_bytes, table

if args.plots:
    prepare_plots(args.plots)  # a mistake is said now, not after the last section
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
rng = random.Random(0)

# %% [markdown]
# The model of this chapter is a small [hybrid](../docs/glossary.md#hybrid-model) with random weights: what is reused
# matters here, not what is said. Of four layers three are [KDA](../docs/glossary.md#kda) and one
# [MLA](../docs/glossary.md#mla). A *node* is its [KVCache](../docs/glossary.md#kvcache) pool, in blocks of 64 tokens.

# %%
BLOCK, FINGERPRINT = 64, b"chapter 06"
model = small_hybrid()
layout = plan_layout(model_state_specs(model.config, "float32"), block_tokens=BLOCK)


def node(num_blocks: int, **options) -> KVCacheManager:
    """The KVCache of one node that runs the model."""
    return KVCacheManager(layout, CacheConfig(num_blocks, BLOCK, **options), "cpu", root=FINGERPRINT)


def words(count: int) -> list[int]:
    return [rng.randrange(512) for _ in range(count)]


# %% [markdown]
# ## 1. An address for a block
#
# To find again what was computed, a [block](../docs/glossary.md#block) needs a name that says what is in it. The rows
# of a token depend on *everything* before it, so its own tokens are not enough. A full block's key is therefore a hash
# of its tokens *and of the key before it*, down to the model's fingerprint: equal keys mean equal prefixes.
#
# *Guess first:* two prompts of 512 tokens (8 blocks) differ in token 100 only. How many of their keys are equal?


# %%
def chain(tokens: list[int]) -> list[bytes]:
    """The keys of the full blocks of a prompt."""
    keys, previous = [], root_key(FINGERPRINT)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        as_bytes = array("q", tokens[start:start + BLOCK]).tobytes()  # 8 bytes a token
        previous = hashlib.blake2b(previous + as_bytes, digest_size=KEY_BYTES).digest()
        keys.append(previous)
    return keys


kvcache = node(400, snapshot_every=4)
document = words(512)
prompts = {"document": document, "document, last token changed": [*document[:-1], 7],
           "document, token 100 changed": [*document[:100], 7, *document[101:]]}
print("1. An address for a block\n")
print(table(["prompt of 512 tokens", "keys of its 8 blocks (first 2 bytes)"], [
    (name, " ".join(key[:2].hex() for key in chain(prompt))) for name, prompt in prompts.items()]))
same = all(chain(prompt) == kvcache.keys(prompt) for prompt in prompts.values())
print(f"\n   Eight lines of hashing and the manager's `keys`: {'the same' if same else 'DIFFERENT'}.\n")

# %% [markdown]
# *Why so long a hash (32 bytes)?* Two prompts with the same key would be handed each other's KVCache, and somebody
# could look for such a pair on purpose. A short checksum is enough against chance, not against that.
#
# *Change this line:* `previous + as_bytes` → `as_bytes`. Now a block's name does not know what came before it: find two
# prompts whose third key is equal and whose KVCache is not.

# %% [markdown]
# ## 2. When a prefix can be reused
#
# Attention's rows ([token state](../docs/glossary.md#token-state-and-request-state)) of any prefix are there once they
# are computed. A linear layer has only its latest state, and that belongs to exactly one length. So to begin after n
# tokens a node needs every full block up to n, *and* a copy of the linear layers' state that was taken at exactly n: a
# [snapshot](../docs/glossary.md#snapshot). Here one is taken every 4 blocks, and at a prompt's last full block.
#
# *Guess first:* a document of 512 tokens was prefilled. How many tokens does a prompt reuse that shares its first 300?
# And one that shares its first 200?


# %%
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


def reusable(kvcache: KVCacheManager, tokens: list[int]) -> int:
    """What `match` says, by hand: full blocks in common, then back to the last one that has a snapshot."""
    keys = chain(tokens[:-1])  # the last token is always computed: the answer begins with its logits
    count = 0
    while count < len(keys) and keys[count] in kvcache.ledger.blocks:
        count += 1
    while count and keys[count - 1] not in kvcache.ledger.snapshots:
        count -= 1
    return count * BLOCK


request, _ = prefill(kvcache, [*document, *words(40)])
kvcache.close(request)
followers = {"the same document, another question": [*document, *words(30)],
             "the first 300 tokens, then other text": [*document[:300], *words(300)],
             "the first 200 tokens, then other text": [*document[:200], *words(300)],
             "another document": words(552)}
print("2. When a prefix can be reused\n")
print(table(["prompt", "tokens", "blocks in common", "tokens reused"], [
    (name, len(prompt), kvcache.ledger.common(kvcache.keys(prompt)), kvcache.match(prompt))
    for name, prompt in followers.items()]))
agrees = all(reusable(kvcache, prompt) == kvcache.match(prompt) for prompt in followers.values())
request, _ = prefill(kvcache, followers["the first 200 tokens, then other text"])
kvcache.close(request)
print(f"\n   By hand and by the manager: {'the same' if agrees else 'DIFFERENT'}. After the third one was prefilled, "
      f"a fourth with those\n   200 tokens reuses {kvcache.match([*document[:200], *words(50)])}.\n")

# %% [markdown]
# *Why does the fourth get more than the third?* The third had 3 blocks in common with the document and no snapshot to
# begin from. Its own prefill left one where the two part, because a prefix that two prompts share is likely to come
# again: a system prompt, a document that many ask about.
#
# *Why not a snapshot after every block?* One costs as much as several blocks of tokens, and pushes those out of the
# pool. Section 7 weighs that.
#
# *Change this line:* `node(400, snapshot_every=4)` → `snapshot_every=1`, then `100`.

# %% [markdown]
# ## 3. A conversation
#
# After an answer the node keeps the request's blocks, and a snapshot at the last full block of the *answer*: the next
# turn begins there.
#
# *Guess first:* a first turn of 1,200 tokens; then each turn brings 100 new ones and an answer of 30. What part of the
# fourth prompt must still be computed? Do the same tokens come out?


# %%
def decode(kvcache: KVCacheManager, request: RequestCache, tokens: list[int], logits: torch.Tensor,
           count: int) -> list[int]:
    """`count` greedy tokens after `tokens`; returns all of them."""
    for _ in range(count):
        tokens = [*tokens, int(logits.argmax())]
        kvcache.reserve(request, len(tokens))
        logits = model(torch.tensor([tokens[-1:]]), kvcache.state([request]))[0, -1]
        kvcache.advance(request, tokens)
    return tokens


kvcache, without = node(600), node(600, prefix_cache=False)
rows, tokens, same, errors = [], words(1200), True, []
for turn in range(1, 5):
    timings, answers, ends, reused = [], [], [], 0
    for cache in (kvcache, without):
        began_s = time.perf_counter()
        request, logits = prefill(cache, tokens)
        timings.append((time.perf_counter() - began_s) * 1e3)
        ends.append(logits)
        answers.append(decode(cache, request, tokens, logits, 30))
        reused = max(reused, request.cached_tokens)
        cache.close(request)
    errors.append(float((ends[0] - ends[1]).abs().max()))
    same = same and answers[0] == answers[1]
    rows.append((turn, len(tokens), reused, f"{timings[0]:.0f}", f"{timings[1]:.0f}"))
    tokens = [*answers[0], *words(100)]
print("3. A conversation\n")
print(table(["turn", "prompt", "reused", "prefill ms", "without cache ms"], rows))
print(f"""
   Of the fourth prompt {1 - rows[-1][2] / rows[-1][1]:.0%} was computed. Answers with and without the cache: \
{'the same tokens' if same else 'DIFFERENT tokens'}; the logits
   after a prompt differ by {max(errors):.1e} at most (they are of the order of {float(ends[1].abs().max()):.0f}).
""")

# %% [markdown]
# *Why is it not only the new tokens?* Reuse ends at a full block, so up to 63 tokens of the turn before are computed
# again. *And why are the logits not equal to the last bit?* Sums are taken in chunks of other lengths, and floats round
# differently. What counts as the same is the tokens.
#
# *Change this line:* the 30 answer tokens → 300, and the 100 new ones → 10. How does the share change?

# %% [markdown]
# ## 4. Only the increment crosses
#
# When another datacenter prefills the turn, its KVCache is shipped. But the decode side still has the last turn's rows.
# So the link carries the rows of the missing tokens, and the final state of each linear layer. To *receive* no snapshot
# is needed: the state crosses in any case, so the decode side counts on every full block that it has.
#
# *Guess first:* the whole KVCache of 1,590 tokens is 1.1 MiB. How much of it crosses in the fourth turn?

# %%
ROW_LAYERS = [layer for layer, spec in enumerate(layout.specs) if spec.kind is StateKind.TOKEN]
STATE_LAYERS = [layer for layer, spec in enumerate(layout.specs) if spec.kind is not StateKind.TOKEN]


def ship(layers: list[int], source: KVCacheManager, tables: list, target: KVCacheManager, into: list, start: int,
         end: int) -> int:
    """Carry what these layers keep of tokens [start, end) from one node's blocks into another's. Returns the bytes."""
    crossed = 0
    for layer in layers:
        group = layout.group_of_layer[layer].index
        data = source.pool.read_bytes(layer, tables[group], start, end)
        target.pool.write_bytes(layer, into[group], start, end, data)
        crossed += data.numel()
    return crossed


def floats(kvcache: KVCacheManager, request: RequestCache, layer: int) -> torch.Tensor:
    """What a layer keeps of all of a request's tokens."""
    blocks = request.block_tables[layout.group_of_layer[layer].index]
    return kvcache.pool.read_bytes(layer, blocks, 0, request.num_tokens).view(torch.float32)


prefiller, decoder = node(600), node(600)
rows, tokens, identical = [], words(1200), True
for turn in range(1, 5):
    sent, logits = prefill(prefiller, tokens)
    received = decoder.open(tokens, to_receive=True)
    decoder.reserve(received, len(tokens))
    crossed = ship(ROW_LAYERS + STATE_LAYERS, prefiller, sent.block_tables, decoder, received.block_tables,
                   received.cached_tokens, len(tokens))
    decoder.advance(received, tokens)
    # Rows of an answer were computed one by one there and in a chunk here: equal but for rounding.
    identical = identical and all(
        torch.allclose(floats(prefiller, sent, layer), floats(decoder, received, layer), atol=1e-4)
        for layer in ROW_LAYERS + STATE_LAYERS)
    prefiller.close(sent)
    whole = kv_bytes(layout.specs, len(tokens))
    rows.append((turn, len(tokens), sent.cached_tokens, received.cached_tokens, human_bytes(crossed),
                 human_bytes(whole), f"{crossed / whole:.0%}"))
    tokens = [*decode(decoder, received, tokens, logits, 70), *words(60)]
    decoder.close(received)
print("4. Only the increment crosses\n")
print(table(["turn", "prompt", "in prefill's cache", "in decode's cache", "crossed", "whole", "share"], rows))
state_bytes = human_bytes(sum(layout.specs[layer].nbytes for layer in STATE_LAYERS))
print(f"\n   Of what crossed {state_bytes} is the state of the linear layers.\n"
      f"   After each turn both sides' blocks hold {'the same KVCache' if identical else 'DIFFERENT KVCaches'}.\n")

# %% [markdown]
# *Why can prefill's cache be shorter than decode's?* The prefill node saw the prompt only; the answer was drawn
# elsewhere. And where may the decode node *begin a prefill* itself, if it has to? Only where it has a snapshot, so one
# is sent along when there is time (`cluster/snapshot_arrivals.py`): expected first, indexed when it is there.
#
# *Change this line:* `words(1200)` above → `words(300)`. Which part of what crosses has not changed?
#
# *Guess first:* how many tokens of a prompt of 700 can the decode node begin after, before and after that?

# %%
other, prompt = node(600), words(700)
sent, _ = prefill(prefiller, prompt)
received = other.open(prompt, to_receive=True)
other.reserve(received, len(prompt))
ship(ROW_LAYERS, prefiller, sent.block_tables, other, received.block_tables, 0, len(prompt))
other.advance(received, prompt, has_state=False)  # as if the stream had ended before the state came
before = other.match([*prompt, 0])
boundary = 10 * BLOCK
expected: ExpectedSnapshot | None = other.snapshots.expect(received.keys, boundary)
ship(STATE_LAYERS, prefiller, prefiller.snapshots.hold(sent, boundary), other, expected.tables, 0, boundary)
is_indexed = other.snapshots.index_expected(expected)
print(f"   With all rows of {len(prompt)} tokens and no snapshot a prefill can begin after {before} tokens, with one "
      f"({'indexed' if is_indexed else 'NOT indexed'}) after {other.match([*prompt, 0])}.\n")
prefiller.close(sent)
other.close(received)
other.check()

# %% [markdown]
# ## 5. The two lives of a block
#
# *Prefix-cache* blocks are full, indexed and shared. *Transfer-cache* blocks (the unaligned tail, and the state at the
# exact length) belong to one request, serve nobody else, and are freed when its transfer is acknowledged.
#
# *Guess first:* a request is closed while its bytes are still on the link. How many of its blocks may be given away?


# %%
def lives(moment: str) -> tuple:
    stats = prefiller.stats()
    return moment, stats.free, stats.cached, stats.in_use, stats.transfer, stats.free + stats.cached + stats.in_use


rows = [lives("before")]
sent, _ = prefill(prefiller, tokens)
rows.append(lives("prefilled"))
prefiller.hold(sent)
prefiller.close(sent)
rows.append(lives("request closed, bytes on the link"))
prefiller.release(sent)
rows.append(lives("acknowledged"))
prefiller.check()
print("5. The two lives of a block\n")
print(table(["blocks", "free", "cached", "in use", "of these only in transfer", "sum"], rows))
sound = {row[-1] for row in rows} == {prefiller.stats().total}
print(f"\n   free + cached + in use = {prefiller.stats().total} at each moment: {'true' if sound else 'FALSE'}.\n")

# %% [markdown]
# *Why is nothing given away on the link?* A sending thread reads those blocks; whoever got them would write into them,
# and wrong bytes would cross with a right digest.
#
# *Change this line:* leave out `hold`, and call `release` all the same. Who notices?

# %% [markdown]
# ## 6. A pool is never large enough
#
# When blocks run out, what was used least recently goes, but never out of the middle of a prefix: a request lets go of
# its blocks from the tail, so a prefix shrinks from its tail. A snapshot leaves with the block at which it ends.
#
# *Guess first:* a pool of 120 blocks holds one prefix of 512 tokens, in 38 blocks. Requests ask for 50, 75, 85, …
# blocks and give them back. Which is the first to cost the prefix something? What is left of it after 105?

# %%
squeezed, rows = node(120, snapshot_every=2), []
request, _ = prefill(squeezed, document)
squeezed.close(request)
for demand in (0, 50, 75, 85, 95, 105, 119):
    squeezed.ledger.give_back(squeezed.ledger.allocate(demand))  # as a large request would; given back at once
    stats = squeezed.stats()
    rows.append((demand, stats.cached, stats.evicted_entries, squeezed.match([*document, 0])))
squeezed.check()
print("6. A pool is never large enough\n")
print(table(["blocks demanded", "still cached", "entries evicted", "tokens that can be reused"], rows))
is_prefix = len(squeezed.ledger.blocks) == squeezed.ledger.common(squeezed.keys(document))
print(f"\n   What is left is the beginning of the document, without a gap: {'true' if is_prefix else 'FALSE'}.\n")

# %% [markdown]
# *Why does so little fit?* A snapshot of this model is as large as several blocks of rows. Real models are larger, and
# so are their blocks; the ratio is what matters.
#
# *Change this line:* `snapshot_every=2` → `8`. Fewer snapshots: is more or less of the document left at 95?

# %% [markdown]
# ## 7. Hit ratio against capacity
#
# Conversations, half of them opening with one of 8 system prompts, go through the same index and eviction, without any
# tensors (the trace is invented here; `python -m minprfaas simulate --cache-only --trace FILE` replays a real one).
#
# *Guess first:* both models have the same number of blocks here. A hybrid can resume a prefix at fewer places, and its
# snapshots take room. By how many points is its hit ratio behind, in the smallest pool and in the largest?

# %%
trace = conversations(2500, rng)
capacities = (300, 1000, 3000, 10_000, None)
dense = replay_trace(trace, capacities)
hybrid = replay_trace(trace, capacities, state_blocks=4)
print("7. Hit ratio against capacity\n")
print(table(["blocks", "dense model", "hybrid model, a snapshot is 4 blocks", "hybrid is behind by"], [
    (a.capacity_blocks or "unlimited", f"{a.hit_ratio:.1%}", f"{b.hit_ratio:.1%}",
     f"{(a.hit_ratio - b.hit_ratio) * 100:.1f} points") for a, b in zip(dense, hybrid)]) + "\n")
if args.plots:
    print(f"   Drawn: {draw_hit_ratios(args.plots, dict(dense=dense, hybrid=hybrid))}\n")

# %% [markdown]
# *Why does the gap close?* With room, a snapshot stands wherever a conversation can go on, and nothing is lost by the
# few other places. In a small pool each snapshot pushes four blocks of rows out.
#
# *Change this line:* `state_blocks=4` → `16`: the state of a model with few, wide linear layers.

# %%
print("A prefix computed once is reused where blocks and a snapshot agree, and only the increment crosses a link.\n"
      "Next: tutorials/07_a_link.py, what that link is.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_06.py`, then `python tutorials/06_hybrid_prefix_cache.py --check 1`.
# 1. `chain_keys`: the keys of a prompt's full blocks.
# 2. `reusable_blocks`: how many blocks a prompt can reuse, given what is indexed.
# 3. `still_cached`: what is left in a pool that is too small for all.
