"""Chapter 11: the router. One request, one view of the clusters, one decision, and its reason.

    python tutorials/11_the_router.py

Every decision here is the package's own; the clusters that it sees are made up.

Modules: scheduling/router.py, scheduling/directory.py, scheduling/congestion.py, scheduling/books.py,
scheduling/control.py
Tests: test_router.py, test_directory.py, test_monitor.py, test_control.py, test_prefix_shipping.py
Paper: 3.2, 3.3, 3.4.3
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import random
import time
from collections import Counter
from dataclasses import replace

from minprfaas.config import LinkSample, Role
from minprfaas.observe.tables import table
from minprfaas.scheduling.books import LoadBooks, NodeBook
from minprfaas.scheduling.congestion import HIGH_UTILIZATION, CongestionMonitor
from minprfaas.scheduling.control import ControlPlane, ControlSettings, NodeJoined, PrefillEnded
from minprfaas.scheduling.directory import CacheChanged, Directory
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, Router, RouteRequest, ShippingCosts

# %% [markdown]
# ## 1. The threshold rule
#
# Chapter 10 found a [threshold](../docs/glossary.md#threshold) t. Above it a prompt's prefill is worth the journey to
# the PrfaaS cluster, up to it the prompt stays. What is judged is not the prompt's length but its
# [uncached tokens](../docs/glossary.md#uncached-tokens): the paper's incremental length, l_total - l_prefix.
#
# *Guess first:* t is 5,120. A prompt of 6,000 tokens continues a conversation of which the PD cluster holds 5,000.
# How many tokens are judged, and which way does it go?

# %%
# A token of KVCache is 17 KB here, and takes 50 µs to compute on the fast cluster and 160 µs on the slow one.
costs = ShippingCosts(token_bytes=17_000, state_bytes=2e8, prfaas_s_per_token=5e-5, pdp_s_per_token=1.6e-4)
router = Router(threshold=5120, costs=costs, ship_prefixes=True)
view = ClusterView(
    regime="scarce",
    prfaas=[NodeView("a0", load=30_000), NodeView("a1", load=12_000)],  # load: uncached tokens waiting
    pdp=[NodeView("p0", load=3000), NodeView("p1", load=9000)],
    pdd=[NodeView("d0", load=4), NodeView("d1", load=7)],  # load: requests
    egress=LinkView(gbps=100.0, utilization=0.41), ingress=LinkView(gbps=100.0))


def route(tokens: int, seen: ClusterView, by: Router = router, **held: int) -> Decision:
    """The decision on a prompt of so many tokens, of which nodes have `held` some in their caches."""
    return by.route(RouteRequest("a request", tokens), held, seen)


def rule(tokens: int, cached: int, threshold: float) -> str:
    """The whole rule."""
    return "prfaas" if tokens - cached > threshold else "pdp"


print("1. The threshold rule\n")
cases = [(900, 0), (5120, 0), (5121, 0), (6000, 5000), (60_000, 0)]
decisions = {case: route(case[0], view, p1=case[1]) for case in cases}
for (tokens, cached), decision in decisions.items():
    print(f"   {tokens:,} tokens, p1 holds {cached:,}: {decision.reason}")
same = sum(rule(*case, 5120) == decision.route.value for case, decision in decisions.items())
print(f"\n   The rule of one line and the router agree on {same} of {len(cases)}.\n")

# %% [markdown]
# *Why does a decision carry a reason?* It is the only witness. A router that goes wrong looks like a slow cluster; with
# the reason in every answer (`reason` in `--json`), each request says itself why it is where it is.
#
# *Change this line:* `Router(threshold=5120, …)` → `threshold=float("inf")`, then `0`. Which deployments of chapter
# 10's table 6 are these two?

# %% [markdown]
# ## 2. Which cache counts? It depends on the link
#
# Both clusters have a [prefix cache](../docs/glossary.md#prefix-cache). Let l_prfaas and l_pd be what each holds of a
# prompt (paper 3.4.3):
#
#     bandwidth scarce:    l_total - l_pd <= t                    → PD-P, else PrfaaS
#     bandwidth abundant:  l_total - max(l_prfaas, l_pd) <= t     → PD-P, else PrfaaS
#
# When bandwidth is abundant it is compute that is scarce, so the longer prefix counts wherever it is, and is shipped
# across first if it would arrive before it could be computed.
#
# *Guess first:* of a prompt of 40,000 tokens a0 (PrfaaS) holds 38,000 and p1 (PD-P) 8,000. Where is it prefilled when
# bandwidth is scarce, and where when it is abundant? How many MB are moved for that?

# %%
abundant = replace(view, regime="abundant")
queued = replace(abundant, egress=LinkView(gbps=100.0, utilization=0.5, queued_bytes=90e9))
print("2. Which cache counts?\n")
for title, seen in (("scarce", view), ("abundant", abundant), ("abundant, but 90 GB wait to leave", queued)):
    decision = route(40_000, seen, a0=38_000, p1=8000)
    shipment = decision.shipment
    print(f"   {title}: {shipment.bytes / 1e6:,.0f} MB from {shipment.source} to {decision.node}\n"
          f"      {decision.reason}")
print(f"   What d1 decoded counts for its cluster, too:\n      {route(40_000, view, d1=38_000).reason}\n")

# %% [markdown]
# *Why is something moved each time?* Inside a cluster the prefix goes over the [fabric](../docs/glossary.md#fabric) to
# a node that has time: at the 800 Gbps that the router assumes, hundreds of times as fast as it could be computed.
# Between clusters it goes over the line, and there the router asks first: with 90 GB in front of it the prefix would
# come too late, so each cluster is judged by its own cache, as if bandwidth were scarce.
#
# *Change this line:* `queued_bytes=90e9` → `1e9`. How much may wait before shipping is not worth it?

# %% [markdown]
# ## 3. When is bandwidth scarce?
#
# A link's utilization jumps about. If one mark at 85% decided, routes would flap with it. So the monitor smooths its
# samples and has two marks: above 85% bandwidth becomes scarce, below 60% (and at least ten seconds later) abundant
# again; between the marks nothing changes.
#
# *Guess first:* ten minutes of utilization between 65% and 100% at random, a sample a second. How often does the regime
# change with one mark? And with two?

# %%
rng = random.Random(11)
shares = [rng.uniform(0.65, 1.0) for _ in range(600)]
one_mark = [share >= HIGH_UTILIZATION for share in shares]
monitor, two_marks = CongestionMonitor(nominal_gbps=100.0), []
for second, share in enumerate(shares):
    monitor.observe(LinkSample(float(second), gbps=100 * share, utilization=share, queued_bytes=0.0))
    two_marks.append(monitor.regime(second) == "scarce")


def changes(regimes: list[bool]) -> int:
    """How often a value differs from the one before."""
    return sum(before != after for before, after in zip(regimes, regimes[1:]))


print("3. When is bandwidth scarce?\n")
print(f"   600 samples: {changes(one_mark)} changes with one mark, {changes(two_marks)} with two and smoothing.\n")
phases = (("calm", 20, 0.3), ("busy", 20, 0.95), ("between the marks", 40, 0.7), ("calm", 20, 0.3))
rows, now_s = [], 0.0
monitor = CongestionMonitor(nominal_gbps=100.0)
for phase, seconds, share in phases:
    for _ in range(seconds):
        now_s += 1.0
        monitor.observe(LinkSample(now_s, gbps=100 * share, utilization=share, queued_bytes=0.0))
    rows.append([phase, f"{now_s:.0f}", f"{share:.0%}", monitor.regime(now_s)])
print(table(["phase", "until, s", "utilization", "regime at its end"], rows) + "\n")

# %% [markdown]
# *Why is time an argument everywhere?* Nothing in `scheduling/` reads a clock. So the simulator can drive the very same
# objects in simulated time (chapter 12), and a test can let ten minutes pass in a millisecond.
#
# *Change this line:* `rng.uniform(0.65, 1.0)` → `rng.uniform(0.3, 1.0)`. Do two marks still help?

# %% [markdown]
# ## 4. The node: affinity against the queue
#
# The cluster is chosen; which of its nodes? One that holds the prefix saves tokens, one with a short queue saves
# waiting. Both are tokens of prefill, so they can be weighed: a queued token costs one, a cached token saves one.
#
# *Guess first:* p1 holds 12,000 tokens of a prompt of 20,000, p0 is idle. How long may p1's queue be before p0 is the
# better choice?

# %%
local, rows = Router(threshold=50_000), []  # without costs it knows of no fabric to fetch over
for load in (0, 6000, 11_999, 12_001):
    decision = route(20_000, replace(view, pdp=[NodeView("p0"), NodeView("p1", load)]), local, p1=12_000)
    rows.append([load, decision.node, 20_000 - decision.cached_tokens])
print("4. The node\n")
print(table(["tokens queued at p1", "chosen", "tokens to compute"], rows) + "\n")

# %% [markdown]
# *Where does the queue's length come from?* Nobody asks the nodes: it would be old when it came. The control plane
# keeps *books*: what it has given to a node is on that node's page until the node says that it is done.
#
# *Guess first:* eight equal prompts come at once, before any node can say a word. p0 and p1 are idle. How many does p0
# get?

# %%
plane = ControlPlane(ControlSettings(threshold=50_000, link_gbps=100.0))
for name, role in (("a0", Role.PRFAAS), ("p0", Role.PDP), ("p1", Role.PDP), ("d0", Role.PDD)):
    plane.hear(NodeJoined(name, role), now_s=0.0)
eight = [plane.route(RouteRequest(number, 20_000), now_s=0.0) for number in range(8)]
given = Counter(decision.node for decision in eight)
loads = plane.loads()
plane.hear(PrefillEnded(0, uncached_tokens=20_000, seconds=3.2), now_s=3.2)

by_hand = LoadBooks()
by_hand.nodes = {name: NodeBook(name) for name in ("a0", "p0", "p1", "d0")}
for number, decision in enumerate(eight):
    by_hand.open(number, decision, load_tokens=20_000, expected_s=0.0)
print(f"   Eight prompts of 20,000 at once: p0 gets {given['p0']}, p1 gets {given['p1']}; on their pages stand "
      f"{loads['p0']:,} and {loads['p1']:,} tokens.\n"
      f"   When the first is done: {plane.loads()['p0']:,}. Books kept by hand say "
      f"{'the same' if by_hand.nodes['p0'].load == loads['p0'] else 'DIFFERENT numbers'} as the control plane's.\n")

# %% [markdown]
# *Change this line:* leave out the `PrefillEnded`. Each node that dies without a word would stay "busy": what does the
# control plane do about that? (`NodeLeft`, in chapter 14.)

# %% [markdown]
# ## 5. Who holds what: the directory
#
# The router's `held` comes from a *directory*: for each block key, which nodes can begin a prefill after it (chapter
# 06). Nodes publish what they gain and lose, and number it.
#
# *Guess first:* a0's news number 3 gets lost. Number 4 says that it has evicted "document", where its 8,192 tokens
# ended. For how many of a0's tokens does the directory then count: 8,192, 512 or 0?

# %%
directory, prompt_keys = Directory(), ["system prompt", "document", "question"]
for name in ("a0", "a1", "p0"):
    directory.add_node(name)
    directory.apply(CacheChanged(name, 0, [], inventory=True))
rows = []


def tell(node: str, sequence: int, key: str, tokens: int, inventory: bool = False) -> None:
    """One node's news, and what the directory then knows about the prompt."""
    believed = "yes" if directory.apply(CacheChanged(node, sequence, [(key, tokens)], inventory)) else "no, a gap"
    told = f"all it holds: {key!r}" if inventory else f"{'stored' if tokens else 'evicted'} {key!r}"
    rows.append([f"{node} #{sequence}: {told}", believed, str(directory.match(prompt_keys))])


tell("a0", 1, "system prompt", 512)
tell("p0", 1, "system prompt", 512)
tell("a0", 2, "document", 8192)
tell("a0", 4, "document", 0)
tell("a0", 4, "system prompt", 512, inventory=True)
print("5. Who holds what\n")
print(table(["news", "believed", "the prompt's cached tokens, by node"], rows))
directory.forget("p0", "system prompt")  # say p0 was asked for it, and had evicted it
print(f"\n   p0 was to send 'system prompt' and had evicted it; once it has said so: {directory.match(prompt_keys)}\n")

# %% [markdown]
# *Why is number 4 not believed?* Nobody knows what number 3 said, so what follows cannot be put in order. The node is
# asked to send everything that it holds (an *inventory*), and until then its news is not believed.
#
# *And if the directory is wrong?* Then a prefill is done twice. Never a wrong token: a node looks into its own index
# before it uses a block.
#
# *Change this line:* `tell("a0", 4, …, 0)` → `tell("a0", 3, …, 0)`. What does the directory know then?

# %% [markdown]
# ## 6. When the PrfaaS cluster is gone
#
# *Guess first:* the line is down. What becomes of a prompt of 60,000 tokens? And how many decisions a second can one
# core make?

# %%
down = route(60_000, replace(view, egress=LinkView(100.0, up=False)))
empty = route(60_000, replace(view, prfaas=[]))
began_s, count = time.perf_counter(), 5000
for _ in range(count):
    route(40_000, view, a0=38_000, p1=8000)
decision_us = (time.perf_counter() - began_s) / count * 1e6
print("6. When the PrfaaS cluster is gone\n")
print(f"   {down.reason}\n   {empty.reason}\n\n"
      f"   {sum(decision.route is Role.PDP for decision in (down, empty))} of 2 stay local. "
      f"{count:,} decisions took {decision_us:.0f} µs each here, {1e6 / decision_us:,.0f} a second.\n")

# %% [markdown]
# *Why so simple?* The PD cluster can do everything, only slower: PrfaaS is a service that it may use. So nothing has to
# be recovered when the service goes; what it was working on is routed again (chapter 14).
#
# *Change this line:* `replace(view, prfaas=[])` → `replace(view, pdp=[])`. And with both empty?

# %%
print("A decision is a pure function of a request and a view, so the simulator asks what the live cluster asks.\n"
      "Next: tutorials/12_two_timescales.py, which lets it learn.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_11.py`, then `python tutorials/11_the_router.py --check 1`.
# 1. `route_by_cache`: the paper's rule of section 2, scarce and abundant.
# 2. `best_node`: affinity against the queue.
# 3. `longest_match`: the directory's answer, from what each node holds.
