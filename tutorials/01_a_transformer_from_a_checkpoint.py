"""Chapter 01: a transformer from a checkpoint. From three files to the next token, through the library and by hand.

    python tutorials/01_a_transformer_from_a_checkpoint.py [DIRECTORY]     (no directory: the embedded model)
"""

import sys
import time
from pathlib import Path

import torch

from minprfaas import load
from minprfaas.config import StateKind
from minprfaas.documents import make_document
from minprfaas.errors import exit_on_user_error
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.layers import Positions
from minprfaas.model.spec import model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.observe.report import human_bytes, table

torch.set_num_threads(1)
torch.set_grad_enabled(False)
directory = Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED
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
    mixed = layer.self_attn(layer.input_layernorm(stream), positions, None)
    stream = stream + mixed
    thought = layer.mlp(layer.post_attention_layernorm(stream))
    stream = stream + thought
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
