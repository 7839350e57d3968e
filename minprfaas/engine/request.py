"""A request, from arrival to its last token. Chapter 04."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from minprfaas.engine.sampling import SamplingParams
from minprfaas.kvcache.manager import RequestCache

KVListener = Callable[[int, int, int], None]  # (layer, start, end): the layer's state now holds tokens [start, end)


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

    `prefill_only` ends the request with its first token and keeps its KVCache until `Engine.release`; `on_kv` hears of
    each layer's new KV of each prefill chunk while the next layer computes. Times are the engine clock's seconds.
    """

    id: str
    token_ids: list[int]
    params: SamplingParams
    prefill_only: bool = False
    on_kv: KVListener | None = None
    status: Status = Status.WAITING
    prompt_tokens: int = field(init=False)
    cached_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    cache: RequestCache | None = None
    preemptions: int = 0
    arrived_s: float = 0.0
    prefill_started_s: float = 0.0
    prefill_ended_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self):
        self.prompt_tokens = len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_tokens :]


@dataclass(frozen=True)
class RequestOutput:
    """A finished answer. `finish_reason` is `eos`, `stop` or `length`; `token_ids` includes the ending token."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    ttft_s: float
    decode_tokens_per_s: float

    @staticmethod
    def of(request: Request) -> "RequestOutput":
        """The output of a finished request."""
        decode_s = request.finished_s - request.first_token_s
        return RequestOutput(
            request.id, request.prompt_tokens, request.cached_tokens, request.output_ids, request.text,
            request.finish_reason, request.first_token_s - request.arrived_s,
            (len(request.output_ids) - 1) / decode_s if decode_s > 0 else 0.0)


@dataclass(frozen=True)
class TokenUpdate:
    """One new token of a request, and the text that it made certain (empty while a stop string could still begin)."""

    request: Request
    token_id: int
    new_text: str
