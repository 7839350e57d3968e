"""What the parts of the cluster tell each other besides KVCache: small typed messages. Chapter 13; paper 3.1.

Who receives one dispatches it with `match`. `envelope` turns them into JSON for the wire and checks what comes from it.
"""

from dataclasses import dataclass

from minprfaas.cluster.upkeep_messages import (
    CacheNews, ChangeRole, Goodbye, NodeFigures, NodeReady, PrefixAbort, PrefixOrder, RelayOver,
    SendInventory, Shutdown, TimelinePart)
from minprfaas.config import LinkSample

# A request: front end and decode node


@dataclass(frozen=True)
class Serve:
    """Front end -> decode node: answer this prompt; `prefill_node` computes its KVCache within `deadline_s`.

    A prefix of `prefix_tokens` (0: none) that `prefix_source` holds is shipped to the prefill node first. The last
    `answered_tokens` are answer already, from a node that was lost. An id is one attempt's: no other ever has it.
    """

    id: str
    token_ids: list[int]
    answered_tokens: int
    sampling: dict
    prefill_node: str
    deadline_s: float
    prefix_source: str
    prefix_tokens: int


@dataclass(frozen=True)
class Progress:
    """Decode node -> front end: how far the prefill is and how much of the KVCache is here."""

    id: str
    prefilled_tokens: int
    received_bytes: int
    expected_bytes: int


@dataclass(frozen=True)
class Prefilled:
    """Decode node -> front end: the prefill has ended, after `prefill_s` for `uncached_tokens`."""

    id: str
    uncached_tokens: int
    prefill_s: float
    prefix_bytes: int


@dataclass(frozen=True)
class Started:
    """Decode node -> front end: decoding begins. The parts of the time until the first token, as this node saw them;
    `kv_bytes` arrived for tokens from `cached_tokens` on, within `transfer_s`, of which `hidden_s` ran beside the
    prefill."""

    id: str
    cached_tokens: int
    kv_bytes: int
    queue_s: float
    prefill_s: float
    transfer_exposed_s: float
    admit_s: float
    transfer_s: float = 0.0
    hidden_s: float = 0.0


@dataclass(frozen=True)
class TokenDrawn:
    """Decode node -> front end: one more token. `finish_reason` is empty until the last one; `length_limit` says which
    limit ended a `length` answer: `max_tokens`, `context`, or the `pool` of the node."""

    id: str
    token_id: int
    new_text: str
    finish_reason: str
    length_limit: str


@dataclass(frozen=True)
class Failed:
    """Prefill node -> decode node -> front end: this attempt comes to nothing, and is forgotten.

    `cause`: the prefill was "lost" with its node or on the way; its node has "refused" it and always will; or the node
    is well, but the cached prefix that was to be shipped to it did not come ("no_prefix"). Another attempt follows,
    unless it is the decode node that can never ("too_long") or not soon enough ("no_room") hold the request."""

    id: str
    reason: str
    cause: str


@dataclass(frozen=True)
class Abort:
    """Front end -> decode node -> prefill node: nobody waits for this request; forget it."""

    id: str


# A prefill: decode node and prefill node


@dataclass(frozen=True)
class PrefillOrder:
    """Decode node -> prefill node: prefill this prompt, and stream the KVCache of tokens [start, len(token_ids)) to me
    as `stream_id`.

    Unless `snapshot_at` is 0, the request-level state at that block boundary is welcome too, as `snapshot_stream_id`:
    with it a later prompt can begin there. Where a field is named as in `Serve`, it is that one.
    """

    id: str
    stream_id: int
    token_ids: list[int]
    start: int
    snapshot_stream_id: int
    snapshot_at: int
    prefix_source: str
    prefix_tokens: int
    answered_tokens: int
    sampling: dict
    deadline_s: float


@dataclass(frozen=True)
class PrefillProgress:
    """Prefill node -> decode node: `tokens` of the prompt are done."""

    id: str
    tokens: int


@dataclass(frozen=True)
class PrefillDone:
    """Prefill node -> decode node: the prompt is prefilled; this is its first token. Its last KVCache may still be on
    the way, and so may the snapshot that was asked for, if `sends_snapshot`."""

    id: str
    first_token: int
    cached_tokens: int
    prefill_s: float
    prefix_bytes: int
    sends_snapshot: bool


Message = (NodeReady | ChangeRole | CacheNews | SendInventory | Shutdown | TimelinePart | NodeFigures
           | Goodbye | Serve | Progress | Prefilled | Started | TokenDrawn | Failed | Abort | PrefillOrder
           | PrefillProgress | PrefillDone | PrefixOrder | PrefixAbort | RelayOver | LinkSample)
