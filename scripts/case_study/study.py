"""The paper's table 6: planned, simulated, and run on a live cluster of emulated machines. Chapter 13; paper 4.

Four deployments of the case study's 12 instances, each as 12 real processes and a front end. Tokens, KVCache, links and
decisions are real; the machines' pace and the line between the datacenters are emulated, in a scale that is printed.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from case_study.loops import loops, run_loops
from case_study.options import NAMES, POINTS, default_scale
from case_study.probe import ask, read, sampled, settle, wrong_answers
from case_study.results import Results
from case_study.runs import Emulated, judged
from case_study.side_by_side import Job, expected_s, run_all
from case_study.soak import LOAD, soak
from case_study.sustained import Reading, highest_sustained, reading, stratified
from minprfaas.cluster.processes import Process
from minprfaas.engine.engine import Engine
from minprfaas.errors import UserError
from minprfaas.observe.cores import Cores
from minprfaas.observe.plots import draw_sweeps, prepare_plots
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.planner import Fleet, Plan, first_token_times, plan
from minprfaas.scheduling.profiles import Scale
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.simulation import Setup, Simulation

# A rate that must be sustained, for TTFT, and one that cannot be, at which Lambda is read, of the plan; and how many
# requests of the mean each has. Simulated over 20 seeds, Lambda spreads by 3 to 5% with 128, by 3 to 7% with 96.
QUICK_LOADS, QUICK_SHARES = (0.8, 1.25), (2 / 3, 4 / 3)
SEARCHED_LOADS = (1.0, 1.15, 1.075, 1.11)  # what a search is expected to try
WARM_UP_LOAD, WARM_UP_REQUESTS = 1.0, 16
START_S = 40.0  # of the run: until 13 processes are there, and are gone; on two cores, about
SIMULATED_REQUESTS = 4000
FIRST_TOKENS_S, PATIENCE_S = 4.0, 12.0  # until the last first tokens of a probe: expected and at most, in real units
SETTLE_S = 1.5  # between two probes, about
SAMPLE = 6
NOTES = """
  measured: real tokens, KVCache, links and decisions; the machines' pace and the line are emulated. TTFT, offloaded and
  egress are those of the rate in brackets (waiting included), planned and the paper's those of Lambda (TTFT without
  waiting). The paper's Lambda of homogeneous PD is one of the two rates that the H20's profile was calibrated with."""


@dataclass(frozen=True)
class Deployment:
    """One column of table 6, in real units."""

    name: str
    fleet: Fleet
    plan: Plan

    @property
    def title(self) -> str:
        """What a person reads."""
        return NAMES.get(self.name, self.name)

    @property
    def setup(self) -> Setup:
        """The cluster as planned; neither loop runs. Least-loaded has no threshold."""
        threshold = self.plan.threshold
        return Setup(self.fleet, self.plan.n_p, threshold or 0.0, selective=threshold is not None, adaptive=False)

    def emulated(self, scale: Scale) -> Emulated:
        """The cluster to run."""
        return Emulated(self.title, self.setup, scale)


def deployments() -> dict[str, Deployment]:
    """The four of table 6, then other splits and other thresholds of the first, for figures 5(a) and 5(b)."""
    fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
    points = {name: (fleet, plan(fleet, lengths, n_p, threshold)) for name, (n_p, threshold) in POINTS.items()}
    return {name: Deployment(name, *of) for name, of in {**paper.paper_plans(), **points}.items()}


def run(args: argparse.Namespace) -> int:
    """Plan, simulate, run, compare; 1 if an emulation was not valid or an answer wrong."""
    if args.loops is not None:
        return _loops(args)
    requests, text = args.requests, args.scale or default_scale()
    study = Study(Scale.parse(text), requests, args.seed, args.quick)
    results = Results(args.results, f"scale {text}, {requests} requests, seed {args.seed}, quick {args.quick}")
    if args.soak is not None:
        return _soak(args, study, results)
    if args.plots:
        prepare_plots(args.plots)
    known = deployments()
    names = [*(args.deployment or NAMES), *(POINTS if args.plots else ())]
    chosen = [known[name] for name in known if name in names]
    waiting = [deployment for deployment in chosen if results.last(deployment.name, "verdict") is None]
    jobs = [Job(one.title, partial(run_deployment, study, one, results), study.expected_s(one)) for one in waiting]
    print(f"scale: {study.scale}\n{len(jobs)} of {len(chosen)} deployments to run, {args.jobs} at once, {requests} "
          f"requests a rate: about {expected_s(jobs, args.jobs) / 60:.0f} minutes\n", flush=True)
    run_all(jobs, args.jobs)
    results = results.again()
    _print_table(study, chosen, results)
    if args.plots:
        best = known["prfaas_pd"]
        measured = [(one.plan, capacity_rps(results.readings(one.name))) for one in known.values()
                    if one.fleet == best.fleet and results.readings(one.name)]
        for path in draw_sweeps(args.plots, best.fleet, paper.paper_lengths(), best.plan, measured):
            print(f"  {path}")
    verdicts = [results.last(deployment.name, "verdict") for deployment in chosen]
    return 0 if all(one is not None and one["is_valid"] and not one["wrong"] for one in verdicts) else 1


def _soak(args: argparse.Namespace, study: "Study", results: Results) -> int:
    deployment = deployments()["prfaas_pd"]
    measured = results.readings(deployment.name)
    # What a quick run measures beyond the plan is the luck of its draw; with weather and kills it would be too much.
    rate_rps = LOAD * min([deployment.plan.lambda_max, *([capacity_rps(measured)] if measured else [])])
    requests = study.arrivals(rate_rps, int(args.soak * 60 / study.scale.time * rate_rps))
    of = "measured, at most of what was planned," if measured else "planned"
    print(f"scale: {study.scale}\n{rate_rps:.2f} req/s, {LOAD:.0%} of what was {of}, "
          f"for {args.soak:g} minutes; then {len(requests)} answers are checked", flush=True)
    return 0 if soak(deployment.setup, study.scale, requests, results, args.seed, args.jobs) else 1


def _loops(args: argparse.Namespace) -> int:
    known = loops(args.trace)
    for name in args.loops:
        if name not in [loop.name for loop in known]:
            raise UserError(f"--loops {name!r} is none; there are {', '.join(loop.name for loop in known)}")
    chosen = [loop for loop in known if loop.name in (args.loops or [one.name for one in known])]
    if args.scale is not None:
        chosen = [replace(loop, scale=Scale.parse(args.scale)) for loop in chosen]
    results = Results(args.results, f"loops, trace {args.trace}, scale {args.scale or 'their own'}")
    return 0 if run_loops(chosen, args.seeds, results, args.jobs) else 1


@dataclass(frozen=True)
class Study:
    """How everything is run, simulated and live."""

    scale: Scale
    requests: int
    seed: int
    quick: bool

    def arrivals(self, rate_rps: float, count: int) -> list[SimRequest]:
        """So many, in real units."""
        return stratified(rate_rps, count, paper.paper_lengths(), paper.OUTPUT_TOKENS, self.seed)

    def probe_arrivals(self, rate_rps: float, planned_rps: float) -> list[SimRequest]:
        """Those of a probe, in real units."""
        share = QUICK_SHARES[rate_rps > planned_rps] if self.quick else 1
        return self.arrivals(rate_rps, round(share * self.requests))

    def search(self, probe: Callable[[float], Reading], planned_rps: float) -> list[Reading]:
        """Probe as this study does."""
        if self.quick:
            return [probe(load * planned_rps) for load in QUICK_LOADS]
        return highest_sustained(probe, planned_rps)

    def expected_s(self, deployment: Deployment) -> float:
        """How long a deployment will take, about."""
        loads, planned_rps = QUICK_LOADS if self.quick else SEARCHED_LOADS, deployment.plan.lambda_max
        shares = QUICK_SHARES if self.quick else [1] * len(loads)
        arrivals_s = WARM_UP_REQUESTS / (WARM_UP_LOAD * planned_rps) + sum(
            share * self.requests / (load * planned_rps) for load, share in zip(loads, shares))
        return START_S + (arrivals_s + len(loads) * (FIRST_TOKENS_S + SETTLE_S)) * self.scale.time

    def patience_s(self, rate_rps: float, planned_rps: float) -> float:
        """How long first tokens are awaited after the last arrival, in real units. What a quick study asks beyond the
        plan cannot be sustained: what is served is counted until the last arrival, and how long the rest then takes is
        in no figure."""
        return 0.0 if self.quick and rate_rps > planned_rps else PATIENCE_S


def simulate(study: Study, deployment: Deployment, rate_rps: float) -> Reading:
    """The simulator's reading of a probe. What it says is simulated."""
    requests = study.probe_arrivals(rate_rps, deployment.plan.lambda_max)
    simulation = Simulation(deployment.setup, iter(requests))
    simulation.run()
    return reading(rate_rps, [one.arrived_at_s for one in requests], [one.first_token_at_s for one in requests],
                   [one.decision.route == "prfaas" for one in requests], simulation.bytes_sent,
                   deployment.setup.selective)


def run_deployment(study: Study, deployment: Deployment, results: Results) -> None:
    """Its processes, until all of its rates are measured. UserError when they end without a verdict."""
    cluster = deployment.emulated(study.scale)
    used = cluster.start(lambda made, engine: drive(study, deployment, cluster, results, made, engine))
    print(f"{deployment.title}: {used}\n", flush=True)


def drive(study: Study, deployment: Deployment, cluster: Emulated, results: Results, made: Process,
          engine: Engine) -> int:
    """What the front end's process does: wait for the nodes, warm the ways up, probe, judge. 0 once all is written."""
    name, scale, asked, vocab_size = deployment.name, study.scale, [], engine.model.config.vocab_size
    planned_rps = deployment.plan.lambda_max
    cluster.wait_for_nodes(made)
    warm_up = cluster.requests(study.arrivals(WARM_UP_LOAD * planned_rps, WARM_UP_REQUESTS))
    ask(made, "warm-up", warm_up, vocab_size, PATIENCE_S * scale.time)
    cores = Cores()

    def probe(rate_rps: float) -> Reading:
        known = results.reading(name, rate_rps)
        if known is not None:
            return known
        settle(made, PATIENCE_S * scale.time)
        requests = cluster.requests(study.probe_arrivals(rate_rps, planned_rps))
        patience_s = study.patience_s(rate_rps, planned_rps) * scale.time
        began_at_s, journeys = ask(made, f"{name}-{rate_rps:.4g}", requests, vocab_size, patience_s)
        asked.extend(journeys)
        seen = read(rate_rps / scale.time, began_at_s, requests, journeys, deployment.setup.selective)
        measured = in_real_units(scale, seen, rate_rps)
        results.add(name, "reading", measured)
        print(f"{deployment.title}: {describe(measured)}", flush=True)
        return measured

    study.search(probe, planned_rps)
    words, is_valid = judged(made, cores)
    checked = sampled(asked, SAMPLE, study.seed)
    wrong = len(wrong_answers(checked, engine.model, engine.tokenizer))
    right = len(checked) - wrong
    words = f"{words}; {right} of {len(checked)} sampled answers identical to the single-process reference"
    results.add(name, "verdict", {"words": words, "is_valid": is_valid, "wrong": wrong, "checked": len(checked)})
    print(f"{deployment.title}: {words}", flush=True)
    return 0


def in_real_units(scale: Scale, run: Reading, rate_rps: float) -> Reading:
    """The factors undone; `rate_rps` is the rate as it was asked for, without rounding."""
    return replace(run, rate_rps=rate_rps, served_rps=scale.rate_rps(run.served_rps),
                   ttft_mean_s=scale.seconds(run.ttft_mean_s), ttft_p90_s=scale.seconds(run.ttft_p90_s),
                   egress_gbps=scale.gbps(run.egress_gbps))


def describe(one: Reading) -> str:
    """A reading in a line."""
    words = (f"{one.rate_rps:.2f} req/s {'sustained' if one.is_sustained else 'NOT sustained'} (backlog grows by "
             f"{one.growth:+.2f} a request), {one.served_rps:.2f} served")
    return words + (f", TTFT {one.ttft_mean_s:.2f} s, P90 {one.ttft_p90_s:.2f}" if one.is_sustained else "")


def capacity_rps(readings: Sequence[Reading]) -> float:
    """The measured Lambda: what was served at the highest rate that was not sustained; or, if that is more, the part of
    a sustained one by which the backlog did not grow."""
    grew = [one for one in readings if not one.is_sustained]
    kept_rps = [one.rate_rps * (1 - max(one.growth, 0.0)) for one in readings if one.is_sustained]
    return max([*kept_rps, max(grew, key=lambda one: one.rate_rps).served_rps if grew else 0.0])


def _print_table(study: Study, chosen: Sequence[Deployment], results: Results) -> None:
    rows, measured_rps = [], {}
    for deployment in chosen:
        live = results.readings(deployment.name)
        if not live:
            continue
        large = replace(study, requests=SIMULATED_REQUESTS)
        simulated = study.search(lambda rate: simulate(large, deployment, rate), deployment.plan.lambda_max)
        calm = max((one for one in live if one.is_sustained), key=lambda one: one.rate_rps, default=live[0])
        beside = simulate(study, deployment, calm.rate_rps)
        measured_rps[deployment.name] = capacity_rps(live)
        rows += _rows(deployment, capacity_rps(simulated), beside, calm, measured_rps[deployment.name])
    print(table(["deployment", "figure", "planned", "simulated", "measured", "paper"], rows))
    print(NOTES)
    for deployment in chosen:
        said = results.last(deployment.name, "verdict")
        planned = deployment.plan.lambda_max
        if said is not None and deployment.name in measured_rps:
            again = [simulate(study, deployment, one.rate_rps) for one in results.readings(deployment.name)]
            off, same = measured_rps[deployment.name] / planned - 1, capacity_rps(again) / planned - 1
            print(f"  {deployment.title}: measured Lambda is {off:+.1%} from the plan (simulated over the same "
                  f"requests {same:+.1%}); {said['words']}")
    if {"prfaas_pd", "homogeneous"} <= {*measured_rps}:
        ratio = measured_rps["prfaas_pd"] / measured_rps["homogeneous"]
        print(f"  PrfaaS-PD over homogeneous PD: measured {ratio:.2f}, paper {paper.TABLE_6['prfaas_pd']['ratio']:.2f}")


def _rows(deployment: Deployment, simulated_rps: float, beside: Reading, calm: Reading,
          measured_rps: float) -> list[tuple]:
    said, plan = paper.TABLE_6.get(deployment.name, {}), deployment.plan
    mean_s, p90_s = first_token_times(deployment.fleet, paper.paper_lengths(), plan)
    at = f" [{calm.rate_rps:.2f}/s]"
    figures = (("Lambda, req/s", plan.lambda_max, simulated_rps, measured_rps, "lambda_max", ".2f"),
               (f"TTFT mean, s{at}", mean_s, beside.ttft_mean_s, calm.ttft_mean_s, "ttft_mean_s", ".2f"),
               (f"TTFT P90, s{at}", p90_s, beside.ttft_p90_s, calm.ttft_p90_s, "ttft_p90_s", ".2f"),
               (f"offloaded{at}", plan.offloaded_fraction, beside.offloaded_fraction, calm.offloaded_fraction,
                "offloaded_fraction", ".1%"),
               (f"egress, Gbps{at}", plan.egress_gbps, beside.egress_gbps, calm.egress_gbps, "egress_gbps", ".2f"))
    return [(deployment.title if number == 0 else "", what, *(format(value, form) for value in values),
             format(said[key], form) if key in said else "–")
            for number, (what, *values, key, form) in enumerate(figures)]
