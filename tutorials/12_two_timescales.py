"""Chapter 12: two timescales. The threshold follows the link, the roles follow the traffic (paper 3.4.3), simulated.

    python tutorials/12_two_timescales.py
"""

import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from minprfaas.observe.report import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import EmpiricalLengths
from minprfaas.scheduling.planner import plan
from minprfaas.simulator.arrivals import day_lengths, diurnal, drawn, from_trace, poisson
from minprfaas.simulator.cluster import Setup, Simulation
from minprfaas.simulator.report import Report
from minprfaas.simulator.trace import read_trace, write_conversations

fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
planned = plan(fleet, lengths)


def simulate(rate: float, seconds: float, **changes) -> Report:
    """Poisson arrivals of the paper's lengths at the planned cluster, but for `changes`."""
    rng = random.Random(1)
    requests = drawn(poisson(rate, rng), int(rate * seconds), lengths, paper.OUTPUT_TOKENS, rng)
    setup = {"fleet": fleet, "n_p": planned.n_p, "threshold": planned.threshold, **changes}
    return Simulation(Setup(**setup), requests).run()


def waiting(report: Report, start_s: float, end_s: float) -> str:
    """Mean number of requests without a first token."""
    return f"{statistics.mean(tick.waiting for tick in report.series if start_s <= tick.time_s < end_s):.0f}"


def measures(name: str, report: Report) -> list[str]:
    """One row under `HEADERS`."""
    mean_s, p90_s = report.ttft_s["mean"], report.ttft_s["p90"]
    return [name, f"{report.goodput_rps:.2f}", f"{mean_s:.1f}", f"{p90_s:.1f}", str(report.peak_waiting)]


HEADERS = ["", "goodput*, req/s", "TTFT mean, s", "TTFT P90, s", "most waiting"]

print(f"""1. Do the model and the simulator agree?

The planner says that the paper's cluster sustains {planned.lambda_max:.2f} requests/s. The simulator knows no equation:
it has queues, one request after the other, and runs the live router. A little below that rate its queues must stay
short, a little above they must grow. Requests without a first token, quarter by quarter of 50 simulated minutes:
""")
rows = []
for load in (0.95, 1.05):
    report = simulate(load * planned.lambda_max, 3000, adaptive=False)
    quarters = [waiting(report, 750 * i, 750 * (i + 1)) for i in range(4)]
    rows.append([f"{load:.0%} of {planned.lambda_max:.2f} req/s", *quarters])
print(table(["load", "1st quarter", "2nd", "3rd", "4th"], rows))

narrow = replace(fleet, link_gbps=40.0)
rate, drop = 0.45 * planned.lambda_max, ((300.0, 4.0), (600.0, 40.0))
print(f"""
2. Short term: the link loses nine tenths of its bandwidth for five minutes

{rate:.2f} requests/s over a link of 40 Gbps, of which 4 are left from 300 s to 600 s. The offloaded half would need
more than that. The short-term loop searches the threshold again with the bandwidth that it observes, so that fewer and
longer prompts travel:
""")
reports = {name: simulate(rate, 1200, fleet=narrow, weather=drop, adaptive=adaptive)
           for name, adaptive in (("fixed threshold", False), ("adaptive threshold", True))}
print(table(HEADERS, [measures(name, report) for name, report in reports.items()]))
print("\n  t over time, adaptive (each ▪ is 1,000 tokens):")
for tick in reports["adaptive threshold"].series[240:780:45]:
    bar = "▪" * round(tick.threshold / 1000)
    print(f"  {tick.time_s:4.0f} s  egress {tick.egress_gbps:4.1f} Gbps  {bar} {tick.threshold:,.0f}")

day_s, rate = 7200.0, 2.7
print(f"""
3. Long term: the traffic changes its shape

A day of {day_s / 3600:.0f} hours: at noon prompts are half as long and come half again as often, so decoding is the
bottleneck; at night they are long and few, and prefill is. The long-term loop converts PD nodes, one at a time,
draining each first:
""")
rows = []
for name, convert_roles in (("fixed split 3 : 5", False), ("role conversion", True)):
    rng = random.Random(1)
    times, count = diurnal(rate, rng, day_s), int(rate * day_s)
    requests = drawn(times, count, lengths, paper.OUTPUT_TOKENS, rng, day_lengths(day_s))
    report = Simulation(Setup(fleet, planned.n_p, planned.threshold, convert_roles=convert_roles), requests).run()
    rows.append(measures(name, report))
print(table(HEADERS, rows) + "\n")
for time_s, node, role, reason in report.role_changes:
    print(f"  {time_s:5.0f} s  {node} becomes {role}: {reason}")

print("""
4. Knowing who holds which prefix

Conversations that grow turn by turn (a trace made up here, in Mooncake's format), 2,000 blocks of prefix cache a node.
Blind, a router finds a cached prefix only by luck; with the directory it asks:
""")
with tempfile.TemporaryDirectory() as scratch:
    write_conversations(Path(scratch) / "made_up.jsonl", requests=2500, rate_rps=3.4, seed=0)
    trace = read_trace(Path(scratch) / "made_up.jsonl")
chat_fleet = replace(fleet, output_tokens=statistics.mean(request.output_tokens for request in trace))
chat_plan = plan(chat_fleet, EmpiricalLengths(request.input_tokens for request in trace), n_p=4)
rows = []
for name, aware in (("cache-blind", False), ("cache-aware", True)):
    setup = Setup(chat_fleet, chat_plan.n_p, chat_plan.threshold, cache_aware=aware, cache_blocks=2000)
    report = Simulation(setup, from_trace(trace, speed=1.2)).run()
    rows.append([*measures(name, report), f"{report.cached_fraction:.0%}", f"{report.egress_gbps:.1f}"])
print(table([*HEADERS, "tokens cached", "egress, Gbps"], rows))
print("""
* requests/s whose first token came within 10 s. All figures are simulated: service times are the paper's profiles'.

One router, two loops around it: seconds for the threshold, minutes for the roles. Tables over many seeds come from
`python scripts/bench.py policies`. `bash scripts/demo.sh` is the whole system, with real tokens.""")
