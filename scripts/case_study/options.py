"""What the live case study can be told, and what can be checked of it without torch. Chapter 13; paper 4."""

import argparse
import os

from minprfaas.errors import ArgumentParser, require_number
from minprfaas.scheduling.profiles import Scale

NAMES = {"prfaas_pd": "PrfaaS-PD", "homogeneous": "homogeneous PD", "naive": "naive heterogeneous PD",
         "least_loaded": "least-loaded"}
POINTS = {"N_p = 2": (2, 19_400), "N_p = 5": (5, 19_400), "t = 8,000": (3, 8000), "t = 40,000": (3, 40_000)}
# Seconds that took 1.2 kept two quiet cores 52 to 59% busy, about half of that by what is there when nothing is asked;
# the other half is the less, the longer seconds take. Four runs at once kept sixteen cores 22% busy.
MANY_CORES, SCALE, SCALE_OF_FEW = 4, "1,128,0.00056", "1.1,128,0.00056"
FULL_REQUESTS, QUICK_REQUESTS = 384, 96
CORES_A_RUN = 4  # of 7 or 13 processes, most of which wait
SEEDS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ArgumentParser(description="The paper's table 6: planned, simulated, and run on a live cluster of emulated "
                                   "machines.", epilog="example: python scripts/live_case_study.py --quick")
    p.add_argument("--deployment", choices=(*NAMES, *POINTS), metavar="NAME", action="append", help="only this one: "
                   f"{', '.join(NAMES)} (all four), or a point of the figures: {', '.join(map(repr, POINTS))}")
    p.add_argument("--quick", action="store_true", help="two rates a deployment near the plan instead of a search: "
                   "the fewest that say something")
    p.add_argument("--requests", type=int, metavar="N", help=f"of a rate, of quick ones in the mean ({FULL_REQUESTS}; "
                   f"quick {QUICK_REQUESTS})")
    p.add_argument("--scale", metavar="TIME,LENGTH,BYTES", help=f"seconds times TIME, one token for LENGTH, bytes "
                   f"times BYTES (here {default_scale()}; each loop has its own); undone in every figure")
    p.add_argument("--results", default="case_study.jsonl", metavar="FILE.jsonl", help="what was measured; a run that "
                   "was interrupted goes on from it (case_study.jsonl)")
    p.add_argument("--plots", metavar="DIR", help="draw figures 5(a) and 5(b) into DIR, with what was measured on the "
                   "modelled lines; four more points are run for them (needs the `plots` extra)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (0)")
    p.add_argument("--loops", nargs="*", metavar="LOOP", help="instead: each scheduling loop with and without, "
                   "simulated and live: line, lengths, cache (all three)")
    p.add_argument("--soak", type=float, metavar="MINUTES", help="instead: PrfaaS-PD at 90%% of its measured rate, "
                   "while the weather changes, nodes are killed and roles change")
    p.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"of each loop ({SEEDS})")
    p.add_argument("--jobs", type=int, default=jobs_here(), metavar="N", help="runs at once, each of 7 or 13 processes "
                   f"(one for four cores: here {jobs_here()})")
    p.add_argument("--trace", metavar="FILE.jsonl", help="conversations for --loops cache (made-up ones)")
    return p


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The same, with as many requests as the kind of study has. UserError names the first option out of range."""
    if args.requests is None:
        args.requests = QUICK_REQUESTS if args.quick else FULL_REQUESTS
    require_number("--seed", args.seed, least=0, whole=True)
    require_number("--jobs", args.jobs, least=1, most=64, whole=True)
    require_number("--requests", args.requests, least=16, most=100_000, whole=True)
    require_number("--seeds", args.seeds, least=1, most=100, whole=True)
    if args.soak is not None:
        require_number("--soak", args.soak, least=1, most=24 * 60)
    if args.scale is not None:
        Scale.parse(args.scale)
    return args


def default_scale() -> str:
    """The one that this machine's cores can keep up with."""
    return SCALE if (os.cpu_count() or 1) >= MANY_CORES else SCALE_OF_FEW


def jobs_here() -> int:
    """How many runs this machine carries at once."""
    return max(1, (os.cpu_count() or 1) // CORES_A_RUN)
