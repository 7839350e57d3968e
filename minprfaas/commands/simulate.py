"""`python -m minprfaas simulate`: the live control plane on a simulated cluster, or a trace's hits.

Chapters 12 and 13.
"""

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from math import inf

from tqdm import tqdm

from minprfaas.commands.plan import add_fleet_options, fleet_of, threshold_of
from minprfaas.errors import UserError, require_number
from minprfaas.files import OutputFile
from minprfaas.kvcache.replay import replay_trace
from minprfaas.observe.plots import prepare_plots
from minprfaas.observe.simulation_plots import draw_hit_ratios, draw_simulation
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import MAX_GBPS, MAX_INSTANCES, Fleet, plan
from minprfaas.simulator.arrivals import bursty, day_lengths, diurnal, drawn, from_trace, poisson, read_trace
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.recorder import TTFT_OBJECTIVE_S, Report
from minprfaas.simulator.simulation import MAX_SIMULATED_S, PrfaaSSite, Setup, Simulation
from minprfaas.transport.wan.line import load_weather

REQUESTS = 10_000
LIMITS = (("requests", 1, 10_000_000), ("day-s", 1, 1_000_000), ("cache-blocks", 0, None), ("speed", 1e-6, 10**9))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fleet, its traffic, what goes wrong, the policy, the output."""
    fleet = parser.add_argument_group("fleet (default: the paper's case study)")
    fleet.add_argument("--profile", metavar="FILE", help="profile (JSON) of a PrfaaS instance")
    add_fleet_options(fleet)
    fleet.add_argument("--site", action="append", default=[], metavar="NAME=N:GBPS[:FILE.json]", help="instead of "
                       "--prfaas-instances, --link-gbps and --weather: a PrfaaS datacenter with N instances, its line "
                       "and weather; once for each")
    fleet.add_argument("--n-p", type=int, metavar="N", help="PD nodes that begin with prefill (default: the planner's)")
    fleet.add_argument("--threshold", type=float, metavar="T", help="offload above T uncached tokens "
                       "(default: the planner's)")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--arrivals", choices=("poisson", "mmpp", "diurnal", "trace"), default="poisson",
                         help="when requests come; mmpp comes in bursts (poisson)")
    traffic.add_argument("--trace", metavar="FILE", help="a Mooncake-format trace")
    traffic.add_argument("--speed", type=float, default=1.0, metavar="X", help="play the trace X times as fast (1)")
    traffic.add_argument("--requests", type=int, metavar="N", help=f"how many ({REQUESTS}; of a trace, all)")
    rate = traffic.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="R", help="requests per second")
    rate.add_argument("--load", type=float, default=0.9, metavar="X", help="or a share of the planned rate (0.9)")
    traffic.add_argument("--day-s", type=float, default=7200.0, metavar="S", help="length of a diurnal day (7200)")
    traffic.add_argument("--seed", type=int, default=0, metavar="N", help="of times and lengths (0)")
    trouble = parser.add_argument_group("what goes wrong")
    trouble.add_argument("--weather", metavar="FILE.json", help="schedule of bandwidth and stalls, as for a live link")
    trouble.add_argument("--fail", action="append", default=[], metavar="NODE:FROM:TO", help="seconds from and to "
                         "which a node is gone, such as prfaas0:60:120; once for each")
    policy = parser.add_argument_group("policy")
    policy.add_argument("--fixed-threshold", action="store_true", help="switch the short-term loop off")
    policy.add_argument("--convert-roles", action="store_true", help="switch the long-term loop on")
    policy.add_argument("--least-loaded", action="store_true", help="no threshold: the least-loaded prefill node")
    policy.add_argument("--cache-blocks", type=int, default=0, metavar="N", help="prefix cache of a node, blocks (0)")
    policy.add_argument("--cache-blind", action="store_true", help="the router ignores what the nodes hold")
    parser.add_argument("--cache-only", action="store_true", help="replay --trace against the real prefix index only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--log", metavar="FILE.jsonl", help="write every decision with its reason")
    parser.add_argument("--plots", metavar="DIR", help="draw pictures into DIR (needs matplotlib)")


def run(args: argparse.Namespace) -> None:
    """Simulate, draw if asked, and print. Raises UserError."""
    if (args.arrivals == "trace" or args.cache_only) != bool(args.trace):
        raise UserError("--trace FILE goes with --arrivals trace or with --cache-only, and they with it")
    if args.plots:
        prepare_plots(args.plots)
    for option, least, most in LIMITS:
        value = getattr(args, option.replace("-", "_"))
        if value is not None:
            require_number(f"--{option}", value, least=least, most=most)
    trace = read_trace(args.trace)[:args.requests] if args.trace else []
    if args.cache_only:
        return _cache_only(args, [request.keys for request in trace])
    setup, requests, count = _prepare(args, trace)
    report = _run(args, setup, requests, count)
    drawn = draw_simulation(args.plots, report) if args.plots else []
    if args.json:
        return print(json.dumps(report.to_json(), indent=2))
    _print(setup, report)
    for path in drawn:
        print(f"drawn: {path}")


def _run(args: argparse.Namespace, setup: Setup, requests: Iterator[SimRequest], count: int) -> Report:
    lines: list[str] = []

    def note(at_s: float, request: SimRequest) -> None:
        decision = {"at_s": round(at_s, 3), "prompt_tokens": request.input_tokens, "attempt": request.attempts,
                    **request.decision._asdict()}
        if decision["threshold"] == inf:
            decision["threshold"] = None  # for which JSON has no number
        lines.append(json.dumps(decision) + "\n")

    bar = tqdm(total=count, unit="request", disable=None, leave=False)
    with bar, closing(OutputFile(args.log)) if args.log else nullcontext() as log:
        report = Simulation(setup, requests, note if log else None, bar.update).run()
        if log:
            log.write("".join(lines))
    return report


def _prepare(args: argparse.Namespace, trace: list[SimRequest]) -> tuple[Setup, Iterator[SimRequest], int]:
    """The cluster, its requests and how many they are."""
    sites = _sites(args)
    fleet = _fleet(args, trace, sites)
    lengths = LengthDistribution(request.input_tokens for request in trace) if trace else paper.paper_lengths()
    planned = plan(fleet, lengths, args.n_p, threshold_of(args, lengths))
    setup = Setup(
        fleet, planned.n_p, planned.threshold, selective=not args.least_loaded,
        adaptive=not (args.fixed_threshold or args.least_loaded), convert_roles=args.convert_roles,
        cache_aware=not args.cache_blind, cache_blocks=args.cache_blocks,
        weather=_weather(args.weather, fleet.link_gbps), failures=tuple(map(_failure, args.fail)), sites=sites)
    if trace:
        requests, count = from_trace(trace, args.speed), len(trace)
        rate_rps = count / max(trace[-1].arrived_at_s / args.speed, 1e-9)
    else:
        count = args.requests or REQUESTS
        rate_rps = args.rate if args.rate is not None else args.load * planned.lambda_max
        requests = _made_up(args, count, lengths, max(1, round(fleet.output_tokens)), rate_rps)
    _check_duration(setup, lengths, count, rate_rps)
    return setup, requests, count


def _fleet(args: argparse.Namespace, trace: list[SimRequest], sites: tuple[PrfaaSSite, ...]) -> Fleet:
    """What the options say; of a trace, the mean answer is known."""
    fleet = fleet_of(args)
    if trace and args.output_tokens is None:
        fleet = replace(fleet, output_tokens=sum(request.output_tokens for request in trace) / len(trace))
    if not sites:
        return fleet
    if args.prfaas_instances is not None or args.link_gbps is not None or args.weather:
        raise UserError("--site says instances, line and weather of each PrfaaS datacenter; --prfaas-instances, "
                        "--link-gbps and --weather are for a single one")
    return replace(fleet, prfaas_instances=sum(site.instances for site in sites),
                   link_gbps=sum(site.gbps for site in sites))


def _sites(args: argparse.Namespace) -> tuple[PrfaaSSite, ...]:
    sites = []
    for text in args.site:
        name, _, rest = text.partition("=")
        count, _, rest = rest.partition(":")
        gbps, _, weather = rest.partition(":")
        try:
            sites.append(PrfaaSSite(name, int(count), float(gbps), _weather(weather, float(gbps))))
        except ValueError:
            raise UserError(f"--site is {text!r:.80}; it must be like prfaas-a=2:100 or prfaas-a=2:100:WEATHER.json") \
                from None
        require_number(f"--site {name}: instances", sites[-1].instances, least=1, most=MAX_INSTANCES)
        require_number(f"--site {name}: Gbps", sites[-1].gbps, above=0, most=MAX_GBPS)
        if not name.startswith("prfaas") or [site.name for site in sites].count(name) > 1:
            raise UserError(f"--site is named {name!r:.80}; each has a name of its own that begins with prfaas")
    return tuple(sites)


def _made_up(args: argparse.Namespace, count: int, lengths: LengthDistribution, output_tokens: int,
             rate_rps: float) -> Iterator[SimRequest]:
    rng = random.Random(args.seed)
    if args.arrivals == "diurnal":
        times, scale = diurnal(rate_rps, rng, args.day_s), day_lengths(args.day_s)
    else:
        times, scale = (bursty if args.arrivals == "mmpp" else poisson)(rate_rps, rng), None
    return drawn(times, count, lengths, output_tokens, rng, scale)


def _check_duration(setup: Setup, lengths: LengthDistribution, count: int, rate_rps: float) -> None:
    """Refuse at once what would be simulated for hours, and then be given up."""
    require_number("arrival rate", rate_rps, above=0, most=10**9)
    fleet = setup.fleet
    # Without a threshold any request may be offloaded; with no link none is, whatever the threshold.
    threshold = (setup.threshold if setup.selective else 0.0) if fleet.link_gbps else inf
    served_rps = min(plan(fleet, lengths, setup.n_p, threshold).lambda_max, rate_rps)
    if served_rps == 0 and setup.n_p == 0 and not fleet.link_gbps:
        return  # no request finds a node
    duration_s = count / served_rps if served_rps else inf
    duration_s += fleet.output_tokens * fleet.pd_profile.t_decode_s
    if duration_s > MAX_SIMULATED_S:
        raise UserError(f"{count:,} requests at {served_rps:.3g}/s, of {fleet.output_tokens:,.0f} output tokens each, "
                        f"would take {duration_s:,.3g} simulated seconds; the limit is {MAX_SIMULATED_S:,.0f}")


def _weather(path: str | None, gbps: float) -> tuple[tuple[float, float], ...]:
    """A live link's schedule as (seconds, Gbps): a stall is a bandwidth of 0."""
    if not path:
        return ()
    steps = []
    for change in load_weather(path):
        gbps = gbps if change.gbps is None else change.gbps
        steps += [(change.at_s, 0.0), (change.at_s + change.stall_s, gbps)] if change.stall_s else [(change.at_s, gbps)]
    return tuple(steps)


def _failure(text: str) -> tuple[str, float, float]:
    try:
        node, fails_s, returns_s = text.split(":")
        return node, float(fails_s), float(returns_s)
    except ValueError:
        raise UserError(f"--fail {text!r} is not NODE:FROM:TO, such as prfaas0:60:120") from None


def _print(setup: Setup, report: Report) -> None:
    fleet = setup.fleet
    threshold = f"t = {setup.threshold:,.0f} tokens" if setup.selective and setup.threshold < inf else "no threshold"
    print(f"{fleet.prfaas_instances} PrfaaS, {setup.n_p} PD-P and {fleet.pd_instances - setup.n_p} PD-D instances, "
          f"{fleet.link_gbps:g} Gbps, {threshold}. All figures are simulated.\n")
    rows = [("throughput, req/s", f"{report.throughput_rps:.2f}"),
            (f"goodput (TTFT ≤ {TTFT_OBJECTIVE_S:g} s), req/s", f"{report.goodput_rps:.2f}")]
    rows += [(f"TTFT {at}, s", f"{seconds:.2f}") for at, seconds in report.ttft_s.items()]
    rows += [(f"inter-token {at}, ms", f"{seconds * 1000:.2f}") for at, seconds in report.inter_token_s.items()]
    rows += [(f"utilization of {stage}", f"{share:.0%}") for stage, share in report.utilization.items()]
    rows += [("offloaded", f"{report.offloaded_fraction:.1%}"),
             ("prompt tokens cached", f"{report.cached_fraction:.1%}"),
             ("egress, Gbps", f"{report.egress_gbps:.2f}"), ("most requests waiting", report.peak_waiting),
             ("threshold moves", report.threshold_moves), ("role changes", len(report.role_changes)),
             ("routed again after a failure", report.routed_again), ("without any node to go to", report.failed)]
    for site in setup.sites:
        there = sum(report.prefilled_at.get(node, 0) for node, name in setup.prfaas_names.items() if name == site.name)
        rows.append((f"prefilled at {site.name} ({site.instances} at {site.gbps:g} Gbps)", f"{there:,}"))
    print(table([f"{report.requests:,} requests in {report.duration_s:,.0f} s", "simulated"], rows))
    for at_s, node, role, reason in report.role_changes:
        print(f"  at {at_s:,.0f} s {node} → {role}: {reason}")


def _cache_only(args: argparse.Namespace, requests: list) -> None:
    """Hit ratio against capacity: the real index and eviction, no tensors."""
    rows = replay_trace(requests)
    drawn = draw_hit_ratios(args.plots, {"token state only": rows}) if args.plots else None
    if args.json:
        return print(json.dumps([{**vars(row), "hit_ratio": row.hit_ratio} for row in rows], indent=2))
    print(table(["capacity, blocks", "hits", "of blocks", "hit ratio", "evicted"],
                [(row.capacity_blocks or "unlimited", row.hit_blocks, row.blocks, f"{row.hit_ratio:.1%}",
                  row.evicted_entries) for row in rows]))
    if drawn:
        print(f"drawn: {drawn}")
