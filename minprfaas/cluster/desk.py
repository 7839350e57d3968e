"""The routing desk: what one datacenter knows, put as the question that `scheduling/` answers. Chapter 11; paper 3.4.3.

No policy lives here. Nodes' events go into the directory, link samples into the congestion monitor, and each request
comes out with the router's decision and its reason.
"""

from minprfaas.cluster import messages
from minprfaas.scheduling.directory import CacheEvent, Directory
from minprfaas.scheduling.monitor import CongestionMonitor, LinkSample
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, Router, RouteRequest

HERE, THERE = "pd-0", "prfaas-0"
UNTHROTTLED_GBPS = 100.0  # the paper's link; a first guess that the monitor corrects from what it observes


class RoutingDesk:
    """Routes requests of the local PD node `HERE`, whose only PrfaaS node is `THERE`."""

    def __init__(self, threshold: int, link_gbps: float | None):
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

    def peer_is_new(self) -> None:
        """The prefill node was started again: forget what the old one held."""
        self.directory.add_node(THERE, "prfaas")

    def route(self, prompt_tokens: int, keys: list[bytes], cached_here: int, load_here: int, load_there: int,
              now_s: float) -> Decision:
        """The router's decision. `keys` are the prompt's chain keys; loads are uncached tokens waiting or in work."""
        matches = {**self.directory.match([key.hex() for key in keys]).nodes, HERE: cached_here}
        egress = LinkView(self.monitor.capacity_gbps, self.monitor.utilization, self.monitor.queued_bytes, self.link_up)
        here = [NodeView(HERE, load_here)]
        view = ClusterView(now_s, [NodeView(THERE, load_there)], here, here, egress, LinkView(self.monitor.capacity_gbps),
                           self.monitor.regime(now_s))
        return self.router.route(RouteRequest(prompt_tokens, matches), view)
