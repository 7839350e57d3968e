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
    """A node that takes new work (a dead or draining one is not in the view). `load`: uncached tokens waiting or being
    computed on a prefill node (and, where known, each request's fixed cost in tokens), requests on a decode node."""

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
    """What the router sees.

    `egress` carries KVCache from the PrfaaS cluster to the PD cluster, `ingress` cached prefixes the other way, and
    `fabric` those that stay inside a cluster; `regime` is the congestion monitor's: "scarce" or "abundant".
    """

    prfaas: Sequence[NodeView]
    pdp: Sequence[NodeView]
    pdd: Sequence[NodeView]
    egress: LinkView
    ingress: LinkView
    regime: str = "scarce"
    fabric: LinkView = field(default_factory=lambda: LinkView(FABRIC_GBPS))


class RouteRequest(NamedTuple):
    """A prompt of `prompt_tokens`. `keys`: the chained keys of its full blocks, but for the last token, which is always
    computed. `avoid`: nodes that are not to be used, because they failed this request before."""

    id: Hashable
    prompt_tokens: int
    keys: Sequence[Hashable] = ()
    avoid: frozenset[str] = frozenset()


class CacheTransfer(NamedTuple):
    """Ship cached tokens `[start, end)` from node `source`, of either cluster, before the prefill begins."""

    source: str
    start: int
    end: int
    bytes: float


class Decision(NamedTuple):
    """The router judged `incremental_tokens` against `threshold`; `node`, of the cluster that `route` names, will find
    `cached_tokens` (after `transfer`, if any), and `decode_node` already holds `decode_cached_tokens`: only what comes
    after those crosses the link."""

    route: Role
    node: str
    decode_node: str
    threshold: float
    incremental_tokens: int
    cached_tokens: int
    decode_cached_tokens: int
    transfer: CacheTransfer | None
    reason: str


@dataclass(frozen=True)
class TransferCosts:
    """What a cached prefix costs to ship and to compute again: KVCache bytes a token, bytes of a request's fixed-size
    state, and seconds of prefill a token in each cluster."""

    token_bytes: float
    state_bytes: float
    prfaas_s_per_token: float
    pdp_s_per_token: float

    def s_per_token(self, cluster: Role) -> float:
        """Seconds that a prefill node of `cluster` computes at one token."""
        return self.prfaas_s_per_token if cluster is Role.PRFAAS else self.pdp_s_per_token


class _Holder(NamedTuple):
    """A node and the tokens of the prompt that it holds."""

    node: NodeView
    tokens: int


class _Choice(NamedTuple):
    """A cluster, the incremental length it was judged by, the longest prefix to be had there and over which link."""

    cluster: Role
    incremental_tokens: int
    source: _Holder | None
    link: LinkView
    why: str


class Router:
    """Routes one request at a time. `threshold` t in tokens may be set at any time (the short-term loop does).

    With `costs`, a prefix that another node of the cluster holds is fetched over the fabric where that is sooner than
    computing it; with `ship_prefixes` too, one of the other cluster over the link while bandwidth is abundant.
    `selective` False is the baseline without a threshold: the least-loaded node of both clusters, whatever the length.
    """

    def __init__(self, threshold: float, costs: TransferCosts | None = None, ship_prefixes: bool = False,
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
        if choice.cluster is Role.PRFAAS:
            node, own, transfer = self._choose_node(choice, view.prfaas, prfaas)
            name = "PrfaaS"
        else:
            node, own, transfer = self._choose_node(choice, view.pdp, pdp)
            name = "PD-P"
        cached = transfer.end if transfer else own
        decoder, decode_cached = _decoder(view.pdd, pdd)
        reason = f"{choice.why}: {name} {node.name}, cached {cached:,}"
        if transfer:
            reason += f", of them {transfer.end - transfer.start:,} shipped from {transfer.source}"
        if request.avoid:
            reason += f"; avoiding {', '.join(sorted(request.avoid))}"
        return Decision(choice.cluster, node.name, decoder.name, self.threshold, choice.incremental_tokens, cached,
                        decode_cached, transfer, reason)

    def _choose_cluster(self, request: RouteRequest, view: ClusterView, prfaas: _Holder | None,
                        pd: _Holder | None) -> _Choice:
        """`prfaas` and `pd` hold the longest prefix in each cluster: l_prfaas and l_pd (paper 3.4.3)."""
        l_prfaas, l_pd = prfaas.tokens if prfaas else 0, pd.tokens if pd else 0
        if not view.prfaas or not view.egress.up:
            incremental = request.prompt_tokens - l_pd
            gone = "link" if view.prfaas else "PrfaaS"
            return _Choice(Role.PDP, incremental, pd, view.fabric, f"{incremental:,} uncached, {gone} down")
        if not view.pdp:
            incremental = request.prompt_tokens - l_prfaas
            return _Choice(Role.PRFAAS, incremental, prfaas, view.fabric, f"{incremental:,} uncached, no PD-P node")
        if not self.selective:
            away = min(map(_load, view.prfaas)) < min(map(_load, view.pdp))
            incremental = request.prompt_tokens - (l_prfaas if away else l_pd)
            why = f"{incremental:,} uncached, least loaded"
            return _Choice(Role.PRFAAS if away else Role.PDP, incremental, prfaas if away else pd, view.fabric, why)
        if self.ship_prefixes and self.costs and view.regime == "abundant":
            # Compute is the scarce thing: judge by the longer prefix, wherever it is, if it is worth shipping.
            incremental = request.prompt_tokens - max(l_prfaas, l_pd)
            cluster, why = self._judge(incremental, view)
            own, other, link = ((prfaas, pd, view.ingress) if cluster is Role.PRFAAS else (pd, prfaas, view.egress))
            own_tokens = own.tokens if own else 0
            if other is None or other.tokens <= own_tokens:
                return _Choice(cluster, incremental, own, view.fabric, why)
            shipped = self._transfer(other, own_tokens)
            if link.seconds_for(shipped.bytes) < (other.tokens - own_tokens) * self.costs.s_per_token(cluster):
                return _Choice(cluster, incremental, other, link, why)
        incremental = request.prompt_tokens - l_pd  # each cluster by its own cache
        cluster, why = self._judge(incremental, view)
        return _Choice(cluster, incremental, prfaas if cluster is Role.PRFAAS else pd, view.fabric, why)

    def _judge(self, incremental: int, view: ClusterView) -> tuple[Role, str]:
        """The threshold rule: above t, offload."""
        away = incremental > self.threshold
        why = (f"{incremental:,} uncached {'>' if away else '≤'} t={self.threshold:,.0f}, "
               f"egress {view.egress.utilization:.0%} of limit, {view.regime}")
        return Role.PRFAAS if away else Role.PDP, why

    def _choose_node(self, choice: _Choice, nodes: Sequence[NodeView],
                     holders: list[_Holder]) -> tuple[NodeView, int, CacheTransfer | None]:
        """(node, tokens in its own cache, what to fetch): the node with the fewest tokens to compute until this request
        is done. So cache affinity, the queue and the time of a fetch are weighed against each other in one unit."""
        end, setup_tokens, tokens_per_token = 0, 0.0, 0.0
        compute_s = self.costs.s_per_token(choice.cluster) if self.costs else 0.0
        if choice.source is not None and compute_s > 0:
            # A fetch of n tokens takes as long as computing setup_tokens + tokens_per_token * n.
            end, link = choice.source.tokens, choice.link
            setup_tokens = link.seconds_for(self.costs.state_bytes) / compute_s
            tokens_per_token = self.costs.token_bytes * 8 / (max(link.gbps, 1e-9) * 1e9) / compute_s
        best = min(nodes, key=_load)
        best_own, best_spared = 0, end - setup_tokens - tokens_per_token * end
        best_cost = best.load - max(best_spared, 0)
        for node, own in holders:
            spared = end - setup_tokens - tokens_per_token * (end - own)
            cost = node.load - max(own, spared)
            if cost < best_cost or (cost == best_cost and own > best_own):
                best, best_own, best_spared, best_cost = node, own, spared, cost
        fetch = best_spared > best_own and end > best_own
        return best, best_own, self._transfer(choice.source, best_own) if fetch else None

    def _transfer(self, source: _Holder, start: int) -> CacheTransfer:
        nbytes = (source.tokens - start) * self.costs.token_bytes + self.costs.state_bytes
        return CacheTransfer(source.node.name, start, source.tokens, nbytes)


def _without(avoid: frozenset[str], view: ClusterView) -> ClusterView:
    """The view without some nodes, neither to work nor to hold a prefix."""
    kept = {role: [node for node in nodes if node.name not in avoid]
            for role, nodes in (("prfaas", view.prfaas), ("pdp", view.pdp), ("pdd", view.pdd))}
    return replace(view, **kept)


def _holders(nodes: Sequence[NodeView], matches: Mapping[str, int], most: int) -> list[_Holder]:
    if not matches:
        return []
    return [_Holder(node, min(matches[node.name], most)) for node in nodes if node.name in matches]


def _longest(holders: list[_Holder]) -> _Holder | None:
    return max(holders, key=attrgetter("tokens"), default=None)


def _decoder(nodes: Sequence[NodeView], holders: list[_Holder]) -> tuple[NodeView, int]:
    """The decode node with the longest prefix, unless its queue is much longer than the shortest."""
    best, cached = min(nodes, key=_load), 0
    limit = best.load + DECODE_SLACK_REQUESTS
    for node, tokens in holders:
        if tokens > cached and node.load <= limit:
            best, cached = node, tokens
    return best, cached
