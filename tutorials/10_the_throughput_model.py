"""Chapter 10: the throughput model. Requests per second, and which prompts should travel (paper 3.4.1-3.4.2, 4).

    python tutorials/10_the_throughput_model.py
"""

from dataclasses import replace

from minprfaas.observe.report import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import EmpiricalLengths
from minprfaas.scheduling.planner import first_token_times, plan, plan_least_loaded, sensitivity, sweep
from minprfaas.scheduling.throughput import theta_pdd

BAR_WIDTH = 40


def bar(value: float, longest: float) -> str:
    """A bar of text; `longest` fills the width."""
    return "█" * round(BAR_WIDTH * min(value / longest, 1))


fleet, lengths = paper.paper_fleet(), paper.paper_lengths()
fast, slow = fleet.prfaas_profile, fleet.pd_profile

print("""1. Three stages, three rates

The paper's case: 4 instances of H200 that only prefill (the PrfaaS cluster), 8 of H20 that prefill or decode (the local
PD cluster), 100 Gbps between them, a 1T hybrid model. Profiles are curves through measured points; the H200's are
published (table 5), the H20's are calibrated from two published rates:
""")
print(table(["tokens", "KVCache, MiB", "H200 prefill, s", "published", "H20 prefill, s (calibrated)"],
            [(point.tokens, f"{fast.kv_bytes(point.tokens) / 2**20:.1f}", f"{fast.prefill_s(point.tokens):.2f}",
              f"{point.prefill_s:.2f}", f"{slow.prefill_s(point.tokens):.2f}") for point in fast.points]))

prompts = [lengths.quantile(q) for q in (0.1, 0.5, 0.9, 0.99)]
longer_share = lengths.mean_above(fast.prefill_s, prompts[1]) / 2 / lengths.mean(fast.prefill_s)
print(f"\nPrompts are log-normal: a tenth is below {prompts[0]:,.0f} tokens, half below {prompts[1]:,.0f}, "
      f"a tenth above {prompts[2]:,.0f},\none in a hundred above {prompts[3]:,.0f}. "
      f"The longer half makes {longer_share:.0%} of the prefill work.")

print("""
2. The threshold: equations 3, 4 and 6

Send a prompt to the PrfaaS cluster if it is longer than t. Raise t, and the PrfaaS cluster sees fewer requests and
sustains a higher total rate, Theta_prfaas / p, while the local prefill instances see more: Theta_pdp / (1 - p) falls.
The system is as fast as the lower of the two, if decode keeps up. With N_p = 3 and N_d = 5 (the paper's figure 5(b)):
""")
points = sweep(fleet, lengths, [*range(0, 16_000, 5000), 17_500, 19_400, 22_500, *range(25_000, 61_000, 10_000)], [3])
best_here = max(points, key=lambda point: point.lambda_max)
rows = [(f"{point.threshold:,}", f"{point.offloaded_fraction:.2f}", f"{point.bounds['prfaas compute']:.2f}",
         f"{point.bounds['pdp']:.2f}" if point.offloaded_fraction < 1 else "–", f"{point.lambda_max:.2f}",
         bar(point.lambda_max, 4) + (" ◄" if point is best_here else "")) for point in points]
print(table(["t", "p", "Θ_prfaas/p", "Θ_pdp/(1-p)", "Λ_max", "requests/s"], rows))
print(f"\nThe peak is where the two bounds cross (equation 7): {best_here.bounds['prfaas compute']:.2f} and "
      f"{best_here.bounds['pdp']:.2f} at t = {best_here.threshold:,}.")

print("""
3. The split: equations 5 and 8

Each PD instance can prefill or decode. At t = 19,400 (the paper's figure 5(a)):
""")
points = sweep(fleet, lengths, [paper.PUBLISHED_THRESHOLD], range(1, fleet.pd_instances))
peak = max(points, key=lambda point: point.lambda_max)
print(table(["N_p / N_d", "Θ_pdd", "binds", "Λ_max", "requests/s"],
            [(f"{point.n_p} / {point.n_d}", f"{point.theta_pdd:.2f}", point.binding_stage, f"{point.lambda_max:.2f}",
              bar(point.lambda_max, 4) + (" ◄" if point is peak else "")) for point in points]))
decode = theta_pdd(n_d=1, bs_max=slow.bs_max, t_decode_s=slow.t_decode_s, output_tokens=fleet.output_tokens)
print(f"\nOne decode instance finishes {decode:.3f} requests/s: {slow.bs_max} at once, {slow.t_decode_s * 1000:.0f} ms "
      f"a token, {fleet.output_tokens:,} tokens each.")

print("""
4. Search both: table 6

Every threshold on a grid of 100 tokens with every split, for three deployments of the paper and one that it lacks: both
kinds of hardware, but each request goes to the least loaded prefill instance whatever its length.
""")
plans = {"PrfaaS-PD": (fleet, plan(fleet, lengths)), "least-loaded": (fleet, plan_least_loaded(fleet, lengths)),
         "naive (all offloaded)": (fleet, plan(fleet, lengths, n_p=0, threshold=0)),
         "homogeneous (12 H20)": (paper.paper_fleet(0, 12), plan(paper.paper_fleet(0, 12), lengths))}
published = {"PrfaaS-PD": "prfaas_pd", "naive (all offloaded)": "naive", "homogeneous (12 H20)": "homogeneous"}
baseline = plans["homogeneous (12 H20)"][1].lambda_max
rows = []
for name, (deployment, found) in plans.items():
    mean_s, p90_s = first_token_times(deployment, lengths, found)
    paper_says = paper.TABLE_6.get(published.get(name), {})
    rows.append((name, f"{found.threshold:,.0f}" if name == "PrfaaS-PD" else "–",
                 f"{found.n_prfaas} / {found.n_p} / {found.n_d}", f"{found.lambda_max:.2f}",
                 f"{paper_says['lambda_max']:.2f}" if paper_says else "–", f"{found.lambda_max / baseline:.2f}",
                 f"{mean_s:.2f} / {p90_s:.2f}", f"{found.egress_gbps:.1f}"))
headers = ["deployment", "t", "N_prfaas / N_p / N_d", "Λ_max", "paper", "ratio", "TTFT mean / P90, s", "egress, Gbps"]
print(table(headers, rows))
best, least = plans["PrfaaS-PD"][1], plans["least-loaded"][1]
print(f"\nTwo kinds of hardware already give {least.lambda_max / baseline:.2f}×; choosing by length makes it "
      f"{best.lambda_max / baseline:.2f}×, and keeps the long prompts off the\nslow instances, as the P90 shows. "
      "TTFT here is service without waiting; chapter 12 simulates the queues.")

print("""
5. What would more buy? And what if the link were thin, or the traffic different?
""")
rows = [(change, f"{more.threshold:,.0f}", f"{more.n_p} / {more.n_d}", f"{more.lambda_max:.2f}", more.binding_stage)
        for change, more in [("as it is", best), *sensitivity(fleet, lengths)]]
for gbps in (10, 5, 2):
    thin = plan(replace(fleet, link_gbps=gbps), lengths)
    rows.append((f"a link of {gbps} Gbps", f"{thin.threshold:,.0f}", f"{thin.n_p} / {thin.n_d}",
                 f"{thin.lambda_max:.2f}", thin.binding_stage))
half_cached = EmpiricalLengths(length / 2 for length in lengths.values)  # half of every prompt is a prefix-cache hit
cached = plan(fleet, half_cached)
rows.append(("half of each prompt cached", f"{cached.threshold:,.0f}", f"{cached.n_p} / {cached.n_d}",
             f"{cached.lambda_max:.2f}", cached.binding_stage))
print(table(["", "t", "N_p / N_d", "Λ_max", "binds"], rows))

print(f"""
Shown: t = {best.threshold:,.0f} tokens and N_p : N_d = {best.n_p} : {best.n_d} serve {best.lambda_max:.2f} requests/s,
found by search and modelled, not run. When the link or the lengths change, so does the best threshold.
Next: tutorials/11_the_router.py, which applies it to one request at a time.""")
