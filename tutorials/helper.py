"""What every chapter shares and does not show: how it begins and ends, other processes, threads. Imports no torch."""

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

from exercises.checking import exercises_of, numbers_of, run_check

from minprfaas.errors import ArgumentParser, UserError

DEADLINE_S = 240.0  # of any wait: on a busy machine a process takes its time to import torch
_started: list[subprocess.Popen] = []


def path_of(name: str) -> str:
    """The path of a file beside the chapters."""
    return str(Path(__file__).resolve().parent / name)


# Beginning and ending


def begin(doc: str | None, options: Mapping[str, dict] | None = None) -> argparse.Namespace:
    """Answer `--help` and `--check N`; return the values of the chapter's own `options` (name -> what argparse's
    `add_argument` takes). From now on Ctrl-C ends the chapter with one line, a mistake of the user with another, and a
    reader who has left, as `head` does, with none. Whatever the chapter has started ends with it. A notebook has no
    command line: there this does nothing, and every option has its default."""
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, how in (options or {}).items():
        parser.add_argument(name, **how)
    if "ipykernel" in sys.modules:  # where `__doc__` is not the chapter's
        return parser.parse_args([])
    chapter = re.search(r"Chapter (\d\d)", doc)[1]
    if exercises_of(chapter).exists():
        parser.add_argument("--check", metavar="N", help=f"check your answer to exercise N, given in "
                                                         f"tutorials/exercises/{exercises_of(chapter).name}")
    signal.signal(signal.SIGINT, lambda number, frame: _end(130, "interrupted"))
    sys.excepthook = _on_exception
    arguments = parser.parse_args()
    if getattr(arguments, "check", None) is not None:
        _check(chapter, arguments.check)
    logging.disable(logging.WARNING)  # what a link would log is told by the chapter
    atexit.register(_end_processes)
    if sys.stdout is not None and not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=True)  # so that a reader who has left is noticed at the next line
    return arguments


def _check(chapter: str, number: str) -> NoReturn:
    """Say whether the answer to one exercise is right, and exit with status 0 if it is."""
    numbers = numbers_of(chapter)
    if number not in map(str, numbers):
        raise UserError(f"--check {number}: chapter {chapter} has the exercises {', '.join(map(str, numbers))}")
    line, status = run_check(chapter, int(number))
    print(line)
    sys.exit(status)


def _on_exception(kind: type, error: BaseException, trace: object) -> None:
    if kind is BrokenPipeError:
        _end(1, None)
    if issubclass(kind, UserError):
        _end(2, f"error: {error}")
    sys.__excepthook__(kind, error, trace)
    _end(1, None)


def _end(status: int, line: str | None) -> None:
    _end_processes()
    if line is not None:
        print(line, file=sys.stderr)
    os._exit(status)  # from any state: threads may be in C++


def _end_processes() -> None:
    for process in [*_started, *multiprocessing.active_children()]:
        process.kill()


@contextlib.contextmanager
def out_of_reach_of_the_keyboard() -> Iterator[None]:
    """Processes that are started in here do not hear Ctrl-C: the chapter ends them. They inherit a mask that keeps it
    from them; for the chapter itself one that comes in between only waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(*arguments: str, errors: IO | None = None) -> subprocess.Popen:
    """A Python process, which ends with this one. What it says on stderr goes into `errors`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out_of_reach_of_the_keyboard():
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=errors)
    _started.append(process)
    return process


def in_parallel(*calls: Callable) -> list:
    """Run the calls in threads; returns their results in order. Raises TimeoutError after DEADLINE_S."""
    results: dict[int, object] = {}
    threads = [threading.Thread(target=lambda at=at, call=call: results.update({at: call()}), daemon=True)
               for at, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    if len(results) < len(calls):
        raise TimeoutError(f"a thread has no result after {DEADLINE_S:g} s")
    return [results[at] for at in range(len(calls))]


def wait_until(reached: Callable[[], bool], what: str) -> float:
    """Look every few ms; returns the seconds that it took. Raises TimeoutError after DEADLINE_S."""
    began_s = time.monotonic()
    while not reached():
        if time.monotonic() - began_s > DEADLINE_S:
            raise TimeoutError(f"{what} did not happen within {DEADLINE_S:g} s")
        time.sleep(0.005)
    return time.monotonic() - began_s
