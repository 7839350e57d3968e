"""The door: hands requests from the HTTP thread to the node's loop, and what becomes of them back. Chapters 13 and 15.

The model's loop must not wait for a client, nor a client's connection for the model: each side leaves what it has to
say with the door and goes on. `open` and `close` belong to the HTTP thread, `step` and `end_all` to the loop's.
"""

import asyncio
import itertools
import queue
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import Journey, Update
from minprfaas.config import SamplingParams
from minprfaas.errors import RequestError, UserError
from minprfaas.serving.metrics import Metrics
from minprfaas.transport.events import EventQueue

SAMPLE_S = 1.0  # how often the loop tells what a scrape then shows


@dataclass(frozen=True)
class AnswerPiece:
    """What became of prompt number `index` of a ticket since its last piece. `finish_reason` is None but in its last
    one: `eos`, `stop`, `length`, or `error` for an answer that `error` took the place of."""

    index: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: RequestError | UserError | None = None
    cached_tokens: int = 0  # of the prompt; known in the last piece


class Ticket:
    """One client's prompts on their way: `pieces` brings what becomes of them, in the HTTP thread."""

    def __init__(self, id: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams]):
        self.id, self.loop = id, asyncio.get_running_loop()
        self.asks = {f"{id}-{index}": ask for index, ask in enumerate(zip(prompts, params, strict=True))}
        self.index_of = {request_id: index for index, request_id in enumerate(self.asks)}
        self.pieces: asyncio.Queue[AnswerPiece] = asyncio.Queue()

    async def next_piece(self) -> AnswerPiece:
        """Raises the error that takes the place of an answer."""
        piece = await self.pieces.get()
        if piece.error is not None:
            raise piece.error
        return piece


@dataclass(frozen=True)
class Knock:
    """An event that concerns nobody in the loop: it only ends the loop's wait for one."""


class Door:
    """`capacity` requests are let in at once. `events` is the queue that the loop waits for."""

    def __init__(self, capacity: int, metrics: Metrics, events: EventQueue, clock: Callable[[], float]):
        self.capacity, self.metrics = capacity, metrics
        self.in_flight = 0  # requests of clients that wait for them: the HTTP thread's count
        self._events, self._clock = events, clock
        self._asks: queue.SimpleQueue[tuple[Ticket, bool]] = queue.SimpleQueue()  # which begin (True), which end
        self._open: dict[str, tuple[Ticket, Journey]] = {}  # that the front end has, by request
        self._numbers = itertools.count()
        self._run = secrets.token_hex(4)  # ids of another run, in somebody's log, are other ids
        self._sampled_at_s = -SAMPLE_S

    # The HTTP thread's side

    def check_room(self, prompts: int = 1) -> None:
        """Raises RequestError unless so many more requests may come in now."""
        if self.in_flight + prompts > self.capacity:
            raise RequestError("full_house", f"{self.in_flight} requests are being answered, and at most "
                                             f"{self.capacity} may be")

    def open(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Ticket:
        """Let prompts in, all or none. Each ends in a piece with a `finish_reason`, unless it is closed. Raises as
        `check_room`."""
        self.check_room(len(prompts))
        self.in_flight += len(prompts)
        ticket = Ticket(f"{self._run}{next(self._numbers):06x}", prompts, params)
        self._asks.put((ticket, True))
        self.knock()
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Nobody waits for this ticket any more: what has not ended is aborted, on both sides. To be called once."""
        self.in_flight -= len(ticket.asks)
        self._asks.put((ticket, False))
        self.knock()

    def knock(self) -> None:
        """Wake the loop."""
        self._events.put(Knock())

    # The loop's side

    @property
    def is_idle(self) -> bool:
        """Whether no request is unfinished."""
        return not self._open and self._asks.empty()

    def step(self, front: FrontEnd, updates: list[Update]) -> None:
        """Pass on what clients ask, and `updates` (the front end's newest) to whom they concern."""
        said = self._ask(front)
        news: dict[str, list[Update]] = defaultdict(list)
        for update in updates:
            news[update.journey.id].append(update)
        said += [self._piece(id, news[id]) for id in news if id in self._open]
        self._say(said)
        now_s = self._clock()
        if now_s - self._sampled_at_s >= SAMPLE_S:
            self._sampled_at_s = now_s
            self.metrics.sample(front, now_s)

    def end_all(self, front: FrontEnd, error: RequestError) -> int:
        """End every request with this error; returns how many."""
        said = self._ask(front)
        count = len(self._open)
        for id in list(self._open):
            front.abort(id)
            ticket = self._forget(id, error.kind)
            said.append((ticket, AnswerPiece(ticket.index_of[id], finish_reason="error", error=error)))
        self._say(said)
        return count

    def _ask(self, front: FrontEnd) -> list[tuple[Ticket, AnswerPiece]]:
        """Do what the HTTP thread has asked for; returns what was refused."""
        refused = []
        while not self._asks.empty():
            ticket, begins = self._asks.get_nowait()
            for id, (token_ids, params) in ticket.asks.items():
                if not begins:
                    if id in self._open:
                        front.abort(id)
                        self._forget(id, "aborted")
                    continue
                try:
                    self._open[id] = ticket, front.submit(id, token_ids, params)
                except UserError as error:
                    refused.append((ticket, AnswerPiece(ticket.index_of[id], finish_reason="error", error=error)))
        return refused

    def _piece(self, id: str, news: list[Update]) -> tuple[Ticket, AnswerPiece]:
        """One piece for all that is new of a request: a step may have drawn two tokens for it."""
        ticket, journey = self._open[id]
        if journey.finish_reason is not None:
            self._forget(id, journey.error.kind if journey.error else journey.finish_reason)
        tokens = sum(update.token_id is not None for update in news)
        return ticket, AnswerPiece(ticket.index_of[id], "".join(update.new_text for update in news), tokens,
                             journey.finish_reason, journey.error, journey.cached_tokens)

    def _forget(self, id: str, state: str) -> Ticket:
        ticket, journey = self._open.pop(id)
        self.metrics.ended(journey, state)
        return ticket

    @staticmethod
    def _say(said: list[tuple[Ticket, AnswerPiece]]) -> None:
        """One call wakes the HTTP thread for a whole step's pieces."""
        said = [(ticket, piece) for ticket, piece in said if piece.tokens or piece.finish_reason is not None]
        if said:
            said[0][0].loop.call_soon_threadsafe(_hand_over, said)


def _hand_over(said: list[tuple[Ticket, AnswerPiece]]) -> None:
    for ticket, piece in said:
        ticket.pieces.put_nowait(piece)
