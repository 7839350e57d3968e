"""The control plane: directory, monitors, router, both loops and the load books in one pure object. Chapters 11, 12.

Events go in, decisions and actions come out; time is an argument. Who drives it (the live front end, or the simulator)
tells it what happened, asks it about each request, and carries out what it says (paper 3.2, 3.3, 3.4.3).
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from minprfaas.config import LinkSample, Role
from minprfaas.scheduling.books import LoadBooks, NodeBook
from minprfaas.scheduling.congestion import CongestionMonitor
from minprfaas.scheduling.directory import CacheChanged, Directory
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.roles import SUSTAIN_S, RoleChange, RoleLoop
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, Router, RouteRequest, ShippingCosts
from minprfaas.scheduling.threshold import Observation, ThresholdLoop

TICK_S = 1.0  # how often the loops look; `tick` may be called more often
INVENTORY_S = 10.0  # an inventory that was asked for and has not come is asked for again
BUSY_SMOOTH_S = 20.0  # time constant of the stages' utilizations
ANSWER_SMOOTH_REQUESTS = 100  # over so many answers their mean length is taken


@dataclass(frozen=True)
class ControlSettings:
    """`link_gbps` is what the line between the clusters is said to carry, a first guess that the monitors correct. With
    `fleet` (profiles) the loops can run: `adaptive` moves the threshold, `convert_roles` the split, when that has been
    wanted for `sustain_s`. `costs` are needed to fetch prefixes; they come from the fleet where there is one, else
    prefill seconds are learned as prefills end.
    `ship_prefixes` lets prefixes cross between clusters, and `selective` False routes without a threshold."""

    threshold: float
    link_gbps: float
    costs: ShippingCosts | None = None
    ship_prefixes: bool = False
    selective: bool = True
    fleet: Fleet | None = None
    adaptive: bool = False
    convert_roles: bool = False
    sustain_s: float = SUSTAIN_S


# Events


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node is ready to work in this role: at the start, after a failure, or after its role was changed."""

    node: str
    role: Role


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """A node has failed, or cannot be reached. What it was given must be routed again."""

    node: str


@dataclass(frozen=True, slots=True)
class PrefixMissing:
    """`node` was to use or to send the prefix that ends at `key`, and does not have it."""

    node: str
    key: Hashable


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """A sample of the line out of the PrfaaS cluster (or, with `ingress`, into it), as the sending `node` sees it."""

    node: str
    sample: LinkSample
    ingress: bool = False


@dataclass(frozen=True, slots=True)
class LineChanged:
    """The line between the clusters has stopped, or works again; the nodes go on with what they have. Where there are
    several PrfaaS datacenters, `site` says whose line it is."""

    up: bool
    site: str = ""


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    """A request's prompt has been computed, `uncached_tokens` of it in `seconds`; 0 where nothing was measured."""

    id: Hashable
    uncached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeStarted:
    """A request's KVCache is complete on its decode node."""

    id: Hashable


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request has its answer of `output_tokens` tokens, or has failed (0)."""

    id: Hashable
    output_tokens: int = 0


Event = (NodeJoined | NodeLeft | CacheChanged | PrefixMissing | LinkMeasured | LineChanged | PrefillEnded
         | DecodeStarted | RequestEnded)


# Actions


@dataclass(frozen=True, slots=True)
class AskInventory:
    """Ask this node for all that it holds (a `CacheChanged` with `inventory`)."""

    node: str


@dataclass(frozen=True, slots=True)
class NewThreshold:
    """Requests are routed by this threshold (tokens) from now on; there is only to tell people."""

    threshold: float
    reason: str


Action = AskInventory | NewThreshold | RoleChange


class ControlPlane:
    """Holds what is known of all clusters, and decides. `directory` may be asked; only `hear` changes it."""

    def __init__(self, settings: ControlSettings):
        self.settings, self.directory = settings, Directory()
        fleet, costs = settings.fleet, settings.costs
        if fleet is not None:
            costs = profile_costs(fleet)
            self._threshold_loop = ThresholdLoop(fleet, settings.threshold)
            self._role_loop = RoleLoop(fleet, settings.sustain_s)
            self._output_tokens = float(fleet.output_tokens)  # of the mean answer, smoothed
        self._router = Router(settings.threshold, costs, settings.ship_prefixes, settings.selective)
        self._egress, self._ingress = CongestionMonitor(settings.link_gbps), CongestionMonitor(settings.link_gbps)
        self._books = LoadBooks()
        self._taking_work: dict[Role, list[NodeBook]] = {role: [] for role in Role}
        prfaas, pdp, pdd = (self._taking_work[role] for role in (Role.PRFAAS, Role.PDP, Role.PDD))
        self._view = ClusterView(prfaas, pdp, pdd, self._egress, self._ingress)
        self._conversion: RoleChange | None = None  # from the beginning of the drain until the node has joined again
        self._asked_at_s: dict[str, float] = {}  # inventories that are awaited
        self._learned: dict[Role, tuple[int, float]] = {}  # tokens and seconds of prefill so far
        self._ticked_at_s = -math.inf
        self._prefill_busy = self._decode_busy = 0.0  # smoothed

    # What a screen shows

    @property
    def threshold(self) -> float:
        """t in tokens, by which requests are routed now."""
        return self._router.threshold

    @property
    def egress(self) -> LinkView:
        """The line out of the PrfaaS cluster, as its senders measure it."""
        return self._egress

    def regime(self, now_s: float) -> str:
        """Whether bandwidth out of the PrfaaS cluster is "scarce" or "abundant"."""
        return self._egress.regime(now_s)

    def loads(self) -> dict[str, float]:
        """Prefill load (uncached tokens) and decode load (requests) of each node that takes new work."""
        return {node.name: node.load for nodes in self._taking_work.values() for node in nodes}

    @property
    def draining(self) -> str | None:
        """The node that gets no new work and ends what it has, to play another role then."""
        change = self._conversion
        return change.node if change is not None and change.node in self._books.nodes else None

    def nodes(self, role: Role) -> list[str]:
        """The nodes that take new work in this role."""
        return [node.name for node in self._taking_work[role]]

    # What happened

    def hear(self, event: Event, now_s: float) -> list[Action]:
        """Take note of an event; one about a node or a request that is not known is harmless."""
        match event:  # the most frequent ones first: a simulation tells a few million
            case PrefillEnded():
                self._end_prefill(event)
            case DecodeStarted(id):
                self._books.start_decode(id)
            case RequestEnded(id, output_tokens):
                self._books.close(id)
                if output_tokens and self.settings.fleet is not None:
                    self._output_tokens += (output_tokens - self._output_tokens) / ANSWER_SMOOTH_REQUESTS
            case CacheChanged():
                return self._change_cache(event, now_s)
            case LinkMeasured():
                line = self._ingress if event.ingress else self._egress
                line.hear(event.node, event.sample, now_s)
            case LineChanged(up):
                self._egress.up = self._ingress.up = up
            case PrefixMissing(node, key):
                self.directory.forget(node, key)
            case NodeJoined(node, role):
                self._remove(node, now_s)  # of a node that was started again nothing that is known is true
                self.directory.add_node(node)
                self._books.nodes[node] = NodeBook(node)
                self._taking_work[role].append(self._books.nodes[node])
                return self._ask_inventory(node, now_s)
            case NodeLeft(node):
                self._remove(node, now_s)
        return []

    def _end_prefill(self, event: PrefillEnded) -> None:
        decision = self._books.end_prefill(event.id)
        is_measured = event.uncached_tokens > 0 and 0 < event.seconds < math.inf
        # A profile knows more than the prefills of this run, whatever their length.
        if decision is None or not is_measured or self._router.costs is None or self.settings.fleet is not None:
            return
        tokens, seconds = self._learned.get(decision.route, (0, 0.0))
        self._learned[decision.route] = (tokens + event.uncached_tokens, seconds + event.seconds)
        per_token = {role: total_s / count for role, (count, total_s) in self._learned.items()}
        here = per_token[decision.route]  # until the other cluster was seen, it is like this one
        self._router.costs = replace(self._router.costs, prfaas_s_per_token=per_token.get(Role.PRFAAS, here),
                                     pdp_s_per_token=per_token.get(Role.PDP, here))

    def _change_cache(self, change: CacheChanged, now_s: float) -> list[Action]:
        if change.inventory:
            self._asked_at_s.pop(change.node, None)
        if change.node not in self.directory or self.directory.apply(change):  # it has left meanwhile, or all is well
            return []
        return self._ask_inventory(change.node, now_s)

    def _ask_inventory(self, node: str, now_s: float) -> list[Action]:
        """Once in a while is enough: an inventory can be large, and is on its way already."""
        if now_s - self._asked_at_s.get(node, -math.inf) < INVENTORY_S:
            return []
        self._asked_at_s[node] = now_s
        return [AskInventory(node)]

    def _remove(self, name: str, now_s: float) -> None:
        """Nothing goes to this node, or comes from it, until it joins (again)."""
        self._switch_off(name)
        if self._conversion is not None and self._conversion.node == name:
            self._conversion = None  # it comes back in its new role, or died on the way
            if self.settings.fleet is not None:
                self._role_loop.converted(now_s)

    def _switch_off(self, name: str) -> None:
        self._stop_work(name)
        self._books.nodes.pop(name, None)
        self.directory.drop_node(name)
        self._asked_at_s.pop(name, None)

    def _stop_work(self, name: str) -> None:
        for nodes in self._taking_work.values():
            nodes[:] = [node for node in nodes if node.name != name]

    # Where a request goes

    def route(self, request: RouteRequest, now_s: float) -> Decision:
        """Decide, and book the request on the nodes that were chosen, in place of an earlier attempt of the same id.
        Raises RequestError ("no_node") when nothing can prefill or nothing can decode."""
        self._books.close(request.id)  # first: what it is given anew must not be weighed against what it had
        decision = self._router.route(request, self.directory.match(request.keys), self._view_of(now_s))
        uncached, expected_s = request.prompt_tokens - decision.cached_tokens, 0.0
        if self.settings.fleet is not None:
            profile = self.settings.fleet.profile(decision.route)
            expected_s = profile.prefill_s(uncached)
            uncached += profile.overhead_tokens
            self._threshold_loop.record(decision.uncached_tokens)
        self._books.open(request.id, decision, uncached, expected_s)
        return decision

    def _view_of(self, now_s: float) -> ClusterView:
        """What the router sees."""
        self._view.regime = self._egress.regime(now_s)
        return self._view

    # What time brings

    def tick(self, now_s: float) -> list[Action]:
        """Call at least once a second; what is done more rarely is done when it is due."""
        elapsed_s = now_s - self._ticked_at_s
        if elapsed_s < TICK_S:
            return []
        self._ticked_at_s = now_s
        actions: list[Action] = []
        for node in list(self._asked_at_s):
            actions += self._ask_inventory(node, now_s)
        if self._conversion is not None:
            actions += self._finish_drain()
        if self.settings.fleet is not None:
            actions += self._run_loops(self._observe(now_s, elapsed_s))
        return actions

    def _observe(self, now_s: float, elapsed_s: float) -> Observation:
        """The stages as the books show them, their utilizations smoothed over `BUSY_SMOOTH_S`."""
        view, places = self._view, self.settings.fleet.pd_profile.bs_max
        prefill = max(sum(bool(node.expected_s) for node in nodes) / max(len(nodes), 1)
                      for nodes in (view.prfaas, view.pdp))
        in_batches = sum(min(len(node.decoding), places) for node in view.pdd)  # more than fit in the batch wait
        decode = in_batches / max(places * len(view.pdd), 1)
        weight = 1 - math.exp(-min(elapsed_s, BUSY_SMOOTH_S) / BUSY_SMOOTH_S)
        self._prefill_busy += weight * (prefill - self._prefill_busy)
        self._decode_busy += weight * (decode - self._decode_busy)
        return Observation(
            now_s, len(view.prfaas), len(view.pdp), len(view.pdd), view.egress.gbps, view.egress.queued_bytes,
            self.regime(now_s) == "scarce", sum(node.waiting_s for node in view.prfaas),
            sum(node.waiting_s for node in view.pdp), self._prefill_busy, self._decode_busy)

    def _run_loops(self, seen: Observation) -> list[Action]:
        actions: list[Action] = []
        if self.settings.adaptive and self._view.prfaas:
            threshold = self._threshold_loop.update(seen)
            if threshold != self.threshold:
                self._router.threshold = threshold
                actions.append(NewThreshold(threshold, self._threshold_loop.reason))
        if self._conversion is None and self.settings.convert_roles:
            change = self._role_loop.update(seen, self._threshold_loop.lengths, self._output_tokens, self._view.pdp,
                                            self._view.pdd)
            if change is not None:
                self._begin_conversion(change)
        return actions

    def _begin_conversion(self, change: RoleChange) -> None:
        self._conversion = change
        self._stop_work(change.node)  # it drains; what it holds can still be fetched

    def _finish_drain(self) -> list[Action]:
        """The node changes its role when it has finished what it was given."""
        change = self._conversion
        node = self._books.nodes.get(change.node)
        if node is None or node.load > 0:  # it changes its role at present, or drains
            return []
        self._switch_off(change.node)  # its cache may survive, but nothing can be fetched from it meanwhile
        return [change]


def profile_costs(fleet: Fleet) -> ShippingCosts:
    """What a token costs to ship and to compute by the profiles, between 8K and 32K tokens."""
    remote, local = fleet.prfaas_profile, fleet.pd_profile

    def slope(curve: Callable[[float], float]) -> float:
        return (curve(32 * 1024) - curve(8 * 1024)) / (24 * 1024)

    return ShippingCosts(slope(remote.kv_bytes), remote.kv_bytes(0), slope(remote.prefill_s), slope(local.prefill_s))
