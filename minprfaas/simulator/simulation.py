"""The simulated cluster: nodes and a link that are modelled, under the very control plane that the live cluster has.

A request's way: arrival, route, (cached prefix shipped or fetched), prefill queue, prefill with its KVCache streaming
over the link, decode. Requests of a node that fails are routed again. Chapter 12 (paper 3.3, 3.4.3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minprfaas.config import Role
from minprfaas.errors import RequestError, UserError
from minprfaas.scheduling import control as plane
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.roles import RoleChange
from minprfaas.scheduling.router import FABRIC_GBPS, PrefixShipment, RouteRequest
from minprfaas.scheduling.sites import SitesControlPlane
from minprfaas.simulator.clock import Clock
from minprfaas.simulator.fluid_link import FluidLink
from minprfaas.simulator.nodes import DecodeNode, PrefillNode, PrefixCache, SimRequest
from minprfaas.simulator.recorder import Recorder, Report, Tick

TICK_S = 1.0  # how often links are sampled and the control plane is asked what to do
RTT_S = 0.02  # modelled, between the clusters
ROLE_SWITCH_S = 10.0  # modelled: a drained node restarts in its other role
MAX_SIMULATED_S = 1e6  # 11 days: a second is a row of the report, so more would fill the memory
Weather = tuple[tuple[float, float], ...]  # (seconds, link Gbps from then on)


@dataclass(frozen=True)
class PrfaaSSite:
    """One of several PrfaaS datacenters: its nodes are NAME-0…, its line to the PD cluster has weather of its own."""

    name: str
    instances: int
    gbps: float
    weather: Weather = ()


class Line:
    """Both directions between one PrfaaS datacenter and the PD cluster."""

    def __init__(self, clock: Clock, gbps: float):
        self.egress, self.ingress = FluidLink(clock, gbps, RTT_S), FluidLink(clock, gbps, RTT_S)


@dataclass(frozen=True)
class Setup:
    """One simulation. Nodes are named prfaas0…, and pd0…, of which the first `n_p` begin as PD-P. `selective` False is
    least-loaded routing without a threshold; `adaptive` and `convert_roles` switch the loops. Where `cache_aware` is
    False, nodes reuse what they hold, but the router ignores it. With `sites` the fleet's PrfaaS instances and its link
    are theirs together."""

    fleet: Fleet
    n_p: int
    threshold: float
    selective: bool = True
    adaptive: bool = True
    convert_roles: bool = False
    cache_aware: bool = True
    cache_blocks: int = 0  # per node
    weather: Weather = ()
    failures: tuple[tuple[str, float, float], ...] = ()  # (node, fails at, returns at), in seconds
    sites: tuple[PrfaaSSite, ...] = ()

    @property
    def prfaas_names(self) -> dict[str, str]:
        """The site of each PrfaaS node."""
        if not self.sites:
            return {f"prfaas{i}": "" for i in range(int(self.fleet.prfaas_instances))}
        return {f"{site.name}-{i}": site.name for site in self.sites for i in range(site.instances)}

    def __post_init__(self) -> None:
        n_prfaas, n_d = int(self.fleet.prfaas_instances), self.fleet.pd_instances - self.n_p
        if self.n_p < 0 or n_d < 1 or self.n_p + n_prfaas < 1:
            raise UserError(f"{n_prfaas} PrfaaS, {self.n_p} PD-P and {n_d} PD-D nodes cannot serve; prefill and decode "
                            f"need one each")
        names = [*self.prfaas_names, *(f"pd{i}" for i in range(self.fleet.pd_instances))]
        for node, fails_s, returns_s in self.failures:
            if node not in names or not 0 <= fails_s < returns_s:
                raise UserError(f"failure of {node!r} from {fails_s:g} s to {returns_s:g} s is not possible; nodes are "
                                f"{names[0]} to {names[-1]}, and a node fails before it returns")
        for weather in (self.weather, *(site.weather for site in self.sites)):
            if any(at_s < 0 or gbps < 0 for at_s, gbps in weather):
                raise UserError(f"weather {weather} has a negative time or bandwidth")
            if weather and max(weather)[1] == 0:
                raise UserError("weather ends with a link at 0 Gbps; what is on its way would never arrive")

    def control_settings(self) -> ControlSettings:
        """What the control plane is told."""
        return ControlSettings(self.threshold, self.fleet.link_gbps, fleet=self.fleet, ship_prefixes=True,
                               selective=self.selective, adaptive=self.adaptive, convert_roles=self.convert_roles)

    def control_plane(self) -> ControlPlane:
        """Who decides."""
        if not self.sites:
            return ControlPlane(self.control_settings())
        return SitesControlPlane(self.control_settings(), {site.name: site.gbps for site in self.sites})


class Simulation:
    """Runs `requests` (in order of arrival) through the cluster of `setup`. `on_decision(at_s, request)` sees each
    request as it is routed; `on_progress(count)` hears of each that ends; `control` may be one that records."""

    def __init__(self, setup: Setup, requests: Iterator[SimRequest],
                 on_decision: Callable[[float, SimRequest], None] | None = None,
                 on_progress: Callable[[int], object] | None = None, control: ControlPlane | None = None):
        fleet = setup.fleet
        self.setup, self._requests, self._on_decision, self._on_progress = setup, requests, on_decision, on_progress
        self.control = control if control is not None else setup.control_plane()
        self.clock, self.recorder = Clock(), Recorder()
        sites = setup.sites or (PrfaaSSite("", 0, fleet.link_gbps, setup.weather),)
        self.lines = {site.name: Line(self.clock, site.gbps) for site in sites}
        self._weather = {site.name: site.weather for site in sites}
        self._site_of = setup.prfaas_names
        self.prefill: dict[str, PrefillNode] = {}
        self.decode: dict[str, DecodeNode] = {}
        self._caches: dict[str, PrefixCache] = {}
        self._in_system, self._arrivals_over = 0, False
        for name in self._site_of:
            self._start_node(name, Role.PRFAAS)
        for i in range(fleet.pd_instances):
            self._start_node(f"pd{i}", Role.PDP if i < setup.n_p else Role.PDD)

    def run(self) -> Report:
        """Until every request has ended. Raises UserError when that takes more than `MAX_SIMULATED_S`."""
        for site, weather in self._weather.items():
            for at_s, gbps in weather:
                self.clock.at(at_s, self._change_weather, site, gbps)
        for node, fails_s, returns_s in self.setup.failures:
            self.clock.at(fails_s, self._fail, node, returns_s)
        self.clock.after(TICK_S, self._tick)
        self._expect_next()
        self.clock.run()
        return self.recorder.report(self.bytes_sent)

    @property
    def bytes_sent(self) -> float:
        """Out of all PrfaaS datacenters, so far."""
        return sum(line.egress.bytes_sent for line in self.lines.values())

    def _line_of(self, node: str) -> Line:
        """The line of a PrfaaS node."""
        return self.lines[self._site_of[node]]

    # A request's way

    def _expect_next(self) -> None:
        request = next(self._requests, None)
        self._arrivals_over = request is None
        if request is not None:
            self.clock.at(request.arrived_at_s, self._arrive, request)

    def _arrive(self, request: SimRequest) -> None:
        self._in_system += 1
        request.id = self.recorder.arrived
        self.recorder.arrived += 1
        self._expect_next()
        self._route(request)

    def _route(self, request: SimRequest) -> None:
        keys = request.keys if self.setup.cache_aware else ()
        try:
            decision = self.control.route(RouteRequest(request.id, request.input_tokens, keys), self.clock.now_s)
        except RequestError:
            return self._end(request, failed=True)
        request.decision = decision
        request.attempts += 1
        if self._on_decision:
            self._on_decision(self.clock.now_s, request)
        node, request.decoder = self.prefill[decision.node], self.decode[decision.decode_node]
        if decision.shipment is None:
            node.submit(request)
        else:
            self._bring_prefix(decision.shipment, node, request)

    def _bring_prefix(self, shipment: PrefixShipment, node: PrefillNode, request: SimRequest) -> None:
        """Over the link from the other cluster, or over the fabric, modelled as never busy."""
        is_remote = node.role is Role.PRFAAS
        if (shipment.source in self._site_of) == is_remote:
            self.recorder.fetched_cache_bytes += shipment.bytes
            self.clock.after(shipment.bytes * 8e-9 / FABRIC_GBPS, self._submit, node, request)
        else:
            self.recorder.shipped_cache_bytes += shipment.bytes
            line = self._line_of(request.decision.node if is_remote else shipment.source)
            (line.ingress if is_remote else line.egress).send(shipment.bytes, self._submit, node, request)

    def _submit(self, node: PrefillNode, request: SimRequest) -> None:
        """The cached prefix is there."""
        if not node.alive:
            return self._route_again(request)
        node.submit(request)

    def _prefill_started(self, request: SimRequest, seconds: float) -> None:
        if request.decision.route is Role.PRFAAS:
            held = request.decision.decode_cached_tokens
            crossing = self.setup.fleet.prfaas_profile.crossing_bytes(request.input_tokens, held)
            request.stream_rate = crossing / seconds
            self._line_of(request.decision.node).egress.open_stream(request.stream_rate)

    def _prefill_done(self, request: SimRequest, seconds: float) -> None:
        uncached = request.input_tokens - request.cached_tokens
        self._tell(plane.PrefillEnded(request.id, uncached, seconds))
        self._remember(request.decision.node, request.keys)
        if request.decision.route is Role.PRFAAS:
            line = self._line_of(request.decision.node)
            line.egress.close_stream(request.stream_rate)
            line.egress.send(0, self._admit, request)
        else:
            self._admit(request)

    def _admit(self, request: SimRequest) -> None:
        if not request.decoder.alive:
            return self._route_again(request)
        self._tell(plane.DecodeStarted(request.id))
        self._remember(request.decision.decode_node, request.keys)
        request.decoder.admit(request)

    def _route_again(self, request: SimRequest) -> None:
        self.recorder.routed_again += 1
        self._route(request)

    def _end(self, request: SimRequest, failed: bool = False) -> None:
        self._in_system -= 1
        self._tell(plane.RequestEnded(request.id, 0 if failed else request.output_tokens))
        self.recorder.ended(request, failed)
        if self._on_progress:
            self._on_progress(1)

    # Nodes come, go and change role

    def _start_node(self, name: str, role: Role) -> None:
        profile = self.setup.fleet.profile(role)
        cache = self._caches.setdefault(name, PrefixCache(name, self.setup.cache_blocks))
        if role is Role.PDD:
            self.decode[name] = DecodeNode(self.clock, profile, self._end)
        else:
            started, done = self._prefill_started, self._prefill_done
            self.prefill[name] = PrefillNode(role, self.clock, profile, cache, started, done)
        self._tell(plane.NodeJoined(name, role))

    def _fail(self, name: str, returns_s: float) -> None:
        node = self.prefill.pop(name, None) or self.decode.pop(name, None)
        if node is None:  # it is changing its role, and holds nothing
            return
        role = node.role if isinstance(node, PrefillNode) else Role.PDD
        if role is Role.PRFAAS and node.running:
            self._line_of(name).egress.close_stream(node.running.stream_rate)
        lost = node.fail()
        self._caches[name].clear()
        self._tell(plane.NodeLeft(name))
        self.clock.at(returns_s, self._start_node, name, role)
        for request in lost:
            self._route_again(request)

    def _remember(self, name: str, keys: tuple) -> None:
        """This node holds a prompt's prefix now, and says so."""
        change = self._caches[name].store(keys) if keys else None
        if change is not None:
            self._tell(change)

    def _change_weather(self, site: str, gbps: float) -> None:
        self.lines[site].egress.set_gbps(gbps)
        self.lines[site].ingress.set_gbps(gbps)
        self._tell(plane.LineChanged(gbps > 0, site))

    # The control plane

    def _tell(self, event: plane.Event) -> None:
        for action in self.control.hear(event, self.clock.now_s):
            self._carry_out(action)

    def _carry_out(self, action: plane.Action) -> None:
        match action:
            case plane.AskInventory(node):
                self._tell(self._caches[node].inventory())
            case plane.NewThreshold():
                self.recorder.threshold_moves += 1
            case RoleChange(node, role, reason):  # it has drained: nothing is lost
                self.recorder.role_changes.append((self.clock.now_s, node, role.value, reason))
                drained = self.prefill.pop(node, None) or self.decode.pop(node)
                drained.alive = False
                self.clock.after(ROLE_SWITCH_S, self._start_node, node, role)

    def _tick(self) -> None:
        now_s = self.clock.now_s
        if now_s > MAX_SIMULATED_S:
            raise UserError(f"after {MAX_SIMULATED_S:,.0f} simulated seconds {self._in_system:,} requests have not "
                            "ended; this cluster is too slow for them")
        samples = {site: line.egress.sample() for site, line in self.lines.items()}
        for site, line in self.lines.items():  # one sender stands for all of a direction
            self._tell(plane.LinkMeasured(f"{site}-line", samples[site]))
            self._tell(plane.LinkMeasured(f"{site}-line", line.ingress.sample(), ingress=True))
        for action in self.control.tick(now_s):
            self._carry_out(action)
        running = sum(len(node.running) for node in self.decode.values())
        batch = running / (max(len(self.decode), 1) * self.setup.fleet.pd_profile.bs_max)
        self.recorder.series.append(Tick(
            now_s, sum(one.gbps for one in samples.values()), max(one.utilization for one in samples.values()),
            sum(one.queued_bytes for one in samples.values()), self._busy(Role.PRFAAS), self._busy(Role.PDP),
            batch, self._in_system - running, self.control.threshold, len(self.control.nodes(Role.PDP))))
        if not self._arrivals_over or self._in_system:
            self.clock.after(TICK_S, self._tick)

    def _busy(self, role: Role) -> float:
        """The share of the nodes of this role that compute."""
        nodes = [node for node in self.prefill.values() if node.role is role]
        return sum(node.running is not None for node in nodes) / max(len(nodes), 1)
