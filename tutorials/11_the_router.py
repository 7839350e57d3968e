"""Chapter 11: the router. One request, one view of the cluster, one decision, and its reason (paper 3.2, 3.3, 3.4.3).

    python tutorials/11_the_router.py
"""

import time
from dataclasses import replace

from minprfaas.config import LinkSample
from minprfaas.observe.report import table
from minprfaas.scheduling.directory import CacheChanged, Directory
from minprfaas.scheduling.monitor import CongestionMonitor
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, Router, RouteRequest, TransferCosts

# A token of KVCache is 17 KB here, and takes 50 µs to compute on the fast cluster and 160 µs on the slow one.
costs = TransferCosts(token_bytes=17_000, state_bytes=2e8, prfaas_s_per_token=5e-5, pdp_s_per_token=1.6e-4)
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


print("""1. The threshold rule

Above t = 5,120 uncached tokens a prompt is worth the journey to the PrfaaS cluster; up to there it stays. The decision
says why:
""")
for tokens in (900, 5120, 5121, 60_000):
    print("  " + route(tokens, view).reason)

print("""
2. Which cache counts? It depends on the link

Of a prompt of 40,000 tokens, PrfaaS node a0 holds 38,000 and PD-P node p1 holds 8,000. With scarce bandwidth each
cluster is judged by its own cache, in which a1 fetches from a0 over the fabric, hundreds of times as fast as it could
compute. With abundant bandwidth compute is what is scarce: the longer prefix counts wherever it is, and is shipped to
where it is needed, if it arrives sooner than it could be computed there:
""")
abundant = replace(view, regime="abundant")
queued = replace(abundant, egress=LinkView(gbps=100.0, utilization=0.5, queued_bytes=90e9))
for title, seen in (("scarce", view), ("abundant", abundant), ("abundant, but 90 GB wait to leave", queued)):
    decision = route(40_000, seen, a0=38_000, p1=8000)
    transfer = decision.transfer
    print(f"  {title}: {transfer.bytes / 1e6:,.0f} MB from {transfer.source} to {decision.node}\n    {decision.reason}")

print("""
So what decode node d1 holds of a conversation counts for its whole cluster, and the prefill node that continues it
fetches that first:
""")
print("  " + route(40_000, view, d1=38_000).reason)

print("""
3. When is bandwidth scarce?

A monitor smooths the link's samples and has two marks: 85% utilization makes bandwidth scarce, below 60% (and ten
seconds later) it is abundant again. Between the marks nothing changes, so routes do not flap. One sample a second:
""")
monitor, rows, now_s = CongestionMonitor(nominal_gbps=100.0), [], 0.0
phases = (("calm", 20, 0.3), ("busy", 20, 0.95), ("between the marks", 40, 0.7), ("calm again", 20, 0.3))
for phase, seconds, share in phases:
    for _ in range(seconds):
        now_s += 1.0
        monitor.observe(LinkSample(now_s, gbps=100 * share, utilization=share, queued_bytes=0.0))
    rows.append([phase, f"{now_s:.0f}", f"{share:.0%}", monitor.regime(now_s)])
print(table(["phase", "until, s", "utilization", "regime at its end"], rows))

print("""
4. The node: affinity against the queue

p1 holds 12,000 tokens of a prompt of 20,000; p0 is idle. A cached token saves one token of prefill, and a queued token
costs one, so p1 is worth waiting for until its queue is as long as the prefix that it holds:
""")
local, rows = Router(threshold=50_000), []  # without costs it knows of no fabric
for load in (0, 6000, 11_999, 12_001):
    waiting = replace(view, pdp=[NodeView("p0"), NodeView("p1", load)])
    decision = route(20_000, waiting, local, p1=12_000)
    rows.append([load, decision.node, 20_000 - decision.cached_tokens])
print(table(["tokens queued at p1", "chosen", "tokens to compute"], rows))

print("""
5. Who holds what: the directory

Nodes publish what they can and can no longer start from, numbered. A missing number means that something was lost: the
node sends everything once (an inventory), and until then its news is not believed. At worst a prefill is repeated:
""")
directory, prompt_keys = Directory(), ["system prompt", "document", "question"]
for name in ("a0", "a1", "p0"):
    directory.add_node(name)
    directory.apply(CacheChanged(name, 0, [], inventory=True))
rows = []


def tell(node: str, sequence: int, key: str, tokens: int, inventory: bool = False) -> None:
    """One node's news, and what the directory then knows about the prompt."""
    believed = "yes" if directory.apply(CacheChanged(node, sequence, [(key, tokens)], inventory)) else "no, gap"
    told = f"all it holds: {key!r}" if inventory else f"{'stored' if tokens else 'evicted'} {key!r}"
    rows.append([f"{node} #{sequence}: {told}", believed, str(directory.match(prompt_keys))])


tell("a0", 1, "system prompt", 512)
tell("p0", 1, "system prompt", 512)
tell("a0", 2, "document", 8192)
tell("a0", 4, "document", 0)
tell("a0", 4, "system prompt", 512, inventory=True)
print(table(["news", "believed", "the prompt's cached tokens, by node"], rows))
directory.forget("p0", "system prompt")  # say p0 was asked for it, and had evicted it
print(f"\np0 was to send 'system prompt' and had evicted it; once it has said so: {directory.match(prompt_keys)}")

print("""
6. When the PrfaaS cluster is gone, everything is local
""")
print("  " + route(60_000, replace(view, egress=LinkView(100.0, up=False))).reason)
print("  " + route(60_000, replace(view, prfaas=[])).reason)

started, count = time.perf_counter(), 10_000
for _ in range(count):
    route(40_000, view, a0=38_000, p1=8000)
decision_us = (time.perf_counter() - started) / count * 1e6
print(f"\n{count:,} decisions took {decision_us:.0f} µs each. A decision is a pure function of request and view,"
      f"\nso the simulator asks the same object as the live cluster: a control plane that holds all these parts\n(`scheduling/control.py`). Chapter 12 lets it learn: two timescales.")
