"""Chapter 10: the throughput model. Requests a second, and which prompts should travel.

    python tutorials/10_the_throughput_model.py

Everything but the last section is modelled: the paper's measured points, the curves through them, and equations 3 to 8.
Nothing is run; chapter 12 runs the same case in a simulator, and scripts/live_case_study.py with processes.

Modules: scheduling/throughput.py, scheduling/profiles.py, scheduling/lengths.py, scheduling/planner.py,
scheduling/paper_case.py, engine/measure.py
Tests: test_throughput.py, test_profiles.py, test_lengths.py, test_planner.py, test_plan_command.py,
       test_profile_command.py, test_extreme_options.py
Paper: 3.4.1, 3.4.2, 4, table 5, table 6, figure 5
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

from dataclasses import replace

import torch

from minprfaas import load
from minprfaas.engine.measure import measure_decode, measure_prefill
from minprfaas.observe.tables import human_bytes, table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import first_token_times, plan, plan_least_loaded, sensitivity, sweep
from minprfaas.scheduling.profiles import Profile
from minprfaas.scheduling.throughput import kv_throughput_gbps, lambda_max, theta_pdd, theta_pdp, theta_prfaas

# %% [markdown]
# ## 1. Three stages, three rates
#
# The paper's case: 4 instances of 8 H200 that only prefill (the [PrfaaS](../docs/glossary.md#prfaas) cluster), 8 of
# 8 H20 that prefill ([PD-P](../docs/glossary.md#pd-p)) or decode ([PD-D](../docs/glossary.md#pd-d)), 100 Gbps between
# them, a hybrid model of 1T parameters. A *profile* is what one instance does with a request of l tokens: two curves
# through measured points, T_prefill(l) in seconds and S_kv(l) in bytes. The H200's points are published (table 5); the
# H20's are *calibrated* from two published rates.
#
# Each stage then sustains so many requests a second, Θ. For prefill it is instances over seconds; the PrfaaS cluster
# must also get its KVCache out (B_out, its [egress](../docs/glossary.md#egress)), and the slower of the two counts:
#
#     Θ_prfaas = min( N_prfaas / T_prefill(l_long),  B_out / S_kv(l_long) )      (3)
#     Θ_pdp    = N_p / T_prefill(l_short)                                        (4)
#     Θ_pdd    = N_d · BS_max / (T_decode · L_out)                               (5)
#
# *Guess first:* a decode instance holds BS_max = 20 requests, draws a token for each every T_decode = 25 ms, and an
# answer has L_out = 1,024 tokens. How many requests does it finish in a second?

# %%
fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
fast, slow = fleet.prfaas_profile, fleet.pd_profile
print("1. Three stages, three rates\n")
print(table(["tokens", "KVCache, MiB", "H200 prefill, s (curve)", "published", "H20 prefill, s (calibrated)"],
            [(point.tokens, f"{fast.kv_bytes(point.tokens) / 2**20:.1f}", f"{fast.prefill_s(point.tokens):.2f}",
              f"{point.prefill_s:.2f}", f"{slow.prefill_s(point.tokens):.2f}") for point in fast.points]))
one = theta_pdd(n_d=1, bs_max=slow.bs_max, t_decode_s=slow.t_decode_s, output_tokens=fleet.output_tokens)
mean_of_curve = lengths.mean(slow.prefill_s)
curve_of_mean = slow.prefill_s(lengths.mean(float))
print(f"\n   One decode instance: {one:.3f} requests/s. One that prefills whatever comes: {1 / mean_of_curve:.3f}."
      f"\n   Of all lengths E[T(L)] = {mean_of_curve:.2f} s, T(E[L]) = {curve_of_mean:.2f} s: "
      f"{mean_of_curve / curve_of_mean - 1:+.1%}.\n")

# %% [markdown]
# *Why E[T(L)] and not T(E[L])?* A stage is busy for the sum of its requests' times. T bends upwards (attention reads
# all that came before), so a long prompt costs more than two half as long, and the time of the mean prompt is less
# than the mean time. So `l_long` and `l_short` in the equations stand for *all* lengths on one side of the threshold.
#
# *Change this line:* `theta_pdd(…, output_tokens=fleet.output_tokens)` → `256`. Answers are a quarter as long; and Θ?

# %% [markdown]
# ## 2. The threshold: equations 6 and 7
#
# A prompt of more than t uncached tokens is sent away, so a share p = P(L > t) of the requests reaches the PrfaaS
# cluster and 1 - p the PD-P nodes; all reach decode. The whole is as fast as its slowest part, for its share:
#
#     Λ_max = min( Θ_prfaas / p,  Θ_pdp / (1 - p),  Θ_pdd )                      (6)
#
# Raise t: fewer and longer prompts leave, Θ_prfaas / p rises, and Θ_pdp / (1 - p) falls. The best t is where they meet:
#
#     Θ_prfaas / p = Θ_pdp / (1 - p)                                             (7)
#
# *Guess first:* with N_p = 3 and N_d = 5 the best t is about 19,400. Which costs more: a t of 5,000 tokens too many, or
# too few? By how much?

# %%
N_P = 3


def mean(of, over: list[float]) -> float:
    """E[of(L)] over these lengths."""
    return sum(map(of, over)) / len(over)


def rates_at(threshold: float, n_p: int = N_P) -> tuple[float, float, float, float]:
    """p, Θ_prfaas, Θ_pdp and Θ_pdd, straight from equations 3 to 5."""
    long = [length for length in lengths.values if length > threshold]
    short = [length for length in lengths.values if length <= threshold]
    remote = min(fleet.prfaas_instances / mean(fast.prefill_s, long),
                 fleet.link_gbps * 1e9 / 8 / mean(fast.kv_bytes, long))
    local = n_p / mean(slow.prefill_s, short) if short else 0.0
    decode = (fleet.pd_instances - n_p) * slow.bs_max / (slow.t_decode_s * fleet.output_tokens)
    return len(long) / len(lengths.values), remote, local, decode


def by_hand(threshold: float) -> float:
    """Λ_max, straight from equation 6."""
    p, remote, local, decode = rates_at(threshold)
    return min([remote / p, decode] + ([local / (1 - p)] if p < 1 else []))


def bar(value: float, longest: float = 4.0, width: int = 36) -> str:
    """A bar of text; `longest` fills the width."""
    return "█" * round(width * min(value / longest, 1))


thresholds = [0, 5000, 10_000, 14_400, 17_500, 19_400, 22_500, 24_400, 35_000, 45_000, 55_000]
points = sweep(fleet, lengths, thresholds, [N_P])
at = {point.threshold: point for point in points}
best_here = max(points, key=lambda point: point.lambda_max)
print("2. The threshold\n")
print(table(["t", "p", "Θ_prfaas/p", "Θ_pdp/(1-p)", "Λ_max", "requests/s"], [
    (f"{point.threshold:,}", f"{point.offloaded_fraction:.2f}", f"{point.bounds['prfaas compute']:.2f}",
     f"{point.bounds['pdp']:.2f}" if point.offloaded_fraction < 1 else "–", f"{point.lambda_max:.2f}",
     bar(point.lambda_max) + (" ◄" if point is best_here else "")) for point in points]))
worst = max(abs(by_hand(t) / at[t].lambda_max - 1) for t in thresholds)
lost = {t: 1 - at[t].lambda_max / best_here.lambda_max for t in (14_400, 24_400)}
gap = abs(best_here.bounds["prfaas compute"] / best_here.bounds["pdp"] - 1)
print(f"""
   At t = {best_here.threshold:,} the two bounds are {gap:.1%} apart (equation 7).
   5,000 too few lose {lost[14_400]:.0%}, 5,000 too many {lost[24_400]:.0%}.
   The equations by hand and the package's `sweep`: {'the same' if worst < 1e-9 else 'DIFFERENT'}.
""")

# %% [markdown]
# *Why not the same on both sides?* Left of the peak the PrfaaS cluster is what binds, right of it the PD-P nodes, and
# these are fewer and slower: a long prompt that stays costs them much more than it would have cost over there.
#
# *Change this line:* `N_P = 3` → `4`. Where does the peak go, and what binds now?

# %% [markdown]
# ## 3. The split: equation 8
#
# A PD node can prefill or decode. Who makes KVCache and who uses it must keep pace:
#
#     Θ_prfaas + Θ_pdp = Θ_pdd                                                   (8)
#
# *Guess first:* 8 PD nodes, t = 19,400. How many should prefill, and what does one too many or too few cost?

# %%
points = sweep(fleet, lengths, [paper.PUBLISHED_THRESHOLD], range(1, fleet.pd_instances))
peak = max(points, key=lambda point: point.lambda_max)
nearest = min(points, key=lambda point: abs(point.theta_prfaas + point.theta_pdp - point.theta_pdd))
print("3. The split\n")
print(table(["N_p / N_d", "Θ_prfaas+Θ_pdp", "Θ_pdd", "binds", "Λ_max", "requests/s"], [
    (f"{point.n_p} / {point.n_d}", f"{point.theta_prfaas + point.theta_pdp:.2f}", f"{point.theta_pdd:.2f}",
     point.binding_stage, f"{point.lambda_max:.2f}", bar(point.lambda_max) + (" ◄" if point is peak else ""))
    for point in points]))
beside = [1 - point.lambda_max / peak.lambda_max for point in points if abs(point.n_p - peak.n_p) == 1]
print(f"\n   One node on the wrong side costs {min(beside):.0%} or {max(beside):.0%}. "
      f"Equation 8 is nearest to holding at N_p = {nearest.n_p},\n"
      f"   the peak is at {peak.n_p}: {'the same' if nearest is peak else 'not the same, because nodes are whole'}.\n")

# %% [markdown]
# *Why does it not hold exactly?* Nodes are whole. What is left over stands in the other columns: here decode has room.
#
# *Change this line:* `[paper.PUBLISHED_THRESHOLD]` → `[35_000]`. More stays local; which split is best then?

# %% [markdown]
# ## 4. Search both: table 6
#
# Two numbers are to be found, t and N_p, and equation 6 judges any pair. So nothing clever is needed: `plan` tries
# every t of a grid with every N_p and keeps the best. Here it does so for three of the paper's deployments and for one
# that the paper lacks: both kinds of hardware, but each request goes to the least loaded prefill node, whatever its
# length.
#
# *Guess first:* PrfaaS-PD gives 1.54 times what 12 H20 instances give. How much of that do the H200s give alone,
# without any choice by length?

# %%
plans = {"PrfaaS-PD": (fleet, plan(fleet, lengths)), "least-loaded": (fleet, plan_least_loaded(fleet, lengths)),
         "naive (all offloaded)": (fleet, plan(fleet, lengths, n_p=0, threshold=0)),
         "homogeneous (12 H20)": (paper.paper_fleet(0, 12), plan(paper.paper_fleet(0, 12), lengths))}
published = {"PrfaaS-PD": "prfaas_pd", "naive (all offloaded)": "naive", "homogeneous (12 H20)": "homogeneous"}
baseline = plans["homogeneous (12 H20)"][1].lambda_max
times = {name: first_token_times(deployment, lengths, found) for name, (deployment, found) in plans.items()}
rows, off = [], []
for name, (_, found) in plans.items():
    says = paper.TABLE_6.get(published.get(name), {}).get("lambda_max")
    off += [] if says is None else [abs(found.lambda_max / says - 1)]
    rows.append((name, f"{found.threshold:,.0f}" if name == "PrfaaS-PD" else "–",
                 f"{found.n_prfaas} / {found.n_p} / {found.n_d}", f"{found.lambda_max:.2f}",
                 "–" if says is None else f"{says:.2f}", f"{found.lambda_max / baseline:.2f}",
                 "{:.2f} / {:.2f}".format(*times[name]), f"{found.egress_gbps:.1f}"))
print("4. Search both\n")
print(table(["deployment", "t", "N_prfaas / N_p / N_d", "Λ_max", "paper's", "ratio", "TTFT mean / P90, s",
             "egress, Gbps"], rows))
best, least = plans["PrfaaS-PD"][1], plans["least-loaded"][1]
print(f"""
   The search is within {max(off):.1%} of the paper's rates. Both kinds of hardware alone make
   {least.lambda_max / baseline:.2f} of the ratio {best.lambda_max / baseline:.2f}; choosing by length \
adds {best.lambda_max / least.lambda_max - 1:.1%}, and the P90 of TTFT
   is {times['PrfaaS-PD'][1]:.2f} instead of {times['least-loaded'][1]:.2f} s. \
TTFT here is service without waiting: chapter 12 simulates the queues.
""")

# %% [markdown]
# *Why does so small a gain in rate matter?* Because of the tail. Without a threshold the long prompts also land on the
# slow nodes, and each waits there for a whole long prefill.
#
# *Change this line:* `plan(fleet, lengths, n_p=0, threshold=0)` → `plan(replace(fleet, link_gbps=5), …)`. What becomes
# of sending everything away when the line is thin?

# %% [markdown]
# ## 5. What would more buy?
#
# *Guess first:* which is worth most: one more PrfaaS instance, one more PD instance, or twice the link? And down to how
# many Gbps may the link shrink before a tenth of Λ_max is lost?

# %%
options = [("as it is", best), *sensitivity(fleet, lengths)]
thin = {gbps: plan(replace(fleet, link_gbps=gbps), lengths) for gbps in (20, 10, 5, 2)}
options += [(f"a link of {gbps} Gbps", found) for gbps, found in thin.items()]
half_cached = LengthDistribution(length / 2 for length in lengths.values)
options.append(("half of each prompt cached", plan(fleet, half_cached)))
print("5. What would more buy?\n")
print(table(["", "t", "N_p / N_d", "Λ_max", "against as it is", "binds"], [
    (change, f"{found.threshold:,.0f}", f"{found.n_p} / {found.n_d}", f"{found.lambda_max:.2f}",
     f"{found.lambda_max / best.lambda_max - 1:+.0%}", found.binding_stage) for change, found in options]))
enough = [gbps for gbps, found in thin.items() if found.lambda_max >= 0.9 * best.lambda_max]
which = " and ".join(f"{gbps} Gbps" for gbps in enough) or "none"
print(f"\n   Of the thin links, {which} would lose less than a tenth of Λ_max.\n")

# %% [markdown]
# *Why is the link worth so little?* The best t uses about an eighth of it. That is what hybrid models changed (chapter
# 00): with a dense model's KVCache this row would be the first to bind. A prefix cache, on the other hand, shortens
# what must be computed *and* what must cross, and moves the threshold: so it must be searched again (chapter 12).
#
# *Change this line:* `length / 2` → `length / 10`, a cache that holds nine tenths. Is a PrfaaS cluster still of use?

# %% [markdown]
# ## 6. A profile of your own machine
#
# The curves above belong to other machines. `python -m minprfaas profile` measures yours; two functions do the work.
# `Profile.read` also knows what somebody else measured of a smaller model, and says who.
#
# *Guess first:* how many Mbps of KVCache does this machine make of 2,048 tokens with the embedded model
# (Φ_kv = S_kv / T_prefill, equation 1)?

# %%
torch.set_num_threads(1)
torch.manual_seed(0)
model, tokenizer = load()
measured = measure_prefill(model, tokenizer, [512, 2048], repeats=1, prefill_chunk=256)
step_s = measure_decode(model, tokenizer, batch=4, context=512, steps=8)
others = Profile.read("kimi-linear-48b-8xh100")
rows = [("embedded, here", tokens, size, seconds) for tokens, size, seconds in measured]
rows.append((others.name, 2048, others.kv_bytes(2048), others.prefill_s(2048)))
print("6. A profile of this machine\n")
print(table(["model, machine", "tokens", "KVCache", "prefill, s", "KV throughput, Mbps"], [
    (who, tokens, human_bytes(size), f"{seconds:.2f}", f"{kv_throughput_gbps(size, seconds) * 1e3:,.1f}")
    for who, tokens, size, seconds in rows]))
remote = theta_prfaas(1, measured[1][2], 0.02, measured[1][1])
rate_rps = lambda_max(remote, theta_pdp(1, measured[0][2]), theta_pdd(1, 4, step_s, 64), offloaded_fraction=0.5)
print(f"""
   The last row: {others.source.partition(" (")[0]} (published by others).
   It counts rows of attention alone; of state Kimi Linear has 41 MiB besides (chapter 00).
   A decode step of 4 requests takes {step_s * 1e3:.1f} ms. With one such node that prefills prompts of 2,048 tokens
   behind a line of 20 Mbps, one that prefills 512 and one that decodes answers of 64, half of the requests
   being long, equation 6 says {rate_rps:.2f} requests/s.
""")

# %%
# %% [markdown]
# *Why more than one length?* A profile is a curve: of each length the prefill takes its own time, and a threshold only
# means something where the curve is known. *Why is so little made here?* Phi_kv is bytes over seconds, and a core is
# slow.
#
# *Change this line:* `[512, 2048]` → `[512, 2048, 4096]` (some seconds). Does Φ_kv rise or fall with the length?

# %%
print(f"""Found by search, and modelled: t = {best.threshold:,.0f} tokens and N_p : N_d = {best.n_p} : {best.n_d} \
serve {best.lambda_max:.2f} requests/s. The same from a
command line: python -m minprfaas plan --case paper, or --profile P.json with what your machine measured.
Next: tutorials/11_the_router.py, which applies the threshold to one request at a time.""")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_10.py`, then `python tutorials/10_the_throughput_model.py --check 1`.
# 1. `system_rate`: Λ_max of a system whose prompts have two lengths only, by equations 3 to 6.
# 2. `balanced_share`: the share p at which equation 7 holds, when the two rates do not depend on p.
# 3. `prefill_nodes`: the split N_p of equation 8 that serves most, by trying them all.
