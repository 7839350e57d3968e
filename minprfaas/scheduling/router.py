"""Where a request is prefilled and decoded, and why: threshold, cached prefixes, node choice. Chapter 11 (paper 3.4.3).

Pure: the same request and the same view give the same decision, and the decision says its reason in words.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from minprfaas.errors import RequestError, UserError

DECODE_SLACK_REQUESTS = 4  # how much longer a decode node's queue may be for the sake of the prefix that it holds
_load = attrgetter("load")


@dataclass(slots=True)
class NodeView:
    """A node that takes new work (a dead or draining one is not in the view). `load`: uncached tokens waiting or being
    computed on a prefill node (and, where known, each request's fixed cost in tokens), requests on a decode node."""

    name: str
    load: float = 0


@dataclass(slots=True)
class LinkView:
    """One direction of the link between the clusters: `gbps` is its observed capacity, `utilization` from 0 to 1."""

    gbps: float
    utilization: float = 0.0
    queued_bytes: float = 0.0
    up: bool = True

    def seconds_for(self, count_bytes: float) -> float:
        """Until `count_bytes` handed over now have left, behind what is queued."""
        return (self.queued_bytes + count_bytes) * 8 / (self.gbps * 1e9) if self.up and self.gbps > 0 else float("inf")


@dataclass(slots=True)
class ClusterView:
    """What the router sees at `time_s`. A node that both prefills and decodes stands in `pdp` and in `pdd`.

    `egress` carries KVCache from the PrfaaS cluster to the PD cluster, `ingress` cached prefixes the other way;
    `regime` is the congestion monitor's: "scarce" or "abundant".
    """

    time_s: float
    prfaas: Sequence[NodeView]
    pdp: Sequence[NodeView]
    pdd: Sequence[NodeView]
    egress: LinkView
    ingress: LinkView
    regime: str = "scarce"


class RouteRequest(NamedTuple):
    """`matches`: cached prefix tokens of this prompt on each node that has any (`Directory.match(...).nodes`)."""

    prompt_tokens: int
    matches: Mapping[str, int] = MappingProxyType({})


class CacheTransfer(NamedTuple):
    """Ship cached tokens `[start, end)` from node `source` in the other cluster before the prefill begins."""

    source: str
    start: int
    end: int
    bytes: float


class Decision(NamedTuple):
    """`route` is "prfaas" or "pdp". The router judged `incremental_tokens` against `threshold`; `node` will find
    `cached_tokens` (after `transfer`, if any), and `decode_node` already holds `decode_cached_tokens`: only what comes
    after those crosses the link."""

    route: str
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


class Router:
    """Routes one request at a time. `threshold` t in tokens may be set at any time (the short-term loop does).

    `costs` None never ships a cached prefix. `selective` False is the baseline without a threshold: the least-loaded
    node of both clusters, whatever the length.
    """

    def __init__(self, threshold: float, costs: TransferCosts | None = None, selective: bool = True):
        if not threshold >= 0:
            raise UserError(f"threshold {threshold} is out of range; it must be at least 0 tokens")
        self.threshold, self.costs, self.selective = threshold, costs, selective

    def route(self, request: RouteRequest, view: ClusterView) -> Decision:
        """Choose cluster and nodes. Raises RequestError ("no_node") when nothing can prefill or nothing can decode."""
        if not view.pdd or not (view.pdp or (view.prfaas and view.egress.up)):
            raise RequestError("no_node", f"{len(view.pdd)} decode nodes, {len(view.pdp)} PD-P nodes, "
                                          f"{len(view.prfaas)} PrfaaS nodes, link {'up' if view.egress.up else 'down'}")
        cluster, incremental, transfer, why = self._choose_cluster(request, view)
        nodes = view.prfaas if cluster == "prfaas" else view.pdp
        fetched = transfer.end if transfer else 0
        node, own = _cheapest(request, nodes, fetched)
        cached = max(own, fetched)
        if transfer is not None:  # what crosses begins where the chosen node's own cache ends
            transfer = self._transfer(transfer.source, own, fetched) if own < fetched else None
        decoder, decode_cached = _decoder(request, view.pdd)
        reason = f"{why}: {'PrfaaS' if cluster == 'prfaas' else 'PD-P'} {node.name}, cached {cached:,}"
        return Decision(cluster, node.name, decoder.name, self.threshold, incremental, cached, decode_cached, transfer,
                        reason)

    def _choose_cluster(self, request: RouteRequest, view: ClusterView) -> tuple[str, int, CacheTransfer | None, str]:
        """(cluster, the incremental length it was judged by, a cache transfer or None, the reason's first half)."""
        total = request.prompt_tokens
        pd_source, l_pd = _longest(request, view.pdp)
        if not view.prfaas or not view.egress.up:
            return "pdp", total - l_pd, None, f"{total - l_pd:,} uncached, {'link' if view.prfaas else 'PrfaaS'} down"
        prfaas_source, l_prfaas = _longest(request, view.prfaas)
        if not view.pdp:
            return "prfaas", total - l_prfaas, None, f"{total - l_prfaas:,} uncached, no PD-P node"
        if not self.selective:
            return self._least_loaded(total, l_prfaas, l_pd, view)
        if view.regime == "abundant" and self.costs and l_prfaas != l_pd:
            # Compute is the scarce thing: judge by the longer prefix, wherever it is, if it is worth shipping.
            incremental = total - max(l_prfaas, l_pd)
            cluster, by = self._judge(incremental, view)
            own, source, other = (l_prfaas, pd_source, l_pd) if cluster == "prfaas" else (l_pd, prfaas_source, l_prfaas)
            if other <= own:
                return cluster, incremental, None, by
            transfer = self._transfer(source, own, other)
            if self._worth_shipping(transfer, cluster, view):
                return cluster, incremental, transfer, f"{by}, {other - own:,} cached tokens shipped from {source}"
        cluster, by = self._judge(total - l_pd, view)  # each cluster by its own cache
        return cluster, total - l_pd, None, by

    def _judge(self, incremental: int, view: ClusterView) -> tuple[str, str]:
        """The threshold rule: above t, offload."""
        away = incremental > self.threshold
        return ("prfaas" if away else "pdp",
                f"{incremental:,} uncached {'>' if away else '≤'} t={self.threshold:,.0f}, "
                f"egress {view.egress.utilization:.0%} of limit, {view.regime}")

    def _least_loaded(self, total: int, l_prfaas: int, l_pd: int, view: ClusterView):
        away = min(map(_load, view.prfaas)) < min(map(_load, view.pdp))
        incremental = total - (l_prfaas if away else l_pd)
        return "prfaas" if away else "pdp", incremental, None, f"{incremental:,} uncached, least loaded"

    def _transfer(self, source: str, start: int, end: int) -> CacheTransfer:
        return CacheTransfer(source, start, end, (end - start) * self.costs.token_bytes + self.costs.state_bytes)

    def _worth_shipping(self, transfer: CacheTransfer, cluster: str, view: ClusterView) -> bool:
        """Whether the bytes arrive sooner than the same tokens could be computed."""
        link, per_token = ((view.ingress, self.costs.prfaas_s_per_token) if cluster == "prfaas"
                           else (view.egress, self.costs.pdp_s_per_token))
        return link.seconds_for(transfer.bytes) < (transfer.end - transfer.start) * per_token


def _longest(request: RouteRequest, nodes: Sequence[NodeView]) -> tuple[str, int]:
    """(node, tokens) of the longest usable cached prefix among `nodes`; at least one token is always computed."""
    best = max(_holders(request, nodes), key=lambda pair: pair[1], default=None)
    return ("", 0) if best is None else (best[0].name, best[1])


def _holders(request: RouteRequest, nodes: Sequence[NodeView]) -> Iterable[tuple[NodeView, int]]:
    if not request.matches:
        return ()
    matches, most = request.matches, request.prompt_tokens - 1
    return [(node, min(matches[node.name], most)) for node in nodes if node.name in matches]


def _cheapest(request: RouteRequest, nodes: Sequence[NodeView], fetched: int) -> tuple[NodeView, int]:
    """(node, tokens in its own cache) with the fewest tokens to compute until this request is done: cache affinity
    weighed against the queue in one unit. `fetched` tokens will be there on any node."""
    best, own = min(nodes, key=_load), 0
    for node, tokens in _holders(request, nodes):
        more = node.load - max(tokens, fetched) - (best.load - max(own, fetched))
        if more < 0 or (more == 0 and tokens > own):
            best, own = node, tokens
    return best, own


def _decoder(request: RouteRequest, nodes: Sequence[NodeView]) -> tuple[NodeView, int]:
    """The decode node with the longest prefix, unless its queue is much longer than the shortest."""
    best, cached = min(nodes, key=_load), 0
    limit = best.load + DECODE_SLACK_REQUESTS
    for node, tokens in _holders(request, nodes):
        if tokens > cached and node.load <= limit:
            best, cached = node, tokens
    return best, cached
