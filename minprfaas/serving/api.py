"""The endpoints: what each path answers, and a request's way through the door and back. Chapters 13 and 15."""

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from minprfaas.config import Role
from minprfaas.errors import RequestError
from minprfaas.serving import metrics
from minprfaas.serving.door import Door, Ticket
from minprfaas.serving.http import HttpError, HttpRequest, Reply, Routes
from minprfaas.serving.openai import AnswerBody, Ask, Served

READERS = 2  # threads in which bodies are parsed and prompts become tokens
STUCK_S = 30.0  # a loop that has not come round for so long is not well


class Api:
    """OpenAI's endpoints for one model behind one door."""

    def __init__(self, served: Served, door: Door, clock: Callable[[], float]):
        self.is_closing = False  # no new request is taken
        self._served, self._door, self._clock = served, door, clock
        self._created = int(time.time())
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read request")

    @property
    def routes(self) -> Routes:
        """Paths, and what each method does there."""
        return {"/v1/completions": {"POST": partial(self._answer, is_chat=False)},
                "/v1/chat/completions": {"POST": partial(self._answer, is_chat=True)},
                "/v1/models": {"GET": self._models}, f"/v1/models/{self._served.name}": {"GET": self._model},
                "/health": {"GET": self._health}, "/metrics": {"GET": self._metrics}}

    async def _models(self, request: HttpRequest, reply: Reply) -> None:
        await reply.send(200, json.dumps({"object": "list", "data": [self._model_card()]}))

    async def _model(self, request: HttpRequest, reply: Reply) -> None:
        await reply.send(200, json.dumps(self._model_card()))

    def _model_card(self) -> dict:
        return {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "minprfaas",
                "max_model_len": self._served.context_tokens}

    async def _health(self, request: HttpRequest, reply: Reply) -> None:
        known = self._door.metrics
        status, said = 200, "ok"
        if known.sampled_at_s is None or self._clock() - known.sampled_at_s > STUCK_S:
            status, said = 503, "the node's loop does not come round"
        elif Role.PDD.value not in known.roles or len(known.roles) < 2:
            status, said = 503, "no node prefills, or none decodes"
        elif self.is_closing:
            status, said = 503, "shutting down"
        await reply.send(status, json.dumps({"status": said, "in_flight": self._door.in_flight}))

    async def _metrics(self, request: HttpRequest, reply: Reply) -> None:
        await reply.send(200, self._door.metrics.text(), metrics.CONTENT_TYPE)

    # A completion

    async def _answer(self, request: HttpRequest, reply: Reply, is_chat: bool) -> None:
        if self.is_closing:
            reply.closes = True
            raise RequestError("shutting_down", "the server was told to end")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HttpError(415, "Content-Type must be application/json")
        self._door.check_room()  # before the work of reading
        loop = asyncio.get_running_loop()
        ask = await loop.run_in_executor(self._readers, self._served.read, request.body, is_chat)
        ticket = self._door.open(ask.prompts, ask.params)
        try:
            body = AnswerBody(ask, ticket.id, self._served.name)
            if ask.stream:
                await self._stream(ask, ticket, body, reply)
            else:
                while not body.is_complete:
                    body.take(await ticket.next_piece())
                await reply.send(200, body.whole(), headers={"X-Request-Id": ticket.id})
        finally:  # also where the client has hung up and this task is cancelled
            self._door.close(ticket)

    async def _stream(self, ask: Ask, ticket: Ticket, body: AnswerBody, reply: Reply) -> None:
        """The head of the answer waits for the first piece: a request that fails before it still gets its status."""
        while not body.is_complete:
            piece = await ticket.next_piece()
            body.take(piece)
            if not reply.has_begun:
                await reply.begin_events({"X-Request-Id": ticket.id})
                for chunk in body.begun():
                    await reply.event(chunk)
            if piece.text or piece.finish_reason is not None:
                await reply.event(body.chunk(piece))
        if ask.include_usage:
            await reply.event(body.usage())
        await reply.event("[DONE]")
        await reply.end_events()
