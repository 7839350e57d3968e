"""How the parts of one process reach each other and the parts of other processes. Chapter 13.

A *part* (front end, prefill role, decode role) has a name. Parts of one process hand each other messages as they are
and KVCache over the loopback; to parts elsewhere both go over the link that leads there.
"""

import threading
from typing import Protocol

from minprfaas.cluster.envelope import BadMessage, Envelope, decode, encode
from minprfaas.cluster.messages import Message
from minprfaas.transport.base import KVTransport, LinkDown, MessageChannel
from minprfaas.transport.events import EventQueue, MessageReceived
from minprfaas.transport.encoding import Wire
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.wan.monitor import LinkStats


class Connection(KVTransport, MessageChannel, Protocol):
    """What leads to another process: KVCache and messages, and how it is doing. A link is one."""

    name: str

    def stats(self) -> LinkStats:
        """Of this side's sending direction."""


class Mail:
    """One process's switchboard. `events` is the queue into which all its transports put what happens; `wire` is how a
    request's KVCache crosses to another datacenter."""

    def __init__(self, events: EventQueue, wire: Wire = Wire()):
        self.events, self._wire = events, wire
        self._loopback = Loopback(events=events)
        self._local: list[Envelope] = []
        self._here: set[str] = set()
        self._link_to: dict[str, Connection] = {}  # by the name of a part elsewhere
        self._crosses_sites: set[str] = set()  # links, by their names
        self._adding = threading.Lock()

    def add_local(self, name: str) -> None:
        """A part of this process."""
        self._here.add(name)

    def is_here(self, name: str) -> bool:
        """Whether the part called `name` is one of this process."""
        return name in self._here

    def add_link(self, link: Connection, names: list[str], crosses_sites: bool = True) -> None:
        """The parts called `names` are at the other end of `link`, from now on of this one. Any thread may call it."""
        with self._adding:  # of two that change it at the same moment one would be lost, and nobody would hear of it
            if crosses_sites:
                self._crosses_sites = self._crosses_sites | {link.name}
            self._link_to = {**self._link_to, **{name: link for name in names}}  # replaced: the loop may be reading it

    def send(self, sender: str, to: str, message: Message) -> None:
        """Send a message. To whom there is no way any more it is not sent: the loss of the link has its own event."""
        envelope = Envelope(to, sender, message)
        if to in self._here:
            self._local.append(envelope)
        elif to in self._link_to:
            try:
                self._link_to[to].send_message(encode(envelope))
            except LinkDown:
                pass  # whoever waits for an answer hears `PeerLost`

    def transport(self, to: str) -> KVTransport:
        """What carries KVCache between this process and the part called `to`. Raises LinkDown for an unknown name."""
        if to in self._here:
            return self._loopback
        if to in self._link_to:
            return self._link_to[to]
        raise LinkDown(f"there is no way to {to!r}")

    def wire_to(self, name: str) -> Wire:
        """How KVCache crosses to the part called `name`, or from it: inside a datacenter exactly."""
        link = self._link_to.get(name)
        return self._wire if link is not None and link.name in self._crosses_sites else Wire()

    @property
    def links(self) -> dict[str, Connection]:
        """The links of this process by the names of the parts that they lead to."""
        return dict(self._link_to)

    @property
    def links_between_sites(self) -> list[Connection]:
        """Every link to the other datacenter once."""
        links = {link.name: link for link in self._link_to.values()}
        return [link for name, link in links.items() if name in self._crosses_sites]

    def names_behind(self, link_name: str) -> list[str]:
        """The parts at the other end of a link."""
        return [name for name, link in self._link_to.items() if link.name == link_name]

    def take_local(self) -> list[Envelope]:
        """What parts of this process have sent each other since the last call."""
        taken, self._local = self._local, []
        return taken

    def opened(self, event: MessageReceived) -> Envelope | None:
        """A message from a link. None unless it is one of ours, for a part that is here, from one behind that link: a
        peer may speak for its own parts only."""
        try:
            envelope = decode(event.message)
        except BadMessage:
            return None  # the handshake vouches for the peer; a message we do not know is one we need not obey
        link = self._link_to.get(envelope.sender)
        is_ours = envelope.to in self._here and link is not None and link.name == event.link
        return envelope if is_ours else None
