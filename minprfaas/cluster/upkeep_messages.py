"""The messages of a node's upkeep: who is there, what it holds, prefix shipping. Chapters 11 and 13; paper 3.4.3."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeReady:
    """Node -> front end: I play `role` and take work. Repeated whenever the front end is met anew."""

    role: str
    device: str
    num_blocks: int


@dataclass(frozen=True)
class ChangeRole:
    """Front end -> PD node: play `role` as soon as what you have is finished, and say so by `NodeReady`."""

    role: str


@dataclass(frozen=True)
class CacheNews:
    """Node -> front end: prefixes that it can begin with (`tokens` at a `key`) or, where tokens are 0, no longer can.

    `sequence` numbers the first of them. With `inventory` they are all that the node holds, as of `sequence`.
    """

    sequence: int
    keys: list[str]
    tokens: list[int]
    inventory: bool


@dataclass(frozen=True)
class SendInventory:
    """Front end -> node: news were lost; say what you hold."""


@dataclass(frozen=True)
class Shutdown:
    """Front end -> node: no more requests; finish, say goodbye, end."""


@dataclass(frozen=True)
class TimelinePart:
    """Node -> front end: some of its timeline's events."""

    events: list[dict]


@dataclass(frozen=True)
class NodeFigures:
    """Node -> front end, now and then: what this process has done in the `up_s` since it began, of which it
    `computed_s` seconds; and the blocks of its pool (see `CacheStats`), now."""

    up_s: float
    computed_s: float
    prefilled_tokens: int
    decoded_tokens: int
    free_blocks: int
    cached_blocks: int
    in_use_blocks: int


@dataclass(frozen=True)
class Goodbye:
    """Node -> front end: the last message, with the process's peak memory, what is wrong with the books of its pool now
    that nothing is under way (empty: nothing) and, of an emulated machine, its pace (see `Pace`)."""

    peak_bytes: int
    wrong: str
    allowed_s: float = 0.0
    needed_s: float = 0.0
    late_s: float = 0.0


@dataclass(frozen=True)
class RelayOver:
    """Decode node -> prefill node: I draw this request's tokens myself now (see `relay.py`)."""

    id: str


@dataclass(frozen=True)
class PrefixOrder:
    """Prefill node -> any node: stream me the cached state of tokens [start, len(token_ids) - 1) as `stream_id`."""

    stream_id: int
    token_ids: list[int]
    start: int


@dataclass(frozen=True)
class PrefixAbort:
    """Either way: this prefix will not be sent, or is wanted no more."""

    stream_id: int
