"""The two kinds of failure a person meets: a mistake of theirs, and a request that could not be finished.

Chapter 15.
"""

import argparse
import atexit
import errno
import functools
import importlib
import math
import operator
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing, the value and the limit (exit status 2)."""


class RequestError(Exception):
    """A request that ends without tokens. `kind` is a stable short name (`deadline`, `link_lost`, `aborted`, …)."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


# Gloo begins with the place in its source, "[/…/tcp/pair.cc:547] ", and for a failed check names the condition as well.
_GLOO_PLACE = re.compile(r"^\[[^\]]*\.(?:cc|h|cpp):\d+\] ")


def one_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 200 characters, without C++ source places and stack frames."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    for advice in ("Exception raised from", "This is typically caused by"):  # torch's C++ stack; Gloo's good wishes
        first = first.partition(advice)[0].strip()
    return _GLOO_PLACE.sub("", first)[:200] or type(error).__name__


def require_number(what: str, value: object, above: float | None = None, least: float | None = None,
                   most: float | None = None, whole: bool = False) -> None:
    """Raise UserError unless `value` is a finite number (a whole one, if asked for) within the given limits."""
    is_right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)  # which Python counts
    is_right = is_right and abs(value) < math.inf  # a NaN is not
    rules = []
    for words, limit, is_within in (("above", above, operator.gt), ("of at least", least, operator.ge),
                                    ("of at most", most, operator.le)):
        if limit is not None:
            rules.append(f"{words} {limit:,}")
            is_right = is_right and is_within(value, limit)
    if not is_right:
        rule = f"{'whole ' if whole else ''}number {' and '.join(rules)}".rstrip()
        raise UserError(f"{what} is {shown(value)}; it must be a {rule}")


def require_unicode(what: str, text: str) -> None:
    """Raise UserError unless `text` can be written as UTF-8: JSON and command lines can spell half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has {text[error.start]!r} at character {error.start + 1}, half of a surrogate pair; "
                        "it must be whole Unicode") from None


def require_host(what: str, host: str) -> None:
    """Raise UserError for what can be no host's name or address, as 127..0.0.1: sockets raise ever other errors."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise UserError(f"{what} is {shown(host)}, which is no name or address of a host: {error}") from None


def shown(value: object) -> str:
    """A value as a line can hold it: an int of 5,000 digits raises ValueError when it is printed."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a `UserError` like any other mistake: one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        shortened = message if len(message) <= 300 else message[:297] + "..."  # it may quote a number of 5,000 digits
        raise UserError(f"{shortened} (see {self.prog} --help)")


def exit_on_user_error(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a program's `main`: a `UserError` becomes one line on stderr and exit status 2, never a traceback."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        _fill_standard_descriptors()
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # its descriptor was closed before we began
                setattr(sys, name, open(os.devnull, "w"))
            elif hasattr(getattr(sys, name), "reconfigure"):  # a test's stand-in has none
                getattr(sys, name).reconfigure(errors="replace")  # a terminal without an arrow is no reason to die
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()  # here, where it can still be said that the disk is full
            return status
        except UserError as error:
            _end(2, f"error: {error}")
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes
            if error.errno == errno.EPIPE:  # whoever read our output has gone, as `head` does
                raise SystemExit(1) from None
            _end(2, f"error: the output cannot be written: {error.strerror}")
        except KeyboardInterrupt:
            _end(130, "interrupted")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's: who made no tensor has not imported it
                raise
            _end(1, f"error: {one_line(error)}")

    return wrapped


def _fill_standard_descriptors() -> None:
    """Lead those of descriptors 0 to 2 nowhere that were closed before we began: what is opened next would take their
    numbers, and be written into as if it were a terminal."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _end(status: int, line: str) -> None:
    print(line.replace("\n", " "), file=sys.stderr)
    raise SystemExit(status) from None


@contextmanager
def long_import() -> Iterator[None]:
    """For imports that wait for torch. An interrupt ends the process at once: what is being imported may swallow a
    KeyboardInterrupt, or make another error of it."""
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_program(module: str) -> None:
    """Import `module`, run its `main(argv)` and exit with its status: an interrupt or a mistake during the import gets
    its one line as well."""

    @exit_on_user_error
    def imported_and_run() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with long_import():
            main = importlib.import_module(module).main
        return main(sys.argv[1:])

    try:
        status = imported_and_run()
    except SystemExit as end:
        status = end.code
    _leave(status or 0)


def _end_at_once(*_: object) -> NoReturn:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _leave(status: int) -> NoReturn:
    """End this process without what C++ does at its end: PyTorch's threads for a peer that was killed may still be
    there, and C++ answers a thread that nobody joined with abort(), which turns a good run's status into 134."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = 1
    os._exit(status)
