"""What every chapter shares and does not show: how it begins and ends, other processes, threads. Imports no torch."""

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import minprfaas  # noqa: F401  (silences what torch says of NumPy, if it comes before torch)

DEADLINE_S = 240.0  # of any wait: on a busy machine a process takes its time to import torch
_started: list[subprocess.Popen] = []


def path_of(name: str) -> str:
    """The path of a file beside the chapters."""
    return str(Path(__file__).resolve().parent / name)


# Beginning and ending


def begin(doc: str) -> None:
    """Answer `--help`; from now on Ctrl-C ends the chapter with one line, and a reader who has left, as `head` does,
    with none. Whatever the chapter has started ends with it. In a notebook this does nothing."""
    if "ipykernel" in sys.modules:
        return
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)  # what a link would log is told by the chapter
    signal.signal(signal.SIGINT, lambda number, frame: _end(130, "interrupted"))
    sys.excepthook = _on_exception
    atexit.register(_end_processes)
    if sys.stdout is not None and not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=True)  # so that a reader who has left is noticed at the next line


def _on_exception(kind: type, error: BaseException, trace: object) -> None:
    if kind is BrokenPipeError:
        _end(1, None)
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
    """Processes that are started in here do not hear Ctrl-C: the chapter ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
