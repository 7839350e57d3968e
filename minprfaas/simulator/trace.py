"""Mooncake-format traces: reading real ones, and writing small ones of our own. Chapter 12.

A line is a JSON object: timestamp (ms), input_length, output_length, and hash_ids, one for each 512-token block of the
prompt, each of which stands for the whole prefix up to there.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from minprfaas.errors import UserError, require_number
from minprfaas.files import write_whole

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    timestamp_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


def read_trace(path: str | Path) -> list[TraceRequest]:
    """All requests in order of time. Raises UserError, with file and line number, for anything malformed or empty."""
    requests = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"trace {path} cannot be read: {error}") from None
    if not requests:
        raise UserError(f"trace {path} is empty; it needs at least 1 request")
    return sorted(requests, key=lambda request: request.timestamp_s)


def _parse(line: str, where: str) -> TraceRequest:
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
    return TraceRequest(raw["timestamp"] / 1000, raw["input_length"], raw["output_length"], tuple(hashes))


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
