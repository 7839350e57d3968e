"""The simulated cluster: the live cluster's router, monitor, directory and loops, over simulated nodes. Chapter 12.

A request's way: arrival, route, (cached prefix shipped across), prefill queue, prefill with its KVCache streaming over
the link, decode. A failed node's requests are routed again; prefix reuse is looked up again when a prefill begins.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minprfaas.errors import RequestError, UserError
from minprfaas.scheduling.directory import Directory, PrefixMatch
from minprfaas.scheduling.monitor import CongestionMonitor
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.roles import RoleChange, RoleLoop
from minprfaas.scheduling.router import ClusterView, Decision, LinkView, NodeView, Router, RouteRequest, TransferCosts
from minprfaas.scheduling.threshold import Observation, ThresholdLoop
from minprfaas.simulator.events import Clock
from minprfaas.simulator.link import FluidLink
from minprfaas.simulator.nodes import DecodeNode, PrefillNode, PrefixCache, SimRequest
from minprfaas.simulator.report import Recorder, Report, Tick

TICK_S = 1.0  # how often links are sampled and the loops are asked
RTT_S = 0.02  # modelled, between the clusters
ROLE_SWITCH_S = 10.0  # modelled: a drained node restarts in its other role
NO_MATCH = PrefixMatch()


@dataclass(frozen=True)
class Setup:
    """One simulation. `weather`: (seconds, link Gbps from then on); `failures`: (node, fails at, returns at), seconds.

    Nodes are named prfaas0…, and pd0…, of which the first `n_p` begin as PD-P. `selective` False is least-loaded
    routing without a threshold; `adaptive` and `convert_roles` switch the short-term and the long-term loop;
    `cache_blocks` are per node. Where `cache_aware` is False, nodes reuse what they hold, but the router ignores it.
    """

    fleet: Fleet
    n_p: int
    threshold: float
    selective: bool = True
    adaptive: bool = True
    convert_roles: bool = False
    cache_aware: bool = True
    cache_blocks: int = 0
    weather: tuple[tuple[float, float], ...] = ()
    failures: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self):
        n_prfaas, n_d = int(self.fleet.prfaas_instances), self.fleet.pd_instances - self.n_p
        if self.n_p < 0 or n_d < 1 or self.n_p + n_prfaas < 1:
            raise UserError(f"{n_prfaas} PrfaaS, {self.n_p} PD-P and {n_d} PD-D nodes cannot serve; prefill and decode "
                            f"need one each")
        names = {*(f"prfaas{i}" for i in range(n_prfaas)), *(f"pd{i}" for i in range(self.fleet.pd_instances))}
        for node, fails_s, returns_s in self.failures:
            if node not in names or not 0 <= fails_s < returns_s:
                raise UserError(f"failure of {node!r} from {fails_s:g} s to {returns_s:g} s is not possible; nodes are "
                                f"prfaas0… and pd0…, and a node fails before it returns")
        if any(time_s < 0 or gbps < 0 for time_s, gbps in self.weather):
            raise UserError(f"weather {self.weather} has a negative time or bandwidth")
        if self.weather and max(self.weather)[1] == 0:
            raise UserError("weather ends with a link at 0 Gbps; what is on its way would never arrive")


class Simulation:
    """Runs `requests` (in order of arrival) through the cluster of `setup`. `on_decision(time_s, request)` sees each
    request as it is routed; `on_progress(count)` hears of each that ends."""

    def __init__(self, setup: Setup, requests: Iterator[SimRequest], on_decision: Callable | None = None,
                 on_progress: Callable | None = None):
        fleet = setup.fleet
        self.setup, self._requests, self._on_decision, self._on_progress = setup, requests, on_decision, on_progress
        self.clock, self.directory, self.recorder = Clock(), Directory(), Recorder()
        self.egress = FluidLink(self.clock, fleet.link_gbps, RTT_S)
        self.ingress = FluidLink(self.clock, fleet.link_gbps, RTT_S)
        self.monitor = CongestionMonitor(fleet.link_gbps)
        self.router = Router(setup.threshold, _transfer_costs(fleet), setup.selective)
        self.threshold_loop = ThresholdLoop(fleet, setup.threshold)
        self.role_loop = RoleLoop(fleet)
        links = [LinkView(fleet.link_gbps, up=fleet.link_gbps > 0) for _ in range(2)]
        self.view = ClusterView(0.0, [], [], [], *links, "abundant")
        self.prefill: dict[str, PrefillNode] = {}
        self.decode: dict[str, DecodeNode] = {}
        self._caches: dict[str, PrefixCache] = {}
        self._draining: RoleChange | None = None
        self._in_system, self._arrivals_over = 0, False
        self._prefill_busy = self._decode_busy = 0.0  # smoothed utilizations
        self._output_tokens = float(fleet.output_tokens)  # smoothed
        for i in range(int(fleet.prfaas_instances)):
            self._add_node(f"prfaas{i}", "prfaas")
        for i in range(fleet.pd_instances):
            self._add_node(f"pd{i}", "pdp" if i < setup.n_p else "pdd")

    def run(self) -> Report:
        """Until every request has ended."""
        for time_s, gbps in self.setup.weather:
            self.clock.at(time_s, self._change_weather, gbps)
        for node, fails_s, returns_s in self.setup.failures:
            self.clock.at(fails_s, self._fail, node, returns_s)
        self.clock.after(TICK_S, self._tick)
        self._expect_next()
        self.clock.run()
        return self.recorder.report(self.egress.bytes_sent, len(self.threshold_loop.moves))

    # A request's way

    def _expect_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._arrivals_over = True
        else:
            self.clock.at(request.arrival_s, self._arrive, request)

    def _arrive(self, request: SimRequest) -> None:
        self._in_system += 1
        self.recorder.arrived += 1
        self._output_tokens += 0.01 * (request.output_tokens - self._output_tokens)
        self._expect_next()
        self._route(request)

    def _route(self, request: SimRequest) -> None:
        match = self.directory.match(request.keys) if request.keys and self.setup.cache_aware else NO_MATCH
        self.view.time_s = self.clock.now_s
        try:
            decision = self.router.route(RouteRequest(request.input_tokens, match.nodes), self.view)
        except RequestError:
            return self._end(request, failed=True)
        request.decision = decision
        request.attempts += 1
        self.threshold_loop.record(decision.incremental_tokens)
        if self._on_decision:
            self._on_decision(self.clock.now_s, request)
        node, request.decoder = self.prefill[decision.node], self.decode[decision.decode_node]
        request.work_tokens = request.input_tokens - decision.cached_tokens + node.overhead_tokens
        node.view.load += request.work_tokens
        request.decoder.view.load += 1
        if decision.transfer is None:
            return node.submit(request)
        self.recorder.shipped_cache_bytes += decision.transfer.bytes
        link = self.ingress if decision.route == "prfaas" else self.egress
        link.send(decision.transfer.bytes, self._submit, node, request)

    def _submit(self, node: PrefillNode, request: SimRequest) -> None:
        """The cached prefix has crossed."""
        if node.alive:
            node.submit(request)
        else:
            self._route_again(request)

    def _prefill_started(self, request: SimRequest, seconds: float) -> None:
        if request.decision.route == "prfaas":
            kv_bytes = self.setup.fleet.prfaas_profile.kv_bytes  # only the increment, and the state of fixed size
            crossing = kv_bytes(request.input_tokens) - kv_bytes(request.decision.decode_cached_tokens) + kv_bytes(0)
            request.stream_rate = crossing / seconds
            self.egress.open_stream(request.stream_rate)

    def _prefill_done(self, request: SimRequest) -> None:
        if request.decision.route == "prfaas":
            self.egress.close_stream(request.stream_rate)
            self.egress.send(0, self._admit, request)
        else:
            self._admit(request)

    def _admit(self, request: SimRequest) -> None:
        if request.decoder.alive:
            request.decoder.admit(request)
        else:
            self._route_again(request)

    def _route_again(self, request: SimRequest) -> None:
        """After a failure."""
        if request.decoder.alive:
            request.decoder.view.load -= 1
        self.recorder.routed_again += 1
        self._route(request)

    def _end(self, request: SimRequest, failed: bool = False) -> None:
        self._in_system -= 1
        self.recorder.ended(request, failed)
        if self._on_progress:
            self._on_progress(1)

    # Nodes come, go and change role

    def _add_node(self, name: str, role: str) -> None:
        fleet, view = self.setup.fleet, NodeView(name)
        self.directory.add_node(name, "prfaas" if role == "prfaas" else "pd")
        cache = self._caches.setdefault(name, PrefixCache(name, self.setup.cache_blocks, self.directory))
        self.directory.resync(name, *cache.entries())
        getattr(self.view, role).append(view)
        if role == "pdd":
            self.decode[name] = DecodeNode(view, self.clock, fleet.pd_profile, cache, self._end)
        else:
            profile = fleet.prfaas_profile if role == "prfaas" else fleet.pd_profile
            events = self._prefill_started, self._prefill_done
            self.prefill[name] = PrefillNode(view, self.clock, profile, cache, *events)

    def _hide(self, name: str) -> None:
        """No new work for this node."""
        for nodes in (self.view.prfaas, self.view.pdp, self.view.pdd):
            nodes[:] = [node for node in nodes if node.name != name]

    def _fail(self, name: str, returns_s: float) -> None:
        node = self.prefill.pop(name, None) or self.decode.pop(name, None)
        if node is None:  # it is changing its role, and holds nothing
            return
        role = "pdd" if isinstance(node, DecodeNode) else "prfaas" if name.startswith("prfaas") else "pdp"
        self._hide(name)
        self.directory.drop_node(name)
        if role == "prfaas" and node.running:
            self.egress.close_stream(node.running.stream_rate)
        lost = node.fail()
        self.clock.at(returns_s, self._add_node, name, role)
        if self._draining and self._draining.node == name:
            self._draining = None
            self.role_loop.converted(self.clock.now_s)
        for request in lost:
            self._route_again(request)

    def _begin_conversion(self, change: RoleChange) -> None:
        self._draining = change
        self._hide(change.node)
        self.recorder.role_changes.append((self.clock.now_s, change.node, change.role, change.reason))

    def _watch_draining(self) -> None:
        change = self._draining
        nodes = self.decode if change.role == "pdp" else self.prefill
        if nodes[change.node].view.load > 0:
            return
        nodes.pop(change.node).alive = False
        self._draining = None
        self.clock.after(ROLE_SWITCH_S, self._convert, change)

    def _convert(self, change: RoleChange) -> None:
        self._add_node(change.node, change.role)
        self.role_loop.converted(self.clock.now_s)

    def _change_weather(self, gbps: float) -> None:
        self.egress.set_gbps(gbps)
        self.ingress.set_gbps(gbps)

    # The loops

    def _tick(self) -> None:
        now_s, view = self.clock.now_s, self.view
        sample = self.egress.sample()
        self.monitor.observe(sample)
        view.regime = self.monitor.regime(now_s)
        up = self.egress.gbps > 0
        view.egress = LinkView(self.monitor.capacity_gbps, self.monitor.utilization, sample.queued_bytes, up)
        view.ingress = LinkView(self.ingress.gbps, self.ingress.sample().utilization, self.ingress.queued_bytes, up)
        (remote, remote_wait_s), (local, local_wait_s) = self._prefill_stage(view.prfaas), self._prefill_stage(view.pdp)
        running = sum(len(node.running) for node in self.decode.values())
        batch = running / (max(len(view.pdd), 1) * self.setup.fleet.pd_profile.bs_max)
        self._prefill_busy += 0.05 * (max(remote, local) - self._prefill_busy)
        self._decode_busy += 0.05 * (batch - self._decode_busy)
        seen = Observation(now_s, len(view.prfaas), len(view.pdp), len(view.pdd), self.monitor.capacity_gbps,
                           sample.queued_bytes, view.regime == "scarce", remote_wait_s, local_wait_s,
                           self._prefill_busy, self._decode_busy)
        if self.setup.adaptive and view.prfaas:
            self.router.threshold = self.threshold_loop.update(seen)
        if self._draining:
            self._watch_draining()
        elif self.setup.convert_roles:
            change = self.role_loop.update(seen, self.threshold_loop.lengths, self._output_tokens, view.pdp, view.pdd)
            if change:
                self._begin_conversion(change)
        self.recorder.series.append(Tick(
            now_s, sample.gbps, sample.utilization, sample.queued_bytes, remote, local, batch,
            self._in_system - running, self.router.threshold, len(view.pdp)))
        if not self._arrivals_over or self._in_system:
            self.clock.after(TICK_S, self._tick)

    def _prefill_stage(self, views: list[NodeView]) -> tuple[float, float]:
        """(share of these nodes that compute, seconds of prefill that wait for them)."""
        nodes = [self.prefill[view.name] for view in views]
        busy = sum(node.running is not None for node in nodes) / max(len(nodes), 1)
        return busy, sum(node.waiting_s for node in nodes)


def _transfer_costs(fleet: Fleet) -> TransferCosts:
    """From the profiles, between 8K and 32K tokens."""
    remote, local, span = fleet.prfaas_profile, fleet.pd_profile, 24 * 1024

    def slope(curve: Callable[[float], float]) -> float:
        return (curve(32 * 1024) - curve(8 * 1024)) / span

    return TransferCosts(slope(remote.kv_bytes), remote.kv_bytes(0), slope(remote.prefill_s), slope(local.prefill_s))
