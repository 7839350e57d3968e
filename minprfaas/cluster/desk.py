"""The routing desk: what one datacenter knows, put as the question that `scheduling/` answers. Chapter 11; paper 3.4.3.

No policy lives here. Nodes' events go into the directory, link samples into the congestion monitor, and each request
comes out with the router's decision and its reason.
"""

import math
from dataclasses import replace

from minprfaas.cluster import messages
from minprfaas.config import StateKind
from minprfaas.kvcache.layout import Layout
from minprfaas.scheduling.directory import CacheEvent, Directory
from minprfaas.scheduling.monitor import CongestionMonitor, LinkSample
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, Router, RouteRequest, TransferCosts

HERE, THERE = "pd-0", "prfaas-0"
UNTHROTTLED_GBPS = 100.0  # the paper's link; a first guess that the monitor corrects from what it observes
ASSUMED_S_PER_TOKEN = 1e-4  # of prefill, until one was seen; then each side is like the other until it was seen itself


class RoutingDesk:
    """Routes requests of the local PD node `HERE`, whose only PrfaaS node is `THERE`.

    With `costs`, cached prefixes are shipped where that is sooner than computing them; what a token costs to compute
    is then learned from the prefills of this run.
    """

    def __init__(self, threshold: int, link_gbps: float | None, costs: TransferCosts | None = None):
        self.costs = costs
        self._prefills: dict[str, tuple[int, float]] = {}  # tokens and seconds of each node so far
        self.router = Router(threshold)
        self.monitor = CongestionMonitor(link_gbps or UNTHROTTLED_GBPS)
        self.directory = Directory()
        self.directory.add_node(THERE, "prfaas")
        self.link_up = True

    def hear_sample(self, sample: messages.EgressSample, now_s: float) -> None:
        """The prefill node's side of the link, as it is now."""
        self.monitor.observe(LinkSample(now_s, sample.gbps, sample.utilization, sample.queued_bytes))

    def hear_events(self, events: messages.CacheEvents) -> bool:
        """What the prefill node holds. False when some were lost: ask for an inventory."""
        pairs = list(zip(events.keys, events.tokens))
        if events.inventory:
            self.directory.resync(THERE, events.sequence, pairs)
            return True
        kinds = [CacheEvent(THERE, events.sequence + number, "stored" if tokens else "evicted", key, tokens)
                 for number, (key, tokens) in enumerate(pairs)]
        return all([self.directory.publish(event) for event in kinds])

    def hear_prefill(self, node: str, tokens: int, seconds: float) -> None:
        """A prefill of `tokens` uncached tokens has ended on `node`."""
        if tokens > 0 and 0 < seconds < math.inf and self.costs is not None:
            before, before_s = self._prefills.get(node, (0, 0.0))
            self._prefills[node] = (before + tokens, before_s + seconds)
            per_token = {name: total_s / count for name, (count, total_s) in self._prefills.items()}
            self.costs = replace(self.costs, prfaas_s_per_token=per_token.get(THERE, per_token[node]),
                                 pdp_s_per_token=per_token.get(HERE, per_token[node]))

    def peer_is_new(self) -> None:
        """The prefill node was started again: forget what the old one held."""
        self.directory.add_node(THERE, "prfaas")

    def route(self, prompt_tokens: int, keys: list[bytes], cached_here: int, load_here: int, load_there: int,
              may_ship: bool, now_s: float) -> Decision:
        """The router's decision. `keys` are the prompt's chain keys; loads are uncached tokens waiting or in work.
        Without `may_ship` each side counts on its own cache only."""
        self.router.costs = self.costs if may_ship else None
        matches = {**self.directory.match([key.hex() for key in keys]).nodes, HERE: cached_here}
        egress = LinkView(self.monitor.capacity_gbps, self.monitor.utilization, self.monitor.queued_bytes, self.link_up)
        here = [NodeView(HERE, load_here)]
        view = ClusterView(now_s, [NodeView(THERE, load_there)], here, here, egress, LinkView(self.monitor.capacity_gbps),
                           self.monitor.regime(now_s))
        return self.router.route(RouteRequest(prompt_tokens, matches), view)


def transfer_costs(layout: Layout) -> TransferCosts:
    """What a prefix of this model costs to ship, by its layout, and (at first assumed) to compute."""
    token_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN)
    state_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is not StateKind.TOKEN)
    return TransferCosts(token_bytes, state_bytes, ASSUMED_S_PER_TOKEN, ASSUMED_S_PER_TOKEN)
