"""Each scheduling loop with and without, simulated and live, over the same requests. Chapters 12, 13; paper 3.4.3.

Half of the case study's fleet, as 7 processes. The loops' constants are in seconds of the emulated machines, so that a
run of half a minute holds five of theirs; what a loop is worth there is not what it is worth in a day.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from case_study.probe import ask, sampled, wrong_answers
from case_study.results import Results
from case_study.runs import Emulated, judged
from case_study.side_by_side import Job, expected_s, run_all
from case_study.sustained import stratified
from minprfaas.cluster.processes import Process
from minprfaas.engine.engine import Engine
from minprfaas.observe.cores import Cores
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import NewThreshold
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.profiles import Scale
from minprfaas.scheduling.roles import RoleChange
from minprfaas.simulator.arrivals import from_trace, read_trace, write_conversations
from minprfaas.simulator.nodes import BLOCK_TOKENS, SimRequest
from minprfaas.simulator.simulation import Setup, Simulation

SECONDS = 300.0  # of arrivals, of the emulated machines
DROP_S, DROPPED = (60.0, 200.0), 0.1  # from when to when the line is down to a tenth
SHIFT_S, STRETCH = 40.0, 0.4  # from then on prompts are that much shorter, and decode has too much to do
TURNS, JITTER_S = 300, 5.0  # of conversations; a seed moves each by up to so much
PATIENCE_S = 240.0  # until the last first token, of the emulated machines
SAMPLE = 4
STARTING_S = 22.0  # of the run: until 7 processes have come, and are gone


@dataclass(frozen=True)
class Loop:
    """What happens, and the cluster without the loop and with it, in real units."""

    name: str
    happens: str
    policies: dict[str, Setup]  # without and with
    requests: Callable[[int], list[SimRequest]]  # of a seed
    scale: Scale
    pool_blocks: int = 1200

    @property
    def block_tokens(self) -> int:
        """Of the run: a block of a trace is one of its blocks."""
        return max(1, round(BLOCK_TOKENS / self.scale.length)) if self.setup.cache_blocks else 64

    @property
    def setup(self) -> Setup:
        """With the loop."""
        return [*self.policies.values()][1]

    def emulated(self, policy: str) -> Emulated:
        """The cluster to run."""
        return Emulated(f"{self.name}: {policy}", self.policies[policy], self.scale, self.block_tokens,
                        self.pool_blocks)

    def expected_s(self) -> float:
        """How long one run takes, about."""
        return STARTING_S + 1.2 * self.scale.time * self.requests(0)[-1].arrived_at_s


@dataclass(frozen=True)
class Outcome:
    """What came of one run, in real units. A request that has no first token has waited until the end."""

    ttft_mean_s: float
    ttft_p90_s: float
    moves: int  # of the threshold
    conversions: int  # of roles
    cached_fraction: float  # of the prompts' tokens


def loops(trace_path: str | None) -> list[Loop]:
    """All three. Without a trace, conversations are made up."""
    fleet, lengths = paper.paper_fleet(2, 4), paper.paper_lengths()
    narrow = replace(fleet, link_gbps=20.0)
    with tempfile.TemporaryDirectory() as scratch:
        if trace_path is None:
            trace_path = str(Path(scratch) / "made_up.jsonl")
            write_conversations(trace_path, TURNS, rate_rps=3.4, seed=0)
        trace = read_trace(trace_path)[:TURNS]
    talk = replace(fleet, output_tokens=fmean(request.output_tokens for request in trace))
    drop, shift = plan(narrow, lengths), plan(fleet, lengths)
    turns = plan(talk, LengthDistribution(request.input_tokens for request in trace), n_p=2)
    weather = ((DROP_S[0], DROPPED * narrow.link_gbps), (DROP_S[1], narrow.link_gbps))

    def steady(rate_rps: float, seed: int) -> list[SimRequest]:
        return stratified(rate_rps, int(SECONDS * rate_rps), lengths, paper.OUTPUT_TOKENS, seed)

    def shifted(seed: int) -> list[SimRequest]:
        requests = steady(1.2 * shift.lambda_max, seed)
        for request in requests:
            if request.arrived_at_s > SHIFT_S:
                request.input_tokens = max(1, round(STRETCH * request.input_tokens))
        return requests

    def conversations(seed: int) -> list[SimRequest]:
        rng, speed = random.Random(seed), 1.05 * turns.lambda_max * trace[-1].arrived_at_s / len(trace)
        moved = [replace(one, arrived_at_s=one.arrived_at_s + rng.uniform(0, JITTER_S)) for one in trace]
        return list(from_trace(sorted(moved, key=lambda one: one.arrived_at_s), speed))

    fixed = Setup(narrow, drop.n_p, drop.threshold, adaptive=False, weather=weather)
    split = Setup(fleet, shift.n_p, shift.threshold)
    aware = Setup(talk, turns.n_p, turns.threshold, cache_blocks=2000)
    return [
        Loop("line", f"a tenth of {narrow.link_gbps:g} Gbps is left for {DROP_S[1] - DROP_S[0]:g} s of {SECONDS:g}",
             {"fixed threshold": fixed, "adaptive threshold": replace(fixed, adaptive=True)},
             lambda seed: steady(0.6 * drop.lambda_max, seed), Scale(0.1, 512, 0.00025)),
        Loop("lengths", f"prompts become {STRETCH:g} times as long after {SHIFT_S:g} s of {SECONDS:g}",
             {"fixed split": split, "role conversion": replace(split, convert_roles=True)}, shifted,
             Scale(0.1, 512, 0.00025)),
        Loop("cache", f"{len(trace)} turns of conversations at 105% of what is planned without a cache",
             {"cache-blind": replace(aware, cache_aware=False), "cache-aware": aware}, conversations,
             Scale(1.0, BLOCK_TOKENS / 4, 0.0005), pool_blocks=8000)]


def simulate(loop: Loop, policy: str, seed: int) -> Outcome:
    """The simulator's prediction."""
    report = Simulation(loop.policies[policy], iter(loop.requests(seed))).run()
    return Outcome(report.ttft_s["mean"], report.ttft_s["p90"], report.threshold_moves, len(report.role_changes),
                   report.cached_fraction)


def run_loops(chosen: Sequence[Loop], seeds: int, results: Results, at_once: int) -> bool:
    """Run what has no result yet, and print with and without; False if a run was not valid or an answer wrong."""
    runs = [(loop, policy, seed) for loop in chosen for seed in range(seeds) for policy in loop.policies]
    jobs = [Job(_name(*run), partial(run_loop, *run, results), run[0].expected_s()) for run in runs
            if results.last(_name(*run), "loop") is None]
    print(f"{len(jobs)} of {len(runs)} runs of loops, {at_once} at once: about {expected_s(jobs, at_once) / 60:.0f} "
          "minutes", flush=True)
    try:
        run_all(jobs, at_once)
    finally:
        print_loops(chosen, seeds, results.again())
    said = [results.again().last(_name(*run), "loop") for run in runs]
    return all(one["is_valid"] and not one["wrong"] for one in said)


def run_loop(loop: Loop, policy: str, seed: int, results: Results) -> None:
    """One run, in processes of its own. UserError when it ends without a result."""
    cluster = loop.emulated(policy)
    used = cluster.start(lambda made, engine: drive(loop, cluster, policy, seed, results, made, engine))
    print(f"{_name(loop, policy, seed)}: {used}", flush=True)


def drive(loop: Loop, cluster: Emulated, policy: str, seed: int, results: Results, made: Process,
          engine: Engine) -> int:
    """What the front end's process does in one run."""
    cluster.wait_for_nodes(made)
    cluster.wait_for_weather(made)
    cores, actions, scale = Cores(), [], loop.scale
    requests = cluster.requests(loop.requests(seed))
    began_at_s, journeys = ask(made, _name(loop, policy, seed), requests, engine.model.config.vocab_size,
                               PATIENCE_S * scale.time, block_tokens=loop.block_tokens, on_action=actions.append)
    ended_at_s = engine.clock()
    words, is_valid = judged(made, cores)
    checked = sampled(journeys, SAMPLE, seed)
    wrong = len(wrong_answers(checked, engine.model, engine.tokenizer))
    ttft_s = sorted(scale.seconds((one.first_token_at_s or ended_at_s) - began_at_s - request.arrived_at_s)
                    for request, one in zip(requests, journeys))
    counts = [sum(isinstance(action, kind) for action in actions) for kind in (NewThreshold, RoleChange)]
    cached = sum(one.cached_tokens for one in journeys) / sum(one.prompt_tokens for one in journeys)
    outcome = Outcome(fmean(ttft_s), ttft_s[int(0.9 * len(ttft_s))], *counts, cached)
    results.add(_name(loop, policy, seed), "loop", {
        **asdict(outcome), "is_valid": is_valid, "wrong": wrong,
        "words": f"{words}; {len(checked) - wrong} of {len(checked)} sampled answers right"})
    return 0


def print_loops(chosen: Sequence[Loop], seeds: int, results: Results) -> None:
    """With and without, of the seeds that have run both: mean and spread, simulated and live; then what follows."""
    rows, verdicts, runs = [], [], []
    for loop in chosen:
        live = {policy: [results.last(_name(loop, policy, seed), "loop") for seed in range(seeds)]
                for policy in loop.policies}
        whole = [seed for seed in range(seeds) if all(outcomes[seed] is not None for outcomes in live.values())]
        runs += [f"  {_name(loop, policy, seed)}: {said[seed]['words']}" for policy, said in live.items()
                 for seed in whole]
        if not whole:
            continue
        measured = {policy: [_outcome(said[seed]) for seed in whole] for policy, said in live.items()}
        simulated = {policy: [simulate(loop, policy, seed) for seed in whole] for policy in loop.policies}
        rows += [[loop.name, policy, how, *_columns(outcomes[policy])] for policy in loop.policies
                 for how, outcomes in (("simulated", simulated), ("live", measured))]
        without, with_it = loop.policies
        invalid = sum(not said[seed]["is_valid"] for said in live.values() for seed in whole)
        verdicts.append(f"  {loop.name}: {loop.happens}. {loop.scale}\n    " + gain_in_words(
            with_it, gains(simulated, without, with_it), gains(measured, without, with_it))
            + (f"; NOT VALID: {invalid} of {2 * len(whole)} runs" if invalid else ""))
    print(table(["loop", "", "", "TTFT mean, s", "P90, s", "threshold moves", "roles changed", "cached"], rows))
    print("\n".join(["", *verdicts, "", *runs]))


def _columns(outcomes: Sequence[Outcome]) -> list[str]:
    digits = {"ttft_mean_s": 2, "ttft_p90_s": 1, "moves": 1, "conversions": 1, "cached_fraction": 2}
    return [spread([getattr(one, name) for one in outcomes], count) for name, count in digits.items()]


def gains(outcomes: dict[str, list[Outcome]], without: str, with_it: str) -> list[float]:
    """By how much the loop shortens the mean TTFT, of each seed, as a share."""
    return [1 - b.ttft_mean_s / a.ttft_mean_s for a, b in zip(outcomes[without], outcomes[with_it])]


def gain_in_words(name: str, simulated: Sequence[float], live: Sequence[float]) -> str:
    """Whether the live gain has the sign that the simulator predicts, seed by seed."""
    same = sum(a * b > 0 for a, b in zip(simulated, live))
    does = "as predicted" if same == len(live) else "NOT as predicted"
    return (f"{does}: {name} shortens the mean TTFT by {spread([100 * one for one in live], 0)}% live, "
            f"{spread([100 * one for one in simulated], 0)}% simulated; the sign is the same in {same} of {len(live)} "
            "seeds")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _outcome(row: dict) -> Outcome:
    return Outcome(**{name: row[name] for name in Outcome.__dataclass_fields__})


def _name(loop: Loop, policy: str, seed: int) -> str:
    return f"{loop.name}/{policy}/{seed}"
