"""Chapter 01: a transformer from a checkpoint. From three files to the next token, through the library and by hand.

    python tutorials/01_a_transformer_from_a_checkpoint.py [DIRECTORY]     (no directory: the embedded model)
    python tutorials/01_a_transformer_from_a_checkpoint.py --config NAME   (one of the paper's six models, made small,
                                                                            with random weights)
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from minprfaas import load
from minprfaas.config import StateKind
from minprfaas.documents import make_document
from minprfaas.errors import exit_on_user_error
from minprfaas.files import read_json
from minprfaas.model.checkpoint import EMBEDDED, save_checkpoint
from minprfaas.model.families import config_from_hf, read_config
from minprfaas.model.layers import Positions, join
from minprfaas.model.published import PUBLISHED, SHIPPED
from minprfaas.model.spec import model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
LAYERS = 8  # of a model made small: one whole group of every kind of layer
SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
         "num_experts_per_tok": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "eos_token_id": None,
         "num_hidden_layers": LAYERS, "vocab_size": read_config(EMBEDDED).vocab_size}


def made_small(fields: dict) -> dict:
    """A published configuration with its first layers alone and narrow; the heads keep their shapes."""
    small = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = made_small(value)
        elif name in ("full_attn_layers", "kda_layers"):
            value = [number for number in value if number <= LAYERS]
        elif isinstance(value, list) and len(value) > LAYERS:
            value = value[:LAYERS]
        small[name] = SMALL.get(name, value)
    return small


def write_small(name: str, directory: Path) -> Path:
    """A checkpoint of that model with random weights and the embedded model's tokenizer."""
    raw = made_small(read_json(SHIPPED / f"{name}.json"))
    torch.manual_seed(0)
    save_checkpoint(Transformer(config_from_hf(raw)), raw, directory / name, torch.float32)
    shutil.copy(EMBEDDED / "tokenizer.json", directory / name)
    return directory / name


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("directory", nargs="?", default=EMBEDDED, type=Path, help="Hugging Face directory")
parser.add_argument("--config", choices=PUBLISHED, metavar="NAME", help=f"one of: {', '.join(PUBLISHED)}")
args = parser.parse_args()
temporary = tempfile.TemporaryDirectory()  # gone when the chapter ends
directory = write_small(args.config, Path(temporary.name)) if args.config else args.directory
model, tokenizer = exit_on_user_error(load)(directory)

print(f"""1. Three files

A checkpoint is a directory as Hugging Face lays it out. This one is {directory.name}:
""")
files = ("config.json", "model.safetensors", "tokenizer.json")
means = ("what the layers are", "the weights, by name", "text to token ids and back")
print(table(["file", "size", "holds"],
            [(name, human_bytes((directory / name).stat().st_size), what) for name, what in zip(files, means)]))

config = model.config
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"""
`load` reads config.json first, builds the model that it describes, and only then opens the weights: every tensor's
name and shape is checked before one is read. {parameters:,} parameters, a vocabulary of {config.vocab_size:,}:
""")
rows = []
for index, (layer, spec) in enumerate(zip(config.layers, model_state_specs(config, "float32"))):
    of_layer = sum(parameter.numel() for parameter in model.model.layers[index].parameters())
    rows.append((index, type(model.model.layers[index].self_attn).__name__, f"{of_layer:,}",
                 f"{human_bytes(spec.nbytes)} {'a token' if spec.kind is StateKind.TOKEN else 'a request'}"))
print(table(["layer", "mixer", "parameters", "remembers"], rows))

document = make_document(seed=10**9 + 1, tokens=400, encode=tokenizer.encode)
question = document.questions[0]
prompt = document.prompt(question)
token_ids = tokenizer.encode(prompt)
print(f"""
2. Text in, one number for every token of the vocabulary out

The prompt is a chronicle of invented facts and a question about one of them, {len(prompt):,} characters:

    {prompt[:90].replace(chr(10), ' ')} ... {prompt[-60:].replace(chr(10), ' ')}

The tokenizer makes {len(token_ids)} token ids of it; the last five are {token_ids[-5:]}:
{[tokenizer.decode([token]) for token in token_ids[-5:]]}.
`model(ids)` returns logits [1, {len(token_ids)}, {config.vocab_size}], for every position its forecast of the next token.
The last position's:
""")
ids = torch.tensor([token_ids])
logits = model(ids)
shares, likeliest = logits[0, -1].softmax(-1).topk(5)
print(table(["next token", "probability"], [(repr(tokenizer.decode([token])), f"{share:.1%}")
                                            for token, share in zip(likeliest.tolist(), shares.tolist())]))

print("""
3. The same by hand

Each token's vector runs through the layers on a stream that every layer only adds to: first what its mixer has read in
other tokens, then what its MLP makes of it. The head can look at the stream after any layer:
""")
stack, positions = model.model, Positions(torch.zeros(1, dtype=torch.int64), len(token_ids))
stream, rows = stack.embed_tokens(ids), []
for index, layer in enumerate(stack.layers):
    normed = layer.input_layernorm(stream)
    mixed = layer.self_attn(normed, positions, None)
    stream = join(stream, normed, mixed, layer.config.mixer_residual)  # their sum, in all families but one
    normed = layer.post_attention_layernorm(stream)
    thought = layer.mlp(normed)
    stream = join(stream, normed, thought, layer.config.mlp_residual)
    forecast = model.lm_head(stack.norm(stream))[0, -1].softmax(-1)
    lengths = [f"{vector[0, -1].norm():.1f}" for vector in (mixed, thought, stream)]
    rows.append((index, type(layer.self_attn).__name__, *lengths,
                 repr(tokenizer.decode([int(forecast.argmax())])), f"{forecast.max():.0%}"))
print(table(["layer", "mixer", "mixer adds", "MLP adds", "stream", "head would say", "sure"], rows))
difference = (model.lm_head(stack.norm(stream)) - logits).abs().max().item()
print(f"\nLengths of the last position's vectors. Largest difference to the library's logits: {difference:.1e}.")

print("""
4. Token by token

To go on, append the likeliest token and ask again. One may run the whole text anew for every token. Or keep what each
layer remembers, its *state*, and run only the new token:
""")
steps = 12
began, recomputed = time.perf_counter(), list(token_ids)
for _ in range(steps):
    recomputed.append(int(model(torch.tensor([recomputed]), last_only=True).argmax()))
recomputing_s = time.perf_counter() - began

state, resumed, new = ContiguousState(config, "float32"), list(token_ids), list(token_ids)
began = time.perf_counter()
for step in range(steps):
    token = int(model(torch.tensor([new]), state, last_only=True).argmax())
    state.advance(len(new))
    if step == 0:
        prefill_s, began = time.perf_counter() - began, time.perf_counter()
    resumed.append(token)
    new = [token]
decode_s = (time.perf_counter() - began) / (steps - 1)
held = sum(tensor.nbytes for layer in state.layers for tensor in layer.tensors)
print(table(["way", "seconds a token", "tokens"], [
    ("everything anew", f"{recomputing_s / steps:.4f}", "the same" if recomputed == resumed else "DIFFERENT"),
    ("with state", f"{decode_s:.4f}", f"the same, after {prefill_s:.3f} s for the prompt")]))
drawn = resumed[len(token_ids):]
end = next((position for position, token in enumerate(drawn) if token in config.eos_token_ids), len(drawn))
answer = tokenizer.decode(drawn[:end]).strip()
cheaper = recomputing_s / steps / decode_s
print(f"""
The state of these {len(resumed) - 1} tokens weighs {human_bytes(held)}, and it makes a token {cheaper:.0f} times cheaper.
It *is* the KVCache: whoever has it can go on with the answer, on this machine or on another one.

    {question.text}
    the model: {answer!r}   the document: {question.answer!r}

Shown: a checkpoint is names and shapes, a transformer is a stream that layers add to, and its memory is a thing that
can be kept, weighed and sent. Next: tutorials/02_hybrid_attention.py, layers whose memory does not grow.""")
