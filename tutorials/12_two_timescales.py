"""Chapter 12: two timescales. The threshold follows the link in seconds, the roles follow the traffic in minutes.

    python tutorials/12_two_timescales.py [--plots DIRECTORY]

Everything here is simulated: service times are the paper's profiles', time is a number, and the control plane that
decides is the object that the live cluster asks, too.

Modules: scheduling/control.py, scheduling/threshold.py, scheduling/roles.py, simulator/,
observe/simulation_plots.py
Tests: test_simulator.py, test_simulator_parts.py, test_threshold.py, test_roles.py, test_control.py,
       test_simulate_command.py
Paper: 3.4.3
"""
import helper

args = helper.begin(__doc__, {"--plots": dict(metavar="DIRECTORY", help="draw section 3 there, as a picture")})

import random
import statistics
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from minprfaas.observe.plots import prepare_plots
from minprfaas.observe.simulation_plots import draw_simulation
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.control import ControlPlane, NewThreshold
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import plan
from minprfaas.scheduling.roles import BUSY, MIN_GAIN, SUSTAIN_S
from minprfaas.scheduling.threshold import HOLD_S
from minprfaas.simulator.arrivals import (day_lengths, diurnal, drawn, from_trace, poisson, read_trace,
                                          write_conversations)
from minprfaas.simulator.clock import Clock
from minprfaas.simulator.recorder import TTFT_OBJECTIVE_S, Report
from minprfaas.simulator.simulation import Setup, Simulation

if args.plots:
    prepare_plots(args.plots)  # a mistake is said now, not after the last section

# %% [markdown]
# ## 1. A clock that jumps
#
# A simulator needs no second to pass. It keeps a list of what happens next, takes the earliest event, sets its clock to
# that moment, and lets the event plan others. Between two events nothing happens, so nothing is lost.
#
# One prefill node, first come first served: a request begins when it is there and the one before it is done. That is
# one line of arithmetic, and with the package's `Clock` three events.
#
# *Guess first:* requests come at random, 0.9 a second, and each takes exactly 1 s. The node is busy 90% of the time.
# How long does a request wait on average? (Not 0.1 s.)

# %%
rng = random.Random(1)
arrivals_s = [at_s for at_s, _ in zip(poisson(0.9, rng), range(5000))]
SERVICE_S = 1.0

done_s, waits_s = 0.0, []
for arrived_s in arrivals_s:
    begins_s = max(arrived_s, done_s)
    done_s = begins_s + SERVICE_S
    waits_s.append(begins_s - arrived_s)

clock, queue, by_clock_s = Clock(), [], []


def arrive(arrived_s: float) -> None:
    queue.append(arrived_s)
    if len(queue) == 1:
        begin()


def begin() -> None:
    by_clock_s.append(clock.now_s - queue[0])
    clock.after(SERVICE_S, end)


def end() -> None:
    queue.pop(0)
    if queue:
        begin()


for arrived_s in arrivals_s:
    clock.at(arrived_s, arrive, arrived_s)
clock.run()
differs_s = max(abs(a - b) for a, b in zip(waits_s, by_clock_s))
print("1. A clock that jumps\n")
print(f"   {clock.now_s:,.0f} simulated seconds: requests waited {statistics.mean(waits_s):.1f} s on average, "
      f"{max(waits_s):.0f} s at most.\n"
      f"   By arithmetic and by events: {'the same' if differs_s < 1e-6 else 'DIFFERENT'}.\n")

# %% [markdown]
# *Why so long, with a tenth of the time idle?* Arrivals come in bunches, and what was idle before a bunch cannot be
# used after it. Queueing theory says ρ / (2 (1 - ρ)) = 4.5 s for ρ = 0.9, over a long run. Hence a system is not
# planned for 100%, and a loop that follows each bunch would never rest.
#
# *Change this line:* `poisson(0.9, rng)` → `poisson(0.5, rng)`, then `poisson(1.05, rng)`.

# %% [markdown]
# ## 2. Do the model and the simulator agree?
#
# Chapter 10's equations say that the paper's cluster sustains Λ_max = 3.24 requests/s. The simulator knows no
# equation: it has nodes, queues, a line, and the live router. A little below Λ_max its queues must stay short, a
# little above they must grow.
#
# *Guess first:* at 110% of Λ_max, by how many requests do the queues grow in a minute?

# %%
fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
planned = plan(fleet, lengths)


def simulate(rate_rps: float, seconds: float, control: ControlPlane | None = None, seed: int = 1, **changes) -> Report:
    """Random arrivals of the paper's lengths at the planned cluster, but for `changes`."""
    rng = random.Random(seed)
    requests = drawn(poisson(rate_rps, rng), int(rate_rps * seconds), lengths, paper.OUTPUT_TOKENS, rng)
    return Simulation(setup_of(**changes), requests, control=control).run()


def setup_of(**changes) -> Setup:
    return Setup(**{"fleet": fleet, "n_p": planned.n_p, "threshold": planned.threshold, **changes})


print("2. Do the model and the simulator agree?\n")
rows, verdicts = [], []
for load in (0.9, 1.1):
    rate_rps = load * planned.lambda_max
    report = simulate(rate_rps, 1500, adaptive=False)
    settled = [tick for tick in report.series if 375 < tick.at_s < 1500]  # the queues as a line over time
    growth_rps = statistics.linear_regression([tick.at_s for tick in settled],
                                              [tick.waiting for tick in settled]).slope
    predicted = max(0.0, (rate_rps - planned.lambda_max) * 60)
    rows.append([f"{load:.0%} of {planned.lambda_max:.2f} req/s", f"{predicted:+.0f}", f"{growth_rps * 60:+.1f}",
                 f"{report.ttft_s['mean']:.1f}", f"{report.offloaded_fraction:.2f}", f"{report.egress_gbps:.1f}"])
    verdicts.append((growth_rps < 0.05 * rate_rps) == (load < 1))
print(table(["load", "queues a minute, by the model", "simulated", "TTFT mean, s", "p", "egress, Gbps"], rows))
verdict = "sustains 90% and not 110%, as the model says" if all(verdicts) else "does not agree with the model here"
print(f"\n   The simulator {verdict}.\n"
      f"   The model: p = {planned.offloaded_fraction:.2f}, {planned.egress_gbps:.1f} Gbps at 100%.\n")

# %% [markdown]
# *Why is it worth having both?* They share nothing but the profiles: one is arithmetic over means, the other has a
# queue for each node. Where the two agree, it is unlikely that either has forgotten something large.
#
# *Change this line:* `(0.9, 1.1)` → `(0.97, 1.03)`. How near to 100% can the two still be told apart in 1,500 s?

# %% [markdown]
# ## 3. Short term: the line loses nine tenths of its bandwidth
#
# The [threshold](../docs/glossary.md#threshold) was computed for one [line](../docs/glossary.md#line) and one traffic.
# Each few seconds the short-term loop looks whether something has changed (bandwidth, queues, nodes, lengths); if so
# it searches t again, as chapter 10 did, over the lengths of the last 2,048 requests and with the bandwidth that is
# observed.
#
# *Guess first:* a line of 40 Gbps carries only 4 from 300 s to 600 s. Must t rise or fall? To about how much? And how
# often will it move while the line stays at 4?

# %%
GOOD = f"TTFT ≤ {TTFT_OBJECTIVE_S:g} s, req/s"


def measures(name: str, report: Report) -> list[str]:
    """One row under `HEADERS`."""
    mean_s, p90_s = report.ttft_s["mean"], report.ttft_s["p90"]
    return [name, f"{report.goodput_rps:.2f}", f"{mean_s:.1f}", f"{p90_s:.1f}", str(report.peak_waiting)]


HEADERS = ["", GOOD, "TTFT mean, s", "TTFT P90, s", "most waiting"]
narrow, drop = replace(fleet, link_gbps=40.0), ((300.0, 4.0), (600.0, 40.0))
rate_rps = 0.45 * planned.lambda_max


class Watched(ControlPlane):
    """A control plane that keeps each move of its threshold, and what it had seen of the line."""

    def __init__(self, settings):
        super().__init__(settings)
        self.moves: list[tuple[float, float, float, str]] = []

    def tick(self, now_s: float) -> list:
        actions = super().tick(now_s)
        for action in actions:
            if isinstance(action, NewThreshold):
                self.moves.append((now_s, action.threshold, self.egress.gbps, action.reason))
        return actions


options = dict(fleet=narrow, weather=drop)
watched = Watched(setup_of(**options).control_settings())
fixed = simulate(rate_rps, 1200, **options, adaptive=False)
adaptive = simulate(rate_rps, 1200, watched, **options)
print("3. Short term\n")
print(table(HEADERS, [measures("fixed threshold", fixed), measures("adaptive", adaptive)]))
print(f"\n   {rate_rps:.2f} requests/s. Each move of t while the line was thin, and the minute after:\n")
print(table(["s", "t", "line thought to carry", "because"], [
    [f"{at_s:.0f}", f"{t:,.0f}", f"{gbps:.1f} Gbps", reason.partition(":")[0]]
    for at_s, t, gbps, reason in watched.moves if 300 <= at_s <= 660]))
thin = plan(replace(fleet, link_gbps=4.0), lengths, n_p=planned.n_p)
inside = [move for move in watched.moves if 300 <= move[0] < 600]
causes = Counter(reason.partition(":")[0] for *_, reason in inside)
better = adaptive.ttft_s["p90"] < fixed.ttft_s["p90"]
print(f"""
   For a line of 4 Gbps and all lengths the planner would say t = {thin.threshold:,.0f} (Λ_max {thin.lambda_max:.2f}).
   The loop made {len(inside)} moves ({', '.join(f'{count}: {cause}' for cause, count in causes.most_common())}).
   P90 of TTFT with it: {adaptive.ttft_s['p90']:.1f} s, without: {fixed.ttft_s['p90']:.1f} s\
{'' if better else ', and so it did not help'}.
""")

# %% [markdown]
# *Why does t move while the line stays the same?* Three reasons, and the table tells which. What is left at 4 Gbps is
# hardly more than what arrives, so by chance a queue surges now here, now there, and t gives way: down when prompts
# wait for PD-P nodes, up when KVCache waits for the line. When more arrives than any t could carry, the loop keeps the
# PD-P nodes at 90% and lets the long prompts wait. And the loop cannot know what a *silent* line carries: it believes
# what it saw when the line was last busy, and less and less as it idles, for a line that nobody uses would never be
# tried again. So with fewer prompts on their way its guess creeps back towards 40 Gbps ("capacity changed"), t falls,
# the line fills, and it learns better.
#
# *Why not follow at once and exactly?* The loop is damped: a factor of 1.5 a move, nothing within 5%, and 30 s before
# it turns around, so that a line that swings faster than that cannot make t swing with it.
#
# *Change this line:* let the line be gone for two minutes: `drop = ((300.0, 0.0), (420.0, 40.0))`.

# %%
if args.plots:
    print("   Drawn: " + ", ".join(map(str, draw_simulation(args.plots, adaptive))) + "\n")
turns = [(before[0], after[0]) for first, before, after in zip(watched.moves, watched.moves[1:], watched.moves[2:])
         if (before[1] > first[1]) != (after[1] > before[1])]
soonest_s = min((later - earlier for earlier, later in turns), default=float("inf"))
print(f"   It turned around {len(turns)} times in the whole run, at the soonest {soonest_s:.0f} s after the last move: "
      f"{'never within' if soonest_s >= HOLD_S else 'BROKEN: within'} {HOLD_S:g} s.\n")

# %% [markdown]
# ## 4. Long term: the traffic changes its shape
#
# No threshold helps when decode is the bottleneck: then a node must change its role. That is slow (it drains first, and
# comes back empty), so the long-term loop looks at minutes. By equation 8 it compares who makes KVCache, Θ_prfaas +
# Θ_pdp, with who uses it, Θ_pdd, and converts one node at a time, if another split would sustain 5% more, the stage is
# at least 80% busy, and both have been so for a minute.
#
# *Guess first:* a day of two hours. At noon prompts are half as long and come half again as often; at night they are
# long and few. Beginning with 3 : 5, how many conversions will there be, and which way is the first?

# %%
day_s, rate_rps = 7200.0, 2.7
reports = {}
for name, convert_roles in (("fixed split 3 : 5", False), ("role conversion", True)):
    rng = random.Random(1)
    times, count = diurnal(rate_rps, rng, day_s), int(rate_rps * day_s)
    requests = drawn(times, count, lengths, paper.OUTPUT_TOKENS, rng, day_lengths(day_s))
    reports[name] = Simulation(setup_of(convert_roles=convert_roles), requests).run()
print("4. Long term\n")
print(table(HEADERS, [measures(name, report) for name, report in reports.items()]) + "\n")
converted = reports["role conversion"]
for at_s, node, role, reason in converted.role_changes:
    print(f"   {at_s:5.0f} s  {node} becomes {role}: {reason}")
gain = converted.goodput_rps / reports["fixed split 3 : 5"].goodput_rps
print(f"\n   {len(converted.role_changes)} conversions; {gain:.2f} times as many first tokens came in time. "
      f"(A conversion needs {MIN_GAIN:.0%} more, {BUSY:.0%} busy, {SUSTAIN_S:g} s.)\n")

# %% [markdown]
# *Why do only PD nodes convert?* A PrfaaS node is in the other datacenter: decoding there would mean that every later
# turn's KVCache lies on the wrong side of the line.
#
# *Change this line:* `day_s = 7200.0` → `1800.0`. Can conversions follow so short a day?

# %% [markdown]
# ## 5. Knowing who holds which prefix
#
# Conversations grow turn by turn (a trace made up here, in Mooncake's format). Each node caches 2,000 blocks of 512
# tokens. Blind, a router finds a cached prefix only by luck; with chapter 11's directory it asks.
#
# *Guess first:* what share of all prompt tokens is found in a cache, blind and with the directory? Does egress grow or
# shrink?

# %%
with tempfile.TemporaryDirectory() as scratch:
    write_conversations(Path(scratch) / "made_up.jsonl", requests=1500, rate_rps=3.4, seed=0)
    trace = read_trace(Path(scratch) / "made_up.jsonl")
chat_fleet = replace(fleet, output_tokens=statistics.mean(request.output_tokens for request in trace))
chat_plan = plan(chat_fleet, LengthDistribution(request.input_tokens for request in trace), n_p=4)
rows, cached = [], []
for name, aware in (("cache-blind", False), ("cache-aware", True)):
    setup = Setup(chat_fleet, chat_plan.n_p, chat_plan.threshold, cache_aware=aware, cache_blocks=2000)
    report = Simulation(setup, from_trace(trace, speed=1.2)).run()
    cached.append(report.cached_fraction)
    rows.append([*measures(name, report), f"{report.cached_fraction:.0%}", f"{report.egress_gbps:.1f}"])
print("5. Knowing who holds which prefix\n")
print(table([*HEADERS, "tokens cached", "egress, Gbps"], rows))
print(f"\n   Asking finds {cached[1] / cached[0]:.1f} times as many tokens.\n")

# %% [markdown]
# *Why does it pay twice?* A cached token need not be computed, and what the decode node holds need not cross. And t is
# judged by uncached tokens, so more prompts count as short.
#
# *Change this line:* `cache_blocks=2000` → `200`. Does the directory still help when little fits?

# %%
print("One control plane, two loops: seconds for the threshold, minutes for the roles. Tables over many seeds come\n"
      "from python scripts/bench.py policies; the same loops run live in scripts/cluster.py --profile P.json.\n"
      "Next: tutorials/13_prefill_as_a_service.py, all of it with real processes.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_12.py`, then `python tutorials/12_two_timescales.py --check 1`.
# 1. `waits`: the waiting times of a node that serves first come, first served, with a service time for each request.
# 2. `next_threshold`: one damped move of the threshold.
# 3. `last_byte_s`: when a file has crossed a line whose bandwidth changes.
