"""The two kinds of failure a person meets: a mistake of theirs, and a request that could not be finished."""

import argparse
import os
import sys


class UserError(Exception):
    """A user's mistake. The message is one line that names the thing, the value and the limit (exit status 2)."""


class RequestError(Exception):
    """A request that ends without tokens. `kind` is a stable short name (`deadline`, `link_lost`, `aborted`, …)."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a `UserError` like any other mistake: one line instead of the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def exit_on_user_error(main):
    """Wrap a program's `main`: a `UserError` becomes one line on stderr and exit status 2, never a traceback."""

    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:  # whoever read our output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped
