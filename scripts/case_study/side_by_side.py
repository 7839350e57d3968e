"""Runs side by side: each in a process of its own, as many at once as the cores carry. Chapter 13."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess

from tqdm import tqdm

from minprfaas.cluster.launch import watch_parent
from minprfaas.errors import UserError, exit_on_user_error

LOOK_EVERY_S = 1.0
BAR = "{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} to go"


@dataclass(frozen=True)
class Job:
    """Something to do, and about how long that takes."""

    name: str
    do: Callable[[], object]
    expected_s: float


def expected_s(jobs: Sequence[Job], at_once: int) -> float:
    """How long all of them take, about."""
    return max([job.expected_s for job in jobs] + [sum(job.expected_s for job in jobs) / at_once], default=0.0)


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Do them, the longest first; a bar tells how much time is left. When all are over, UserError names those that
    failed."""
    waiting, under_way, failed = sorted(jobs, key=lambda job: job.expected_s), {}, []
    with tqdm(total=round(expected_s(jobs, at_once)), bar_format=BAR) as bar:
        looked_at_s = time.monotonic()
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                job = waiting.pop()
                process = ForkProcess(target=_do, args=(job.do,), name=job.name)
                process.start()
                under_way[process.sentinel] = process
            for sentinel in wait(list(under_way), LOOK_EVERY_S):
                process = under_way.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed.append(process.name)
            passed_s = time.monotonic() - looked_at_s
            looked_at_s += passed_s
            bar.update(min(passed_s, bar.total - bar.n))  # what is late has no end that is known
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs have failed ({', '.join(failed)}); the same command again "
                        "runs only what is missing")


def _do(do: Callable[[], object]) -> None:
    watch_parent()

    def main(argv: list[str]) -> int:
        do()
        return 0

    sys.exit(exit_on_user_error(main)([]))
