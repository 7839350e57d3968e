"""One front end's HTTP service: a thread that serves the API, and the loop that steps node and door.

Chapters 13 and 15.
"""

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from minprfaas.cluster.processes import Process
from minprfaas.errors import RequestError, UserError, require_host
from minprfaas.serving.api import Api
from minprfaas.serving.door import Door
from minprfaas.serving.http import BodyBudget, ClientConnection, ClientProtocol, Limits
from minprfaas.serving.metrics import Metrics
from minprfaas.serving.openai import Served
from minprfaas.transport.events import EventQueue

UNACCEPTED = 1024  # connections that wait for this process, which computes as well
END_S = 5.0  # that connections get to send what they have, once every request has ended
# After 30 s of silence three probes, 10 s apart; what is sent must be acknowledged within 30 s.
PEER_IS_GONE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


def most_connections(capacity: int) -> int:
    """Connections where `capacity` requests are answered at once: others wait, or ask how things stand."""
    return 2 * capacity + 64


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose. UserError when it cannot be had."""
    require_host("the host to listen on", host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=UNACCEPTED)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None


class Service:
    """HTTP in a thread of its own. `events` is what the node's loop waits for; see `Door` for `capacity`."""

    def __init__(self, served: Served, listener: socket.socket, capacity: int, events: EventQueue,
                 limits: Limits | None = None):
        self.door = Door(capacity, Metrics(), events, time.monotonic)
        self.port = listener.getsockname()[1]
        self._api = Api(served, self.door, time.monotonic)
        self._listener = listener
        self._limits = limits or Limits(most_connections(capacity))
        self._connections: dict[asyncio.Task, ClientConnection] = {}
        self._bodies = BodyBudget(self._limits.bodies_bytes)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http", daemon=True)
        self._has_begun, self._refusing, self._ending = threading.Event(), asyncio.Event(), asyncio.Event()

    def start(self) -> None:
        """Begin to take connections."""
        self._thread.start()
        self._has_begun.wait()

    @property
    def is_serving(self) -> bool:
        """Whether a connection is still open, or may be opened."""
        return self._thread.is_alive()

    def refuse_new(self) -> None:
        """Take no more connections and no more requests; those that are here go on."""
        self._loop.call_soon_threadsafe(self._refusing.set)

    def end(self) -> None:
        """Close each connection once it has sent what it has, and all of them soon."""
        self._loop.call_soon_threadsafe(self._ending.set)

    def join(self, timeout_s: float) -> None:
        """Wait until nothing is served any more."""
        self._thread.join(timeout_s)

    # In the HTTP thread

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, what: print(f"error: http: {what['message']}", file=sys.stderr))
        server = await self._loop.create_server(self._protocol, sock=self._listener, backlog=UNACCEPTED)
        self._has_begun.set()
        await self._refusing.wait()
        self._api.is_closing = True
        server.close()
        await self._ending.wait()
        for task, connection in self._connections.items():
            connection.is_ending = True
            if not connection.is_answering:
                task.cancel()
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=END_S)
            for task in late:
                task.cancel()

    def _protocol(self) -> ClientProtocol:
        return ClientProtocol(asyncio.StreamReader(self._limits.head_bytes), self._accept)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = ClientConnection(reader, writer, self._api.routes, self._limits, self.door.metrics, self._bodies)
        _end_when_peer_is_gone(writer.get_extra_info("socket"))
        task = asyncio.current_task()
        self._connections[task] = connection
        try:
            await connection.serve(is_welcome=len(self._connections) <= self._limits.connections)
        except asyncio.CancelledError:
            pass  # at the service's end
        finally:
            del self._connections[task]


def _end_when_peer_is_gone(connection: socket.socket) -> None:
    """A machine that has vanished says no goodbye: the system asks it, and ends the connection when it is silent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PEER_IS_GONE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def serve(service: Service, made: Process, drain_s: float, look: Callable[[], object]) -> int:
    """Step node and door until SIGINT or SIGTERM, then let the requests that are here end; who is not done after
    `drain_s`, or at a second signal, ends in a named error. Returns how many did. `look` is called after each
    step of the node."""
    signals: list[int] = []

    def take(number: int, frame: object) -> None:
        signals.append(number)
        service.door.knock()  # CPython 3.11: a `get` that a signal interrupts at the end of its timeout waits for ever

    def step() -> None:
        made.node.step()
        look()
        door.step(made.front, made.front.take_updates())

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    door, error, cut = service.door, RequestError("server_failed", "the node's loop has ended"), 0
    service.start()
    try:
        while not signals:
            step()
        service.refuse_new()
        give_up_at_s = time.monotonic() + drain_s
        while not door.is_idle and len(signals) < 2 and time.monotonic() < give_up_at_s:
            step()
        error = RequestError("shutting_down", "the server was told to end")
    finally:
        service.refuse_new()
        service.end()
        while service.is_serving:  # a request may come through the door even now
            cut += door.end_all(made.front, error)
            service.join(0.02)
        for number, handler in before.items():
            signal.signal(number, handler)
    return cut
