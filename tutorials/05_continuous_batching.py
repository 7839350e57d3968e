"""Chapter 05: continuous batching. Many requests a step, a queue before the pool, and the youngest gives way.

    python tutorials/05_continuous_batching.py [DIRECTORY]     (no directory: the embedded model)
"""

import random
import sys
import time

import torch

from minprfaas import SamplingParams, load
from minprfaas.config import CacheConfig
from minprfaas.documents import make_document
from minprfaas.engine.engine import Engine
from minprfaas.engine.request import Request
from minprfaas.errors import exit_on_user_error
from minprfaas.observe.report import table

torch.set_num_threads(1)
model, tokenizer = exit_on_user_error(load)(sys.argv[1] if len(sys.argv) > 1 else None)


def prompts(count: int, tokens: int = 130) -> list[str]:
    """Questions on `count` different short chronicles."""
    documents = [make_document(10**9 + 500 + number, tokens, tokenizer.encode) for number in range(count)]
    return [document.prompt(document.questions[0]) for document in documents]


def new_engine(blocks: int, **options) -> Engine:
    """An engine over a pool of `blocks` blocks of 16 tokens, without the prefix cache (chapter 06)."""
    return Engine(model, tokenizer, CacheConfig(blocks, block_tokens=16, prefix_cache=False), **options)


def finish(engine: Engine) -> int:
    """Step until nothing is left; returns the number of steps."""
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    return steps


print("""1. A step for everyone

Chapter 04 said why decode should be shared: the weights are read once a step, for however many requests. The engine
keeps all answers in one batch; each row is another request, at its own place, with its own length. Ten decode steps:
""")
questions, rows, rates = prompts(32), [], {}
for batch in (1, 2, 4, 8, 16, 32):
    engine = new_engine(blocks=2000)
    for number, text in enumerate(questions[:batch]):
        engine.add(engine.request(str(number), text, SamplingParams(max_tokens=60, ignore_eos=True)))
    while engine.waiting or engine.prefilling:
        engine.step()
    began = time.perf_counter()
    drawn = sum(len(engine.step()) for _ in range(10))
    rates[batch] = drawn / (time.perf_counter() - began)
    rows.append((batch, f"{rates[batch]:.0f}", f"{rates[batch] / rates[1]:.1f}x", f"{1e3 * batch / rates[batch]:.0f}"))
print(table(["requests", "tokens/s", "gain", "ms a step"], rows))

print("""
2. Nobody waits for the slowest

Answers end at different times. A static batch goes on until its longest is done, with ever more idle rows. A continuous
one lets the next request in as soon as there is room. 16 answers of 4 to 40 tokens, at most 4 at a time:
""")
rng = random.Random(0)
lengths = [rng.randint(4, 40) for _ in range(16)]


def requests_of(engine: Engine, numbers: range) -> list[Request]:
    return [engine.add(engine.request(str(n), questions[n], SamplingParams(max_tokens=lengths[n], ignore_eos=True)))
            for n in numbers]


engine = new_engine(blocks=2000, max_batch=4)
continuous = requests_of(engine, range(16))
began = time.perf_counter()
continuous_steps, continuous_s = finish(engine), time.perf_counter() - began
engine, static, static_steps = new_engine(blocks=2000, max_batch=4), [], 0
began = time.perf_counter()
for first in range(0, 16, 4):
    static += requests_of(engine, range(first, first + 4))
    static_steps += finish(engine)
static_s = time.perf_counter() - began
total = sum(lengths)
print(table(["batch", "steps", "seconds", "answer tokens a step"], [
    ("static", static_steps, f"{static_s:.1f}", f"{total / static_steps:.1f}"),
    ("continuous", continuous_steps, f"{continuous_s:.1f}", f"{total / continuous_steps:.1f}")]))
same = all(a.output_ids == b.output_ids for a, b in zip(continuous, static))
print(f"\nThe {total} answer tokens are {'the same' if same else 'NOT THE SAME'} in both, token for token.")

print("""
3. When the pool is full

The pool holds the KVCache of everyone who is being answered. Two rules: a request enters only when its whole prompt has
room (until then it queues), and when a running one needs a block and there is none, the youngest gives everything back
and queues again. Eight requests, a pool with room for three prompts and little more:
""")
roomy = new_engine(blocks=2000)
blocks = 3 * roomy.layout.blocks_for(len(tokenizer.encode(questions[0])) + 16)
tight = new_engine(blocks, prefill_chunk=64)
params = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8 * (n % 2), seed=n) for n in range(8)]
queued = [tight.add(tight.request(str(n), questions[n], params[n])) for n in range(8)]
rows, step, preempted = [], 0, 0
while tight.has_work:
    tight.step()
    step += 1
    stats, now = tight.kvcache.stats(), sum(request.preemptions for request in queued)
    if step in (1, 8) or now > preempted or not tight.has_work:
        event = "all answered" if not tight.has_work else ""
        if now > preempted:
            event = f"request {tight.waiting[0].id} gives way"
        done = sum(request.finish_reason is not None for request in queued)
        rows.append((step, len(tight.waiting), len(tight.prefilling), len(tight.running), done,
                     f"{stats.in_use} of {stats.total}", event))
    preempted = now
print(table(["step", "queue", "prefill", "decode", "done", "blocks in use", ""], rows))
tight.kvcache.check()

alone = []
for request, text in zip(queued, questions):
    engine = new_engine(blocks=2000)
    alone.append(engine.add(engine.request(request.id, text, request.params)))
    finish(engine)
same = sum(a.output_ids == b.output_ids for a, b in zip(queued, alone))
print(f"""
{preempted} preemptions, and {same} of {len(queued)} answers are those of the request alone with the engine. Four are
greedy, four sampled: a draw depends on the request's seed and the token's number, not on who sits in the next row.
A preempted request keeps the tokens it has drawn and is prefilled again with them.

Shown: {rates[32] / rates[1]:.0f} times the tokens a second with 32 requests a step; a free row is filled at once;
a full pool costs time and never an answer.
Next: tutorials/06_hybrid_prefix_cache.py, how a prefix is computed once and used by many.""")
