"""Tables of with and without: each policy's worth in the simulator, over several seeds, as mean ± standard deviation.

`python scripts/bench.py policies [--seeds N] [--trace FILE] [TABLE …]`, TABLE one of stability, baselines, bandwidth,
lengths, cache. A few minutes on one core. Chapter 12; paper 3.4.3, table 6.
"""

import argparse
import os
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benches import at_least_one
from minprfaas.errors import ArgumentParser
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import Fleet, Plan, plan
from minprfaas.simulator.arrivals import (day_lengths, diurnal, drawn, from_trace, poisson, read_trace,
                                          write_conversations)
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.recorder import Report
from minprfaas.simulator.simulation import Setup, Simulation

LENGTHS = paper.paper_lengths()
COLUMNS = {"goodput, req/s": (lambda r: r.goodput_rps, ".2f"), "TTFT mean, s": (lambda r: r.ttft_s["mean"], ".1f"),
           "P90, s": (lambda r: r.ttft_s["p90"], ".1f"), "P99, s": (lambda r: r.ttft_s["p99"], ".1f"),
           "most waiting": (lambda r: r.peak_waiting, ".0f")}


def main(arguments: list[str]) -> int:
    """Print the tables asked for, all of them by default."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=at_least_one, default=5)
    parser.add_argument("--trace", help="Mooncake-format trace (default: MINPRFAAS_TRACE, else a made-up one)")
    args = parser.parse_args(arguments)
    for name in args.tables:
        if name not in TABLES:
            parser.error(f"table {name!r} is not one of {', '.join(TABLES)}")
    print("All figures are simulated, with the paper's case study as the fleet; goodput counts TTFT up to 10 s.")
    for name in args.tables or TABLES:
        TABLES[name](args)
    return 0


def poisson_run(setup: Setup, rate: float, count: int, seed: int) -> Report:
    """`count` requests of the paper's lengths, `rate` a second."""
    rng = random.Random(seed)
    return Simulation(setup, drawn(poisson(rate, rng), count, LENGTHS, paper.OUTPUT_TOKENS, rng)).run()


def print_runs(title: str, runs: dict[str, list[Report]]) -> None:
    """One row a policy, one column a measure: mean ± standard deviation over the seeds."""
    rows = [[name, *(_spread([of(report) for report in reports], shown) for of, shown in COLUMNS.values())]
            for name, reports in runs.items()]
    print(f"\n{title}\n\n" + table(["", *COLUMNS], rows))


def _spread(values: list[float], shown: str) -> str:
    return f"{statistics.mean(values):{shown}}" + (f" ± {statistics.stdev(values):{shown}}" if len(values) > 1 else "")


def stability(args: argparse.Namespace) -> None:
    """The throughput model and the simulator check each other."""
    rows = []
    for name, (fleet, planned) in tqdm(paper.paper_plans().items(), disable=None, leave=False):
        for load in (0.95, 1.05):
            waiting = []
            for seed in range(args.seeds):
                report = poisson_run(planned_setup(fleet, planned), load * planned.lambda_max, 10_000, seed)
                waiting.append(waiting_by_quarter(report, 10_000 / (load * planned.lambda_max)))
            quarters = [_spread(list(quarter), ".0f") for quarter in zip(*waiting)]
            rows.append([name, f"{planned.lambda_max:.2f}", f"{load:.0%}", *quarters])
    print("\nRequests without a first token, mean of each quarter of 10,000 arrivals, around the planned rate\n")
    print(table(["deployment", "Λ_max", "load", "1st quarter", "2nd", "3rd", "4th"], rows))


def planned_setup(fleet: Fleet, planned: Plan, **changes) -> Setup:
    """A deployment of table 6 as planned, with neither loop running."""
    changes = {"adaptive": False, "selective": planned.threshold is not None, **changes}
    return Setup(fleet, planned.n_p, planned.threshold or 0.0, **changes)


def waiting_by_quarter(report: Report, arrivals_s: float) -> list[float]:
    """Mean number of requests without a first token in each quarter of the time in which requests arrive."""
    quarters = [[], [], [], []]
    for row in report.series:
        if row.at_s < arrivals_s:
            quarters[int(4 * row.at_s / arrivals_s)].append(row.waiting)
    return [statistics.mean(quarter) for quarter in quarters]


def baselines(args: argparse.Namespace) -> None:
    """Selective offloading told apart from merely having two kinds of hardware, at one and the same load."""
    deployments = paper.paper_plans()
    for rate in (2.0, 2.9, 3.1):
        runs = {name: [poisson_run(planned_setup(fleet, planned), rate, 10_000, seed) for seed in range(args.seeds)]
                for name, (fleet, planned) in tqdm(deployments.items(), disable=None, leave=False)}
        print_runs(f"Four deployments at {rate} requests/s (least_loaded: both kinds of hardware, no threshold)", runs)


def bandwidth(args: argparse.Namespace) -> None:
    """The short-term loop, when a tenth of the bandwidth is left for five minutes."""
    fleet, drop = replace(paper.paper_fleet(), link_gbps=40.0), ((300.0, 4.0), (600.0, 40.0))
    planned = plan(fleet, LENGTHS)
    shrunken = plan(replace(fleet, link_gbps=4.0), LENGTHS, n_p=planned.n_p)
    for load, note in ((0.45, "within what the shrunken link can carry"), (0.65, "beyond any threshold")):
        rate, runs = load * planned.lambda_max, {}
        for name, adaptive in (("fixed threshold", False), ("adaptive threshold", True)):
            setup = planned_setup(fleet, planned, adaptive=adaptive, weather=drop)
            runs[name] = [poisson_run(setup, rate, int(1200 * rate), seed)
                          for seed in tqdm(range(args.seeds), disable=None, leave=False)]
        print_runs(f"40 Gbps, and 4 from 300 s to 600 s of 1,200 s, at {rate:.2f} requests/s: {note}\n"
                   f"(planned rate {planned.lambda_max:.2f} at 40 Gbps, {shrunken.lambda_max:.2f} at 4 Gbps)", runs)


def lengths(args: argparse.Namespace) -> None:
    """The long-term loop, over two days in which prompts are short at noon and long at night."""
    fleet, day_s, rate = paper.paper_fleet(), 14_400.0, 2.7
    planned = plan(fleet, LENGTHS)
    policies = {"fixed threshold, fixed split": {}, "adaptive threshold, fixed split": {"adaptive": True},
                "adaptive threshold, role conversion": {"adaptive": True, "convert_roles": True}}
    runs = {name: [] for name in policies}
    for name, policy in policies.items():
        for seed in tqdm(range(args.seeds), disable=None, leave=False):
            rng = random.Random(seed)
            times, count = diurnal(rate, rng, day_s), int(2 * rate * day_s)
            requests = drawn(times, count, LENGTHS, paper.OUTPUT_TOKENS, rng, day_lengths(day_s))
            runs[name].append(Simulation(planned_setup(fleet, planned, **policy), requests).run())
    changes = _spread([len(report.role_changes) for report in runs[name]], ".1f")
    print_runs(f"Two days of {day_s / 3600:g} h, {rate} requests/s ± 50%, prompts stretched by 0.55 at noon and 1.8 at "
               f"night ({changes} role changes)", runs)


def cache(args: argparse.Namespace) -> None:
    """Cache-aware routing, on a real conversation trace if there is one."""
    with tempfile.TemporaryDirectory() as scratch:
        path = args.trace or os.environ.get("MINPRFAAS_TRACE")
        if not path:
            path = Path(scratch) / "made_up.jsonl"
            write_conversations(path, 8000, rate_rps=3.4, seed=0)
        trace = read_trace(path)
    answers = sum(request.output_tokens for request in trace) / len(trace)
    fleet = replace(paper.paper_fleet(), output_tokens=answers)
    planned = plan(fleet, LengthDistribution(request.input_tokens for request in trace), n_p=4)  # so that prefill binds
    rate = len(trace) / max(trace[-1].arrived_at_s, 1e-9)  # a trace may be of one moment
    speed, runs = 1.05 * planned.lambda_max / rate, {}
    for name, aware in (("cache-blind routing", False), ("cache-aware routing", True)):
        runs[name] = [Simulation(planned_setup(fleet, planned, adaptive=True, cache_aware=aware, cache_blocks=2000),
                                 from_trace(_jittered(trace, seed), speed)).run()
                      for seed in tqdm(range(args.seeds), disable=None, leave=False)]
    print_runs(f"{Path(path).name}: {len(trace):,} requests at {speed:.2f} times their recorded speed, 105% of what is "
               f"planned without a cache\n(a seed shifts each arrival by up to 5 s), 2,000 blocks of 512 tokens a node",
               runs)
    for name, reports in runs.items():
        cached = [100 * report.cached_fraction for report in reports]
        egress = [report.egress_gbps for report in reports]
        print(f"  {name}: {_spread(cached, '.1f')}% of prompt tokens cached, {_spread(egress, '.1f')} Gbps of egress")


def _jittered(trace: list[SimRequest], seed: int) -> list[SimRequest]:
    rng = random.Random(seed)
    shifted = [replace(request, arrived_at_s=request.arrived_at_s + rng.uniform(0, 5)) for request in trace]
    return sorted(shifted, key=lambda request: request.arrived_at_s)


TABLES = {"stability": stability, "baselines": baselines, "bandwidth": bandwidth, "lengths": lengths, "cache": cache}
