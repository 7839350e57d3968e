"""Chapter 02: hybrid attention. A memory of one size, its two forms, what it saves, and what it cannot do.

    python tutorials/02_hybrid_attention.py [--plots DIRECTORY]

Modules: model/delta.py, model/delta_segments.py, model/kda.py, model/gdn.py, model/lightning.py,
         model/recurrent.py, model/window.py, model/mla.py, model/spec.py
Tests: test_kda.py, test_linear_mixers.py, test_model.py
Paper: 2.2, tables 1 and 2
"""
import helper

args = helper.begin(__doc__, {"--plots": dict(metavar="DIRECTORY", help="draw section 6 there, as a picture")})

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from minprfaas.config import RopeConfig, StateKind
from minprfaas.model.delta import delta_rule_chunked, delta_rule_recurrent
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import Positions
from minprfaas.model.lightning import LightningConfig, lightning_chunked, lightning_recurrent
from minprfaas.model.mla import MLAConfig
from minprfaas.model.recurrent import ShortConvolution
from minprfaas.model.spec import kv_bytes
from minprfaas.model.state import ContiguousLayerState
from minprfaas.model.window import attend_window
from minprfaas.observe.plots import draw_curves, prepare_plots
from minprfaas.observe.tables import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
if args.plots:
    prepare_plots(args.plots)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The quickest of a few runs, after one that warms up."""
    work()
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began_s)
    return min(times_s)


# %% [markdown]
# ## 1. A memory that is written to
#
# Attention keeps every token and searches them all (chapter 01). A *linear* layer keeps one matrix S a head instead.
# Kimi delta attention ([KDA](../docs/glossary.md#kda)) does three things for each token: it lets S decay, it replaces
# what S stores under the token's key k by its value v (as far as beta, between 0 and 1, asks for), and it reads with
# the query q:
#
# > S ← diag(exp g) S,  S ← S + β k (v − kᵀS)ᵀ,  o = Sᵀq
#
# *Guess first:* write 5 under the key a, 7 under b, then 9 under a. What does a read give: 5, 9, or 14?


# %%
def remember(memory: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: float) -> torch.Tensor:
    """One token: `memory` `[key_dim, value_dim]`, k and decay `[key_dim]`, v `[value_dim]`."""
    memory = decay[:, None] * memory
    stored = k @ memory
    return memory + beta * torch.outer(k, v - stored)


a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
story = [("write 5 under a", a, 5.0, 1.0, 1.0), ("write 7 under b", b, 7.0, 1.0, 1.0),  # key, value, beta, decay
         ("write 9 under a", a, 9.0, 1.0, 1.0), ("halve everything", a, 0.0, 0.0, 0.5)]
memory, package, rows = torch.zeros(2, 1), torch.zeros(1, 1, 2, 1), []
for what, k, value, beta, decay in story:
    memory = remember(memory, k, torch.tensor([value]), torch.tensor([decay, decay]), beta)
    inputs = [x.view(1, 1, 1, -1) for x in (k, k, torch.tensor([value]), torch.tensor([decay, decay]).log())]
    _, package = delta_rule_recurrent(*inputs, torch.full((1, 1, 1), beta), package)
    rows.append((what, f"{a @ memory[:, 0]:.1f}", f"{b @ memory[:, 0]:.1f}",
                 "yes" if torch.allclose(memory, package[0, 0]) else "NOT so"))
print("1. A memory that is written to\n")
print(table(["token", "a read of a", "a read of b", "as the package has it"], rows))
print()

# %% [markdown]
# *Why not 14?* `v − kᵀS` is what is *new* about the value. A memory that only adds would now say 14: that is the
# difference between the delta rule and plain linear attention (section 4).
#
# *Change this line:* write 9 under `(a + b) / 2**0.5`. What do a and b read afterwards? A matrix has as many clean
# places as it has rows, and no more.

# %% [markdown]
# ## 2. Two forms of one function
#
# Decode has one token at a time and uses the recurrence as it stands. Prefill has all of them at once, and a loop over
# tokens would waste that. `delta_rule_chunked` solves each 64 tokens as one triangular system, carries S from chunk to
# chunk, and gives the same numbers in fewer, larger steps.
#
# *Guess first:* 64 times fewer steps; how many times faster?


# %%
def random_tokens(tokens: int, decay: float, heads: int = 2, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta and an empty memory; every channel keeps exp(-decay) of itself a token."""
    q, k = (F.normalize(torch.randn(1, tokens, heads, dim), dim=-1) for _ in range(2))
    v, beta = torch.randn(1, tokens, heads, dim), torch.rand(1, tokens, heads)
    return q, k, v, torch.full_like(q, -decay), beta, torch.zeros(1, heads, dim, dim)


rows = []
for tokens in (256, 512, 1024):
    arguments = random_tokens(tokens, decay=0.1)
    difference = (delta_rule_recurrent(*arguments)[0] - delta_rule_chunked(*arguments)[0]).abs().max().item()
    slow_s = seconds(lambda: delta_rule_recurrent(*arguments), repeats=1)
    fast_s = seconds(lambda: delta_rule_chunked(*arguments))
    rows.append((tokens, f"{slow_s * 1e3:.0f}", f"{fast_s * 1e3:.1f}", f"{slow_s / fast_s:.1f}x", f"{difference:.0e}"))
print("2. Two forms of one function (2 heads of 64, one core, float32)\n")
print(table(["tokens", "recurrence, ms", "chunked, ms", "ratio", "largest difference"], rows))
print()

# %% [markdown]
# *Why not 64 times?* The chunked form does more arithmetic (all pairs of a chunk meet), in products large enough for
# the core to be good at them. On a GPU, where a small step costs as much as a large one, far more is gained.
#
# *Change this line:* `delta_rule_chunked(*arguments)` → `delta_rule_chunked(*arguments, chunk=16)`, in both places.

# %% [markdown]
# ## 3. Why the chunked form has chunks inside its chunks
#
# Between tokens i > j of a chunk the memory decays by exp(G_i − G_j), with G the sum of g so far. To have all pairs in
# one product, one is tempted to multiply k_i exp(G_i) with k_j exp(−G_j). The two exponentials cancel on paper.
#
# *Guess first:* float32 ends at 3e38, and a chunk has 64 tokens. At which decay a token does exp(−G) leave it?

# %%
rows, broken = [], None
for decay in (0.1, 1.0, 1.3, 2.0, 20.0, 1000.0):
    q, k, v, g, beta, memory = random_tokens(64, decay)
    total = g.cumsum(dim=1)
    tempting = torch.einsum("bihd,bjhd->bhij", k * total.exp(), k * (-total).exp())
    pair_decay = (total[:, :, None] - total[:, None]).double().clamp(max=0).exp()
    exact = torch.einsum("bihd,bjhd,bijhd->bhij", k.double(), k.double(), pair_decay)
    error = (tempting - exact).tril().abs().max().item()
    chunked = (delta_rule_chunked(q, k, v, g, beta, memory)[0] - delta_rule_recurrent(q, k, v, g, beta, memory)[0])
    if broken is None and not error < 1e-3:
        broken = decay
    rows.append((f"{decay:g}", f"{torch.exp(-total).max().item():.0e}", f"{error:.0e}", f"{chunked.abs().max():.0e}"))
print("3. Why the chunked form has chunks inside its chunks\n")
print(table(["decay a token", "largest exp(−G)", "error of the one product", "error of the chunked form"], rows))
print(f"\n   From a decay of {broken:g} a token on, the one product is of no use.\n")

# %% [markdown]
# *Why is the chunked form safe?* It refers all decays to a moment *between* the two tokens, so that both exponents are
# small: in blocks of 8 tokens to the middle, across blocks to the border. It is written out in `delta.py`.
#
# *And on a GPU?* KDA's prefill multiplies in float16 there, which ends at 65,504. So inside a block each pair of tokens
# has a decay of its own, and no exponent is above 0. A chunk has 128 tokens, and what it does to S is made one affine
# map, S ← diag(kept) S + moves S + writes, for many chunks at once: all that is left to the loop is `moves S` and two
# sums (`delta_segments.py`).
#
# *Change this line:* `random_tokens(64, decay)` → `random_tokens(16, decay)`: how much further does it get?

# %% [markdown]
# ## 4. Relatives
#
# KDA has a decay for each channel of the key, and looks at what is stored. Others ask less; they have the same two
# forms:
#
# > GDN (Qwen3.5):  S ← e^g S,  S ← S + β k (v − kᵀS)ᵀ  (one decay a head)
# >
# > Lightning (MiniMax-Text, Ring):  S ← e^(−slope) S,  S ← S + k vᵀ  (a fixed decay, nothing replaced)
#
# *Guess first:* in the chunked form, how many times as fast as KDA is the quickest of the three?

# %%
q, k, v, g, beta, memory = random_tokens(512, decay=0.1)
forms = {"KDA": (delta_rule_recurrent, delta_rule_chunked, (q, k, v, g, beta, memory)),
         "GDN": (delta_rule_recurrent, delta_rule_chunked, (q, k, v, g[..., :1], beta, memory)),
         "Lightning": (lightning_recurrent, lightning_chunked, (q, k, v, torch.full((2,), 0.1), memory))}
rows = []
for name, (recurrent, chunked, arguments) in forms.items():
    difference = (recurrent(*arguments)[0] - chunked(*arguments)[0]).abs().max().item()
    slow_s, fast_s = seconds(lambda: recurrent(*arguments), repeats=1), seconds(lambda: chunked(*arguments))
    rows.append((name, f"{slow_s * 1e3:.0f}", f"{fast_s * 1e3:.1f}", f"{difference:.0e}"))
print("4. Relatives (512 tokens)\n")
print(table(["memory", "recurrence, ms", "chunked, ms", "largest difference"], rows))

# %% [markdown]
# The less a memory asks for, the less there is to do: with one decay a head two tokens share one number instead of one
# for each channel, and where nothing is replaced there is no triangular system to solve.
#
# Two more kinds of state have one size. A *sliding window* (SWA, MiMo) is ordinary attention over the last few tokens:
# the others forget by decay, it forgets by distance. And a linear mixer looks at its last few inputs through a *short
# convolution*; the last three inputs are therefore a part of its state, too.

# %%
q, k, v = torch.randn(3, 1, 100, 2, 16).unbind(0)
everything, window = Positions(torch.zeros(1, dtype=torch.int64), 100), 16
out = attend_window(q, k, v, everything, scale=0.25, window=window, sinks=None)
k[:, :100 - window], v[:, :100 - window] = 0, 0  # all but the last 16 tokens are wiped out
wiped = attend_window(q, k, v, everything, scale=0.25, window=window, sinks=None)

convolution, inputs = ShortConvolution(channels=8, kernel=4), torch.randn(1, 10, 8)
(whole,), _ = convolution(torch.zeros(1, 8, 3), inputs)
(resumed,), _ = convolution(inputs[:, 3:6].transpose(1, 2), inputs[:, 6:])  # its tail, then the last four
print(f"""
   A window of 16, the 84 tokens before it wiped out: the last output differs by {(out - wiped)[:, -1].abs().max():.0e}.
   A convolution resumed from its tail of three inputs: {(whole[:, 6:] - resumed).abs().max():.0e}.
""")

# %% [markdown]
# *Why does that matter?* Whoever takes over a request must have S, the window's rows and the tail, exactly as they were
# after a certain token. Rows of attention can be sent in any order and used in part; this state cannot (chapter 06).
#
# *Change this line:* `(out - wiped)[:, -1]` → `[:, -2]`. Why is it not zero there?

# %% [markdown]
# ## 5. MLA: the same product, bracketed differently
#
# The layers that look up exactly, in Kimi and Ring, are [MLA](../docs/glossary.md#mla). Of each token they keep one
# short latent c, and a matrix W makes a head's key of it, k = W c. A score is then q · (W c), which is also (Wᵀq) · c.
# So for one query W need not be applied to each latent; it is applied once, to the query.
#
# *Guess first:* 1,000 latents of 512, keys of 128: how many multiplications does the second way save?

# %%
W, q, latents = torch.randn(128, 512), torch.randn(128), torch.randn(1000, 512)
expanded, absorbed = (latents @ W.T) @ q, latents @ (W.T @ q)
error = ((expanded - absorbed).abs().max() / expanded.abs().max()).item()
config = MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_dim=32, qk_shared_dim=16, v_dim=32)
mixer, x = config.build(hidden_size=128, norm_eps=1e-6), torch.randn(1, 100, 128)
state = ContiguousLayerState(config.state_spec("float32"), 1, "cpu")
mixer(x[:, :-1], Positions(torch.zeros(1, dtype=torch.int64), 99), state)
by_decode = mixer(x[:, -1:], Positions(torch.tensor([99]), 1), state)[0, -1]
by_prefill = mixer(x, everything, None)[0, -1]
print("5. MLA: the same product, bracketed differently\n")
print(table(["way", "multiplications"], [("expand each latent", 1000 * 512 * 128 + 1000 * 128),
                                         ("absorb W into the query", 512 * 128 + 1000 * 512)]))
print(f"\n   The scores agree to {error:.0e} of the largest one; the package's prefill (expanding) and its decode "
      f"(absorbing)\n   to {(by_decode - by_prefill).abs().max():.0e}.\n")

# %% [markdown]
# *Why does prefill not absorb?* With many queries the expansion is shared by all of them, and keys of 128 are shorter
# than latents of 512. The same layer takes one way to read and the other to write.
#
# *Change this line:* `1000` latents → `2`. Which way is shorter now?

# %% [markdown]
# ## 6. What each kind of layer remembers
#
# *Guess first:* one layer with Kimi Linear's shapes. From how many tokens on does MLA weigh more than KDA: 20, 200 or
# 2,000?

# %%
gqa = GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig())
mla = MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128)
kda = KDAConfig(num_heads=32, head_dim=128)
layers = {"GQA": [gqa], "GQA, window": [replace(gqa, window=128)], "MLA": [mla], "KDA": [kda],
          "GDN": [GDNConfig(num_k_heads=16, num_v_heads=64, k_dim=128, v_dim=128)],
          "Lightning": [LightningConfig(head_dim=128, slopes=(0.1,) * 64)],
          "3 KDA + 1 MLA, a layer": [kda] * 3 + [mla]}


def layer_bytes(mixers: list, tokens: int) -> float:
    """Mean bytes a layer after `tokens` tokens; bfloat16, and the recurrent matrices float32."""
    return kv_bytes(tuple(mixer.state_spec("bfloat16") for mixer in mixers), tokens) / len(mixers)


lengths = (1024, 8192, 32_768, 131_072, 1_048_576)
print("6. What each kind of layer remembers\n")
print(table(["layer", *(f"{tokens // 1024}K" for tokens in lengths)],
            [(name, *(human_bytes(layer_bytes(mixers, tokens)) for tokens in lengths))
             for name, mixers in layers.items()]))
mla_from, gqa_from = (int(layer_bytes([kda], 1) // layer_bytes([mixer], 1)) + 1 for mixer in (mla, gqa))
print(f"\n   MLA weighs more than KDA from {mla_from:,} tokens on, GQA from {gqa_from:,}.\n")
if args.plots:
    curves = {name: [(tokens, layer_bytes(mixers, tokens)) for tokens in (2**exponent for exponent in range(4, 21))]
              for name, mixers in layers.items()}
    print(f"   Drawn: {draw_curves(args.plots, 'state_of_a_layer.png', curves, 'bytes of state')}\n")

# %% [markdown]
# *Why a mixture, then, and not linear layers alone?* See what a memory of one size cannot do. Write pairs of random
# keys and values into one head, then ask for each value again by its key. Attention asked with the same key (sharply:
# its scores times 50) looks through all of them.
#
# *Guess first:* the matrix has 64 rows. An answer counts as right when no other value is nearer to what is read. How
# many of 32 pairs are answered rightly? And of 512?

# %%
rows = []
for pairs in (16, 32, 64, 128, 512):
    keys = F.normalize(torch.randn(1, pairs, 1, 64), dim=-1)
    values = F.normalize(torch.randn(1, pairs, 1, 64), dim=-1)
    never = torch.zeros_like(keys)  # nothing decays
    _, memory = delta_rule_recurrent(keys, keys, values, never, torch.ones(1, pairs, 1), torch.zeros(1, 1, 64, 64))
    keys, values = keys[0, :, 0], values[0, :, 0]
    read = {"delta rule": keys @ memory[0, 0], "attention": (50 * keys @ keys.T).softmax(dim=-1) @ values}
    found = {name: (out @ values.T).argmax(dim=1) == torch.arange(pairs) for name, out in read.items()}
    rows.append((pairs, *(f"{right.float().mean():.0%}" for right in found.values()), human_bytes(64 * 64 * 4),
                 human_bytes(pairs * 2 * 64 * 4)))
print(table(["pairs", "found by the memory", "by attention", "memory", "keys and values"], rows))
print()

# %% [markdown]
# That is the bargain of a *hybrid*: most layers keep the gist in one size, and a few full-attention layers are there to
# look things up exactly. Those few pay for the length, in bytes and in time; chapter 01 showed one of them find a name.
#
# *Change this line:* `torch.ones(1, pairs, 1)` (beta) → `0.2 * torch.ones(…)`, and look at 16 pairs.

# %% [markdown]
# ## 7. What that means for time
#
# A decode step reads the whole state of every layer. One step of one mixer (width 256, 4 heads of 64), after contexts
# of two lengths:
#
# *Guess first:* GQA's bytes grow 8 times from 1K to 8K tokens. How many times does its time?


# %%
class FullContext:
    """The token state of one layer with one free row at its end: a step writes that row and copies nothing."""

    attend = None  # there is no other way than through the rows

    def __init__(self, context: int, width: int):
        self.tensor, self.longest = torch.randn(1, context + 1, width), context + 1

    def append(self, new_rows: torch.Tensor) -> "FullContext":
        self.tensor[:, -1:] = new_rows
        return self

    def rows(self) -> torch.Tensor:
        return self.tensor


small = {"GQA": GQAConfig(4, 2, 64, RopeConfig()), "MLA": MLAConfig(4, 128, 64, 16, 64),
         "GQA, window": GQAConfig(4, 2, 64, RopeConfig(), window=128), "KDA": KDAConfig(4, 64),
         "GDN": GDNConfig(2, 4, 64, 64), "Lightning": LightningConfig(64, (0.1,) * 4)}
contexts, rows, growth = (1024, 8192), [], {}
for name, config in small.items():
    mixer, spec, times_s = config.build(256, 1e-6), config.state_spec("float32"), []
    for context in contexts:
        width = spec.tensors[0].shape[0]
        state = ContiguousLayerState(spec, 1, "cpu")
        if spec.kind is StateKind.TOKEN:
            state = FullContext(context, width)
        positions, token = Positions(torch.tensor([context]), 1), torch.randn(1, 1, 256)
        times_s.append(seconds(lambda: mixer(token, positions, state), repeats=30))
    sizes = [spec.bytes_at(context) for context in contexts]
    growth[name] = sizes[1] / sizes[0], times_s[1] / times_s[0]
    rows.append((name, *map(human_bytes, sizes), *(f"{step_s * 1e3:.2f}" for step_s in times_s),
                 *(f"{times:.1f}x" for times in growth[name])))
print("7. What that means for time (one decode step)\n")
print(table(["mixer", "state, 1K", "8K", "ms, 1K", "8K", "bytes grow", "time grows"], rows))
print(f"\n   From 1K to 8K tokens a step with GQA takes {growth['GQA'][1]:.1f} times as long, one with KDA "
      f"{growth['KDA'][1]:.1f} times.\n")

# %% [markdown]
# *Why is that not just the growth of the bytes?* A step has parts that the context does not touch: the projections, the
# calls themselves. They hide a part of the growth. Other things add to it: a long context falls out of the core's
# caches, and attention on a CPU copies keys and values into buffers of its own.
#
# *Change this line:* `contexts = (1024, 8192)` → `(1024, 65_536)`. Those buffers are now so large that the operating
# system hands them out anew at each step, page by page: time grows faster than the bytes, and that is not attention's
# doing. A measurement of time is one of everything that happens.

# %%
print("The recurrence and its chunked form are one function; its state has one size; a hybrid keeps a few layers that\n"
      "look things up. Next: tutorials/03_paged_kvcache.py, where both kinds of state live in one pool of blocks.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_02.py`, then `python tutorials/02_hybrid_attention.py --check 1`.
# 1. `delta_step`: one token of the delta rule.
# 2. `lightning_by_attention`: Lightning attention without a memory, as prefill does it inside a chunk.
# 3. `layers_to_keep`: how many full-attention layers a budget of bytes allows.
