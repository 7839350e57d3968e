"""Where a request is prefilled and decoded, and why: threshold, cached prefixes, node choice. Chapter 11 (paper 3.4.3).

Pure: the same request and the same view give the same decision, and the decision says its reason in words.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

from minprfaas.config import Role
from minprfaas.errors import RequestError, UserError

DECODE_SLACK_REQUESTS = 4  # how much longer a decode node's queue may be for the sake of the prefix that it holds
FABRIC_GBPS = 800.0  # inside a datacenter, where nobody told otherwise: 100 GB/s
_load = attrgetter("load")


@dataclass(slots=True)
class NodeView:
    """A node that takes new work. `load`: uncached tokens waiting or being computed on a prefill node (with each
    request's fixed cost in tokens, where it is known), requests on a decode node."""

    name: str
    load: float = 0


@dataclass(slots=True)
class LinkView:
    """One direction of a link: `gbps` is its observed capacity, `utilization` from 0 to 1."""

    gbps: float
    utilization: float = 0.0
    queued_bytes: float = 0.0
    up: bool = True

    def seconds_for(self, count_bytes: float) -> float:
        """Until `count_bytes` handed over now have left, behind what is queued."""
        if not self.up or self.gbps <= 0:
            return float("inf")
        return (self.queued_bytes + count_bytes) * 8 / (self.gbps * 1e9)


@dataclass(slots=True)
class ClusterView:
    """What the router sees. `egress` carries KVCache from the PrfaaS cluster to the PD cluster, `ingress` cached
    prefixes the other way, `fabric` those that stay inside a cluster; `regime` is the monitor's."""

    prfaas: Sequence[NodeView]
    pdp: Sequence[NodeView]
    pdd: Sequence[NodeView]
    egress: LinkView
    ingress: LinkView
    regime: str = "scarce"  # or "abundant"
    fabric: LinkView = field(default_factory=lambda: LinkView(FABRIC_GBPS))


class RouteRequest(NamedTuple):
    """A prompt. `keys`: the chained keys of its full blocks, but for the last token, which is always computed. `avoid`:
    nodes that failed this request before."""

    id: Hashable
    prompt_tokens: int
    keys: Sequence[Hashable] = ()
    avoid: frozenset[str] = frozenset()


class PrefixShipment(NamedTuple):
    """Ship cached tokens `[start, end)` from node `source`, of either cluster, before the prefill begins."""

    source: str
    start: int
    end: int
    bytes: float


class Decision(NamedTuple):
    """`uncached_tokens` were judged against `threshold`; `node`, of the cluster `route`, will find `cached_tokens`
    (after `shipment`); only what comes after `decode_cached_tokens` crosses to `decode_node`."""

    route: Role
    node: str
    decode_node: str
    threshold: float
    uncached_tokens: int
    cached_tokens: int
    decode_cached_tokens: int
    shipment: PrefixShipment | None
    reason: str


@dataclass(frozen=True)
class ShippingCosts:
    """What a cached prefix costs to ship (bytes a token, and of the fixed-size state) and to compute again."""

    token_bytes: float
    state_bytes: float
    prfaas_s_per_token: float
    pdp_s_per_token: float

    def s_per_token(self, cluster: Role) -> float:
        """Seconds that a prefill node of `cluster` computes at one token."""
        return self.prfaas_s_per_token if cluster is Role.PRFAAS else self.pdp_s_per_token

    def bytes_of(self, tokens: int) -> float:
        """What so many tokens of a prefix weigh on their way, the state at its end included."""
        return tokens * self.token_bytes + self.state_bytes


class _Holder(NamedTuple):
    """A node and the tokens of the prompt that it holds."""

    node: NodeView
    tokens: int


class _Choice(NamedTuple):
    """A cluster, the uncached length it was judged by, the longest prefix to be had and over which link."""

    cluster: Role
    uncached_tokens: int
    source: _Holder
    link: LinkView
    why: str


class Router:
    """Routes one request at a time. `threshold` t in tokens may be set at any time (the short-term loop does).

    With `costs`, a prefix that another node of the cluster holds is fetched over the fabric where that is sooner than
    computing it; with `ship_prefixes` too, one of the other cluster over the link while bandwidth is abundant.
    `selective` False is the baseline without a threshold: the least-loaded node, whatever the length.
    """

    def __init__(self, threshold: float, costs: ShippingCosts | None = None, ship_prefixes: bool = False,
                 selective: bool = True):
        if not threshold >= 0:
            raise UserError(f"threshold {threshold} is out of range; it must be at least 0 tokens")
        self.threshold, self.costs, self.ship_prefixes, self.selective = threshold, costs, ship_prefixes, selective

    def route(self, request: RouteRequest, matches: Mapping[str, int], view: ClusterView) -> Decision:
        """Choose cluster and nodes. `matches`: cached prefix tokens of this prompt on each node that has any
        (`Directory.match`). Raises RequestError ("no_node") when nothing can prefill or nothing can decode."""
        if request.avoid:
            view = _without(request.avoid, view)
        if not view.pdd or not (view.pdp or (view.prfaas and view.egress.up)):
            raise RequestError("no_node", f"{len(view.pdd)} decode nodes, {len(view.pdp)} PD-P nodes, "
                                          f"{len(view.prfaas)} PrfaaS nodes, link {'up' if view.egress.up else 'down'}")
        most = request.prompt_tokens - 1  # at least one token is always computed: the answer begins with its logits
        prfaas, pdp, pdd = (_holders(nodes, matches, most) for nodes in (view.prfaas, view.pdp, view.pdd))
        # A prefill node can use what a decode node of its cluster holds only if that can be fetched.
        choice = self._choose_cluster(request, view, _longest(prfaas), _longest(pdp + pdd if self.costs else pdp))
        away = choice.cluster is Role.PRFAAS
        name, nodes, holders = ("PrfaaS", view.prfaas, prfaas) if away else ("PD-P", view.pdp, pdp)
        prefiller, shipment = self._choose_node(choice, nodes, holders)
        decoder = _choose_decoder(view.pdd, pdd)
        cached = shipment.end if shipment else prefiller.tokens
        reason = f"{choice.why}: {name} {prefiller.node.name}, cached {cached:,}"
        if shipment:
            reason += f", of them {shipment.end - shipment.start:,} shipped from {shipment.source}"
        if request.avoid:
            reason += f"; avoiding {', '.join(sorted(request.avoid))}"
        return Decision(choice.cluster, prefiller.node.name, decoder.node.name, self.threshold,
                        choice.uncached_tokens, cached, decoder.tokens, shipment, reason)

    def _choose_cluster(self, request: RouteRequest, view: ClusterView, prfaas: _Holder, pd: _Holder) -> _Choice:
        """`prfaas` and `pd` hold the longest prefix in each cluster: l_prfaas and l_pd (paper 3.4.3)."""
        if not view.prfaas or not view.egress.up:
            cluster, why = Role.PDP, "link down" if view.prfaas else "PrfaaS down"
        elif not view.pdp:
            cluster, why = Role.PRFAAS, "no PD-P node"
        elif not self.selective:
            away = min(map(_load, view.prfaas)) < min(map(_load, view.pdp))
            cluster, why = Role.PRFAAS if away else Role.PDP, "least loaded"
        else:
            # While bandwidth is abundant compute is the scarce thing, so the longer prefix counts wherever it is.
            across = self.ship_prefixes and self.costs is not None and view.regime == "abundant"
            return self._judge(request.prompt_tokens, view, prfaas, pd, across)
        source = prfaas if cluster is Role.PRFAAS else pd
        uncached = request.prompt_tokens - source.tokens
        return _Choice(cluster, uncached, source, view.fabric, f"{uncached:,} uncached, {why}")

    def _judge(self, prompt_tokens: int, view: ClusterView, prfaas: _Holder, pd: _Holder, across: bool) -> _Choice:
        """The threshold rule, by the longest prefix of both clusters (`across`) or by each cluster's own cache."""
        uncached = prompt_tokens - (max(prfaas.tokens, pd.tokens) if across else pd.tokens)
        away = uncached > self.threshold
        cluster = Role.PRFAAS if away else Role.PDP
        source, link = prfaas if away else pd, view.fabric
        other, other_link = (pd, view.ingress) if away else (prfaas, view.egress)
        missing = other.tokens - source.tokens
        if across and missing > 0:
            compute_s = missing * self.costs.s_per_token(cluster)
            if other_link.seconds_for(self.costs.bytes_of(missing)) >= compute_s:  # not worth shipping
                return self._judge(prompt_tokens, view, prfaas, pd, across=False)
            source, link = other, other_link
        why = (f"{uncached:,} uncached {'>' if away else '≤'} t={self.threshold:,.0f}, "
               f"egress {view.egress.utilization:.0%} of limit, {view.regime}")
        return _Choice(cluster, uncached, source, link, why)

    def _choose_node(self, choice: _Choice, nodes: Sequence[NodeView],
                     holders: list[_Holder]) -> tuple[_Holder, PrefixShipment | None]:
        """The node with the fewest tokens to compute until this request is done, and what it is to fetch: affinity,
        queue and fetch are weighed in one unit."""
        end = choice.source.tokens
        compute_s = self.costs.s_per_token(choice.cluster) if self.costs else 0.0

        def saved_by_fetch(own: int) -> float:
            """Tokens of the prefix, less those that could be computed while what is missing of it travels."""
            if own >= end or compute_s <= 0:
                return 0.0
            return end - choice.link.seconds_for(self.costs.bytes_of(end - own)) / compute_s

        def rank(candidate: _Holder) -> tuple[float, int]:
            node, own = candidate
            return node.load - max(own, saved_by_fetch(own)), -own

        best = min([_idlest(nodes), *holders], key=rank)  # of nodes that hold nothing, only the idlest can be best
        if saved_by_fetch(best.tokens) <= best.tokens:
            return best, None
        nbytes = self.costs.bytes_of(end - best.tokens)
        return best, PrefixShipment(choice.source.node.name, best.tokens, end, nbytes)


def _without(avoid: frozenset[str], view: ClusterView) -> ClusterView:
    """Without some nodes, neither to work nor to hold a prefix."""
    prfaas, pdp, pdd = ([node for node in nodes if node.name not in avoid]
                        for nodes in (view.prfaas, view.pdp, view.pdd))
    return replace(view, prfaas=prfaas, pdp=pdp, pdd=pdd)


def _holders(nodes: Sequence[NodeView], matches: Mapping[str, int], most: int) -> list[_Holder]:
    if not matches:
        return []
    return [_Holder(node, min(matches[node.name], most)) for node in nodes if node.name in matches]


def _idlest(nodes: Sequence[NodeView]) -> _Holder:
    return _Holder(min(nodes, key=_load), 0)  # where it holds something it is among the holders too


def _longest(holders: list[_Holder]) -> _Holder:
    return max(holders, key=attrgetter("tokens"), default=_Holder(NodeView("nobody"), 0))


def _choose_decoder(nodes: Sequence[NodeView], holders: list[_Holder]) -> _Holder:
    """The decode node with the longest prefix, unless its queue is much longer than the shortest."""
    idlest = _idlest(nodes)
    limit = idlest.node.load + DECODE_SLACK_REQUESTS
    return max([idlest, *(holder for holder in holders if holder.node.load <= limit)], key=attrgetter("tokens"))
