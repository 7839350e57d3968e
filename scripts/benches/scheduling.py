"""How fast the scheduler and its simulator are: a routing decision, a million requests, a 10,000-GPU fleet for an hour.

`python scripts/bench.py scheduling [--quick]`; several minutes of one core, with --quick a tenth of the requests. Times
are of the processor (`time.process_time`), so other work on the machine does not count. Chapters 11 and 12.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tqdm import tqdm

from minprfaas.config import LinkSample, Role
from minprfaas.errors import ArgumentParser
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import ControlPlane, ControlSettings, LinkMeasured, NodeJoined
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.router import RouteRequest, ShippingCosts
from minprfaas.simulator.arrivals import bursty, drawn, poisson
from minprfaas.simulator.recorder import Report
from minprfaas.simulator.simulation import Setup, Simulation

DECISION_GOAL_US = 50
MILLION_GOAL_S = 120


def main(argv: list[str]) -> int:
    """Print both tables; exits 1 when a goal is missed."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    share = 0.1 if parser.parse_args(argv).quick else 1.0
    decision_us = _print_decisions()
    rows, million_s = [], 0.0
    for title, scale, count, arrivals, load in (
            ("12 instances, Poisson", 1, int(1_000_000 * share), poisson, 0.9),
            ("60 instances, Poisson", 5, int(1_000_000 * share), poisson, 0.9),
            ("1,248 instances (10,000 GPUs), bursty, one hour", 104, None, bursty, 0.6)):
        seconds, simulated_s, requests, report = _simulate(scale, count, arrivals, load, share)
        million_s = max(million_s, seconds / requests * 1e6) if count else million_s
        rows.append([title, requests, f"{simulated_s:,.0f}", f"{seconds:.1f}", f"{seconds / requests * 1e6:.0f}",
                     f"{simulated_s / seconds:,.0f}", f"{report.ttft_s['p90']:.2f}"])
    print("\nSimulation, adaptive threshold, at 90% of the planned rate (bursty: 60%, in bursts 120%)\n\n" + table(
        ["fleet", "requests", "simulated s", "processor s", "µs a request", "times real time", "TTFT P90, s"], rows))
    print(f"\nA decision among 64 nodes takes {decision_us:.1f} µs (goal {DECISION_GOAL_US}); a million requests take "
          f"{million_s:.0f} s (goal {MILLION_GOAL_S}).")
    return 0 if decision_us < DECISION_GOAL_US and million_s < MILLION_GOAL_S else 1


def _print_decisions() -> float:
    """Microseconds of a decision with 64 nodes, matching and booking included, in the worse of both regimes."""
    rows, slowest = [], 0.0
    for nodes in (12, 64, 1248):
        rng, prompts = random.Random(0), []
        for number in range(2000):
            chat = rng.randrange(500)
            keys = [(chat, i) for i in range(rng.randrange(1, 60))]
            prompts.append(RouteRequest(number, rng.randrange(200, 100_000), keys))
        taken = {}
        for regime, utilization in (("scarce", 0.95), ("abundant", 0.4)):
            control = _control_plane(nodes, utilization)
            started = time.process_time()
            for prompt in prompts:
                control.route(prompt, 10.0)
            taken[regime] = (time.process_time() - started) / len(prompts) * 1e6
            assert control.regime(10.0) == regime
        started = time.process_time()
        for prompt in prompts:
            control.directory.match(prompt.keys)
        match_us = (time.process_time() - started) / len(prompts) * 1e6
        if nodes == 64:
            slowest = max(taken.values())
        rows.append([nodes, f"{taken['scarce']:.1f}", f"{taken['abundant']:.1f}", f"{match_us:.1f}"])
    print(table(["nodes", "decision, scarce, µs", "decision, abundant, µs", "of it, directory match, µs"], rows))
    return slowest


def _control_plane(nodes: int, utilization: float) -> ControlPlane:
    """A third of the nodes in the PrfaaS cluster, and a directory with 500 conversations on two nodes each."""
    rng, third = random.Random(1), nodes // 3
    costs = ShippingCosts(17_000, 2e8, 5e-5, 1.6e-4)
    control = ControlPlane(ControlSettings(19_400, 100.0, costs=costs, ship_prefixes=True))
    held = {}
    for role in Role:
        for i in range(third):
            control.hear(NodeJoined(f"{role.value}{i}", role), 0.0)
            held[f"{role.value}{i}"] = []
    for role in (Role.PRFAAS, Role.PDP):
        for chat in range(500):
            name = f"{role.value}{rng.randrange(third)}"
            held[name] += [((chat, i), 512 * (i + 1)) for i in range(rng.randrange(1, 60))]
    for name, entries in held.items():
        control.hear(CacheChanged(name, len(entries), entries, inventory=True), 0.0)
    control.hear(LinkMeasured("line", LinkSample(10.0, 100 * utilization, utilization, 0.0)), 10.0)
    return control


def _simulate(scale: int, count: int | None, arrivals: Callable[[float, random.Random], Iterator[float]], load: float,
              share: float) -> tuple[float, float, int, Report]:
    fleet, lengths, rng = paper.paper_fleet(4 * scale, 8 * scale), paper.paper_lengths(), random.Random(1)
    fleet = replace(fleet, link_gbps=paper.LINK_GBPS * scale)
    planned = plan(paper.paper_fleet(), lengths)
    rate = load * planned.lambda_max * scale
    count = count or int(rate * 3600 * share)
    setup = Setup(fleet, planned.n_p * scale, planned.threshold)
    with tqdm(total=count, unit="request", disable=None, leave=False) as bar:
        requests = _counted(drawn(arrivals(rate, rng), count, lengths, paper.OUTPUT_TOKENS, rng), bar)
        started = time.process_time()
        report = Simulation(setup, requests).run()
    return time.process_time() - started, report.duration_s, count, report


def _counted(requests: Iterator, bar: tqdm) -> Iterator:
    for number, request in enumerate(requests, 1):
        if number % 1000 == 0:
            bar.update(1000)
        yield request
