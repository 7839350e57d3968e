"""Chapter 15: the road to production. The same rooms in other houses, fewer bytes, and what nobody has answered yet.

    python tutorials/15_the_road_to_production.py

Sections 2 to 8 are measured, computed or modelled now, on this machine; what other projects call things was read in
their files in November 2026, and they move fast.

Modules: transport/encoding.py, scheduling/planner.py, scheduling/throughput.py, scheduling/profiles.py,
         scheduling/sites.py, engine/paced.py, serving/, errors.py
Tests: test_encoding.py, test_wire.py, test_relay.py, test_unequal_ends.py, test_map.py, test_readme.py,
       test_doctests.py, test_notebook.py, test_chapters.py, test_exercises.py, test_reading.py, test_sites.py,
       test_mutate.py, test_house.py
Paper: 5, 6
"""
import helper

helper.begin(__doc__)

import json
from collections import Counter
from dataclasses import replace

import torch
from elsewhere import rooms_elsewhere

from minprfaas import SamplingParams, load
from minprfaas.config import CacheConfig, Encoding, Role, StateKind
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.paced import Pace, PacedEngine
from minprfaas.errors import UserError
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import ControlSettings, NodeJoined
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.profiles import Scale
from minprfaas.scheduling.router import RouteRequest
from minprfaas.scheduling.sites import SitesControlPlane, site_of
from minprfaas.scheduling.throughput import relay_s
from minprfaas.serving.openai import Served
from minprfaas.transport.encoding import RowCodec, Wire, row_codec

torch.set_num_threads(1)
torch.set_grad_enabled(False)

# %% [markdown]
# ## 1. The same rooms in other houses
#
# What you have read is laid out in the order in which a request meets it. Production engines have the same rooms, under
# names of their own, and between walls of speed. vLLM and SGLang are whole engines; NIXL and Mooncake's transfer engine
# move bytes; Mooncake Store and LMCache keep KVCache outside an engine; Dynamo routes and plans above engines.
#
# *Guess first:* how many of our rooms have no counterpart in any of them? (The list is `elsewhere.py`, beside this.)

# %%
print(f"1. The same rooms in other houses\n\n{rooms_elsewhere()}\n")

# %% [markdown]
# *Why those three?* The six are made for networks inside a datacenter, fast and owned. A line that is thin, shared, and
# may fall silent is the paper's subject. Not found is not the same as not there: look for yourself.
#
# *Change this line:* nothing; open one of the files instead. `KVConnectorBase_V1` is the best first one: its methods
# split into those of the scheduler and those of the worker, as `expect` and `put` do here.

# %% [markdown]
# ## 2. Fewer bytes: one row at a time
#
# The [line](../docs/glossary.md#line) carries what prefill makes. A hybrid makes ten times less of it; one can also
# send each number in fewer bits. The paper names that (KIVI, CacheGen) and does not build it. Here `--wire` does, for
# the rows of attention state; the linear layers' state has one size, weighs little, and crosses exactly.
#
# Eight bits for a number: scale a group of neighbours by their largest magnitude, so that they lie in -127 … 127, and
# round. The group's *scale* crosses with them.
#
# *Guess first:* one of 64 numbers of about 1 becomes 100. How many times as large is the error of the other 63?

# %%
def int8_and_back(row: torch.Tensor) -> torch.Tensor:
    """A group of numbers as a receiver would see it."""
    scale = row.abs().max() / 127
    return (row / scale).round().clamp(-127, 127) * scale


torch.manual_seed(0)
plain = torch.randn(1, 64)
outlier = plain.clone()
outlier[0, 7] = 100.0
kinds = {"as a normal distribution": plain, "with one outlier": outlier}


def error(row: torch.Tensor, arrived: torch.Tensor) -> float:
    """Root of the mean squared error of all but the largest number, relative to the others' own size."""
    others = row.abs() < row.abs().max()
    return float(((row - arrived)[others].square().mean() / row[others].square().mean()).sqrt())


def through(encoding: Encoding, row: torch.Tensor) -> torch.Tensor:
    """What arrives of a float32 row."""
    codec = RowCodec(encoding, row.shape[1], torch.float32)
    return codec.decode(codec.encode(row.view(torch.uint8).reshape(-1))).view(torch.float32).view_as(row)


print("2. Fewer bytes: one row at a time\n")
coded = [Encoding.BF16, Encoding.FP8, Encoding.INT8, Encoding.INT4]
print(table(["relative error of 64 numbers", "int8 by hand", *(encoding.value for encoding in coded)], [
    [name, *(f"{error(row, arrived):.1e}" for arrived in
             (int8_and_back(row), *(through(encoding, row) for encoding in coded)))]
    for name, row in kinds.items()]))
by_hand, by_package = error(plain, int8_and_back(plain)), error(plain, through(Encoding.INT8, plain))
worse = {one: error(outlier, through(one, outlier)) / error(plain, through(one, plain)) for one in coded}
print(f"\n   By hand and by the package int8 loses the same, within 2%: "
      f"{'true' if abs(by_hand / by_package - 1) < 0.02 else 'FALSE'}.\n"
      f"   One outlier: int8's error is {worse[Encoding.INT8]:.0f} times as large, fp8's {worse[Encoding.FP8]:.1f}.\n")

# %% [markdown]
# *Why does fp8 not mind?* Its steps are fine near zero and coarse far out: it keeps digits, not a distance. int8 has
# equal steps, and the outlier makes them coarse for all. KIVI gives each *channel* of the keys its scale over many
# tokens, since in real models outliers keep to their channel; a stream that leaves row by row cannot wait for those.
#
# *Change this line:* `outlier[0, 7] = 100.0` → `10.0`.

# %% [markdown]
# ## 3. What it does to an answer
#
# Rows that were rounded give other logits, and another logit may give another token. So `--wire` suspends rule 1 (the
# same tokens whichever way) for that line, and the screen says so. How often is a question about a model, not about
# arithmetic. Here: one document, prefilled once; its rows go through each encoding; the answer is drawn from what
# arrives.
#
# *Guess first:* with how many of the four encodings does the name in the answer change?

# %%
model, tokenizer = load()
specs = model_state_specs(model.config, "float32")
document = make_document(EVALUATION_SEEDS + 15, 700, tokenizer.encode)
question = document.questions[0]
prompt = torch.tensor([tokenizer.encode(document.prompt(question))])


def prefilled() -> tuple[ContiguousState, torch.Tensor]:
    """The state of the prompt, and the logits of the first token."""
    state = ContiguousState(model.config, "float32")
    logits = model(prompt, state, last_only=True)[0, -1]
    state.advance(prompt.shape[1])
    return state, logits


def answer_from(state: ContiguousState, first: torch.Tensor, steps: int = 8) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens, and the logits that each was drawn from."""
    drawn, seen, logits = [], [], first
    for _ in range(steps):
        seen.append(logits)
        drawn.append(int(logits.argmax()))
        if drawn[-1] in model.config.eos_token_ids:
            break
        logits = model(torch.tensor([drawn[-1:]]), state, last_only=True)[0, -1]
        state.advance(1)
    return drawn, seen


def crossed(encoding: Encoding) -> tuple[ContiguousState, int]:
    """The state as it arrives, and the bytes that crossed."""
    state, _ = prefilled()
    nbytes = 0
    for layer, spec in zip(state.layers, specs):
        if spec.kind is StateKind.REQUEST:
            nbytes += spec.nbytes
            continue
        codec, (rows,) = row_codec(spec, encoding), layer.tensors
        wire = codec.encode(rows.contiguous().view(torch.uint8).reshape(-1))
        nbytes += wire.numel()
        layer.tensors = (codec.decode(wire).view(rows.dtype).view_as(rows),)
    return state, nbytes


first_logits = prefilled()[1]
exact_tokens, exact_logits = answer_from(crossed(Encoding.EXACT)[0], first_logits)
rows, changed = [], []
for encoding in Encoding:
    state, nbytes = crossed(encoding)
    drawn, seen = answer_from(state, first_logits)
    same = next((at for at, pair in enumerate(zip(drawn, exact_tokens)) if pair[0] != pair[1]), len(exact_tokens))
    gap = max(float((a - b).abs().max()) for a, b in zip(seen[:same + 1], exact_logits))
    changed += [encoding.value] * (drawn != exact_tokens)
    rows.append([encoding.value, human_bytes(nbytes), f"{nbytes / kv_bytes(specs, prompt.shape[1]):.0%}", f"{gap:.2g}",
                 tokenizer.decode([token for token in drawn if token not in model.config.eos_token_ids]).strip()])
print("3. What it does to an answer\n")
print(table(["wire", "KVCache", "of exact", "largest logit change", "answer"], rows))
print(f"\n   The document says {question.answer!r}. Changed: {', '.join(changed) or 'none of the answers'}.\n"
      "   One document proves little: python scripts/bench.py wire asks twelve, of 1K to 8K tokens.\n")

# %% [markdown]
# *Why is int4 not an eighth of the bytes?* Each group's scale crosses too, and the linear layers' state crosses
# whole. The longer the prompt, the less that weighs.
#
# *Change this line:* `700` → `4000` tokens (some seconds). What is the share of int4 now?

# %% [markdown]
# ## 4. What it is worth
#
# Fewer bytes are worth something only where bytes are scarce. The planner of chapter 10 knows the line: what becomes of
# the paper's case when rows cross in half of their bytes, or a third, over its 100 Gbps and over thinner ones? And
# *relay decode* (`--relay`): after an offloaded prefill the PrfaaS node goes on decoding while the KVCache crosses, so
# that the first tokens need not wait for the line. That takes time of a PrfaaS instance, which the planner counts.
#
# *Guess first:* over 100 Gbps, what does int4 add to the paper's 3.24 requests/s?

# %%
fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
SHARES = {"exact": 1.0, "int8, fp8": 0.52, "int4": 0.31}  # of a bf16 row, scales included, as `plan --by-wire` has them
found = {}
for gbps in (100, 10, 5, 2):
    for name, share in SHARES.items():
        behind = replace(fleet, link_gbps=gbps, prfaas_profile=fleet.prfaas_profile.encoded(share))
        found[gbps, name] = plan(behind, lengths)
    found[gbps, "relay"] = plan(replace(fleet, link_gbps=gbps, relay=True), lengths)
print("4. What it is worth (modelled: the paper's case, Λ_max in requests/s)\n")
print(table(["line, Gbps", *SHARES, "exact, with relay", "binds when exact"], [
    [str(gbps), *(f"{found[gbps, name].lambda_max:.2f}" for name in (*SHARES, "relay")),
     found[gbps, "exact"].binding_stage] for gbps in (100, 10, 5, 2)]))
gains = {gbps: found[gbps, "int4"].lambda_max - found[gbps, "exact"].lambda_max for gbps in (100, 10, 5, 2)}
most = max(gains, key=gains.get)
tokens, slow_gbps = 44_000, 2
transfer_s = fleet.prfaas_profile.kv_bytes(tokens) * 8e-9 / slow_gbps
prefill_s = fleet.prfaas_profile.prefill_s(tokens)
spent_s = relay_s(transfer_s, prefill_s, fleet.prfaas_profile.decode_step_s(1), fleet.output_tokens)
wait_s = max(transfer_s - prefill_s, 0.0)
given_up = max(found[gbps, "exact"].lambda_max - found[gbps, "relay"].lambda_max for gbps in gains)
print(f"""
   int4 adds {gains[100]:.2f} over 100 Gbps and {gains[most]:.2f} over {most}: it pays where the line binds.
   Relay is about first tokens; Λ_max gives up {given_up:.2f} for it at most. One request of {tokens:,} tokens, alone
   on {slow_gbps} Gbps: prefill {prefill_s:.1f} s, its KVCache {transfer_s:.1f} s. Without relay the first token waits
   {wait_s:.1f} s for the rest of the transfer. With it the token comes when prefill ends, and the PrfaaS
   instance decodes for {spent_s:.1f} s, in which it prefills nothing.
""")

# %% [markdown]
# *Why not always?* Over the paper's line nothing binds but computing, and an encoding then costs answers for nothing.
# The planner's answer is the threshold of chapter 10 once more: the thinner the line, the fewer requests should leave.
#
# *Change this line:* `relay=True` together with `.encoded(0.31)`. Do the two help each other?
#
# Live: `--wire int8` and `--relay`; `python scripts/bench.py wire` and `relay` measure them, over emulated lines.

# %% [markdown]
# ## 5. Unequal ends
#
# Two datacenters are rarely bought on one day. A stream speaks of tokens and layers, never of the sender's blocks, so
# blocks of another size cost nothing: each end writes rows where its own table says. Another number format does:
# rows then cross in bf16, which both can read, and the linear layers' state in float32. What the ends cannot agree on
# (other weights, another layout of heads) is refused in one line when they meet.
#
# *Guess first:* how many KiB more cross between a float32 and a bfloat16 node than between two that keep bfloat16?

# %%
half = model_state_specs(model.config, "bfloat16")
wires = {"both bfloat16": Wire(), "both bfloat16, int8": Wire(Encoding.INT8),
         "bfloat16 to float32": Wire(recast="bfloat16 in datacenter A and float32 in B")}
print("5. Unequal ends: bytes of a request of 1,000 tokens\n")
crossing = []
for name, wire in wires.items():
    entries = [wire.entry(layer, 0, spec, 1000) for layer, spec in enumerate(half)]
    row_part = sum(1000 * entry.row_bytes for entry in entries if entry.kind is StateKind.TOKEN)
    state_part = sum(entry.row_bytes for entry in entries if entry.kind is not StateKind.TOKEN)
    crossing.append([name, wire.rows.value, human_bytes(row_part), human_bytes(state_part)])
print(table(["caches", "rows cross as", "rows", "state"], crossing))
print("\n   The live programs take it as --dtype prfaas=bfloat16,pd=float32 and --block-tokens prfaas=128,pd=64.\n")

# %% [markdown]
# *Why is the state not rounded like the rows?* A row is read again and again, and its error stays one row's. State goes
# through every later token, and so does its error. *And are the tokens the same?* Not surely: a prefill in bfloat16 is
# another prefill, and rule 1 holds between equals. `--check` says which answers changed, and by how much.
#
# *Change this line:* `1000` → `100`, in both places. Which part does not shrink?

# %% [markdown]
# ## 6. Several datacenters that prefill
#
# The paper has one PrfaaS cluster. With two, each with nodes and a line of its own, the control plane asks of both when
# the request would be done: its prompt computed behind what waits there, *and* its KVCache across behind what that line
# still owes. The earlier one gets it.
#
# *Guess first:* two nodes each, lines of 100 Gbps and of 1: how many of twelve prompts does the second site get?

# %%
sites = SitesControlPlane(ControlSettings(19_400, 0.0, fleet=fleet), {"prfaas-a": 100.0, "prfaas-b": 1.0})
for node, role in (*((f"prfaas-{site}-{number}", Role.PRFAAS) for site in "ab" for number in range(2)),
                   ("pd-0", Role.PDP), ("pd-1", Role.PDD)):
    sites.hear(NodeJoined(node, role), 0.0)
decisions = [sites.route(RouteRequest(number, 32_768), 0.0) for number in range(12)]
print("6. Several datacenters that prefill: twelve prompts of 32K tokens at once (modelled)\n")
print(table(["request", "goes to", "because"], [
    [str(number), site_of(decisions[number].node), decisions[number].reason.partition("; ")[2]]
    for number in sorted({0, 1, 4, 11, *(at for at, one in enumerate(decisions) if site_of(one.node) == "prfaas-b")})]))
count = Counter(site_of(decision.node) for decision in decisions)
print(f"\n   prfaas-a {count['prfaas-a']}, prfaas-b {count['prfaas-b']}: "
      f"{'a long queue of nodes is worth a slow line' if count['prfaas-b'] else 'the slow line is worth no queue'}.\n"
      "   Simulated, with weather: python -m minprfaas simulate --site prfaas-a=2:100 --site prfaas-b=2:1\n")

# %% [markdown]
# *Why does a slow line get anything?* What counts is when a request is done, and a queue of nodes takes time, too.
#
# *Change this line:* `"prfaas-b": 1.0` → `10.0`. When do the two share evenly?

# %% [markdown]
# ## 7. The door
#
# In front of all this stands a client, who speaks HTTP and JSON. `serving/` answers OpenAI's bodies, and follows one
# rule that production doors break: an option that would be ignored is refused by name, because an answer to another
# question is worse than none.
#
# *Guess first:* how many of these three bodies are answered?

# %%
served = Served.of(EMBEDDED, model.config, tokenizer, None)
print("7. The door\n")
bodies = {"a question": {"prompt": "Who is the baker?", "max_tokens": 8},
          "two answers wanted": {"prompt": "Who is the baker?", "n": 2},
          "the likeliest tokens, too": {"prompt": "Who is the baker?", "logprobs": 5}}
for name, body in bodies.items():
    try:
        ask = served.read(json.dumps(body).encode(), is_chat=False)
        print(f"   {name}: {len(ask.prompts[0])} tokens of prompt, at most {ask.params[0].max_tokens} of answer")
    except UserError as refused:
        print(f"   {name}: 400, {refused}")
print()

# %% [markdown]
# *Change this line:* `"n": 2` → `"n": 1`. And what of an option that nobody has heard of?

# %% [markdown]
# ## 8. Rehearse before you buy
#
# A plan is arithmetic. Before machines are bought one would like to see the software at their pace: `--emulate` holds
# every layer and every decode step back until a profile's time for it has passed. Tokens, KVCache, links and decisions
# are real; the machine's pace is emulated. A small model stands for a large one by a *scale*: here one token stands for
# sixteen, and a second takes four, so that two cores can keep up. What is read is divided by the scale again.
#
# *Guess first:* the H200 instance of the paper reads 32K tokens in 1.84 s. How long does it take for this prompt?

# %%
scale = Scale(time=4.0, length=16.0)
profile = scale.profile(paper.h200_profile())
pace = Pace(profile.prefill_s, profile.decode_step_s)
engine = PacedEngine(model, tokenizer, CacheConfig(64), prefill_chunk=256)
engine.emulate(pace, max_batch=8)
request = engine.add(engine.request("rehearsal", prompt[0].tolist(), SamplingParams(max_tokens=8)))
while engine.has_work:
    engine.step()
took_s = request.first_token_at_s - request.arrived_at_s
stands_for = round(scale.tokens(prompt.shape[1]))
print("8. Rehearse before you buy\n")
profile_s, late = paper.h200_profile().prefill_s(stands_for), pace.late_s / pace.allowed_s
print(f"   {prompt.shape[1]:,} tokens stand for {stands_for:,}. They took {took_s:.2f} s here, which stand for "
      f"{scale.seconds(took_s):.2f} s;\n   the profile says {profile_s:.2f} s. This machine needed "
      f"{pace.needed_s / pace.allowed_s:.0%} of the time allowed, and was late by {late:.1%}:\n   "
      f"{'a valid rehearsal' if late < 0.05 else 'not valid, it was too slow or too busy for this pace'}.\n")

# %% [markdown]
# *Why can a rehearsal be invalid?* Where real work takes longer than the profile allows, nothing can be waited out. So
# each node reports by how much it was late, and a run in which one was is not counted. `scripts/live_case_study.py`
# rehearses the paper's table 6 so, with its twelve instances as twelve processes.
#
# *Change this line:* `time=4.0` → `time=0.1`. How late is it then?

# %% [markdown]
# ## 9. What this project leaves out, and why
#
# - *RDMA, GPUDirect.* One card's driver is not the lesson; the seam where it goes is (`KVTransport`). NIXL, Mooncake.
# - *Kernels of our own.* The linear layers are PyTorch to be read, and `docs/measurements.md` says what that costs.
# - *Tensor, pipeline, expert parallelism.* A node is one device; ranks would send a share each. vLLM, SGLang.
# - *KVCache on disks or in a remote store.* A tier below chapter 06's pool, under the same keys. LMCache, Mooncake.
# - *Encryption.* Frames are authenticated, not hidden: PyTorch's Gloo has no TLS. WireGuard, or a private line.
# - *Many front ends.* One routes hundreds of requests a second (`bench.py front_end`). Dynamo.
# - *Speculative decoding, LoRA, images.* They change what a token costs, not where it is computed.
# - *Approximate reuse* (CacheBlend). Rule 1: the same tokens whichever way.
#
# ## 10. What the paper leaves open
#
# - *It feeds profiles into a model.* Nobody outside has seen the system at its size; here it runs, at a laptop's.
# - *Failures.* What a lost line, node or datacenter costs is not discussed: chapter 14 is one answer.
# - *Round trips.* Each offloaded request pays at least one. Between continents that is more than a short prefill.
# - *Where the prefix lives.* A conversation that moves between clusters leaves copies of its prefix; who keeps which,
#   and for how long, is a question of money (a byte kept against a byte sent) that nobody has put into the planner.
# - *Trust.* KVCache is the prompt, in another alphabet: whoever reads the line reads the conversation.
# - *Compression and approximation.* Sections 2 to 4 are a beginning. What an encoding costs in answers depends on the
#   model; a planner that knew it could choose the encoding by the request, as it chooses the cluster.

# %%
print("You have seen the whole of it. Next: docs/reading.md, the code in an afternoon; then change something, and let\n"
      "bash scripts/test.sh say what you broke.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_15.py`, then `python tutorials/15_the_road_to_production.py --check 1`.
# 1. `int8_and_back` for a row of several groups.
# 2. `row_bytes`: what a row weighs on the wire, scales included.
# 3. `relayed_tokens`: how many tokens a PrfaaS node draws while the KVCache crosses.
