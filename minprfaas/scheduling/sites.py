"""Several PrfaaS datacenters before one PD cluster: which of them prefills a request. Chapter 15.

The paper has one of each. Here each has nodes, and a line to the PD cluster with a rate and weather of its own. A
request that may go out is offered to the datacenter that is expected to be done with it first: when a node there has
computed its prompt, or when the line has carried all that was promised to it, whichever is later.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from minprfaas.config import Role
from minprfaas.scheduling.control import (Action, ControlPlane, ControlSettings, DecodeStarted, Event, LineChanged,
                                          LinkMeasured, RequestEnded)
from minprfaas.scheduling.congestion import CongestionMonitor
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, RouteRequest


def site_of(node: str) -> str:
    """The datacenter of a node: `prfaas-a-0` is in `prfaas-a`."""
    return node.rpartition("-")[0]


@dataclass
class Site:
    """One PrfaaS datacenter: its line as observed, and the KVCache (bytes, by request) that it owes the PD cluster."""

    egress: CongestionMonitor
    ingress: CongestionMonitor
    owed: dict[Hashable, float] = field(default_factory=dict)


class AllLines(LinkView):
    """All lines out as one: their rates and queues add up. Scarce where each of them is."""

    def __init__(self, lines: list[CongestionMonitor]):
        self._lines = lines

    gbps = property(lambda self: sum(line.gbps for line in self._lines if line.up))
    queued_bytes = property(lambda self: sum(line.queued_bytes for line in self._lines))
    up = property(lambda self: any(line.up for line in self._lines))

    @property
    def utilization(self) -> float:
        """Of their rates together."""
        return sum(line.utilization * line.gbps for line in self._lines) / sum(line.gbps for line in self._lines)

    def regime(self, now_s: float) -> str:
        """See `CongestionMonitor.regime`."""
        return "scarce" if all(line.regime(now_s) == "scarce" for line in self._lines) else "abundant"


class SitesControlPlane(ControlPlane):
    """A `ControlPlane` before several PrfaaS datacenters, given by the Gbps of their lines. Their nodes are named
    `SITE-number`. Both loops see all of them together; what a request could begin with is looked for in the one that
    was chosen, and in the PD cluster."""

    def __init__(self, settings: ControlSettings, lines_gbps: Mapping[str, float]):
        super().__init__(replace(settings, link_gbps=sum(lines_gbps.values())))
        self.sites = {name: Site(CongestionMonitor(gbps), CongestionMonitor(gbps)) for name, gbps in lines_gbps.items()}
        self._egress = self._view.egress = AllLines([site.egress for site in self.sites.values()])

    def hear(self, event: Event, now_s: float) -> list[Action]:
        """See `ControlPlane.hear`. A line is told by the node at its PrfaaS end or, inwards, by the link's name."""
        match event:
            case LinkMeasured(node, sample, ingress):
                ends = [*sample.link.split(":"), node] if ingress else [node]
                for site in {site_of(end) for end in ends} & self.sites.keys():
                    (self.sites[site].ingress if ingress else self.sites[site].egress).hear(node, sample, now_s)
                return []
            case LineChanged(up, site):
                self.sites[site].egress.up = self.sites[site].ingress.up = up
                return []
            case DecodeStarted(id) | RequestEnded(id):
                self._owes_no_more(id)
        return super().hear(event, now_s)

    def route(self, request: RouteRequest, now_s: float) -> Decision:
        """See `ControlPlane.route`; the decision's reason says what was expected of each datacenter."""
        self._owes_no_more(request.id)
        matches = self.directory.match(request.keys)
        expected_s = {}
        for name, site in self.sites.items():
            nodes = [node for node in self._nodes_of(name) if node.name not in request.avoid]
            if nodes and site.egress.up:
                expected_s[name] = min(self._done_s(site, node, matches, request) for node in nodes)
        self._chosen = min(expected_s, key=expected_s.get, default="")
        decision = super().route(request, now_s)
        if decision.route is Role.PRFAAS:
            owed = self._crossing_bytes(request.prompt_tokens, decision.decode_cached_tokens)
            self.sites[self._chosen].owed[request.id] = owed
        expected = ", ".join(f"{name} in {seconds:.2f} s" for name, seconds in expected_s.items())
        return decision._replace(reason=f"{decision.reason}; expected: {expected or 'no PrfaaS cluster'}")

    def _view_of(self, now_s: float) -> ClusterView:
        view, site = super()._view_of(now_s), self.sites.get(self._chosen)
        if site is None:
            return replace(view, prfaas=[])
        return replace(view, prfaas=self._nodes_of(self._chosen), egress=site.egress, ingress=site.ingress,
                       regime=site.egress.regime(now_s))

    def _nodes_of(self, site: str) -> list[NodeView]:
        return [node for node in self._view.prfaas if site_of(node.name) == site]

    def _done_s(self, site: Site, node: NodeView, matches: Mapping[str, int], request: RouteRequest) -> float:
        """From now until the KVCache would be complete, if this node prefilled the request."""
        fleet, costs = self.settings.fleet, self._router.costs
        uncached = request.prompt_tokens - min(matches.get(node.name, 0), request.prompt_tokens - 1)
        if fleet is not None:
            computed_s = sum(node.expected_s.values()) + fleet.prfaas_profile.prefill_s(uncached)
        else:
            computed_s = (node.load + uncached) * (costs.prfaas_s_per_token if costs else 0.0)
        here = max((matches.get(one.name, 0) for one in self._view.pdd), default=0)
        promised = sum(site.owed.values()) + self._crossing_bytes(request.prompt_tokens, here)
        return max(computed_s, promised * 8e-9 / site.egress.gbps)

    def _crossing_bytes(self, tokens: int, held: int) -> float:
        """Rows that the decode node lacks, and the state of one size."""
        if self.settings.fleet is not None:
            return self.settings.fleet.prfaas_profile.crossing_bytes(tokens, held)
        return self._router.costs.bytes_of(tokens - held) if self._router.costs else 0.0

    def _owes_no_more(self, id: Hashable) -> None:
        for site in self.sites.values():
            site.owed.pop(id, None)
