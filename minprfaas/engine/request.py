"""A request, from arrival to its last token. Chapter 04."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from minprfaas.config import SamplingParams
from minprfaas.kvcache.request_cache import RequestCache


class Status(enum.Enum):
    """Where a request stands. REMOTE: another node prefills it. HELD: prefilled, its KVCache kept for the transfer."""

    WAITING = "waiting"
    PREFILL = "prefill"
    REMOTE = "remote"
    HELD = "held"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer. `token_ids` is the prompt and then the output, as far as it is known.

    `prefill_only` ends the request with its first token and keeps its KVCache until `Engine.release`. Moments are the
    engine clock's seconds, None until they have come. `finish_reason` is `eos`, `stop`, `length` or `aborted`;
    `length_limit` is what ended a `length` answer: `max_tokens`, `context`, or the `pool` (a larger one would go on).
    """

    id: str
    token_ids: list[int]
    params: SamplingParams
    prefill_only: bool = False
    answered_tokens: int = 0  # the last so many of `token_ids` are answer already, from a node that was lost
    status: Status = Status.WAITING
    cached_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    length_limit: str | None = None
    cache: RequestCache | None = None
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed yet
    preemptions: int = 0
    arrived_at_s: float | None = None
    prefill_started_at_s: float | None = None
    prefill_ended_at_s: float | None = None
    first_token_at_s: float | None = None
    finished_at_s: float | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids) - self.answered_tokens

    @property
    def output_ids(self) -> list[int]:
        """The answer so far, its ending token included."""
        return self.token_ids[self.prompt_tokens:]


KVListener = Callable[[Request, int, int, int], None]  # (request, layer, start, end): it holds tokens [start, end)


@dataclass(frozen=True)
class TokenUpdate:
    """One new token of a request, and the text that it made certain (empty while a stop string could still begin)."""

    request: Request
    token_id: int
    new_text: str
    finish_reason: str | None = None  # of the request, if this is its last token: a step may draw two for one request
