"""The benchmarks, and the types of their options: argparse makes one line of a number that none of them can use."""

from argparse import ArgumentTypeError


def at_least_one(text: str) -> int:
    """A whole number, of things."""
    if int(text) < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number."""
    if not 0 < float(text) < float("inf"):
        raise ArgumentTypeError(f"{text} is not above 0")
    return float(text)
