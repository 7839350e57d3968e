"""Benchmark of the prefix index: hash and match a long prompt, memory of an entry, match time against index size."""

import json
import random
import statistics
import time
import tracemalloc

from tqdm import tqdm

from benches import at_least_one
from minprfaas.errors import ArgumentParser
from minprfaas.kvcache.ledger import BlockLedger, chain_keys, root_key

PROMPT_TOKENS, BLOCK_TOKENS = 128 * 1024, 64
SIZES = (2_048, 10_000, 100_000, 1_000_000)  # the smallest holds the prompt and nothing else


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=at_least_one, default=30, help="timings of which the median is printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(argv)

    token_ids = [random.Random(0).randrange(150_000) for _ in range(PROMPT_TOKENS)]
    rows = [measure(size, token_ids, args.repeats) for size in tqdm(SIZES, unit="index", disable=None, leave=False)]
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"a prompt of {PROMPT_TOKENS:,} tokens, {BLOCK_TOKENS} a block, one CPU core, median of {args.repeats}")
    print(f"{'entries':>10}  {'hash ms':>8}  {'match ms':>8}  {'hash + match ms':>15}  {'bytes an entry':>14}")
    for row in rows:
        print(f"{row['entries']:>10,}  {row['hash_ms']:>8.2f}  {row['match_ms']:>8.2f}  "
              f"{row['hash_ms'] + row['match_ms']:>15.2f}  {row['bytes_per_entry']:>14.0f}")
    last, first = rows[-1], rows[0]
    print(f"a {last['entries'] // first['entries']} times larger index takes "
          f"{last['match_ms'] / first['match_ms']:.1f} times as long to match")
    return 0


def measure(size: int, token_ids: list[int], repeats: int) -> dict[str, float]:
    """Fill an index with the prompt's chain and other chains up to `size` entries, then time it."""
    root = root_key(b"a model")
    tracemalloc.start()
    ledger = BlockLedger(size, has_tokens=True, has_state=False)
    for position, key in enumerate(chain_keys(root, token_ids, BLOCK_TOKENS)):
        insert(ledger, key, position + 1)
    for position in range(size - len(ledger.blocks)):
        insert(ledger, root_key(position.to_bytes(8, "little")), position + 1)
    bytes_per_entry = tracemalloc.get_traced_memory()[0] / len(ledger.blocks)
    tracemalloc.stop()

    hash_s, match_s = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        keys = chain_keys(root, token_ids, BLOCK_TOKENS)
        hashed = time.perf_counter()
        matched = ledger.match(keys)
        match_s.append(time.perf_counter() - hashed)
        hash_s.append(hashed - started)
        if matched != len(keys):
            raise RuntimeError(f"matched {matched} of {len(keys)} blocks")
    return {"entries": len(ledger.blocks), "hash_ms": statistics.median(hash_s) * 1e3,
            "match_ms": statistics.median(match_s) * 1e3, "bytes_per_entry": bytes_per_entry}


def insert(ledger: BlockLedger, key: bytes, blocks: int) -> None:
    ledger.release(ledger.insert_block(key, ledger.allocate(1), blocks * BLOCK_TOKENS))
