"""When requests arrive and how long they are: Poisson, bursty, diurnal, or from a trace. All seeded. Chapter 12.

A line of a Mooncake-format trace is a JSON object: timestamp (ms), input_length, output_length, and hash_ids, one for
each 512-token block of the prompt, each of which stands for the whole prefix up to there.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from minprfaas.errors import UserError, require_number
from minprfaas.files import read_lines, write_whole
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.simulator.nodes import BLOCK_TOKENS, SimRequest

BURST_FACTOR = 2.0  # how much faster a burst arrives than the mean
BURST_SHARE = 0.2  # of the time
BURST_MEAN_S = 20.0
DAY_SWING = 0.5  # how far the rate of a day swings above and below its mean
DAY_STRETCH = 0.6  # and the logarithm of its lengths, the other way


def poisson(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Arrival times without memory, `rate_rps` a second."""
    require_number("arrival rate", rate_rps, above=0)
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate_rps)
        yield at_s


def bursty(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """A Markov-modulated Poisson process: calm and burst alternate at random; the mean is `rate_rps`."""
    require_number("arrival rate", rate_rps, above=0)
    calm_rps = rate_rps * (1 - BURST_FACTOR * BURST_SHARE) / (1 - BURST_SHARE)
    calm_mean_s = BURST_MEAN_S * (1 - BURST_SHARE) / BURST_SHARE
    start_s, burst = 0.0, False
    while True:
        end_s = start_s + rng.expovariate(1 / (BURST_MEAN_S if burst else calm_mean_s))
        phase_rps = BURST_FACTOR * rate_rps if burst else calm_rps
        at_s = start_s + rng.expovariate(phase_rps)
        while at_s < end_s:
            yield at_s
            at_s += rng.expovariate(phase_rps)
        start_s, burst = end_s, not burst


def diurnal(rate_rps: float, rng: random.Random, period_s: float) -> Iterator[float]:
    """A day of `period_s`: the rate begins at its mean, rises, and falls below it."""
    for at_s in poisson(rate_rps * (1 + DAY_SWING), rng):
        if rng.random() * (1 + DAY_SWING) < 1 + DAY_SWING * math.sin(2 * math.pi * at_s / period_s):
            yield at_s


def day_lengths(period_s: float) -> Callable[[float], float]:
    """What lengths are multiplied by as the day goes: 0.55 in the busiest hour, 1.8 in the quietest."""
    return lambda at_s: math.exp(-DAY_STRETCH * math.sin(2 * math.pi * at_s / period_s))


def drawn(times: Iterable[float], count: int, lengths: LengthDistribution, output_tokens: int, rng: random.Random,
          scale: Callable[[float], float] | None = None) -> Iterator[SimRequest]:
    """`count` requests at `times`, with lengths drawn from the planner's own distribution; `scale(at_s)` stretches
    them as the day goes."""
    values = lengths.values
    for at_s in islice(times, count):
        length = values[int(rng.random() * len(values))]
        yield SimRequest(at_s, max(1, round(length * scale(at_s) if scale else length)), output_tokens)


def from_trace(trace: Iterable[SimRequest], speed: float = 1.0) -> Iterator[SimRequest]:
    """A trace's requests once more, `speed` times as fast as they were recorded."""
    require_number("trace speed", speed, above=0)
    for request in trace:
        yield replace(request, arrived_at_s=request.arrived_at_s / speed)


def read_trace(path: str | Path) -> list[SimRequest]:
    """All requests in order of time. Raises UserError, with file and line number, for anything malformed or empty."""
    lines = enumerate(read_lines("trace", path), 1)
    requests = [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not requests:
        raise UserError(f"trace {path} is empty; it needs at least 1 request")
    return sorted(requests, key=lambda request: request.arrived_at_s)


def _parse(line: str, where: str) -> SimRequest:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    if not isinstance(raw, dict) or any(name not in raw for name in names):
        raise UserError(f"{where}: not an object with {', '.join(names)}")
    for name, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
        require_number(f"{where}: {name}", raw[name], least=least, most=10**12, whole=True)
    hashes = raw["hash_ids"]
    if not isinstance(hashes, list) or not all(isinstance(one, int) for one in hashes):
        raise UserError(f"{where}: hash_ids is no list of whole numbers")
    return SimRequest(raw["timestamp"] / 1000, raw["input_length"], raw["output_length"], tuple(hashes))


def write_conversations(path: str | Path, requests: int, rate_rps: float, seed: int) -> None:
    """Write a made-up trace: `requests` turns of conversations that share a system prompt of one block and grow from
    turn to turn; a quarter of the turns begin a new one."""
    rng, now_ms, next_hash, open_chats, lines = random.Random(seed), 0.0, 1, [], []
    for _ in range(requests):
        now_ms += rng.expovariate(rate_rps) * 1000
        chat = [0] if not open_chats or rng.random() < 0.25 else open_chats.pop(rng.randrange(len(open_chats)))
        grown = rng.randint(1, 24)
        chat = [*chat, *range(next_hash, next_hash + grown)]
        next_hash += grown
        tokens, answer = len(chat) * BLOCK_TOKENS - rng.randrange(BLOCK_TOKENS), rng.randint(20, 600)
        lines.append(json.dumps(
            {"timestamp": int(now_ms), "input_length": tokens, "output_length": answer, "hash_ids": chat}))
        open_chats = [*open_chats[-63:], chat]
    write_whole(path, "\n".join(lines) + "\n")
