"""One request's hold on the pool. Chapters 03 and 06 (paper 3.2)."""

from array import array
from dataclasses import dataclass, field


@dataclass(eq=False)
class RequestCache:
    """What one request holds; an *entry* is one of the ledger's, a *boundary* a number of full blocks."""

    block_tables: list[array]  # by group: block ids; of rows in token order, or of the state that passes read and write
    keys: list[bytes]  # of the full blocks, as far as they are known
    prompt_tokens: int
    branch: int  # leading blocks in common with an earlier prompt
    num_tokens: int  # tokens whose state the blocks hold
    cached_tokens: int  # of these, found in the cache when it was opened
    num_blocks: int  # reserved, in each token group
    entries: list[int] = field(default_factory=list)  # of the leading full blocks, all held
    replaced: list[int] = field(default_factory=list)  # own blocks, no longer used: the index had equal ones already
    holds: int = 0  # by streams that read its blocks
    closed: bool = False
    is_exact: bool = True  # False: its rows were rounded on the wire, so no other request may use them
    # Request-level state; see `snapshots.py`.
    has_state: bool = False  # whether the live state has its blocks
    origin: int | None = None  # the snapshot (an entry) that the live state will begin as a copy of
    planned: dict[int, list[int]] = field(default_factory=dict)  # boundary -> blocks that the next pass fills
    sending: list[int] = field(default_factory=list)  # snapshots (entries) that a stream reads
    rolling: bytes | None = None  # key of the snapshot that gives way to the next (decode)

    @property
    def snapshots(self) -> list[int]:
        """Snapshots (entries) that must not be evicted."""
        return self.sending if self.origin is None else [*self.sending, self.origin]
