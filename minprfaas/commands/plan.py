"""`python -m minprfaas plan`: the paper's table 6, equation 2's cases, or a plan for one's own fleet.

Chapters 10 and 13.
"""

import argparse
import json
from dataclasses import replace
from math import inf, isfinite

from minprfaas.errors import UserError
from minprfaas.observe.plots import draw_plan, prepare_plots
from minprfaas.observe.tables import table
from minprfaas.scheduling import paper_case as paper
from minprfaas.scheduling.lengths import LengthDistribution, TruncatedLogNormal
from minprfaas.scheduling.planner import MAX_INSTANCES, Fleet, Plan, first_token_times, plan, sensitivity
from minprfaas.scheduling.profiles import Profile
from minprfaas.scheduling.throughput import egress_needed_gbps, kv_throughput_gbps
from minprfaas.simulator.arrivals import read_trace

FLEET_NUMBERS = ("prfaas_instances", "pd_instances", "link_gbps", "output_tokens")
OWN_OPTIONS = ("pd_profile", *FLEET_NUMBERS, "lognormal", "trace", "threshold", "n_p")
DEPLOYMENTS = {"prfaas_pd": "PrfaaS-PD", "homogeneous": "homogeneous", "naive": "naive", "least_loaded": "least-loaded"}
ROWS = {  # JSON key: (label, format)
    "threshold": ("threshold t, tokens", ",.0f"), "n_prfaas": ("N_prfaas", "d"),
    "n_p": ("N_p", "d"), "n_d": ("N_d", "d"),
    "theta_prfaas": ("Θ_prfaas, req/s", ".2f"), "theta_pdp": ("Θ_pdp, req/s", ".2f"),
    "theta_pdd": ("Θ_pdd, req/s", ".2f"), "lambda_max": ("Λ_max, req/s", ".2f"), "ratio": ("ratio", ".2f"),
    "ttft_mean_s": ("TTFT mean, s", ".2f"), "ttft_p90_s": ("TTFT P90, s", ".2f"),
    "offloaded_fraction": ("offloaded fraction", ".3f"), "mean_offloaded_tokens": ("their mean, tokens", ",.0f"),
    "egress_gbps": ("egress, Gbps", ".1f")}
BY_WIRE = {"wire": ("wire", ""), "rows_share": ("of a row", ".0%"),
           **{key: ROWS[key] for key in ("lambda_max", "threshold", "offloaded_fraction", "egress_gbps")},
           "gbps_32k": ("Φ_kv at 32K, Gbps", ".2f")}
BY_RELAY = {"link_gbps": ("link, Gbps", "g"), "relay": ("relay", ""),
            **{key: ROWS[key] for key in ("lambda_max", "theta_prfaas", "threshold", "offloaded_fraction",
                                          "ttft_mean_s", "ttft_p90_s")}}
EGRESS = {"model": ("model", ""), "tokens": ("tokens", ","), "gpus": ("GPUs", ","),
          "instance_gbps": ("Φ_kv, Gbps (paper)", ".2f"), "egress_gbps": ("B_out, Gbps", ",.0f"),
          "paper": ("paper says", "")}
WIRE_SHARES = {"exact, bf16": 1.0, "fp8, int8": 33 / 64, "int4": 5 / 16}  # see transport/encoding.py
NOTES = """\
modelled: every figure but the columns `paper`, which are table 6's own; TTFT is without waiting.
calibrated: the paper prints no H20 prefill times; two of its rates (1.64 and 2.11 req/s) fix them, so these agree by
  construction, and the H20's part of the other figures rests on them. BS_max = 20 is read out of table 6's Θ_pdd.
least-loaded: both kinds of hardware, no threshold, requests to the least loaded prefill instance; not in the paper."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to plan, for which fleet, and how to show it."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--case", choices=["paper"], help="the paper's case study: table 6 beside the paper's numbers")
    what.add_argument("--profile", metavar="FILE",
                      help="plan for this profile of a PrfaaS instance: a JSON file, or a shipped one by name, such "
                           "as kimi-linear-48b-8xh100")
    parser.add_argument("--egress", action="store_true", help="equation 2's cases: the egress of a prefill cluster")
    fleet = parser.add_argument_group("fleet, link and lengths (with --profile)")
    add_fleet_options(fleet)
    fleet.add_argument("--lognormal", type=float, nargs=4, metavar=("MU", "SIGMA", "LOW", "HIGH"),
                       help="log-normal lengths within LOW..HIGH tokens (default: the paper's, 9.9 1 128 131072)")
    fleet.add_argument("--trace", metavar="FILE", help="lengths of a Mooncake-format trace, nothing cached")
    fleet.add_argument("--threshold", type=float, metavar="T", help="plan for this threshold (default: search)")
    fleet.add_argument("--n-p", type=int, metavar="N", help="plan for this many PD prefill instances (default: search)")
    parser.add_argument("--by-wire", action="store_true", help="also what each encoding of the wire would make of it")
    parser.add_argument("--by-relay", action="store_true", help="also what relay decode would take of the PrfaaS "
                        "cluster, and give to the first tokens, on this link and slower ones")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plots", metavar="DIR", help="draw figures 2, 5(a), 5(b) into DIR (needs matplotlib)")


def add_fleet_options(group: argparse._ArgumentGroup) -> None:
    """What a fleet is made of, but for `--profile`."""
    group.add_argument("--pd-profile", metavar="FILE", help="profile of a PD instance (default: the same as --profile)")
    group.add_argument("--prfaas-instances", type=int, metavar="N", help="instances of the PrfaaS cluster (default: 4)")
    group.add_argument("--pd-instances", type=int, metavar="N", help="instances of the PD cluster (default: 8)")
    group.add_argument("--link-gbps", type=float, metavar="GBPS", help="bandwidth between them (default: 100)")
    group.add_argument("--output-tokens", type=float, metavar="N", help="mean length of an answer (default: 1024)")


def fleet_of(args: argparse.Namespace) -> Fleet:
    """The paper's fleet, but for what the options say."""
    fleet = paper.paper_fleet()
    if args.profile:
        own = Profile.read(args.profile)
        fleet = replace(fleet, prfaas_profile=own, pd_profile=own)
    if args.pd_profile:
        fleet = replace(fleet, pd_profile=Profile.read(args.pd_profile))
    return replace(fleet, **{name: getattr(args, name) for name in FLEET_NUMBERS if getattr(args, name) is not None})


def run(args: argparse.Namespace) -> None:
    """Plan, draw if asked, and print. Raises UserError."""
    _check_options(args)
    if args.plots:
        prepare_plots(args.plots)
    if not (args.case or args.profile):
        cases = _egress_cases()
        return print(json.dumps(cases, indent=2)) if args.json else _print_egress(cases)
    if args.case:
        lengths, plans = paper.paper_lengths(), paper.paper_plans()
        fleet, best = plans["prfaas_pd"]
        result = {name: _figures(*planned, lengths, plans["homogeneous"][1]) for name, planned in plans.items()}
    else:
        fleet, lengths = fleet_of(args), _own_lengths(args)
        best = plan(fleet, lengths, args.n_p, threshold_of(args, lengths))
        result = {"plan": _figures(fleet, best, lengths), "binding_stage": best.binding_stage,
                  "bounds": {stage: rate if isfinite(rate) else None for stage, rate in best.bounds.items()}}
    more = sensitivity(fleet, lengths)
    if args.profile:
        result["sensitivity"] = {change: changed.lambda_max for change, changed in more}
        result["without_prfaas"] = {name: other.lambda_max for name, other in _without_prfaas(fleet, lengths).items()}
    if args.by_wire:
        result["by_wire"] = _by_wire(fleet, lengths)
    if args.by_relay:
        result["by_relay"] = _by_relay(fleet, lengths)
    if args.egress:
        result["egress"] = _egress_cases()
    drawn = draw_plan(args.plots, fleet, lengths, best, _curves(args, fleet)) if args.plots else []
    if args.json:
        return print(json.dumps(result, indent=2))
    if args.case:
        _print_table_6(result)
    else:
        _print_own(fleet, lengths, best, result)
    _print_margins(best, more)
    if args.by_wire:
        print("\nBy the encoding of the wire (modelled): what grows with each token crosses in so much of its bytes, "
              "state of one size exactly.\n")
        _print_rows(BY_WIRE, result["by_wire"])
    if args.by_relay:
        print("\nWith relay decode and without (modelled; an instance relays one request at a time, and prefills none "
              "meanwhile):\n")
        _print_rows(BY_RELAY, result["by_relay"])
    if args.egress:
        print()
        _print_egress(result["egress"])
    for path in drawn:
        print(f"drawn: {path}")


def _check_options(args: argparse.Namespace) -> None:
    for option in OWN_OPTIONS:
        if getattr(args, option) is not None and not args.profile:
            raise UserError(f"--{option.replace('_', '-')} goes with --profile; the paper's case is as published")
    if not (args.case or args.profile) and (args.plots or not args.egress):
        raise UserError("there is nothing to plan" + (" or draw" if args.plots else "")
                        + "; give --case paper or --profile FILE, or --egress alone")


def _curves(args: argparse.Namespace, fleet: Fleet) -> dict[str, list[tuple[int, float]]]:
    """Figure 2's: (tokens, Gbps an instance) of each of the paper's models, or of one's own profiles."""
    if args.case:
        kinds = {name: "dense" if name in paper.TABLE_3_DENSE else "hybrid" for name in paper.TABLE_3_GBPS}
        return {f"{name} ({kinds[name]})": list(zip(paper.TABLE_3_TOKENS, gbps))
                for name, gbps in paper.TABLE_3_GBPS.items()}
    return {p.name: [(point.tokens, kv_throughput_gbps(point.kv_bytes, point.prefill_s)) for point in p.points]
            for p in (fleet.prfaas_profile, fleet.pd_profile)}


def _own_lengths(args: argparse.Namespace) -> LengthDistribution:
    if args.trace and args.lognormal:
        raise UserError("--trace and --lognormal are both given; lengths come from one of them")
    if not args.trace:
        return TruncatedLogNormal(*args.lognormal) if args.lognormal else paper.paper_lengths()
    return LengthDistribution(request.input_tokens for request in read_trace(args.trace))


def threshold_of(args: argparse.Namespace, lengths: LengthDistribution) -> float | None:
    """What `--threshold` says. UserError where no length could tell it from another."""
    longest = lengths.values[-1]
    if args.threshold is not None and not 0 <= args.threshold <= longest:
        raise UserError(f"--threshold {args.threshold:g} is outside the lengths; it must be from 0 to {longest:,.0f}")
    return args.threshold


def _figures(fleet: Fleet, of: Plan, lengths: LengthDistribution, baseline: Plan | None = None) -> dict:
    """What is printed of a plan, in the order of `ROWS`; null where a stage has no instances or no requests."""
    mean_s, p90_s = first_token_times(fleet, lengths, of)
    values = {**vars(of), "lambda_max": of.lambda_max, "ttft_mean_s": mean_s, "ttft_p90_s": p90_s,
              "egress_gbps": of.egress_gbps, "ratio": of.lambda_max / baseline.lambda_max if baseline else None}
    return {key: values[key] if values[key] is not None and isfinite(values[key]) else None for key in ROWS}


def _print_table_6(result: dict) -> None:
    headers, columns = [""], [[label for label, _ in ROWS.values()]]
    for name, title in DEPLOYMENTS.items():
        published = paper.TABLE_6.get(name)
        headers.append(title)
        columns.append([_cell(key, result[name][key]) for key in ROWS])
        if published:
            headers += ["paper", "diff"]
            columns.append([_cell(key, published.get(key)) for key in ROWS])
            columns.append([_difference(name, key, result[name][key], published.get(key)) for key in ROWS])
    print("Table 6: the best plan of each deployment, beside the paper's numbers\n")
    print(table(headers, list(zip(*columns))))
    print(f"\n{NOTES}\n")


def _without_prfaas(fleet: Fleet, lengths: LengthDistribution) -> dict[str, Plan]:
    """What the same money buys in one datacenter: the PD cluster alone, and with as many instances more."""
    together = fleet.pd_instances + int(fleet.prfaas_instances)
    # A single instance cannot both prefill and decode, and without PrfaaS instances there is nothing to compare.
    if not 1 < fleet.pd_instances < together <= MAX_INSTANCES:
        return {}
    alone = replace(fleet, prfaas_instances=0)
    more = replace(alone, pd_instances=together)
    return {"alone": plan(alone, lengths), "in_the_building": plan(more, lengths)}


def _print_own(fleet: Fleet, lengths: LengthDistribution, best: Plan, result: dict) -> None:
    print("The best plan (modelled; TTFT is without waiting)\n")
    rows = [(ROWS[key][0], _cell(key, value)) for key, value in result["plan"].items() if key != "ratio"]
    print(table(["", "plan"], rows), "\n")
    for profile in dict.fromkeys((fleet.prfaas_profile, fleet.pd_profile)):
        print(f"profile {profile.name}: the prefill curve passes within {profile.fit_error:.1%} of its measured points")
        if profile.source:
            print(f"profile {profile.name}: {profile.source}")
        if lengths.values[-1] > profile.points[-1].tokens:
            print(f"profile {profile.name}: lengths reach {lengths.values[-1]:,.0f} tokens and the measurements "
                  f"{profile.points[-1].tokens:,}; beyond them the curves are extrapolated")
    if result["without_prfaas"]:
        _print_gain(fleet, best, **result["without_prfaas"])
    print()


def _print_gain(fleet: Fleet, best: Plan, alone: float, in_the_building: float) -> None:
    """What the PrfaaS cluster is worth, and what the line takes from it."""
    count, gbps = fleet.prfaas_instances, fleet.link_gbps
    print("\n" + table(["", "Λ_max, req/s", "of alone"], [
        (f"{fleet.pd_instances} PD instances alone", f"{alone:.2f}", "1.00"),
        (f"… with {count} PrfaaS instances at {gbps:g} Gbps", f"{best.lambda_max:.2f}",
         f"{best.lambda_max / alone:.2f}"),
        (f"… with {count} PD instances more instead", f"{in_the_building:.2f}", f"{in_the_building / alone:.2f}")]))
    profile = fleet.prfaas_profile
    per_instance = [(point.tokens, kv_throughput_gbps(point.kv_bytes, point.prefill_s)) for point in profile.points]
    tokens, most_gbps = max(per_instance, key=lambda pair: pair[1])
    carried = gbps / most_gbps
    print(f"\nAt {tokens:,} tokens an instance emits {most_gbps:.1f} Gbps of KVCache (eq. 1, its highest): the line "
          f"carries {carried:.1f} of {count} such instances"
          + ("." if carried >= count else ", so the line decides before the prefill does."))


def _print_margins(best: Plan, more: list[tuple[str, Plan]]) -> None:
    bounds = [(stage, f"{rate:.2f}" if rate < inf else "–") for stage, rate in best.bounds.items()]
    print(table(["stage", "saturates at, req/s"], bounds))
    print(f"\n{best.binding_stage} binds first. What more would buy, planned anew:\n")
    rows = [(change, f"{changed.lambda_max:.2f}", f"{changed.lambda_max - best.lambda_max:+.2f}",
             _cell("threshold", changed.threshold), f"{changed.n_p} / {changed.n_d}", changed.binding_stage)
            for change, changed in more]
    print(table(["", "Λ_max, req/s", "gain, req/s", "t, tokens", "N_p / N_d", "binds"], rows))


def _by_wire(fleet: Fleet, lengths: LengthDistribution) -> list[dict]:
    """The best plan behind each encoding: of a bf16 cache, scales included, at rows of a multiple of 64 channels."""
    rows = []
    for wire, share in WIRE_SHARES.items():
        profile = fleet.prfaas_profile.encoded(share)
        gbps_32k = kv_throughput_gbps(profile.kv_bytes(32_768), profile.prefill_s(32_768))
        rows.append({"wire": wire, "rows_share": share, "gbps_32k": gbps_32k,
                     **_best_figures(replace(fleet, prfaas_profile=profile), lengths)})
    return rows


def _by_relay(fleet: Fleet, lengths: LengthDistribution) -> list[dict]:
    """The best plan with relay decode and without, on links down to a sixteenth."""
    links = [replace(fleet, link_gbps=fleet.link_gbps / part, relay=relay)
             for part in (1, 4, 8, 16) for relay in (False, True)]
    return [{"link_gbps": behind.link_gbps, "relay": behind.relay, **_best_figures(behind, lengths)}
            for behind in links]


def _best_figures(fleet: Fleet, lengths: LengthDistribution) -> dict:
    return _figures(fleet, plan(fleet, lengths), lengths)


def _egress_cases() -> list[dict]:
    cases = []
    for model, tokens, gpus, published in paper.EGRESS_CASES:
        gbps = paper.TABLE_3_GBPS[model][paper.TABLE_3_TOKENS.index(tokens)]
        needed_gbps = egress_needed_gbps(gpus, paper.GPUS_PER_INSTANCE, gbps)
        cases.append(dict(model=model, tokens=tokens, gpus=gpus, instance_gbps=gbps, egress_gbps=needed_gbps,
                          paper=published))
    return cases


def _print_egress(cases: list[dict]) -> None:
    print("Equation 2: the egress that a prefill cluster needs, B_out = N / P · Φ_kv, from the paper's table 3\n")
    _print_rows(EGRESS, cases)


def _print_rows(columns: dict[str, tuple[str, str]], rows: list[dict]) -> None:
    """`columns`: JSON key of a row -> (header, format)."""
    print(table([header for header, _ in columns.values()],
                [[_cell(key, row[key], columns) for key in columns] for row in rows]))


def _cell(key: str, value: object, columns: dict[str, tuple[str, str]] = ROWS) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None or value == inf else format(value, columns[key][1])


def _difference(name: str, key: str, value: float | None, published: float | None) -> str:
    if published is None or value is None:
        return ""
    return "calibrated" if (name, key) in paper.CALIBRATED else f"{value / published - 1:+.1%}"
