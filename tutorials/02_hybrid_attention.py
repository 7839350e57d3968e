"""Chapter 02: hybrid attention. A memory of one size, its two forms, and what it saves (paper 2.2).

    python tutorials/02_hybrid_attention.py [--plots DIRECTORY]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from minprfaas.config import RopeConfig, StateKind
from minprfaas.errors import exit_on_user_error
from minprfaas.model.delta import delta_rule_chunked, delta_rule_recurrent
from minprfaas.model.gdn import GDNConfig
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import Positions
from minprfaas.model.lightning import LightningConfig, lightning_chunked, lightning_recurrent
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import kv_bytes
from minprfaas.model.state import ContiguousLayerState
from minprfaas.observe.plots import draw_weights, prepare_plots
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--plots", metavar="DIRECTORY", help="draw section 5 there, as a picture")
args = parser.parse_args()
if args.plots:
    exit_on_user_error(prepare_plots)(args.plots)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The quickest of a few runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def random_tokens(tokens: int, decay: float, heads: int = 2, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta and an empty memory; every channel keeps exp(-decay) of itself a token."""
    q, k = (F.normalize(torch.randn(1, tokens, heads, dim), dim=-1) for _ in range(2))
    v, beta = torch.randn(1, tokens, heads, dim), torch.rand(1, tokens, heads)
    return q, k, v, torch.full_like(q, -decay), beta, torch.zeros(1, heads, dim, dim)


print("""1. A memory that is written to

Attention keeps every token and searches them all. Kimi delta attention (KDA) keeps one matrix a head, S, and does three
things a token: let S decay, replace what S stores under the key k by the value v, read with the query q.

    S = diag(exp(g)) S;    S = S + beta k (v - k'S)';    o = S'q

Five tokens through the real function, with keys "a" = [1, 0] and "b" = [0, 1] and values of one number:
""")
a, b, nothing = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
story = [("write 5 under a", a, 5.0, 1.0, 0.0, a),  # key, value, beta, g, query
         ("write 7 under b", b, 7.0, 1.0, 0.0, b),
         ("read a", nothing, 0.0, 0.0, 0.0, a),
         ("write 9 under a", a, 9.0, 1.0, 0.0, a),
         ("decay by half, read a", nothing, 0.0, 0.0, -0.6931, a)]
memory, rows = torch.zeros(1, 1, 2, 1), []
for what, key, value, beta, g, query in story:
    q, k = torch.tensor(query).view(1, 1, 1, 2), torch.tensor(key).view(1, 1, 1, 2)
    out, memory = delta_rule_recurrent(q, k, torch.full((1, 1, 1, 1), value), torch.full((1, 1, 1, 2), g),
                                       torch.full((1, 1, 1), beta), memory)
    rows.append((what, f"{out.item():.1f}", f"{memory[0, 0, 0].item():.1f}", f"{memory[0, 0, 1].item():.1f}"))
print(table(["token", "output", "S under a", "S under b"], rows))
print("\nThe second value under a took the place of the first (the delta rule); a plain sum would now say 14.")

print("""
2. Two forms of one function

Decode has one token at a time, so it uses the recurrence as it stands. Prefill has them all: `delta_rule_chunked` solves
each chunk of 64 tokens as one triangular system and carries S from chunk to chunk. The same numbers, in fewer, larger steps
(2 heads of 64, one core, float32):
""")
rows = []
for tokens in (256, 1024, 4096):
    arguments = random_tokens(tokens, decay=0.1)
    difference = (delta_rule_recurrent(*arguments)[0] - delta_rule_chunked(*arguments)[0]).abs().max().item()
    slow = seconds(lambda: delta_rule_recurrent(*arguments), repeats=1)
    fast = seconds(lambda: delta_rule_chunked(*arguments))
    rows.append((tokens, f"{slow:.4f}", f"{fast:.4f}", f"{slow / fast:.1f}x", f"{difference:.0e}"))
print(table(["tokens", "recurrence, s", "chunked, s", "ratio", "largest difference"], rows))

print("""
3. Why the chunked form needs chunks inside its chunks

Between tokens i > j of a chunk the memory decays by exp(G_i - G_j), G being the sum of g so far. The obvious way to
have all pairs at once is the product of (k_i exp(G_i)) with (k_j exp(-G_j)): but exp(-G) explodes, and float32 ends at
3e38. Secondary chunking goes through a reference between the two, so that every exponent is at most 0:
""")
rows, broken = [], 0.0
for decay in (0.1, 1.0, 1.3, 2.0, 20.0, 1000.0):
    q, k, v, g, beta, memory = random_tokens(64, decay)
    total = g.cumsum(dim=1)
    naive = torch.einsum("bihd,bjhd->bhij", k * total.exp(), k * (-total).exp())
    pair_decay = (total[:, :, None] - total[:, None]).double().clamp(max=0).exp()
    exact = torch.einsum("bihd,bjhd,bijhd->bhij", k.double(), k.double(), pair_decay)
    error = (naive - exact).tril().abs().max().item()
    arguments = (q, k, v, g, beta, memory)
    chunked = (delta_rule_chunked(*arguments)[0] - delta_rule_recurrent(*arguments)[0]).abs().max().item()
    if not error < 1e-3:
        broken = broken or decay
    rows.append((f"{decay:g}", f"{torch.exp(-total).max().item():.0e}", f"{error:.0e}", f"{chunked:.0e}"))
print(table(["decay a token", "largest factor", "error of the one product", "error of the chunked form"], rows))
print(f"\nFrom a decay of {broken:g} a token on, the one product is of no use, and a gate that wants to forget asks for more"
      "\nthan that. The bounded form does not notice.")

print("""
4. The same memory with fewer questions

KDA asks a decay of every channel of a key, and what is already stored. Two relatives ask less, and have the same two
forms:

    GDN (Qwen3.5)              S = exp(g) S;       S = S + beta k (v - k'S)';   one decay a head
    Lightning (MiniMax, Ring)  S = exp(-slope) S;  S = S + k v';                a fixed decay a head, nothing replaced

The first four tokens of section 1 through Lightning, without its decay: the second value under a is added to the
first. Then 1,024 tokens through each of the three (2 heads of 64, one core, float32):
""")
memory, read = torch.zeros(1, 1, 2, 1), []
for what, key, value, _, _, query in story[:4]:
    q, k = torch.tensor(query).view(1, 1, 1, 2), torch.tensor(key).view(1, 1, 1, 2)
    value = torch.full((1, 1, 1, 1), value).expand(1, 1, 1, 2)  # as wide as its key
    out, memory = lightning_recurrent(q, k, value, torch.zeros(1), memory)
    read.append(f"{what}: {out[0, 0, 0, 0]:.0f}")
print("    " + ", ".join(read) + "\n")
q, k, v, g, beta, memory = random_tokens(1024, decay=0.1)
slopes = torch.full((2,), 0.1)
forms = {"KDA": (delta_rule_recurrent, delta_rule_chunked, (q, k, v, g, beta, memory)),
         "GDN": (delta_rule_recurrent, delta_rule_chunked, (q, k, v, g[..., :1], beta, memory)),
         "Lightning": (lightning_recurrent, lightning_chunked, (q, k, v, slopes, memory))}
rows = []
for name, (recurrent, chunked, arguments) in forms.items():
    difference = (recurrent(*arguments)[0] - chunked(*arguments)[0]).abs().max().item()
    slow, fast = seconds(lambda: recurrent(*arguments), repeats=1), seconds(lambda: chunked(*arguments))
    rows.append((name, f"{slow:.4f}", f"{fast:.4f}", f"{slow / fast:.1f}x", f"{difference:.0e}"))
print(table(["mixer", "recurrence, s", "chunked, s", "ratio", "largest difference"], rows))
print("""
A sliding window (SWA, MiMo) is another way to a state of one size: attention as ever, but over the last few tokens
only. It forgets by position what the others forget by decay.""")

print("""
5. What each kind of layer remembers

One layer with Kimi Linear's shapes (32 heads of 128; MLA latent 512 + 64), a GQA layer with 8 KV heads of 128, the same
with a window of 128 tokens, and the relatives' published shapes; bfloat16, the recurrent matrices float32:
""")
gqa = GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig())
mla = MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_dim=128, qk_shared_dim=64, v_dim=128)
kda = KDAConfig(num_heads=32, head_dim=128)
layers = {"GQA": [gqa], "GQA, window": [replace(gqa, window=128)], "MLA": [mla], "KDA": [kda],
          "GDN": [GDNConfig(num_k_heads=16, num_v_heads=64, k_dim=128, v_dim=128)],
          "Lightning": [LightningConfig(head_dim=128, slopes=(0.1,) * 64)], "3 KDA + 1 MLA, a layer": [kda] * 3 + [mla]}


def layer_bytes(mixers: list, tokens: int) -> float:
    """Mean bytes a layer after `tokens` tokens."""
    return kv_bytes(tuple(mixer.state_spec("bfloat16") for mixer in mixers), tokens) / len(mixers)


lengths = (1024, 8192, 32_768, 131_072, 1_048_576)
print(table(["layer", *(f"{tokens // 1024}K" for tokens in lengths)],
            [(name, *(human_bytes(layer_bytes(mixers, tokens)) for tokens in lengths))
             for name, mixers in layers.items()]))
mla_crossing, gqa_crossing = (layer_bytes([kda], 1) // layer_bytes([mixer], 1) for mixer in (mla, gqa))
print(f"""
KDA is the heavier one up to {mla_crossing:,.0f} tokens (MLA) or {gqa_crossing:,.0f} (GQA): a matrix is a matrix,
even after one word. A hybrid keeps a few full-attention layers to look things up exactly, and pays for those alone as
the text grows.""")
if args.plots:
    curves = {name: [(tokens, layer_bytes(mixers, tokens)) for tokens in (2**exponent for exponent in range(4, 21))]
              for name, mixers in layers.items()}
    print(f"\nDrawn: {draw_weights(args.plots, 'state_of_a_layer.png', curves)}")

print("""
6. What that means for time

A decode step reads the whole state of every layer. One step of one mixer (width 256, 4 heads of 64) after a context
of:
""")


class FullContext:
    """The token state of one layer with one free row at its end: a step writes that row and copies nothing."""

    attend = None  # as `TokenContext`: there is no other way than through the rows

    def __init__(self, context: int, width: int):
        self.tensor = torch.randn(1, context + 1, width)

    def append(self, new_rows: torch.Tensor) -> "FullContext":
        self.tensor[:, -1:] = new_rows
        return self

    def rows(self) -> torch.Tensor:
        return self.tensor


small = {"GQA": GQAConfig(4, 4, 64, RopeConfig()), "MLA": MLAConfig(4, 128, 64, 16, 64),
         "GQA, window": GQAConfig(4, 4, 64, RopeConfig(), window=128), "KDA": KDAConfig(4, 64),
         "GDN": GDNConfig(2, 4, 64, 64), "Lightning": LightningConfig(64, (0.1,) * 4)}
contexts, rows, growth = (1024, 8192, 65_536), [], {}
for name, mixer_config in small.items():
    mixer, spec, times = mixer_config.build(256, 1e-6), mixer_config.state_spec("float32"), []
    for context in contexts:
        width = spec.tensors[0].shape[0]
        state = FullContext(context, width) if spec.kind is StateKind.TOKEN else ContiguousLayerState(spec, 1, "cpu")
        positions, token = Positions(torch.tensor([context]), 1), torch.randn(1, 1, 256)
        times.append(seconds(lambda: mixer(token, positions, state), repeats=10))
    growth[name] = times[-1] / times[0]
    rows.append((name, *(f"{1e3 * step_s:.2f} ms" for step_s in times), f"{growth[name]:.1f}x"))
print(table(["mixer", *(f"{context // 1024}K tokens" for context in contexts), "growth"], rows))
print(f"""
Shown: KDA's recurrence and its chunked form are one function; bounded exponents make the chunked one safe; its state
has one size, so a step after 64K tokens costs {growth['KDA']:.1f} times one after 1K; with GQA, {growth['GQA']:.0f} times.
Next: tutorials/03_paged_kvcache.py, where both kinds of state live in one pool of blocks.""")
