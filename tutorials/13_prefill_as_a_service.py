"""Chapter 13: Prefill-as-a-Service, end to end. Two datacenters, four processes, two turns of one talk. Paper 3, 4.

    python tutorials/13_prefill_as_a_service.py

The nodes are those of scripts/cluster.py. The line between the datacenters is emulated in its rate and its round trip;
the processes, the KVCache that crosses, and the times are real.

Modules: cluster/, commands/, observe/
Tests: test_cluster_program.py, test_cluster_messages.py, test_cluster_roles.py, test_cluster_parts.py,
       test_cluster_lines.py, test_cluster_life.py, test_upkeep.py, test_two_datacenters.py, test_answers.py,
       test_case_study.py, test_demo.py, test_help.py, test_launch.py, test_load.py, test_paced.py, test_page.py,
       test_topology.py, test_two_datacenters_program.py, test_cluster_kills.py, test_serving.py, test_errors.py,
       test_serving_chat.py, test_serving_mistakes.py, test_serving_program.py, test_board.py, test_cluster_matrix.py,
       test_front_end.py, test_screen.py
Paper: 3, 4
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

from itertools import combinations

from nodes import LiveCluster

from minprfaas import SamplingParams, generate
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.topology import Topology
from minprfaas.config import LineConfig
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.observe.tables import human_bytes, table

# %% [markdown]
# ## 1. Who is there
#
# Prefill reads the whole prompt at once and wants arithmetic; decode reads the whole KVCache for every token and wants
# memory bandwidth (chapter 04: [prefill](../docs/glossary.md#prefill), [decode](../docs/glossary.md#decode)). So the
# paper puts machines that are good at prefill into a datacenter of their own, and lets the PD cluster ask it for
# *prefill as a service*: `prfaas-0` there; here `pd-0`, which prefills what stays ([PD-P](../docs/glossary.md#pd-p)),
# `pd-1`, which decodes ([PD-D](../docs/glossary.md#pd-d)), and the front end, which runs no model and routes.
#
# *Guess first:* every process has a link to every other. How many links join these four, and how many of them cross the
# line between the datacenters?

# %%
THRESHOLD = 512  # uncached tokens; a request with more of them is offloaded
LINE = LineConfig(gbps=0.05, rtt_ms=20)
topology = Topology(prfaas=1, pd=2, split=1)
cluster = LiveCluster(topology, THRESHOLD, LINE)
cluster.wait_for(*(node.name for node in cluster.nodes))
links = list(combinations(topology.places(), 2))
crossing = sum(here.site != there.site for here, there in links)
print("1. Who is there\n")
print(table(["process", "datacenter", "role", "process id"], [
    [node.name, node.site, cluster.front.ready[node.name].role, str(cluster.processes[node.name].pid)]
    for node in cluster.nodes]))
print(f"\n   {len(links)} links, of which {crossing} cross the line.")
print(f"   Between the datacenters: {LINE.gbps * 1e3:g} Mbps, {LINE.rtt_ms:g} ms round trip (emulated). "
      f"More than {THRESHOLD} uncached tokens go to PrfaaS.\n")

# %% [markdown]
# *Why so many?* Nobody stands between two nodes: KVCache goes straight from where it is made to where it is read, and
# words go straight to whom they concern. The front end decides, and no byte of KVCache passes through it.
#
# *Change this line:* `pd=2` → `pd=3`. How many links cross the line now?

# %% [markdown]
# ## 2. Requests of two lengths
#
# Attention makes a long prompt's prefill grow faster than its KVCache: the longer, the fewer bytes a second has the
# line to carry, and the more is gained elsewhere. A short prompt is soon done here, and a round trip would only delay
# it. The threshold says what is long (chapter 10 computes it, chapter 11 applies it).
#
# *Guess first:* a prompt of 1,500 tokens and one of 200: which route, and how many bytes cross for each?

# %%
GREEDY = SamplingParams(max_tokens=8)
encode = cluster.tokenizer.encode


def serve(requests: dict[str, list[int]]) -> list[Journey]:
    """Submit them all at once; step the front end until each has its answer."""
    journeys = [cluster.front.submit(name, token_ids, GREEDY) for name, token_ids in requests.items()]
    while cluster.front.has_work:
        cluster.step()
    for journey in journeys:
        if journey.error is not None:
            raise journey.error
    return journeys


documents = {name: make_document(EVALUATION_SEEDS + seed, tokens, encode)
             for seed, (name, tokens) in enumerate({"long": 1500, "short": 200}.items())}
asked = {name: encode(document.prompt(document.questions[0])) for name, document in documents.items()}
first = serve(asked)


def show(journeys: list[Journey]) -> str:
    """What became of each, and why."""
    rows = [[journey.id, f"{journey.prompt_tokens:,}", f"{journey.cached_tokens:,}", f"{journey.held_tokens:,}",
             journey.route, human_bytes(journey.kv_bytes), journey.text.strip()] for journey in journeys]
    reasons = "\n".join(f"   {journey.id}: {journey.reason}" for journey in journeys)
    return table(["request", "tokens", "cached", "held", "route", "KV crossed", "answer"], rows) + f"\n\n{reasons}\n"


print("2. Requests of two lengths\n")
print(show(first))

# %% [markdown]
# `cached` is what the node that prefilled had in its cache and did not compute; `held` what the node that decodes had,
# so that it did not cross. The second half of each reason is the node.
#
# *Why does the decode node ask, instead of being sent the KVCache?* Only `pd-1` knows what it holds already. So the
# front end says `Serve` to `pd-1`; that reserves blocks, expects a stream, and orders the prefill, from the first token
# that it lacks. The KVCache then arrives while prefill still runs, layer by layer (chapter 08). For the short one it
# came from `pd-0` over the datacenter's fabric (chapter 09), and nothing crossed.
#
# *Change this line:* `THRESHOLD = 512` → `100`. What does the short one cost in bytes, and in TTFT below?

# %% [markdown]
# ## 3. The second turn: increments only
#
# The user goes on: the same conversation, and a new text of 700 tokens to read. What was there before is cached where
# it was prefilled and held where it was decoded.
#
# *Guess first:* the first turn sent its whole KVCache. What part of the second prompt's KVCache crosses? And would a
# short second question go to the other datacenter, where its prefix is, or not?

# %%
new_text = make_document(EVALUATION_SEEDS + 7, 700, encode)
so_far = first[0].token_ids
second = serve({"next, with a new text": so_far + encode("\n\n" + new_text.prompt(new_text.questions[0]))})
third = serve({"next, a short question": so_far + encode(documents["long"].questions[1].prompt_tail)})
print("3. The second turn\n")
print(show([*second, *third]))
token_bytes = cluster.front.plane.settings.costs.token_bytes
turn = second[0]
whole_bytes = turn.prompt_tokens * token_bytes + cluster.front.plane.settings.costs.state_bytes
print(f"   The KVCache of {turn.prompt_tokens:,} tokens is {human_bytes(whole_bytes)}; "
      f"{human_bytes(turn.kv_bytes)} crossed, {turn.kv_bytes / whole_bytes:.0%} of it.\n"
      f"   For the short question {human_bytes(third[0].kv_bytes)} crossed; "
      f"{human_bytes(third[0].prefix_bytes)} of cached prefix were shipped to {third[0].decision.node}.\n")

# %% [markdown]
# *Why is it not just the share of the new tokens?* This model is a hybrid. The rows of its full-attention layers are
# there once for each token, and only the new ones cross; the state of its linear layers has one size whatever the
# prompt's length, and crosses whole each time (chapter 06). And the short question is judged by its *uncached* tokens,
# wherever the cached ones are. Where shipping them is quicker than computing them, the node that has them ships them
# (*prefix shipping*); inside the datacenter they go over the fabric.
#
# *Change this line:* a new text of 700 → 2000 tokens. Does the share grow or shrink?

# %% [markdown]
# ## 4. Where the time to the first token went
#
# A [TTFT](../docs/glossary.md#ttft) is measured at the front end, its parts where they happen: waiting for room and for
# one's turn, with the words' way there and back (queue), computing (prefill), what still had to arrive when the word
# came that prefill is done (exposed), being taken into the running batch (admit). What no part claims is called route:
# deciding, and the words between front end and decode node.
#
# *Guess first:* what part of the long one's TTFT is the transfer?

# %%
journeys = [*first, *second, *third]
PARTS = ("route_s", "queue_s", "prefill_s", "transfer_exposed_s", "admit_s")
print("4. Where the time to the first token went (ms)\n")
print(table(["request", *(part[:-2].replace("_", " ") for part in PARTS), "sum", "TTFT"], [
    [journey.id, *(f"{getattr(journey, part) * 1e3:,.0f}" for part in PARTS),
     f"{sum(getattr(journey, part) for part in PARTS) * 1e3:,.0f}", f"{journey.ttft_s * 1e3:,.0f}"]
    for journey in journeys]))
long = first[0]
exposed, exposed_ms = long.transfer_exposed_s / long.ttft_s, long.transfer_exposed_s * 1e3
alone_s = long.kv_bytes * 8e-9 / LINE.gbps
least = min(getattr(journey, part) for journey in journeys for part in PARTS)
print(f"""
   The long one's KVCache alone takes the line {alone_s * 1e3:,.0f} ms (emulated); {exposed_ms:,.0f} ms of its
   transfer were exposed, {exposed:.0%} of its TTFT. The parts add up by the definition of route; that they do not
   overlap shows in that no part is negative: {'true' if least > -1e-6 else 'FALSE'}.
""")

# %% [markdown]
# *Why is a part of the transfer always exposed?* What prefill makes last cannot leave before it is made: the last rows,
# and all of the linear layers' state (chapter 08). The word that prefill is done is shorter, and overtakes it.
#
# *Change this line:* `gbps=0.05` → `0.01`: the line is now slower than prefill makes KVCache, and nothing can hide
# that.

# %% [markdown]
# ## 5. The same answers
#
# All of this must change nothing. One process, one request at a time, no cache that anybody shares: the reference.
#
# *Guess first:* four answers, from three nodes, in other chunks and other batches. How many of their tokens differ from
# the reference's?

# %%
prompts = [journey.token_ids[:journey.prompt_tokens] for journey in journeys]
alone = generate(cluster.model, cluster.tokenizer, prompts, GREEDY)
same = sum(journey.output_ids == output.token_ids for journey, output in zip(journeys, alone))
right = [journey.text.strip() == documents[journey.id].questions[0].answer for journey in first]
crossed = all((journey.kv_bytes > 0) == (journey.route == "prfaas") for journey in journeys)
cluster.close()
print("5. The same answers\n")
tokens = [pair for journey, output in zip(journeys, alone) for pair in zip(journey.output_ids, output.token_ids)]
print(f"   {sum(ours != theirs for ours, theirs in tokens)} of {len(tokens)} tokens differ. "
      f"{same} of {len(journeys)} answers are, token by token, those of one process;\n   "
      f"{sum(right)} of {len(right)} first ones are the right name.\n"
      f"   KVCache crossed for each request that went to PrfaaS, and for no other: {'true' if crossed else 'FALSE'}.\n")

# %% [markdown]
# *Is that proof?* Of the tokens, not of the bytes: a short answer can come out right although rows are missing, and
# nothing raises an error (chapter 03 zeroed 64 of them). So this project's tests also compare the blocks that have
# arrived with a reference, byte for byte (`tests/kv_oracle.py`).
#
# *Change this line:* `GREEDY = SamplingParams(max_tokens=8)` → `SamplingParams(max_tokens=8, temperature=0.8, seed=1)`.
# Now tokens are drawn by chance. How many differ?

# %%
print("""The same from a command line, with your own prompts, and a page that draws each request's life:

  python scripts/cluster.py --topology prfaas=1,pd=2 --split 1 --prompts P.jsonl \\
      --check --json run.jsonl --timeline run.json
  python -m minprfaas report --json run.jsonl --timeline run.json

And under load, with both loops: the threshold follows what is measured, and a node that decodes changes its role
(docs/commands.md shows such a run):

  python -m minprfaas profile --out P.json
  python scripts/cluster.py --topology prfaas=1,pd=3 --split 1 --load poisson:3 --requests 330 --threshold 600 \\
      --link-gbps 0.02 --rtt-ms 5 --profile P.json --convert-roles --check

Next: tutorials/14_when_things_break.py, what is left of it when processes die.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_13.py`, then `python tutorials/13_prefill_as_a_service.py --check 1`.
# 1. `bytes_that_cross`: what of a prompt's KVCache is sent, when the decode node holds a part of it.
# 2. `largest_part`: where most of a time to the first token went.
#
# To go on: `Topology(prfaas=1, pd=2, split=1)` → `Topology(prfaas=2, pd=3, split=1)`, and submit four long requests at
# once. Which nodes are named in the reasons? And print `update.new_text` of
# `cluster.front.take_updates()` after each step of `serve`: when does the first one come?
