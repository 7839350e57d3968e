"""Traces of block hashes through the real index: the hits that a cache of a given size would have had. Chapter 06."""

import json
import os
from pathlib import Path

import pytest

from minprfaas.kvcache.replay import replay_trace

TRACE = Path(os.environ.get("MINPRFAAS_TRACE")
             or Path(__file__).resolve().parents[2] / "shared/data/mooncake_conversation_trace.jsonl")
SMALL = [[1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3, 7], [5, 8], [1, 2, 3, 7]]  # 18 blocks, 10 of them seen before


def ideal_hits(requests):
    """Blocks of each request up to its first one that no earlier request had: counted with a set and nothing else."""
    seen, hits = set(), 0
    for blocks in requests:
        hits += next((count for count, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
    return hits


def test_without_a_limit_every_block_seen_before_is_a_hit():
    (row,) = replay_trace(SMALL, [None])
    assert (row.requests, row.blocks, row.hit_blocks, row.evicted_entries) == (6, 18, 10, 0)
    assert row.hit_blocks == ideal_hits(SMALL) and row.hit_ratio == 10 / 18


def test_a_smaller_cache_hits_less():
    tiny, small, enough = replay_trace(SMALL, [1, 4, 8])
    assert tiny.hit_blocks < small.hit_blocks < enough.hit_blocks == ideal_hits(SMALL)
    assert tiny.evicted_entries > 0 and small.evicted_entries > 0 and enough.evicted_entries == 0


def test_a_hybrid_model_hits_only_where_a_snapshot_was_taken():
    (every,) = replay_trace(SMALL, [None], state_blocks=3, snapshot_every=1)
    (ends,) = replay_trace(SMALL, [None], state_blocks=3, snapshot_every=1000)
    # [1,2,3] at its end; [1,2,4] none, but it parts from the first at 2; [1,2,3,7] at 3, then whole; [5,8] none.
    assert every.hit_blocks == 10 and ends.hit_blocks == 3 + 4


def test_without_a_limit_nothing_is_evicted_for_snapshots_either():
    prompts = [[10 * number + block for block in range(4)] for number in range(8)]
    (row,) = replay_trace([*prompts, prompts[0]], [None], state_blocks=3, snapshot_every=1)
    assert (row.hit_blocks, row.evicted_entries) == (4, 0)


def test_an_empty_trace_has_no_hits():
    (row,) = replay_trace([], [None])
    assert (row.blocks, row.hit_ratio) == (0, 0.0)


@pytest.mark.skipif(not TRACE.exists(), reason=f"no conversation trace at {TRACE}; set MINPRFAAS_TRACE")
def test_the_conversation_trace_reaches_its_ideal_hit_ratio():
    requests = [json.loads(line)["hash_ids"] for line in TRACE.read_text().splitlines()]
    small, unlimited = replay_trace(requests, [10_000, None])
    assert unlimited.hit_blocks == ideal_hits(requests)
    assert round(unlimited.hit_ratio, 3) == 0.366
    assert 0 < small.hit_ratio < unlimited.hit_ratio and small.evicted_entries > 0
