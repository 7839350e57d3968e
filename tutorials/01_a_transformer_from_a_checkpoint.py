"""Chapter 01: a transformer from a checkpoint. From three files to the next token, with the package and by hand.

    python tutorials/01_a_transformer_from_a_checkpoint.py [DIRECTORY]     (no directory: the embedded model)
    python tutorials/01_a_transformer_from_a_checkpoint.py --config NAME   (one of the paper's six models, made small,
                                                                            with random weights)

Modules: model/checkpoint.py, model/names.py, model/families/, model/tokenizer.py, model/transformer.py,
         model/layers.py, model/attention.py, model/gqa.py, model/moe.py, model/state.py, documents.py
Tests: test_checkpoint.py, test_families.py, test_model.py, test_moe.py, test_parity.py, test_tokenizer.py,
       test_config.py, test_documents.py, test_tiny_asset.py, test_bad_input.py
Paper: background of 2.1; table 2's GQA
"""
import helper

args = helper.begin(__doc__, {
    "directory": dict(nargs="?", metavar="DIRECTORY", help="a Hugging Face directory"),
    "--config": dict(metavar="NAME", help="kimi-linear-48b, mimo-v2-flash, qwen3.5-397b, ring-2.5-1t, minimax-m2.5 or "
                                          "qwen3-235b: its layers, with random weights")})

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from made_up import write_small

from minprfaas import load
from minprfaas.config import RopeConfig, StateKind
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.model.attention import attend
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import FAMILIES, read_published
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import Positions, apply_rotary, join
from minprfaas.model.moe import MoEConfig
from minprfaas.model.names import our_name
from minprfaas.model.spec import model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)

# %% [markdown]
# ## 1. Three files
#
# A checkpoint is a directory as Hugging Face lays it out: `config.json` says what the layers are, `model.safetensors`
# holds the weights by name, `tokenizer.json` turns text into numbers and back. `load` reads the first, builds the
# model that it describes, and only then opens the weights: each tensor's name and shape is checked before one is read.
#
# *Guess first:* 5 million weights of 4 bytes are 20 MB. How large is the file?

# %%
directory = Path(args.directory or EMBEDDED)
if args.config:
    read_published(args.config)  # an unknown name is refused here, in one line
    temporary = tempfile.TemporaryDirectory()  # gone when the chapter ends
    directory = write_small(args.config, Path(temporary.name))
model, tokenizer = load(directory)
config = model.config
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"1. Three files: {directory.name}\n")
print(table(["file", "size"], [(file.name, human_bytes(file.stat().st_size)) for file in sorted(directory.iterdir())
                               if file.name in ("config.json", "model.safetensors", "tokenizer.json")]))
print(f"\n   {config.family}, one of {len(FAMILIES)} names of families that can be read. {parameters:,} parameters, a "
      f"vocabulary of {config.vocab_size:,}:\n")
rows = []
for index, (layer, spec) in enumerate(zip(model.model.layers, model_state_specs(config, "float32"))):
    rows.append((index, type(layer.self_attn).__name__, type(layer.mlp).__name__,
                 sum(parameter.numel() for parameter in layer.parameters()),
                 f"{human_bytes(spec.nbytes)} {'a token' if spec.kind is StateKind.TOKEN else 'a request'}"))
print(table(["layer", "mixer", "MLP", "parameters", "remembers"], rows))

# %% [markdown]
# *Why half?* The file keeps bfloat16, two bytes a weight; `load` makes float32 of them. (`load(dtype=…)` chooses.)
#
# A *family* is one short reader in `model/families/` that says what a `config.json` means in our own pieces. The rest
# of the work is spelling: each author names the same tensor differently.

# %%
SPELLED = {
    "Kimi": "model.layers.3.block_sparse_moe.experts.7.w1.weight",
    "MiMo": "model.layers.3.self_attn.attention_sink_bias",
    "Qwen3.5": "model.language_model.layers.3.linear_attn.conv1d.weight",
    "Ring": "model.layers.3.attention.query_key_value.weight",
    "an old Llama": "model.layers.3.self_attn.rotary_emb.inv_freq"}
print()
print(table(["author", "in the file", "here"],
            [(author, name, our_name(name) or "(not needed)") for author, name in SPELLED.items()]))
print()

# %% [markdown]
# *Change this line:* run the chapter with `--config ring-2.5-1t`. Which mixers and MLPs do you see? (Its weights are
# random, so what it says below is noise; everything else holds.)

# %% [markdown]
# ## 2. Text in, a number for each token of the vocabulary out
#
# The prompt is a chronicle of invented facts and a question about one of them: a right answer can only come out of the
# text. The tokenizer cuts it into tokens; the model gives for each place its forecast of the next one, as *logits*,
# one number for each token of the vocabulary. Softmax makes probabilities of them.
#
# *Guess first:* the prompt has some 1,600 characters; how many tokens? And how sure is a model of 5 million weights of
# a name that it has never seen in training?

# %%
document = make_document(EVALUATION_SEEDS + 1, tokens=400, encode=tokenizer.encode)
question = document.questions[0]
prompt = document.prompt(question)
token_ids = tokenizer.encode(prompt)
ids = torch.tensor([token_ids])
logits = model(ids)
assert tokenizer.decode(token_ids) == prompt  # nothing is lost on the way


def forecast(row: torch.Tensor, tokenizer: Tokenizer = tokenizer) -> tuple[str, float]:
    """The likeliest next token, and its probability, by the logits `row` `[vocab]`."""
    share, token = row.softmax(-1).max(dim=-1)
    return repr(tokenizer.decode([int(token)])), float(share)


print("2. Text in, a number for each token of the vocabulary out\n")
print(f"   {len(prompt):,} characters: {prompt[:64].replace(chr(10), ' ')} … {prompt[-56:].replace(chr(10), ' ')}")
print(f"   {len(token_ids)} tokens, the last ones {[tokenizer.decode([token]) for token in token_ids[-6:]]}")
print(f"   logits: {list(logits.shape)}\n")
torch.manual_seed(1)
fresh = Transformer(config)  # the same layers, before any training
print(table(["weights", "next token", "sure"], [
    ("as loaded", *(f"{part:.0%}" if isinstance(part, float) else part for part in forecast(logits[0, -1]))),
    ("fresh", *(f"{part:.0%}" if isinstance(part, float) else part for part in forecast(fresh(ids)[0, -1])))]))
print(f"\n   The right answer is {question.answer!r}.\n")

# %% [markdown]
# *Why compare with fresh weights?* Layers alone know nothing. What was trained here is to find a name in the text.
#
# *Change this line:* `document.questions[0]` → `[1]`.

# %% [markdown]
# ## 3. Attention, in ten lines
#
# How does the last token find the name? By *attention*. Each token makes three vectors: a query (what I look for), a
# key (what I am found by), a value (what I tell). A token compares its query with the keys of all tokens up to itself;
# softmax makes shares of the scores, and the values are added in these shares:
#
# > o_i = Σ_(j ≤ i) softmax_j(q_i · k_j / √d) v_j


# %%
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head: q, k, v `[tokens, dim]` -> `[tokens, dim]`."""
    scores = q @ k.T / q.shape[1] ** 0.5
    is_later = torch.ones_like(scores).triu(diagonal=1).bool()
    return scores.masked_fill(is_later, float("-inf")).softmax(dim=-1) @ v


# %% [markdown]
# A layer has several heads. In *grouped-query* attention ([GQA](../docs/glossary.md#gqa)) several queries share one
# head of keys and values.
#
# *Guess first:* with 8 query heads on 2 KV heads, how much smaller is what must be kept?

# %%
q, k, v = torch.randn(50, 8, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)  # [tokens, heads, dim]
by_hand = torch.stack([attention(q[:, head], k[:, head // 4], v[:, head // 4]) for head in range(8)], dim=1)
everything = Positions(torch.zeros(1, dtype=torch.int64), 50)  # one request, its tokens 0 to 49
by_package = attend(q[None], k[None], v[None], everything, scale=16**-0.5)[0]

last_alone = torch.stack([(k[:, head // 4] @ q[-1, head] / 4).softmax(dim=0) @ v[:, head // 4] for head in range(8)])
print("3. Attention, in ten lines\n")
print(table(["what", "largest difference"], [
    ("ten lines, and `attend` of the package", f"{(by_hand - by_package).abs().max():.0e}"),
    ("the last token alone, with all keys and values", f"{(by_package[-1] - last_alone).abs().max():.0e}")]))
print(f"\n   Kept for each token: {2 * 2 * 16} numbers, where 8 heads of their own would keep {2 * 8 * 16}.\n")

# %% [markdown]
# *Look at the second row.* The last token needs *all* keys and values, but only its own query. So keys and values are
# worth keeping, and queries are not. What is kept is the [KVCache](../docs/glossary.md#kvcache): K for keys, V for
# values.
#
# *But where are the places?* Nothing above depends on the tokens' order. RoPE turns each pair of channels of q and k by
# an angle that grows with the place; then a score depends on how far apart two tokens are, and on nothing else:

# %%
rope = RopeConfig()
query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)


def score(query_at: int, key_at: int) -> float:
    """Of one query and one key at these places."""
    turned = [apply_rotary(x, *Positions(torch.tensor([at]), 1).rotary(rope, 16, torch.float32))
              for x, at in ((query, query_at), (key, key_at))]
    return float((turned[0] * turned[1]).sum())


print(table(["query at", "key at", "score"], [(a, b, f"{score(a, b):.4f}") for a, b in ((7, 4), (1007, 1004), (7, 5))]))

# %% [markdown]
# A whole GQA layer is that between two matrices: project, turn, attend, project back.

# %%
mixer = GQAConfig(num_heads=8, num_kv_heads=2, head_dim=16, rope=rope).build(hidden_size=64, norm_eps=1e-6)
x = torch.randn(1, 50, 64)
turns = everything.rotary(rope, 16, x.dtype)
q = apply_rotary(mixer.q_proj(x).unflatten(-1, (8, 16)), *turns)[0]
k = apply_rotary(mixer.k_proj(x).unflatten(-1, (2, 16)), *turns)[0]
v = mixer.v_proj(x).unflatten(-1, (2, 16))[0]
heads = torch.stack([attention(q[:, head], k[:, head // 4], v[:, head // 4]) for head in range(8)], dim=1)
difference = (mixer.o_proj(heads.flatten(1)) - mixer(x, everything, None)[0]).abs().max()
print(f"\n   A GQA layer by hand, and the package's: largest difference {difference:.0e}.\n")

# %% [markdown]
# *Change this line:* `scores.masked_fill(is_later, …)` → `scores`. Every token now sees the future: which comparison
# still holds, and why?

# %% [markdown]
# ## 4. The stream
#
# Each token's vector runs through the layers on a *stream* that each layer only adds to: first what its mixer has read
# in other tokens, then what its MLP makes of that. Here is the whole forward pass by hand; the head may look at the
# stream after any layer.
#
# *Guess first:* this model has two layers that can look up a token exactly (in the embedded one, layers 3 and 7). After
# which layer does it know the answer?

# %%
stack, positions = model.model, Positions(torch.zeros(1, dtype=torch.int64), len(token_ids))
stream, rows = stack.embed_tokens(ids), []
for index, layer in enumerate(stack.layers):
    normed = layer.input_layernorm(stream)
    mixed = layer.self_attn(normed, positions, None)
    stream = join(stream, normed, mixed, layer.config.mixer_residual)  # stream + mixed, in all families but one
    normed = layer.post_attention_layernorm(stream)
    thought = layer.mlp(normed)
    stream = join(stream, normed, thought, layer.config.mlp_residual)
    word, sure = forecast(model.lm_head(stack.norm(stream))[0, -1])
    lengths = [f"{vector[0, -1].norm():.1f}" for vector in (mixed, thought, stream)]
    rows.append((index, type(layer.self_attn).__name__, *lengths, word, f"{sure:.0%}"))
print("4. The stream, at the last token: lengths of vectors, and what the head would say\n")
print(table(["layer", "mixer", "mixer adds", "MLP adds", "stream", "next token", "sure"], rows))
difference = (model.lm_head(stack.norm(stream)) - logits).abs().max().item()
print(f"\n   Largest difference to the package's logits: {difference:.1e}.\n")

# %% [markdown]
# *Why an MLP at all?* Attention moves what tokens know from one to another. The MLP works on each token by itself, and
# most of the weights are there. The paper's models have hundreds of small MLPs (*experts*) in a layer, and a router
# that picks a few for each token: a *mixture of experts*. By hand:

# %%
mlp = MoEConfig(num_experts=8, top_k=2, intermediate_size=32, scoring="softmax").build(hidden_size=64)
out = torch.zeros(50, 64)
for place, token in enumerate(x[0]):
    shares, chosen = (mlp.gate.weight @ token).softmax(dim=-1).topk(2)
    for share, expert in zip(shares / shares.sum(), chosen):
        gate, up = (mlp.experts.gate_up_proj[expert] @ token).chunk(2)
        out[place] += share * (mlp.experts.down_proj[expert] @ (F.silu(gate) * up))
used = len({int(expert) for expert in mlp.gate(x[0])[0].flatten()})
print(f"   A mixture of experts by hand, and the package's: largest difference {(out - mlp(x)[0]).abs().max():.0e}.\n"
      f"   Each token met 2 of 8 experts, 50 tokens together {used}.\n")

# %% [markdown]
# *Why does that matter to us?* It makes prefill cheap (few weights a token) and says nothing about what is remembered:
# experts keep no state. So a mixture of experts makes batons faster and not lighter, and the wall of chapter 00 higher.
#
# *Change this line:* `top_k=2` → `8` (and `topk(2)`). What does the mixture become?

# %% [markdown]
# ## 5. Token by token
#
# To go on, append the likeliest token and ask again. There are two ways: run the whole text anew for each token, or
# keep what each layer remembers, its *state*, and run only the new token.
#
# *Guess first:* with some 370 tokens behind it, how many times cheaper does the state make a token? 370 times?

# %%
STEPS = 12
began_s, recomputed = time.perf_counter(), list(token_ids)
for _ in range(STEPS):
    recomputed.append(int(model(torch.tensor([recomputed]), last_only=True).argmax()))
anew_s = (time.perf_counter() - began_s) / STEPS

state, resumed, new, times_s = ContiguousState(config, "float32"), list(token_ids), list(token_ids), []
for _ in range(STEPS):
    began_s = time.perf_counter()
    token = int(model(torch.tensor([new]), state, last_only=True).argmax())
    state.advance(len(new))
    times_s.append(time.perf_counter() - began_s)
    resumed.append(token)
    new = [token]
prefill_s, decode_s = times_s[0], sum(times_s[1:]) / (STEPS - 1)
held = sum(tensor.nbytes for layer in state.layers for tensor in layer.tensors)
print("5. Token by token\n")
print(table(["way", "ms a token", "answer"], [
    ("everything anew", f"{anew_s * 1e3:.1f}", "–"),
    ("with the state", f"{decode_s * 1e3:.1f}", "the same" if recomputed == resumed else "DIFFERENT")]))
print(f"""
   The prompt took {prefill_s * 1e3:.0f} ms, once. Without the state a token takes {anew_s / decode_s:.1f} times as
   long. The state of {len(resumed) - 1} tokens weighs {human_bytes(held)}. It *is* the KVCache, the baton.
""")

# %% [markdown]
# *Why not 370 times?* The work falls by a factor of 370, the time does not: one token goes through as many steps as
# many tokens do, and each step reads its weights either way. Chapter 04 measures that.
#
# *Change this line:* `tokens=400` in section 2 → `1200`. Which of the two times grows?

# %%
drawn = resumed[len(token_ids):]
end = next((place for place, token in enumerate(drawn) if token in config.eos_token_ids), len(drawn))
answer = tokenizer.decode(drawn[:end]).strip()
print(f"""   {question.text}
   the model: {answer!r}   the document: {question.answer!r}

A checkpoint is names and shapes, a transformer is a stream that layers add to, and its memory can be kept, weighed
and sent. Next: tutorials/02_hybrid_attention.py, layers whose memory does not grow.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_01.py`, then
# `python tutorials/01_a_transformer_from_a_checkpoint.py --check 1`.
# 1. `attend_to_window`: attention in which a token sees only the last few, itself included.
# 2. `rotate`: RoPE for one vector, by sines and cosines.
# 3. `choose_experts`: which experts a token goes to, and with which shares.
