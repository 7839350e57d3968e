"""Chapter 05: continuous batching. Many requests a step, a queue before the pool, and the youngest gives way.

    python tutorials/05_continuous_batching.py [DIRECTORY]     (no directory: the embedded model)

Modules: engine/engine.py, engine/scheduler.py, engine/sampling.py, engine/text.py, engine/prompts.py,
         engine/fast_runner.py, engine/cpu_runner.py, engine/decode_graphs.py, commands/generate.py
Tests: test_engine.py, test_engine_edges.py, test_sampling.py, test_text.py, test_prompts.py,
       test_fast_runner.py, test_decode_layers.py, test_prefill_together.py
Paper: 2.1; the scheduler of any serving engine
"""
import helper

args = helper.begin(__doc__, {"directory": dict(nargs="?", metavar="DIRECTORY", help="a Hugging Face directory")})

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from minprfaas import SamplingParams, load
from minprfaas.commands import generate
from minprfaas.config import CacheConfig
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.cpu_runner import CPURunner
from minprfaas.engine.decode_graphs import bucket_of
from minprfaas.engine.engine import Engine
from minprfaas.engine.fast_runner import FastRunner, what_must_run_eagerly
from minprfaas.engine.prompts import read_prompts
from minprfaas.engine.request import Request
from minprfaas.engine.sampling import sample
from minprfaas.engine.scheduler import Scheduler
from minprfaas.engine.text import StreamedText
from minprfaas.observe.tables import table

torch.set_num_threads(1)
model, tokenizer = load(args.directory)
documents = [make_document(EVALUATION_SEEDS + 500 + number, 130, tokenizer.encode) for number in range(32)]
questions = [document.prompt(document.questions[0]) for document in documents]


def new_engine(blocks: int = 2000, **options) -> Engine:
    """An engine over a pool of `blocks` blocks of 16 tokens, without the prefix cache (chapter 06)."""
    return Engine(model, tokenizer, CacheConfig(blocks, block_tokens=16, prefix_cache=False), **options)


def finish(engine: Engine) -> int:
    """Step until nothing is left; returns the number of steps."""
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    return steps


# %% [markdown]
# ## 1. A step for everyone
#
# Chapter 04 said why [decode](../docs/glossary.md#decode) should be shared: the weights are read once a step, for
# however many requests. The engine keeps all answers in one batch. Each row is another request, at its own place in its
# text, with its own length.
#
# *Guess first:* 32 requests at once. How many times the tokens a second of one, and how many times as long a step?

# %%
rows, rates, steps_ms = [], {}, {}
for batch in (1, 4, 16, 32):
    engine = new_engine()
    for number, text in enumerate(questions[:batch]):
        engine.add(engine.request(str(number), text, SamplingParams(max_tokens=60, ignore_eos=True)))
    while engine.waiting or engine.prefilling:
        engine.step()
    began_s = time.perf_counter()
    drawn = sum(len(engine.step()) for _ in range(10))
    took_s = time.perf_counter() - began_s
    rates[batch], steps_ms[batch] = drawn / took_s, took_s * 100
    rows.append((batch, f"{rates[batch]:.0f}", f"{rates[batch] / rates[1]:.1f}x", f"{steps_ms[batch]:.0f}"))
print("1. A step for everyone (ten steps)\n")
print(table(["requests", "tokens/s", "gain", "ms a step"], rows))
own_ms = (steps_ms[32] - steps_ms[1]) / 31
print(f"""
   With 32 requests a step takes {steps_ms[32] / steps_ms[1]:.1f} times as long and draws 32 tokens: \
{rates[32] / rates[1]:.1f} times the tokens a second.
   By the first row and the last, {steps_ms[1] - own_ms:.0f} ms of a step are shared, and a request adds {own_ms:.1f}.
""")

# %% [markdown]
# *Why does a step take longer with more requests?* What they share (reading the weights, the calls of Python) is paid
# once. Each request's own KVCache, its draw and its text are paid once a request. The longer the contexts, the larger
# that part: it is what chapter 04 found of batches.
#
# *Change this line:* `(1, 4, 16, 32)` → `(1, 2, 3, 4)`. Is the gain already there?

# %% [markdown]
# ## 2. Nobody waits for the slowest
#
# Answers end at different times. A *static* batch goes on until its longest is done, with ever more idle rows. A
# [continuous](../docs/glossary.md#continuous-batching) one lets the next request in as soon as there is a place. How
# many steps that saves can be counted without any model: a place in the batch is a number of tokens still to draw.
#
# *Guess first:* 16 answers of 4 to 40 tokens, 4 at a time. What part of the steps does a static batch waste?


# %%
def steps_of(lengths: list[int], at_once: int) -> int:
    """Steps of a continuous batch. A step reads one new prompt, which draws a token, and draws one more for each."""
    waiting, running, steps = list(lengths), [], 0
    while waiting or running:
        if waiting and len(running) < at_once:
            running.append(waiting.pop(0) - 1)
        running = [left - 1 for left in running if left > 1]
        steps += 1
    return steps


rng = random.Random(0)
lengths = [rng.randint(4, 40) for _ in range(16)]
by_hand = {"static": sum(steps_of(lengths[first:first + 4], 4) for first in range(0, 16, 4)),
           "continuous": steps_of(lengths, 4)}


def requests_of(engine: Engine, numbers: range) -> list[Request]:
    return [engine.add(engine.request(str(n), questions[n], SamplingParams(max_tokens=lengths[n], ignore_eos=True)))
            for n in numbers]


steps, took_s, answered = dict.fromkeys(by_hand, 0), {}, {}
for name, at_a_time in {"static": 4, "continuous": 16}.items():
    engine, answered[name] = new_engine(max_batch=4), []
    began_s = time.perf_counter()
    for first in range(0, 16, at_a_time):
        answered[name] += requests_of(engine, range(first, first + at_a_time))
        steps[name] += finish(engine)
    took_s[name] = time.perf_counter() - began_s
total = sum(lengths)
print("2. Nobody waits for the slowest\n")
print(table(["batch", "steps by hand", "steps of the engine", "answer tokens a step", "seconds"], [
    (name, by_hand[name], steps[name], f"{total / steps[name]:.1f}", f"{took_s[name]:.1f}") for name in steps]))
same = all(a.output_ids == b.output_ids for a, b in zip(*answered.values()))
fewer, quicker = 1 - steps["continuous"] / steps["static"], took_s["static"] / took_s["continuous"]
verdict = f"{quicker:.2f} times as fast"
if quicker < 1:
    verdict = (f"slower, {1 / quicker:.2f} times the seconds\n"
               "   (steps are counted; seconds are what a busy machine leaves)")
print(f"""
   {fewer:.0%} fewer steps; in this run the continuous batch was {verdict}.
   The {total} answer tokens are {'the same' if same else 'DIFFERENT'} in both, token for token.
""")

# %% [markdown]
# *Why are seconds not saved in the same measure?* A step of a full batch takes a little longer than one that has lost
# rows, and the same 16 prompts have to be read either way. The steps are what the scheduler decides; the seconds are
# what this machine makes of them.
#
# *Change this line:* `rng.randint(4, 40)` → `rng.randint(20, 24)`. When is a static batch good enough?

# %% [markdown]
# ## 3. When the pool is full
#
# The pool holds the KVCache of everyone who is being answered. The `Scheduler` has three queues and two rules. A
# request enters only when its *whole* prompt has room; until then it waits, and nobody overtakes it. And when a running
# one needs a block and there is none, the *youngest* gives everything back and waits again.
#
# *Guess first:* six requests, and room for three prompts and a little. How many times must one give
# way, and how many of the six answers change?

# %%
blocks = 3 * new_engine().layout.blocks_for(len(tokenizer.encode(questions[0])) + 16)
tight = new_engine(blocks, prefill_chunk=64)
params = [SamplingParams(max_tokens=32, ignore_eos=True, temperature=0.8 * (n % 2), seed=n) for n in range(6)]
queued = [tight.add(tight.request(str(n), questions[n], params[n])) for n in range(6)]
scheduler: Scheduler = tight.scheduler
rows, step, preempted = [], 0, 0
while tight.has_work:
    tight.step()
    step += 1
    stats, now = tight.kvcache.stats(), sum(request.preemptions for request in queued)
    if step in (1, 8) or now > preempted or not tight.has_work:
        event = "" if tight.has_work else "all answered"
        if now > preempted:
            event = f"request {scheduler.waiting[0].id} gives way"
        done = sum(request.finish_reason is not None for request in queued)
        rows.append((step, len(scheduler.waiting), len(scheduler.prefilling), len(scheduler.running), done,
                     f"{stats.in_use} of {stats.total}", event))
    preempted = now
tight.kvcache.check()  # every block is free again, or this raises

alone = []
for request, text in zip(queued, questions):
    engine = new_engine()
    alone.append(engine.add(engine.request(request.id, text, request.params)))
    finish(engine)
same = sum(a.output_ids == b.output_ids for a, b in zip(queued, alone))
print("3. When the pool is full\n")
print(table(["step", "waiting", "prefilling", "running", "done", "blocks in use", ""], rows))
print(f"\n   {preempted} preemptions. {same} of {len(queued)} answers are those that the request gets alone.\n")

# %% [markdown]
# *Why the youngest?* It has the least to lose, and the oldest is sure to come to its end, so something always moves.
# The tokens that it had drawn are kept: they are part of its prompt when it is read again.
#
# *Why does nobody overtake?* A long prompt would starve behind short ones, which always fit.
#
# *Change this line:* `+ 16` → `+ 40` in `blocks`. How many give way now?

# %% [markdown]
# ## 4. The same draw, whoever sits beside
#
# Three of the six were *sampled*, at temperature 0.8, and still their answers were the same. A generator of random
# numbers that all requests share could not do that. Instead each number depends on the request's seed, the token's
# place in the answer, and the token, on nothing else. By the *Gumbel trick*
#
# > argmax_i (logit_i / T + g_i), g_i = −log(−log u_i), u_i uniform
#
# is a draw from softmax(logits / T).
#
# *Guess first:* logits 2, 1, 0, −1 at temperature 1. How often does the first one win?

# %%
logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0]), 3000
drawn = Counter(sample(logits, SamplingParams(temperature=1.0, seed=seed), position=0) for seed in range(draws))
generator = torch.Generator().manual_seed(0)
noise = -(-torch.rand(draws, 4, generator=generator).log()).log()
by_hand = Counter((logits + noise).argmax(dim=1).tolist())
nucleus = Counter(sample(logits, SamplingParams(temperature=1.0, top_p=0.8, seed=seed), 0) for seed in range(draws))
print("4. The same draw, whoever sits beside\n")
print(table(["token", "softmax", "drawn by hand", "by the package", "with top_p 0.8"], [
    (token, f"{share:.1%}", *(f"{count[token] / draws:.1%}" for count in (by_hand, drawn, nucleus)))
    for token, share in enumerate(logits.softmax(dim=0).tolist())]))
print()

# %% [markdown]
# *What does top_p do?* It keeps the likeliest tokens whose probabilities first add up to 0.8, and draws among those.
#
# *Change this line:* `temperature=1.0` → `0.3`, in `drawn`. And what is the limit at 0?

# %% [markdown]
# ## 5. Text as it streams
#
# Tokens are not letters: one may be half a character, and a *stop string* may begin in one token and end in the next.
# So a piece of text is shown only once it is certain.
#
# *Guess first:* the answer is to stop at "wyn Ash". How many letters of "Ilwyn Ashcombe" are shown?

# %%
ids = tokenizer.encode(" Ilwyn Ashcombe")
rows, plain, cut = [], StreamedText(tokenizer, stop=()), StreamedText(tokenizer, stop=("wyn Ash",))
for token in ids:
    if not cut.stopped:
        rows.append((repr(tokenizer.decode([token])), repr(plain.push(token)), repr(cut.push(token)),
                     "stopped" if cut.stopped else ""))
print("5. Text as it streams\n")
print(table(["token", "shown", "shown with the stop string", ""], rows))
print()

# %% [markdown]
# *Why hold back?* What was shown cannot be taken away again.
#
# *Change this line:* `"wyn Ash"` → `"wyn Oak"`. Is what was held back shown in the end? (`cut.finish()`.)

# %% [markdown]
# ## 6. Steps of one shape
#
# On a GPU the calls cost more than the arithmetic. There a step is *captured* once, as a graph of kernels, and replayed
# with one launch. A graph has a fixed shape, so requests and pages are rounded up to a *bucket*; rows that stand for no
# request write into a scratch block. Here is that runner on a CPU, where nothing is captured; it must draw the same
# tokens. So must the one that a CPU has: its calls cost little, but it attends to the pages where they lie.
#
# *Guess first:* 5 requests of up to 11 pages. Which bucket?

# %%
eager_kinds = what_must_run_eagerly(model)  # layers of which it is not known that they can be captured
engines = [new_engine(fast=False), new_engine(fast=not eager_kinds), new_engine()]
assert isinstance(engines[1].runner, FastRunner) or eager_kinds
assert isinstance(engines[2].runner, (CPURunner, FastRunner))
answers = []
for engine in engines:
    answers.append([engine.add(engine.request(str(n), questions[n], SamplingParams(max_tokens=8))) for n in range(5)])
    finish(engine)
same = all(len({tuple(request.output_ids) for request in alike}) == 1 for alike in zip(*answers))
print("6. Steps of one shape\n")
print(table(["requests", "pages", "bucket"], [(requests, pages, f"{bucket_of(requests, pages)}")
                                              for requests, pages in ((1, 3), (5, 11), (9, 40), (33, 1000))]))
first, second, third = (type(engine.runner).__name__ for engine in engines)
print(f"\n   {first}, {second} and {third} drew {'the same tokens' if same else 'DIFFERENT tokens'}.\n")

# %% [markdown]
# *Why buckets, and not one graph for the largest?* Padding is computed, too. Why not one for each shape? Each capture
# costs time and memory. So: powers of two, then steps of eight.
#
# *Change this line:* add (8, 8) and (9, 9). What does the ninth request cost?

# %% [markdown]
# ## 7. A file of requests
#
# All of this is behind `python -m minprfaas generate --prompts FILE`. A line is a request; one that comes *after*
# another continues that conversation.
#
# *Guess first:* three lines, of which the second comes after the first. How many can begin at once?

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "prompts.jsonl"
    tail = documents[0].questions[1].prompt_tail
    path.write_text("\n".join(json.dumps(line) for line in (
        {"id": "first", "prompt": questions[0], "max_tokens": 8},
        {"id": "next", "prompt": tail, "max_tokens": 8, "after": "first"},
        {"id": "other", "prompt": questions[1], "max_tokens": 8, "stop": "\n"})))
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    print("7. A file of requests\n")
    print("   " + ", ".join(f"{prompt.id} (after {prompt.after})" if prompt.after else prompt.id
                            for prompt in read_prompts(path)) + ":\n")
    chosen = ["--model", args.directory] if args.directory else []
    generate.run(parser.parse_args(["--prompts", str(path), *chosen]))

# %% [markdown]
# *Why does it wait for the first?* Its prompt is the first one's prompt, answer, and its own text. What of that is in
# the cache already is the next chapter's question.
#
# *Change this line:* give `"other"` an `"after": "nobody"`. What is said, and what is the exit status?

# %%
print(f"""
{rates[32] / rates[1]:.1f} times the tokens a second with 32 requests a step; a free place is filled at once;
a full pool costs time and never an answer.
Next: tutorials/06_hybrid_prefix_cache.py, a prefix computed once and used by many.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_05.py`, then `python tutorials/05_continuous_batching.py --check 1`.
# 1. `admitted`: how many of those that wait may enter.
# 2. `kept_by_top_p`: the tokens that `top_p` leaves to draw from.
# 3. `held_back`: how much of a text may not be shown yet.
