"""What became of one request: the front end's record, from the door to the last token. Chapter 13."""

from dataclasses import dataclass, field

from minprfaas.cluster import messages
from minprfaas.config import Role, SamplingParams
from minprfaas.errors import RequestError
from minprfaas.scheduling.router import Decision

TTFT_PARTS = ("route_s", "queue_s", "prefill_s", "transfer_exposed_s", "admit_s", "ttft_s")  # the last is their sum


@dataclass(eq=False)
class Journey:
    """One request, from the door to its last token, and what became of it on the way.

    `token_ids` is the prompt and then the answer, as far as it is known. The five parts of `ttft_s` add up to it; they
    are those of the attempt that gave the first token, and what earlier ones took is part of `route_s`.
    """

    id: str
    token_ids: list[int]
    params: SamplingParams
    keys: list[str]  # of the full blocks that are to be prefilled, but for the last token, which is always computed
    arrived_at_s: float
    prompt_tokens: int = field(init=False)
    text: str = ""
    finish_reason: str | None = None
    length_limit: str | None = None  # what ended a `length` answer: max_tokens, context, or a pool too small for it
    error: RequestError | None = None  # instead of an answer
    decision: Decision | None = None  # the newest
    attempt: str = ""  # the newest one's id, by which the nodes know it
    attempts: int = 0
    recoveries: int = 0  # times that the node which decoded it was lost, and another took over
    fallback: str | None = None  # why a request that was offloaded was prefilled in the PD cluster after all
    avoid: frozenset[str] = frozenset()  # prefill nodes that failed it
    refused: frozenset[str] = frozenset()  # those of them that always will
    held_tokens: int = 0  # rows that were at the decode node, and so did not cross
    cached_tokens: int = 0  # that the prefill node had, and did not compute
    prefix_bytes: int = 0  # of a cached prefix that was shipped to the prefill node
    kv_bytes: int = 0  # that crossed from the PrfaaS cluster
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_exposed_s: float = 0.0
    admit_s: float = 0.0
    transfer_s: float = 0.0  # from the first byte's arrival to the last one's
    hidden: float = 0.0  # share of the transfer that ran while prefill still did, from 0 to 1
    first_token_at_s: float = 0.0
    finished_at_s: float = 0.0
    prefilled_tokens: int = 0  # progress, for a screen
    received_bytes: int = 0
    expected_bytes: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    def note(self, message: messages.Message) -> None:
        """Take what a node tells of the newest attempt. What led to the first token is settled once that is there."""
        match message:
            case messages.Progress():
                self.prefilled_tokens = message.prefilled_tokens
                self.received_bytes, self.expected_bytes = message.received_bytes, message.expected_bytes
            case messages.Prefilled() if not self.first_token_at_s:
                self.cached_tokens = self.prompt_tokens - message.uncached_tokens
                self.prefix_bytes = message.prefix_bytes
            case messages.Started():
                self.prefilled_tokens = len(self.token_ids)
                self.kv_bytes += message.kv_bytes if self.decision.route is Role.PRFAAS else 0
                if not self.first_token_at_s:
                    self.held_tokens, self.queue_s = message.cached_tokens, message.queue_s
                    self.prefill_s, self.admit_s = message.prefill_s, message.admit_s
                    self.transfer_exposed_s = message.transfer_exposed_s
                if message.transfer_s > 0:
                    self.transfer_s, self.hidden = message.transfer_s, message.hidden_s / message.transfer_s

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far."""
        return self.token_ids[self.prompt_tokens:]

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, in an answer or in an error."""
        return self.finish_reason is not None

    @property
    def route(self) -> str:
        """Where it was prefilled: "prfaas" or "pdp"; empty while that is undecided."""
        return self.decision.route.value if self.decision is not None else ""

    @property
    def reason(self) -> str:
        """The router's words."""
        return self.decision.reason if self.decision is not None else ""

    @property
    def ttft_s(self) -> float:
        """From the door to the first token."""
        return self.first_token_at_s - self.arrived_at_s

    @property
    def route_s(self) -> float:
        """What of `ttft_s` is no other part's: deciding, the messages between front end and decode node, and attempts
        that came to nothing."""
        return self.ttft_s - self.queue_s - self.prefill_s - self.transfer_exposed_s - self.admit_s


@dataclass(frozen=True)
class Update:
    """What `FrontEnd.take_updates` tells of a request: a token was drawn, it ended, or (neither) it made progress."""

    journey: Journey
    token_id: int | None = None
    new_text: str = ""
