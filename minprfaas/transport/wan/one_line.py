"""An error as one line, as logs, events and screens want it: torch and Gloo append their C++ stack. Chapter 14."""

import re

# Gloo begins with the place in its source, "[/…/tcp/pair.cc:547] ", and for a failed check names the condition as well.
_GLOO_PLACE = re.compile(r"^\[[^\]]*\.(?:cc|h|cpp):\d+\] ")


def one_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 200 characters, without C++ source places and stack frames."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    for advice in ("Exception raised from", "This is typically caused by"):  # torch's C++ stack; Gloo's good wishes
        first = first.partition(advice)[0].strip()
    return _GLOO_PLACE.sub("", first)[:200] or type(error).__name__
