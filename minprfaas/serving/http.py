"""HTTP/1.1 on asyncio streams: connections, limits and deadlines, and server-sent events. Chapters 13 and 15.

What a client may do wrong ends in a 4xx with one line of JSON, what it fails to do ends at a deadline, and when it
hangs up, the task that makes its answer is cancelled, also while there is nothing to send.
"""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from minprfaas.errors import RequestError, UserError, one_line
from minprfaas.serving.metrics import Metrics

STATUS_OF = {"full_house": 429, "model_not_found": 404, "too_long": 400, "no_room": 503, "no_node": 503,
             "shutting_down": 503}  # kinds of RequestError
READ_BYTES = 64 * 1024
UNSENT_BYTES = 16 * 1024  # that wait for a client before its answer waits with them
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a method or a header's name (RFC 9110)


@dataclass(frozen=True)
class Limits:
    """What one client may take of the house."""

    connections: int
    head_bytes: int = 16 * 1024
    body_bytes: int = 8 * 2**20
    bodies_bytes: int = 64 * 2**20  # of all connections together
    idle_s: float = 75.0  # between two requests
    head_s: float = 10.0  # from the first byte of a request to the end of its head
    body_s: float = 30.0
    stall_s: float = 30.0  # that a client may leave its answer unread
    answer_s: float = 3600.0
    linger_s: float = 2.0  # that a refused client gets to read why


class HttpError(Exception):
    """A request that is answered with `status` and one line."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}
        if status == 429:  # places become free all the time: a second is long
            self.headers = {"Retry-After": "1"}

    def body(self) -> str:
        """One line, in the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return json.dumps({"error": {"message": self.message, "type": kind, "param": None, "code": self.code}})


@dataclass(frozen=True)
class HttpRequest:
    """A whole request. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    is_old: bool  # HTTP/1.0, which knows no chunks
    closes: bool  # whether the connection ends with the answer


UNREAD = HttpRequest("", "", {}, b"", is_old=False, closes=True)  # in place of one that could not be read


class Reply:
    """The answer to one request: `send` it whole, or `begin` a stream of events, `event` by `event`, and `end` it."""

    def __init__(self, writer: asyncio.StreamWriter, request: HttpRequest, path: str, limits: Limits,
                 metrics: Metrics):
        self.closes, self.has_begun, self.has_ended = request.closes, False, False
        self._writer, self._request, self._path, self._limits, self._metrics = writer, request, path, limits, metrics

    async def send(self, status: int, body: str, content_type: str = "application/json",
                   headers: dict[str, str] | None = None) -> None:
        """A whole answer; without its body for who asked for its head."""
        data = body.encode() + (b"\n" if content_type == "application/json" else b"")
        self._begin(status, {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})})
        self.has_ended = True
        await self._write(b"" if self._request.method == "HEAD" else data)

    async def begin_events(self, headers: dict[str, str]) -> None:
        """A stream of events is coming."""
        self._begin(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                          **({} if self._request.is_old else {"Transfer-Encoding": "chunked"}), **headers})

    async def event(self, data: str) -> None:
        """One event. Waits while the client leaves too much unread; TimeoutError when it does so for too long."""
        chunk = f"data: {data}\n\n".encode()
        await self._write(chunk if self._request.is_old else b"%x\r\n%b\r\n" % (len(chunk), chunk))

    async def end_events(self) -> None:
        """The last one was the last."""
        self.has_ended = True
        if not self._request.is_old:
            await self._write(b"0\r\n\r\n")

    async def fail(self, error: HttpError) -> None:
        """The error as the answer, or as the last event of a stream that has begun."""
        if not self.has_begun:
            return await self.send(error.status, error.body(), headers=error.headers)
        if not self.has_ended:
            await self.event(error.body())
            await self.end_events()

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.has_begun = True
        self._metrics.responded(self._path, status)
        headers = {**headers, "Connection": "close" if self.closes else "keep-alive"}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def _write(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise ConnectionResetError("the client has hung up")
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES:
            await asyncio.wait_for(self._writer.drain(), self._limits.stall_s)


Handler = Callable[[HttpRequest, Reply], Awaitable[None]]
Routes = dict[str, dict[str, Handler]]  # by path, then by method


class ClientProtocol(asyncio.StreamReaderProtocol):
    """Knows when the client has hung up, also while nobody reads what it sends."""

    def __init__(self, reader: asyncio.StreamReader, accept: Callable[..., Awaitable[None]]):
        super().__init__(reader, accept)
        self.hung_up = asyncio.get_running_loop().create_future()

    def eof_received(self) -> bool | None:
        self._hang_up()
        return super().eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._hang_up()
        super().connection_lost(error)

    def _hang_up(self) -> None:
        if not self.hung_up.done():
            self.hung_up.set_result(None)


class ClientConnection:
    """One client's connection: request after request, until either side ends it. The reader's limit is that of a
    request's head."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, routes: Routes, limits: Limits,
                 metrics: Metrics, bodies: "BodyBudget"):
        self.is_answering = False
        self.is_ending = False  # no request is taken after the one that is being answered
        self._reader, self._writer, self._routes, self._limits = reader, writer, routes, limits
        self._metrics, self._bodies = metrics, bodies
        self._hung_up = writer.transport.get_protocol().hung_up
        writer.transport.set_write_buffer_limits(high=UNSENT_BYTES)

    async def serve(self, is_welcome: bool = True) -> None:
        """Answer until the client has gone, or has made a mistake after which nothing it sends can be understood."""
        try:
            if is_welcome:
                await self._serve()
            else:
                await self._refuse(HttpError(429, "too many connections are open"))
        except (OSError, asyncio.TimeoutError):  # reset, or left unread for too long
            self._writer.transport.abort()
        finally:
            self._writer.close()

    async def _serve(self) -> None:
        try:
            while (request := await self._read_request()) is not None:
                if not await self._answer(request):
                    return
        except HttpError as error:
            await self._refuse(error)

    async def _refuse(self, error: HttpError) -> None:
        """Answer what could not be read. The client may still be sending: closed at once, the connection would be
        reset, and the line lost. So its bytes are thrown away for a moment."""
        reply = Reply(self._writer, UNREAD, "other", self._limits, self._metrics)
        await reply.fail(error)
        try:
            self._writer.write_eof()
            await asyncio.wait_for(self._until_end(), self._limits.linger_s)
        except (OSError, asyncio.TimeoutError):
            pass

    async def _until_end(self) -> None:
        while await self._reader.read(READ_BYTES):
            pass

    async def _first_byte(self) -> bytes:
        """Of the next request; none where the connection ends. An empty line before it says nothing (RFC 9112, 2.2)."""
        first = await self._reader.read(1)
        if first != b"\r":
            return first
        if await self._reader.read(1) not in (b"\n", b""):
            raise HttpError(400, "the first line is no HTTP request line")
        return await self._reader.read(1)

    async def _read_request(self) -> HttpRequest | None:
        """The next request; None where none comes any more. Raises HttpError."""
        reader, limits = self._reader, self._limits
        try:
            first = await asyncio.wait_for(self._first_byte(), limits.idle_s)
        except asyncio.TimeoutError:
            return None
        if not first:
            return None
        self.is_answering = True
        try:
            rest = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), limits.head_s)
            method, path, headers, is_old = parse_head(first + rest)
            length = body_length(method, headers)
            if length > limits.body_bytes:
                raise HttpError(413, f"the body has {length:,} bytes; it may have {limits.body_bytes:,}")
            if "expect" in headers and not is_old:
                self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            with self._bodies.room_for(length):
                body = await asyncio.wait_for(reader.readexactly(length), limits.body_s)
        except asyncio.TimeoutError:
            raise HttpError(408, "the request did not arrive in time") from None
        except asyncio.LimitOverrunError:
            raise HttpError(431, f"the head of a request may have {limits.head_bytes:,} bytes") from None
        except asyncio.IncompleteReadError:
            raise HttpError(400, "the connection ended in the middle of a request") from None
        closes = is_old or "close" in headers.get("connection", "").lower()
        return HttpRequest(method, path, headers, body, is_old, closes)

    async def _answer(self, request: HttpRequest) -> bool:
        """Run the handler until it has answered, the client hangs up, or time is up; whether another request may
        follow."""
        path = request.path if request.path in self._routes else "other"
        reply = Reply(self._writer, request, path, self._limits, self._metrics)
        handling = asyncio.create_task(self._handle(request, reply))
        try:
            await asyncio.wait({handling, self._hung_up}, return_when=asyncio.FIRST_COMPLETED,
                               timeout=self._limits.answer_s)
        finally:  # also where this connection itself is cancelled
            handling.cancel()  # one that has not ended gives back what it holds
            await asyncio.wait({handling})
        self.is_answering = False
        if not handling.cancelled():
            handling.result()
            return not reply.closes and not self.is_ending
        if self._hung_up.done():
            self._writer.transport.abort()
        else:
            await reply.fail(HttpError(504, f"no answer within {self._limits.answer_s:g} s", code="deadline"))
        return False

    async def _handle(self, request: HttpRequest, reply: Reply) -> None:
        try:
            methods = self._routes.get(request.path)
            if methods is None:
                raise HttpError(404, f"there is no {request.path[:200]}", code="unknown_url")
            method = "GET" if request.method == "HEAD" else request.method
            if method not in methods:
                allowed = ", ".join(methods)
                message = f"{request.path} takes {allowed}, not {request.method}"
                raise HttpError(405, message, headers={"Allow": allowed})
            await methods[method](request, reply)
        except HttpError as error:
            await reply.fail(error)
        except UserError as error:
            await reply.fail(HttpError(400, str(error)))
        except RequestError as error:
            await reply.fail(HttpError(STATUS_OF.get(error.kind, 500), str(error), code=error.kind))
        except (OSError, asyncio.TimeoutError):
            raise
        except Exception as error:  # a bug, which must cost one client its answer and no other
            print(f"error: {request.path}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
            await reply.fail(HttpError(500, "the server failed at this request"))


class BodyBudget:
    """The bytes of bodies that are being read, of all connections together."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.reading_bytes = most_bytes, 0

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Room while a body is read; 429 when there is none."""
        if self.reading_bytes + count > self.most_bytes:
            raise HttpError(429, "too many large requests are arriving at once")
        self.reading_bytes += count
        try:
            yield
        finally:
            self.reading_bytes -= count


def parse_head(head: bytes) -> tuple[str, str, dict[str, str], bool]:
    """Method, path without its query, headers, and whether this is HTTP/1.0. Raises HttpError."""
    first, *lines = head.removesuffix(b"\r\n\r\n").decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or not words[1].isprintable():
        raise HttpError(400, "the first line is no HTTP request line")
    method, target, version = words
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise HttpError(505 if version.startswith("HTTP/") else 400, f"this is no HTTP/1.1: {version[:20]!r}")
    if not target.startswith("/"):
        raise HttpError(400, "the target of a request must begin with /")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HttpError(400, f"a header line is no header: {line[:80]!r}")
        name, value = name.lower(), value.strip(" \t")
        if headers.get(name, value) != value and name in ("content-length", "host", "transfer-encoding"):
            raise HttpError(400, f"header {name} comes twice, with two values")
        headers[name] = value
    return method, target.partition("?")[0], headers, version == "HTTP/1.0"


def body_length(method: str, headers: dict[str, str]) -> int:
    """How many bytes of body follow the head. Raises HttpError where that cannot be known."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:  # two lengths: who stands between us and the client may believe the other one
            raise HttpError(400, "a request must not have both Content-Length and Transfer-Encoding")
        raise HttpError(411, "chunked requests are not read; send a Content-Length")
    if length is None:
        if method in ("POST", "PUT", "PATCH"):
            raise HttpError(411, f"a {method} needs a Content-Length")
        return 0
    if not (length.isascii() and length.isdigit() and len(length) <= 15):
        raise HttpError(400, f"Content-Length is {length[:40]!r}; it must be a whole number")
    return int(length)
