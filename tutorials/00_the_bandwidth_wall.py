"""Chapter 00: the bandwidth wall. Why prefill could not leave the datacenter, and what changed (paper 2.1-2.3).

    python tutorials/00_the_bandwidth_wall.py
"""

import time

import torch

from minprfaas.config import LayerConfig, ModelConfig, RopeConfig, StateKind
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes, table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.throughput import egress_needed_gbps, kv_throughput_gbps

ETHERNET_GBPS = 400  # a generous dedicated line between two datacenters


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
# The attention shapes of three published models; MLPs and experts leave no state, so any will do.
gqa = GQAConfig(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeConfig())
qwen_gqa = GQAConfig(num_heads=64, num_kv_heads=4, head_dim=128, rope=RopeConfig())
mla = MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128)
kda = KDAConfig(num_heads=32, head_dim=128)
models = {
    "MiniMax-M2.5": stack([gqa] * 62, 3072, 1536, 200_064),
    "Qwen3-235B": stack([qwen_gqa] * 94, 4096, 1536, 151_936),
    "Kimi Linear": stack(([kda] * 3 + [mla]) * 6 + [kda] * 2 + [mla], 2304, 1024, 163_840),
}

print("""1. What a layer remembers

Prefill reads a prompt and leaves its KVCache; decode needs that KVCache to go on. If the two run on different
machines, it has to travel. How much there is depends on the kind of layer (bfloat16; recurrent state is float32):
""")
rows = []
for name, mixer in (("GQA, 8 KV heads of 128", gqa), ("MLA, latent of 512 + 64", mla), ("KDA, 32 heads of 128", kda)):
    spec = mixer.state_spec("bfloat16")
    per_token, fixed = (spec.nbytes, 0) if spec.kind is StateKind.TOKEN else (0, spec.nbytes)
    rows.append((name, f"{per_token:,}", human_bytes(fixed), human_bytes(per_token * 32_768 + fixed)))
print(table(["layer", "bytes a token", "fixed", "at 32K tokens"], rows))
print("\nGQA keeps every token's keys and values. MLA keeps one small latent for each. KDA keeps no tokens at all: one"
      "\nmatrix per head, as large after a word as after a book.")

print("""
2. What a request weighs: S_kv(l)

Stack such layers the way three real models do, two dense ones and a hybrid with three KDA layers for each MLA layer:
""")
lengths = paper.TABLE_3_TOKENS
weights = {name: [kv_bytes(model_state_specs(config, "bfloat16"), tokens) for tokens in lengths]
           for name, config in models.items()}
print(table(["model", *(f"{tokens // 1024}K tokens" for tokens in lengths)],
            [(name, *map(human_bytes, counts)) for name, counts in weights.items()]))
dense, hybrid = weights["MiniMax-M2.5"], weights["Kimi Linear"]
print(f"\nMiniMax-M2.5 weighs {dense[0] / hybrid[0]:.1f} times as much as the hybrid at 1K tokens, where the fixed "
      f"state counts, and {dense[-1] / hybrid[-1]:.0f} times\nas much at 128K.")

print("""
3. How fast it comes out: Phi_kv(l) = S_kv(l) / T_prefill(l)   (equation 1)

A heavy cache would not matter if prefill were slow. The link has to keep up with bytes *per second of prefill*. The
paper's table 3, in Gbps, for one instance of 8 H200 (published numbers, none of them measured here):
""")
print(table(["model", *(f"{tokens // 1024}K" for tokens in lengths)],
            [(name, *(f"{gbps:.2f}" for gbps in line)) for name, line in paper.TABLE_3_GBPS.items()]))
index = lengths.index(32_768)
implied = {name: counts[index] * 8 / 1e9 / paper.TABLE_3_GBPS[name][index] for name, counts in weights.items()}
print("\nBoth tables together give the prefill times of 32K tokens: "
      + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in implied.items()) + "."
      "\nFaster prefill raises the wall, fewer bytes take it down. The hybrid is the fastest and still emits least.")

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
