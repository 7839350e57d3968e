"""Chapter 00: the bandwidth wall. Why prefill could not leave the datacenter, and what changed (paper 2.1-2.3).

    python tutorials/00_the_bandwidth_wall.py [--plots DIRECTORY]
"""

import helper

args = helper.begin(__doc__, {"--plots": dict(metavar="DIRECTORY", help="draw section 2 there, as a picture")})

import time
from collections import Counter

import torch

from minprfaas.config import LayerConfig, ModelConfig, RopeConfig, StateKind
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.lightning import LightningConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.published import PUBLISHED, read_published
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.model.transformer import Transformer
from minprfaas.observe.plots import draw_weights, prepare_plots
from minprfaas.observe.report import human_bytes, table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.throughput import egress_needed_gbps, kv_throughput_gbps

ETHERNET_GBPS = 400  # a generous dedicated line between two datacenters
PLOTTED_TOKENS = [2**exponent for exponent in range(8, 21)]  # 256 to 1M


def stack(mixers: list, hidden_size: int, intermediate_size: int, vocab_size: int) -> ModelConfig:
    """A model of these mixers; what its layers remember depends on nothing else."""
    layers = tuple(LayerConfig(mixer, DenseConfig(intermediate_size)) for mixer in mixers)
    return ModelConfig("example", vocab_size, hidden_size, layers, norm_eps=1e-6, tie_embeddings=True,
                       max_context_tokens=2**17)


def prefill_seconds(model: Transformer, prompt: torch.Tensor) -> float:
    """Seconds that `model` takes for one prompt `[1, tokens]`."""
    began = time.perf_counter()
    model(prompt, last_only=True)
    return time.perf_counter() - began


torch.set_num_threads(1)  # one core measures the same on a busy machine
if args.plots:
    prepare_plots(args.plots)
models = {theirs: read_published(ours) for ours, theirs in PUBLISHED.items()}  # of table 1, as their authors publish

print("""1. What a layer remembers

Prefill reads a prompt and leaves its KVCache; decode needs that KVCache to go on. If the two run on different
machines, it has to travel. How much there is depends on the kind of layer (bfloat16; recurrent state is float32):
""")
kinds = {
    "GQA, 8 KV heads of 128": GQAConfig(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeConfig()),
    "the same, last 128 tokens": GQAConfig(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeConfig(), window=128),
    "MLA, latent of 512 + 64": MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128),
    "KDA, 32 heads of 128": KDAConfig(num_heads=32, head_dim=128),
    "GDN, 16 and 64 heads of 128": GDNConfig(num_k_heads=16, num_v_heads=64, k_dim=128, v_dim=128),
    "Lightning, 64 heads of 128": LightningConfig(head_dim=128, slopes=(0.1,) * 64)}
rows = []
for name, mixer in kinds.items():
    spec = mixer.state_spec("bfloat16")
    per_token, fixed = (spec.nbytes, 0) if spec.kind is StateKind.TOKEN else (0, spec.nbytes)
    rows.append((name, f"{per_token:,}", human_bytes(fixed), human_bytes(spec.bytes_at(32_768))))
print(table(["layer", "bytes a token", "at most", "at 32K tokens"], rows))
print("\nGQA keeps every token's keys and values, or those of the last few (a sliding window, SWA). MLA keeps one small\n"
      "latent for each. KDA, GDN and Lightning keep no tokens at all: one matrix per head, as large after a word as\n"
      "after a book.")

print("""
2. What a request weighs: S_kv(l)

The six models of the paper's table 1 stack such layers, from the configurations that their authors publish
(`python -m minprfaas inspect --config kimi-linear-48b` shows one in full):
""")
lengths, rows, weights = paper.TABLE_3_TOKENS, [], {}
for name, config in models.items():
    specs = model_state_specs(config, "bfloat16")
    layers = Counter(type(layer.mixer).__name__.removesuffix("Config") + " window" * (spec.kind is StateKind.WINDOW)
                     for layer, spec in zip(config.layers, specs))
    per_token = sum(spec.nbytes for spec in specs if spec.kind is StateKind.TOKEN)
    fixed = sum(spec.nbytes for spec in specs if spec.kind is not StateKind.TOKEN)
    weights[name] = [kv_bytes(specs, tokens) for tokens in lengths]
    rows.append((name, ", ".join(f"{count} {kind}" for kind, count in layers.items()), f"{per_token:,}",
                 human_bytes(fixed), *map(human_bytes, weights[name])))
print(table(["model", "layers", "bytes a token", "fixed", *(f"{tokens // 1024}K" for tokens in lengths)], rows))
dense, hybrid = weights["MiniMax-M2.5"], weights["Kimi Linear"]
print(f"\nMiniMax-M2.5 weighs {dense[0] / hybrid[0]:.1f} times as much as Kimi Linear at 1K tokens, where the fixed "
      f"state counts, and {dense[-1] / hybrid[-1]:.0f} times\nas much at 128K.")
if args.plots:
    curves = {name: [(tokens, kv_bytes(model_state_specs(config, "bfloat16"), tokens)) for tokens in PLOTTED_TOKENS]
              for name, config in models.items()}
    print(f"\nDrawn: {draw_weights(args.plots, 'kvcache_of_six_models.png', curves)}")

print("""
3. How fast it comes out: Phi_kv(l) = S_kv(l) / T_prefill(l)   (equation 1)

A heavy cache would not matter if prefill were slow. The link has to keep up with bytes *per second of prefill*. The
paper's table 3, in Gbps, for one instance of 8 H200 (published numbers, none of them measured here):
""")
print(table(["model", *(f"{tokens // 1024}K" for tokens in lengths)],
            [(name, *(f"{gbps:.2f}" for gbps in line)) for name, line in paper.TABLE_3_GBPS.items()]))
print("\nBoth tables together imply how long prefill took, in seconds (equation 1 the other way round):\n")
print(table(["model", *(f"{tokens // 1024}K" for tokens in lengths)], [
    (name, *(f"{count * 8e-9 / gbps:.2f}" for count, gbps in zip(weights[name], line)))
    for name, line in paper.TABLE_3_GBPS.items()]))
print("\nFaster prefill raises the wall, fewer bytes take it down. At 128K Kimi Linear is the fastest, and emits a tenth"
      "\nof what MiniMax-M2.5 does.")

print("""
   The same on this machine, with two small models of random weights (float32, measured now):
""")
small_gqa = GQAConfig(num_heads=2, num_kv_heads=2, head_dim=64, rope=RopeConfig())
small_mla = MLAConfig(num_heads=2, kv_lora_rank=48, qk_nope_dim=64, qk_shared_dim=16, v_dim=64)
small_kda = KDAConfig(num_heads=2, head_dim=32)
small = {"dense: 4 GQA": stack([small_gqa] * 4, 128, 512, 1024),
         "hybrid: 3 KDA + 1 MLA": stack([small_kda] * 3 + [small_mla], 128, 512, 1024)}
rows, measured = [], {}
torch.manual_seed(0)
with torch.inference_mode():
    for name, config in small.items():
        model = Transformer(config)
        model(torch.zeros(1, 64, dtype=torch.int64), last_only=True)  # the first call also allocates
        for tokens in (512, 2048):
            prompt = torch.randint(config.vocab_size, (1, tokens))
            prefill_s = min(prefill_seconds(model, prompt) for _ in range(3))
            size = kv_bytes(model_state_specs(config, "float32"), tokens)
            measured[name] = size, prefill_s
            gbps = kv_throughput_gbps(size, prefill_s)
            rows.append((name, tokens, human_bytes(size), f"{prefill_s:.3f}", f"{gbps:.4f}"))
print(table(["model", "tokens", "S_kv", "T_prefill, s", "Phi_kv, Gbps"], rows))
(dense_bytes, dense_s), (hybrid_bytes, hybrid_s) = measured.values()
print(f"\nAt 2,048 tokens the dense model leaves {dense_bytes / hybrid_bytes:.1f} times the bytes, and the hybrid "
      f"takes {hybrid_s / dense_s:.1f} times as long (KDA is readable\nPyTorch here, chapter 02). "
      "A slow prefill lowers Phi_kv too, but only fewer bytes are a merit.")

print(f"""
4. What a prefill cluster needs: B_out = N / P * Phi_kv   (equation 2)

512 GPUs at 8 an instance, all of them prefilling, and a line of {ETHERNET_GBPS} Gbps to the next datacenter:
""")
rows = []
for name, line in paper.TABLE_3_GBPS.items():
    at_32k, at_128k = (egress_needed_gbps(512, paper.GPUS_PER_INSTANCE, instance_gbps) for instance_gbps in line[2:])
    verdict = "crosses" if max(at_32k, at_128k) <= ETHERNET_GBPS else "does not"
    rows.append((name, f"{at_32k:,.0f}", f"{at_128k:,.0f}", verdict))
print(table(["model", "32K prompts, Gbps", "128K prompts, Gbps", f"with {ETHERNET_GBPS} Gbps"], rows))

crossing = [row[0] for row in rows if row[-1] == "crosses"]
print(f"""
Shown: KVCache per second of prefill decides whether prefill may leave the datacenter. Dense models need terabits;
{', '.join(crossing)} fit through one line. Smaller is necessary, not sufficient:
chapters 10 to 12 decide *which* requests should go.
Next: tutorials/01_a_transformer_from_a_checkpoint.py, what such a model computes.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_00.py`, then `python tutorials/00_the_bandwidth_wall.py --check 1`.
# 1. `gqa_kv_bytes`: what a request weighs in a model of GQA layers.
# 2. `lighter_from`: from how many tokens on a hybrid's KVCache is lighter than a dense model's.
# 3. `instances_that_fit`: how many instances of a prefill cluster one link can carry.
