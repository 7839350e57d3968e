"""Hit ratio against capacity: a trace of block hashes through the real index and eviction. Chapter 06 (paper 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minprfaas.kvcache.ledger import BlockLedger

CAPACITIES = (1_000, 3_000, 10_000, 30_000, 100_000, None)


@dataclass(frozen=True)
class ReplayRow:
    """What one cache size did. A hit is a block of a prompt that was reused, as in Mooncake's own count: the last,
    partly filled block of a prompt counts like any other, and a prompt may be found whole."""

    capacity_blocks: int | None  # None: unlimited
    requests: int
    blocks: int
    hit_blocks: int
    evicted_entries: int

    @property
    def hit_ratio(self) -> float:
        """Share of the prompts' blocks that were reused, from 0 to 1."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


def replay_trace(requests: Sequence[Sequence[int]], capacities: Sequence[int | None] = CAPACITIES,
                 state_blocks: int = 0, snapshot_every: int = 16) -> list[ReplayRow]:
    """One row a capacity (in blocks). A request is its prompt's block hashes, each of which stands for the whole prefix
    up to there (Mooncake's `hash_ids`, 512 tokens a block).

    `state_blocks` above 0 replays a hybrid model, whose prefix can be reused only where a snapshot of so many blocks
    was taken: at the end of each prompt, where it departs from an earlier one, and every `snapshot_every` blocks.
    """
    rows = []
    with tqdm(total=len(requests) * len(capacities), unit="request", disable=None, leave=False) as bar:
        for capacity in capacities:
            size = min(state_blocks, 1) if capacity is None else state_blocks  # without a limit, only its being matters
            most = sum(map(len, requests)) * (1 + size) if capacity is None else capacity
            ledger = BlockLedger(most, has_tokens=True, has_state=state_blocks > 0)
            hits = 0
            for keys in requests:
                hits += _replay_request(ledger, keys, size, snapshot_every)
                bar.update()
            rows.append(ReplayRow(capacity, len(requests), sum(map(len, requests)), hits, ledger.evicted_entries))
    return rows


def _replay_request(ledger: BlockLedger, keys: Sequence[int], state_blocks: int, snapshot_every: int) -> int:
    """Match, compute the rest as far as it fits, let go from the tail; returns the matched blocks."""
    matched, branch = ledger.match(keys), ledger.common(keys)
    held = []
    for count, key in enumerate(keys, 1):
        entry = ledger.blocks.get(key)
        if entry is not None:
            ledger.hold(entry)
        else:
            blocks = ledger.allocate(1)
            if blocks is None:
                break
            entry = ledger.insert_block(key, blocks, count)
        held.append(entry)
        wanted = count in (len(keys), branch) or count % snapshot_every == 0
        if state_blocks and wanted and key not in ledger.snapshots:
            state = ledger.allocate(state_blocks)
            if state is not None:
                ledger.insert_snapshot(key, state, count)
    for entry in reversed(held):
        ledger.release(entry)
    return matched
