"""Chapter 00: the bandwidth wall. Why prefill could not leave the datacenter, and what changed.

    python tutorials/00_the_bandwidth_wall.py [--plots DIRECTORY]

Modules: config.py, model/spec.py, model/families/, scheduling/throughput.py, commands/inspect.py, observe/plots.py
Tests: test_throughput.py, test_families.py, test_config.py, test_kvcache_inspect.py
Paper: 2.1-2.3, equations 1 and 2, tables 1-3
"""
import helper

args = helper.begin(__doc__, {"--plots": dict(metavar="DIRECTORY", help="draw section 2 there, as a picture")})

import time
from collections import Counter
from dataclasses import replace

import torch

from minprfaas.commands import inspect
from minprfaas.config import LayerConfig, ModelConfig, RopeConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.families import PUBLISHED, read_published
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.lightning import LightningConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.moe import MoEConfig
from minprfaas.model.spec import StateSpec, kv_bytes, model_state_specs
from minprfaas.model.transformer import Transformer
from minprfaas.observe.plots import draw_curves, prepare_plots
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.throughput import egress_needed_gbps, kv_throughput_gbps

torch.set_num_threads(1)  # one core measures the same on a busy machine
if args.plots:
    prepare_plots(args.plots)

# %% [markdown]
# ## The relay race
#
# To answer, a language model does two things. First it *reads* the prompt, all of it at once: that is
# [prefill](../docs/glossary.md#prefill). Then it *writes* the answer, one token after the other, and for each it looks
# back at everything before: that is [decode](../docs/glossary.md#decode). Reading is much arithmetic, writing is much
# looking up, and hardware that is good at one is wasted on the other. So let two runners share the race: one reads, and
# hands over to one that writes.
#
# What is handed over, the *baton*, is everything that the model remembers of the prompt: the
# [KVCache](../docs/glossary.md#kvcache). And here it used to end. For a prompt of 32K tokens the baton weighed
# gigabytes, a reader made one every second or two, and only the network *inside* a datacenter could carry that. The two
# runners could live in different machines, but never in different buildings: a wall of bandwidth stood between them.
#
# Then models changed, for a reason of their own: long prompts were too expensive.
# [Hybrid](../docs/glossary.md#hybrid-model) models keep a memory of one size in most of their layers, and the baton
# became ten times lighter. Light enough for plain Ethernet: reading can be done somewhere else, by whoever does it
# best, *as a service* ([PrfaaS](../docs/glossary.md#prfaas)). This chapter weighs batons; the others build the race.

# %% [markdown]
# ## 1. What a layer remembers
#
# In attention a layer keeps, for each token, a *key* and a *value* in each of its KV heads
# ([GQA](../docs/glossary.md#gqa)). So a model with L such layers, h heads of d numbers, at 2 bytes a number
# (bfloat16), remembers of l tokens
#
# > S_kv(l) = l · L · h · 2 · d · 2 bytes
#
# *Guess first:* Qwen3-235B has 94 layers with 4 KV heads of 128. What does a prompt of 32K tokens (some sixty pages)
# weigh: 6 MB, 600 MB, or 6 GB?

# %%
LENGTHS = paper.TABLE_3_TOKENS
models = {theirs: read_published(ours) for ours, theirs in PUBLISHED.items()}  # as their authors publish them

by_hand = 32_768 * 94 * 4 * 2 * 128 * 2
by_package = kv_bytes(model_state_specs(models["Qwen3-235B"], "bfloat16"), 32_768)
print("1. What a layer remembers\n")
print(f"   Qwen3-235B, 32K tokens: {human_bytes(by_hand)} by hand; from its published configuration "
      f"{human_bytes(by_package)}{'' if by_hand == by_package else ', which is NOT the same'}.\n")


# %% [markdown]
# Not every layer is like that. Here is one layer of each kind, in the shapes of published models. A *window*
# (sliding-window attention, SWA) keeps the last few tokens only. [MLA](../docs/glossary.md#mla) keeps one short
# *latent* a token, out of which all heads make their keys and values. [KDA](../docs/glossary.md#kda), GDN and Lightning
# keep no tokens at all, but a matrix a head, as large after a word as after a book (chapter 02).
#
# *Guess first:* at 32K tokens, how many KDA layers weigh as much as one GQA layer?

# %%
def fixed_bytes(specs: tuple[StateSpec, ...]) -> int:
    """Bytes that are there whatever the length."""
    return sum(spec.nbytes for spec in specs if spec.kind is not StateKind.TOKEN)


def token_bytes(specs: tuple[StateSpec, ...]) -> int:
    """Bytes that each further token adds."""
    return sum(spec.nbytes for spec in specs if spec.kind is StateKind.TOKEN)


gqa = GQAConfig(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeConfig())
kinds = {
    "GQA, 8 KV heads of 128": gqa,
    "the same, last 128 tokens": replace(gqa, window=128),
    "MLA, latent of 512 + 64": MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128),
    "KDA, 32 heads of 128": KDAConfig(num_heads=32, head_dim=128),
    "GDN, 16 and 64 heads of 128": GDNConfig(num_k_heads=16, num_v_heads=64, k_dim=128, v_dim=128),
    "Lightning, 64 heads of 128": LightningConfig(head_dim=128, slopes=(0.1,) * 64)}
specs = {name: mixer.state_spec("bfloat16") for name, mixer in kinds.items()}
print(table(["one layer", "bytes a token", "fixed", "at 32K tokens"], [
    (name, token_bytes((spec,)), human_bytes(fixed_bytes((spec,))), human_bytes(spec.bytes_at(32_768)))
    for name, spec in specs.items()]))
kda_layers = specs["GQA, 8 KV heads of 128"].bytes_at(32_768) / specs["KDA, 32 heads of 128"].bytes_at(32_768)
print(f"\n   One GQA layer weighs as much as {kda_layers:.0f} KDA layers.\n")

# %% [markdown]
# *Why is the matrix so heavy, then?* 32 heads of 128 x 128 numbers in float32 are 2 MiB, and a single token fills
# them. A linear layer pays at once, and then never again.
#
# *Change this line:* in `kinds`, `num_kv_heads=8` → `1`. Is GQA now lighter than MLA? (Its queries then all look
# at the same keys: that is what MLA avoids.)

# %% [markdown]
# ## 2. What a request weighs: S_kv(l)
#
# The six models of the paper's table 1 stack such layers, some one kind only (*dense* attention), some a mixture
# (*hybrid*). They are not of one size. Parameters are counted here from the published configurations, without any
# weights; *active* parameters are those that one token passes through (chapter 01, mixture of experts).
#
# *Guess first:* MiniMax-M2.5 is 4.7 times as large as Kimi Linear. How many times as heavy is its baton at 128K?


# %%
def parameters_of(config: ModelConfig) -> tuple[float, float]:
    """Billions of parameters, all and active. On the "meta" device a tensor has a shape and no memory."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(parameter.numel() * (1 - layer.config.mlp.top_k / layer.config.mlp.num_experts)
               for layer in model.model.layers if isinstance(layer.config.mlp, MoEConfig)
               for parameter in layer.mlp.experts.parameters())
    return total / 1e9, (total - idle) / 1e9


def layers_of(config: ModelConfig) -> str:
    """How many of which kind."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(
        "SWA" if getattr(layer.mixer, "window", None) else type(layer.mixer).__name__.removesuffix("Config")
        for layer in config.layers).items())


rows, weights, is_hybrid = [], {}, {}
for name, config in models.items():
    specs = model_state_specs(config, "bfloat16")
    weights[name] = [kv_bytes(specs, tokens) for tokens in LENGTHS]
    is_hybrid[name] = fixed_bytes(specs) > 0
    total, active = parameters_of(config)
    rows.append((name, f"{total:.0f}B, {active:.0f}B", layers_of(config), token_bytes(specs),
                 human_bytes(fixed_bytes(specs)), *map(human_bytes, weights[name])))
AT = [f"{tokens // 1024}K" for tokens in LENGTHS]
print("2. What a request weighs: S_kv(l)\n")
print(table(["model", "all, active", "layers", "a token", "fixed", *AT], rows))
dense, hybrid = weights["MiniMax-M2.5"], weights["Kimi Linear"]
print(f"\n   MiniMax-M2.5 weighs {dense[0] / hybrid[0]:.1f} times as much as Kimi Linear at 1K tokens, and "
      f"{dense[-1] / hybrid[-1]:.0f} times as much at 128K.\n")
if args.plots:
    curves = {f"{name} ({'hybrid' if is_hybrid[name] else 'dense'})": [
        (tokens, kv_bytes(model_state_specs(config, "bfloat16"), tokens)) for tokens in (2**i for i in range(8, 21))]
        for name, config in models.items()}
    print(f"   Drawn: {draw_curves(args.plots, 'kvcache_of_six_models.png', curves, 'bytes of KVCache')}\n")

# %% [markdown]
# *Is that the hybrid's doing, or is it only the smaller model?* To know, change nothing but the layers: Kimi Linear
# with MiniMax's attention in all of its 27 layers has the same depth and width.
#
# *Guess first:* 27 layers of 4,096 bytes a token, against 7 of 1,152: what is the ratio for a long prompt?

# %%
kimi = models["Kimi Linear"]
as_dense = replace(kimi, layers=tuple(replace(layer, mixer=gqa) for layer in kimi.layers))
same_size = [kv_bytes(model_state_specs(as_dense, "bfloat16"), tokens) / weight
             for tokens, weight in zip(LENGTHS, hybrid)]
print(table(["weights", *AT], [
    ("Kimi Linear, all dense / as it is", *(f"{ratio:.1f}" for ratio in same_size)),
    ("MiniMax-M2.5 / Kimi Linear", *(f"{a / b:.1f}" for a, b in zip(dense, hybrid)))]))
print(f"\n   So at 128K a factor of {same_size[-1]:.0f} comes from the kind of layer; the rest comes from depth.\n")

# %% [markdown]
# *Why does the ratio grow?* The fixed part weighs the same at 1K and at 128K; the longer the prompt, the less it
# counts, and the ratio nears 27 · 4096 / (7 · 1152).
#
# *Change this line:* `mixer=gqa` → `mixer=replace(gqa, window=128)`, every layer a window. What does the ratio do now,
# and what could such a model not do any more?

# %% [markdown]
# ## 3. How fast it comes out: Phi_kv(l)
#
# A heavy baton would not matter if nobody made one often. What a line has to carry is bytes *per second of prefill*,
# the [KV throughput](../docs/glossary.md#kv-throughput) (equation 1):
#
# > Phi_kv(l) = S_kv(l) / T_prefill(l)
#
# The paper measured it on an instance of 8 H200, its table 3. With the weights of section 2 that also tells how long
# prefill took: T = S / Phi. Both are the paper's numbers, nothing of it is measured here.
#
# *Guess first:* a model prefills twice as fast, and its baton weighs the same. How wide a line does it need: half as
# wide, the same, or twice?

# %%
print("3. How fast it comes out: Phi_kv(l) = S_kv(l) / T_prefill(l)\n")
print(table(["model", *(f"{at}, Gbps" for at in AT), "implied T at 32K, s"], [
    (name, *(f"{gbps:.2f}" for gbps in line), f"{weights[name][2] * 8e-9 / line[2]:.2f}")
    for name, line in paper.TABLE_3_GBPS.items()]))

# %% [markdown]
# ![Figure 2: the same, drawn over the length of the prompt](../docs/figure_2.png)
#
# Twice as wide: who makes batons faster needs the wider road. So a slow prefill also has a low Phi_kv, and that is no
# merit; only fewer bytes are one. (The models differ in size, too: a smaller one prefills faster, which *raises* Phi.)
#
# The same measured here, with two models of equal depth and width and random weights. One has attention in its four
# layers, the other in one of four.
#
# *Guess first:* the dense one's baton has 15 times the bytes. How many times as high is its Phi_kv?


# %%
def stack(*mixers) -> ModelConfig:
    """A small model of these mixers."""
    return ModelConfig("example", 1024, 128, tuple(LayerConfig(mixer, DenseConfig(512)) for mixer in mixers),
                       norm_eps=1e-6, tie_embeddings=True, max_context_tokens=2**17)


def prefill_seconds(model: Transformer, prompt: torch.Tensor) -> float:
    """Seconds that `model` takes for one prompt `[1, tokens]`."""
    began_s = time.perf_counter()
    model(prompt, last_only=True)
    return time.perf_counter() - began_s


small_gqa = GQAConfig(num_heads=2, num_kv_heads=2, head_dim=64, rope=RopeConfig())
small_mla = MLAConfig(num_heads=2, kv_lora_rank=48, qk_nope_dim=64, qk_shared_dim=16, v_dim=64)
small_kda = KDAConfig(num_heads=2, head_dim=32)
small = {"dense: 4 GQA": stack(*[small_gqa] * 4), "hybrid: 3 KDA + 1 MLA": stack(*[small_kda] * 3, small_mla)}
rows, measured = [], {}
torch.manual_seed(0)
with torch.inference_mode():
    for name, config in small.items():
        model = Transformer(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        model(torch.zeros(1, 64, dtype=torch.int64), last_only=True)  # the first call also allocates
        for tokens in (512, 2048):
            prompt = torch.randint(config.vocab_size, (1, tokens))
            prefill_s = min(prefill_seconds(model, prompt) for _ in range(3))
            size = kv_bytes(model_state_specs(config, "float32"), tokens)
            measured[name, tokens] = size, prefill_s, kv_throughput_gbps(size, prefill_s)
            rows.append((name, f"{count / 1e6:.2f}M", tokens, human_bytes(size), f"{prefill_s * 1e3:.0f}",
                         f"{measured[name, tokens][2] * 1e3:.0f}"))
print("\n   Measured on this machine, one core, float32:\n")
print(table(["model", "parameters", "tokens", "S_kv", "T_prefill, ms", "Phi_kv, Mbps"], rows))
(dense_bytes, dense_s, dense_gbps), (hybrid_bytes, hybrid_s, hybrid_gbps) = [measured[name, 2048] for name in small]
print(f"\n   Dense to hybrid, at 2,048 tokens: {dense_bytes / hybrid_bytes:.1f} times the bytes, "
      f"{dense_s / hybrid_s:.2f} times the seconds, so {dense_gbps / hybrid_gbps:.1f} times the Phi_kv.\n")

# %% [markdown]
# *Why can Phi fall with length?* Bytes grow as l, but attention compares each token with all before it, so for long
# prompts its time grows as l². That is why in table 3 the dense models' Phi is largest in the middle. A long prompt is
# a good one to send away: much work, few bytes for it.
#
# *Change this line:* in `small`, `*[small_kda] * 3, small_mla` → `*[small_kda] * 4`. What is left of S_kv, and does it
# grow?

# %% [markdown]
# ## 4. What a whole prefill cluster needs: B_out
#
# N GPUs, P of them an instance, all prefilling all the time: what leaves the datacenter
# ([egress](../docs/glossary.md#egress)) is (equation 2)
#
# > B_out = N / P · Phi_kv
#
# Take a generous line of 400 Gbps between two datacenters, four times that of the paper's case study.
#
# *Guess first:* of six models, four are hybrids. How many of the six can 512 GPUs prefill through one such line?

# %%
ETHERNET_GBPS = 400
rows, crossing = [], {}
for name, line in paper.TABLE_3_GBPS.items():
    at_32k, at_128k = (egress_needed_gbps(512, paper.GPUS_PER_INSTANCE, gbps) for gbps in line[2:])
    crossing[name] = max(at_32k, at_128k) <= ETHERNET_GBPS
    verdict = "crosses" if crossing[name] else f"needs {max(at_32k, at_128k) / ETHERNET_GBPS:.1f} lines"
    rows.append((name, "hybrid" if is_hybrid[name] else "dense", f"{at_32k:,.0f}", f"{at_128k:,.0f}", verdict))
print(f"4. What a prefill cluster needs: 512 GPUs, 8 an instance, a line of {ETHERNET_GBPS} Gbps\n")
print(table(["model", "attention", "32K prompts, Gbps", "128K prompts, Gbps", "one line"], rows))
too_much = [name for name in models if is_hybrid[name] and not crossing[name]]
print(f"\n   {sum(crossing.values())} of {len(crossing)} fit through one line: "
      f"{', '.join(name for name in crossing if crossing[name])}.\n"
      f"   Hybrid, and still too much: {', '.join(too_much) or 'none'}.\n")

# %% [markdown]
# *Why does a hybrid not cross?* Being a hybrid says how many layers are full attention, not what those keep. Both:

# %%
rows = []
for name in (name for name in models if is_hybrid[name]):
    growing = [spec for spec in model_state_specs(models[name], "bfloat16") if spec.kind is StateKind.TOKEN]
    implied_s = weights[name][2] * 8e-9 / paper.TABLE_3_GBPS[name][2]
    rows.append((name, f"{len(growing)} of {len(models[name].layers)}", growing[0].nbytes, token_bytes(growing),
                 human_bytes(weights[name][2]), f"{implied_s:.2f}", "yes" if crossing[name] else "no"))
print(table(["hybrid", "full attention", "bytes each, a token", "all", "S_kv at 32K", "T at 32K, s", "crosses"], rows))
print()

# %% [markdown]
# Qwen3.5's fifteen full-attention layers are GQA with 2,048 bytes a token each, together nearly four times what Kimi
# Linear's seven MLA layers keep; its fixed part is the second largest, and it prefills about as fast as MiniMax. Ring
# has a large fixed part, too, but takes its time, as a model of a trillion parameters does. So it is not "hybrid" that
# decides, but bytes per second. Qwen3.5 would cross on a wider line, from fewer GPUs, or if only *some* prompts were
# sent. Which ones: that is what chapters 10 to 12 are about.
#
# *Change this line:* `egress_needed_gbps(512, …)` → `10_000`. Who needs more than a line now? (Paper 2.3 asks it, too.)

# %% [markdown]
# ## 5. One model in full
#
# `python -m minprfaas inspect --config kimi-linear-48b` prints for any model what this chapter computed; this is the
# same function. (What *groups* and *blocks* are, chapter 03 shows.)
#
# *Guess first:* a prompt of 2K tokens instead of 1K: by how many percent does Kimi Linear's baton grow?

# %%
CHOSEN = "Kimi Linear"
specs = model_state_specs(models[CHOSEN], "bfloat16")
print("5. One model in full\n")
inspect.show(CHOSEN, inspect.describe(models[CHOSEN], plan_layout(specs, block_tokens=64), "bfloat16"))
of_1k, of_2k = (kv_bytes(specs, tokens) for tokens in (1024, 2048))
print(f"\n   From 1K to 2K tokens it grows by {of_2k / of_1k - 1:.0%}: of 1K's "
      f"{fixed_bytes(specs) / of_1k:.0%} is there whatever the length.")

# %% [markdown]
# *Why does that matter to a router?* A short prompt to a hybrid is nearly all fixed part: as heavy to send as a much
# longer one, and with little prefill to hide it behind. One more reason to send the long ones only.
#
# *Change this line:* `CHOSEN = "Kimi Linear"` → `"Qwen3-235B"`. By how many percent does a dense one's grow?

# %%
print(f"""
KVCache per second of prefill decides whether prefill may leave the datacenter: through one line it could for
{sum(crossing.values())} of {len(crossing)} models.
Next: tutorials/01_a_transformer_from_a_checkpoint.py, what such a model computes.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_00.py`, then `python tutorials/00_the_bandwidth_wall.py --check 1`.
# 1. `gqa_kv_bytes`: what a request weighs in a model of GQA layers.
# 2. `lighter_from`: from how many tokens on a hybrid's KVCache is lighter than a dense model's.
# 3. `instances_that_fit`: how many instances of a prefill cluster one link can carry.
