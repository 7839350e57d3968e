"""What every chapter shares and does not show: how it begins and ends, other processes, threads. Imports no torch."""

import argparse
import atexit
import contextlib
import logging
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import NoReturn

from exercises.checking import exercises_of, numbers_of, run_check

from minprfaas.errors import ArgumentParser, UserError

DEADLINE_S = 240.0  # of any wait: on a busy machine everything takes its time


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
    for starter in _starters:
        starter.end()
    if line is not None:
        print(line, file=sys.stderr)
    os._exit(status)  # from any state: threads may be in C++


# Other processes


@contextlib.contextmanager
def out_of_reach_of_the_keyboard() -> Iterator[None]:
    """Processes that are started in here do not hear Ctrl-C: the chapter ends them. They inherit a mask that keeps it
    from them; for the chapter itself one that comes in between only waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Starter:
    """A process from which a chapter's others are forked, as it is itself forked from the chapter's: when torch is
    imported, and before there are threads. So each of them starts in a tenth of the time that the import takes."""

    def __init__(self) -> None:
        self._here, there = multiprocessing.Pipe()
        self._one_at_a_time = threading.Lock()
        self._process = ForkProcess(target=_do_as_told, args=(there, self._here))
        with out_of_reach_of_the_keyboard():
            self._process.start()
        os.setpgid(self._process.pid, self._process.pid)  # one group with all that will be forked from it
        there.close()
        _starters.append(self)
        atexit.register(self.end)  # before multiprocessing's own, which would wait for it: the last one goes first

    def ask(self, order: Callable, *arguments: object) -> object:
        """What `order(processes, *arguments)` returns there."""
        with self._one_at_a_time:
            self._here.send((order, arguments))
            return self._here.recv()

    def end(self) -> None:
        """With all that was forked from it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


_starters: list[Starter] = []


def _do_as_told(here: Connection, there: Connection) -> None:
    """Until the chapter's process is gone, even by kill -9."""
    there.close()  # or the pipe would stay open without the chapter
    processes: dict[int, ForkProcess] = {}
    with contextlib.suppress(EOFError):
        while True:
            order, arguments = here.recv()
            here.send(order(processes, *arguments))
    os.killpg(0, signal.SIGKILL)


def _start(processes: dict[int, ForkProcess], call: Callable, arguments: tuple) -> int:
    process = ForkProcess(target=call, args=arguments)
    process.start()
    processes[process.pid] = process
    return process.pid


def _send_signal(processes: dict[int, ForkProcess], pid: int, number: int) -> None:
    if processes[pid].is_alive():
        os.kill(pid, number)


def _status(processes: dict[int, ForkProcess], pid: int, patience_s: float) -> int | None:
    processes[pid].join(patience_s)
    return processes[pid].exitcode


class Process:
    """`call(*arguments)` in a process of its own, which ends with the chapter's."""

    def __init__(self, starter: Starter, call: Callable, *arguments: object):
        self._starter, self.pid = starter, starter.ask(_start, call, arguments)

    def send_signal(self, number: int) -> None:
        self._starter.ask(_send_signal, self.pid, number)

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self.send_signal(signal.SIGKILL)
        self.status(DEADLINE_S)

    def status(self, patience_s: float = 0.0) -> int | None:
        """Its exit status; None if it still runs when patience is over."""
        return self._starter.ask(_status, self.pid, patience_s)


# Waiting


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
