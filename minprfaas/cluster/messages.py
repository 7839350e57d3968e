"""What two nodes tell each other besides KVCache: small typed messages, JSON on the wire. Chapter 13; paper 3.1.

A message from another datacenter is input from outside: `decode` accepts exactly the known types with exactly their
fields, or raises `BadMessage`.
"""

from dataclasses import asdict, dataclass, fields

MAX_ITEMS = 1 << 20  # of one list; far above any prompt here, far below what could exhaust memory


class BadMessage(Exception):
    """A message that is not one of ours."""


@dataclass(frozen=True)
class NodeReady:
    """A node introduces itself after the handshake."""

    role: str
    device: str
    num_blocks: int


@dataclass(frozen=True)
class PrefillOrder:
    """PD -> PrfaaS: prefill this prompt and stream the KVCache of tokens [start, len(token_ids)) as `stream_id`.

    Unless `snapshot_at` is 0, the request-level state at that block boundary is welcome too, as stream `stream_id + 1`:
    with it the PD side can begin the conversation's next turn there.
    """

    id: str
    stream_id: int
    token_ids: list[int]
    start: int
    snapshot_at: int
    sampling: dict


@dataclass(frozen=True)
class PrefillProgress:
    """PrfaaS -> PD: `tokens` of the prompt are done."""

    id: str
    tokens: int


@dataclass(frozen=True)
class PrefillDone:
    """PrfaaS -> PD: the prompt is prefilled; this is its first token. Its last KVCache may still be on the link."""

    id: str
    first_token: int
    cached_tokens: int
    prefill_s: float


@dataclass(frozen=True)
class TransferDone:
    """PrfaaS -> PD: every byte is acknowledged. `exposed_s` of `transfer_s` came after the prefill had ended."""

    id: str
    kv_bytes: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True)
class PrefillFailed:
    """PrfaaS -> PD: this request cannot be served here, for this reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class PrefillAbort:
    """PD -> PrfaaS: forget this request."""

    id: str


@dataclass(frozen=True)
class EgressSample:
    """PrfaaS -> PD: what its side of the link did lately; `queued_bytes` wait to leave."""

    gbps: float
    utilization: float
    queued_bytes: int


@dataclass(frozen=True)
class CacheEvents:
    """PrfaaS -> PD: prefixes that it can begin with (`tokens` at a `key`) or, where tokens are 0, no longer can.

    `sequence` numbers the first of them. With `inventory` they are all that the node holds, as of `sequence`.
    """

    sequence: int
    keys: list[str]
    tokens: list[int]
    inventory: bool


@dataclass(frozen=True)
class SendInventory:
    """PD -> PrfaaS: events were lost; say what you hold."""


@dataclass(frozen=True)
class PrefixOrder:
    """PD -> PrfaaS: stream the cached state of tokens [start, len(token_ids) - 1) as `stream_id`."""

    stream_id: int
    token_ids: list[int]
    start: int


@dataclass(frozen=True)
class PrefixOffer:
    """PD -> PrfaaS: all but the last of these tokens are cached here; `stream_id` can bring you what you lack."""

    stream_id: int
    token_ids: list[int]


@dataclass(frozen=True)
class PrefixReady:
    """PrfaaS -> PD: the offer is welcome, from token `start` on."""

    stream_id: int
    start: int


@dataclass(frozen=True)
class PrefixAbort:
    """Either way: this prefix will not be shipped, or not be taken."""

    stream_id: int


@dataclass(frozen=True)
class Shutdown:
    """PD -> PrfaaS: no more requests."""


@dataclass(frozen=True)
class TimelinePart:
    """PrfaaS -> PD: some of its timeline's events."""

    events: list[dict]


@dataclass(frozen=True)
class Goodbye:
    """PrfaaS -> PD: the last message, with the process's peak memory."""

    peak_bytes: int


TYPES = {cls.__name__: cls for cls in (NodeReady, PrefillOrder, PrefillProgress, PrefillDone, TransferDone, PrefillFailed,
                                       PrefillAbort, EgressSample, CacheEvents, SendInventory, PrefixOrder, PrefixOffer,
                                       PrefixReady, PrefixAbort, Shutdown, TimelinePart, Goodbye)}


def encode(message) -> dict:
    """A JSON-ready object."""
    return {"type": type(message).__name__, **asdict(message)}


def decode(raw: dict):
    """The message that `raw` encodes. Raises BadMessage on an unknown type, a missing, extra or ill-typed field."""
    cls = TYPES.get(raw.get("type")) if isinstance(raw, dict) and isinstance(raw.get("type"), str) else None
    if cls is None:
        raise BadMessage("unknown message type")
    names = {field.name: field.type for field in fields(cls)}
    if set(raw) != {"type", *names}:
        raise BadMessage(f"{cls.__name__} has fields {sorted(raw)}")
    for name, kind in names.items():
        if not _is_a(raw[name], kind):
            raise BadMessage(f"{cls.__name__}.{name} is not {kind}")
    return cls(**{name: raw[name] for name in names})


def _is_a(value, kind) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (list[int], list[str], list[dict]):
        return isinstance(value, list) and len(value) <= MAX_ITEMS and all(_is_a(item, kind.__args__[0]) for item in value)
    return isinstance(value, kind)
