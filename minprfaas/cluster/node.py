"""One process: the parts that live in it, and the loop that all of them share. Chapter 13; paper 3.1.

A step drains everything that has happened before a part computes: the queue cannot outgrow the loop, and a part that
computes for long does not keep another from hearing what is already here.
"""

import queue
from dataclasses import dataclass
from typing import Protocol

from minprfaas.cluster.mail import Mail
from minprfaas.cluster.messages import Message
from minprfaas.transport.events import Event, LinkLost, LinkRestored, MessageReceived, StreamDone, StreamFailed

IDLE_S = 0.02  # how long a node with nothing to compute waits for news before it looks at its deadlines


@dataclass(frozen=True)
class PeerLost:
    """The part called `name` is gone: its link is lost, or its process is a new one that knows nothing of before."""

    name: str
    reason: str


@dataclass(frozen=True)
class PeerReturned:
    """The part called `name` is there again, as a new one."""

    name: str


Happening = StreamDone | StreamFailed | PeerLost | PeerReturned


class Part(Protocol):
    """Front end, prefill role or decode role."""

    name: str

    def hear(self, sender: str, message: Message) -> None:
        """Take a message that `sender` has addressed to this part."""

    def notice(self, happening: Happening) -> None:
        """Take what has happened to a stream or to a peer; a stream that is not this part's is ignored."""

    def step(self) -> None:
        """Compute once, and look after what is overdue."""

    @property
    def is_ready(self) -> bool:
        """Whether the next step will compute something."""


class Node:
    """The loop of one process."""

    def __init__(self, mail: Mail, parts: list[Part]):
        self.mail = mail
        self.parts = {part.name: part for part in parts}
        for name in self.parts:
            mail.add_local(name)

    def step(self, idle_s: float | None = None) -> None:
        """Let every part compute, each after all that is there by then has been heard. With nothing to compute, this
        waits for news first, for `idle_s` (IDLE_S)."""
        self._drain(IDLE_S if idle_s is None else idle_s)
        for part in self.parts.values():
            part.step()
            self._drain(0.0)

    def _drain(self, idle_s: float) -> None:
        """Hear everything that is there; with nothing to compute, wait for news first."""
        self._deliver_local()
        wait_s = 0.0 if any(part.is_ready for part in self.parts.values()) else idle_s
        while True:
            try:
                event = self.mail.events.get(timeout=wait_s) if wait_s else self.mail.events.get_nowait()
            except queue.Empty:
                return
            self._dispatch(event)
            self._deliver_local()
            wait_s = 0.0

    def _deliver_local(self) -> None:
        """Hand over what the parts of this process told each other, and what they answer to that."""
        while envelopes := self.mail.take_local():
            for envelope in envelopes:
                self.parts[envelope.to].hear(envelope.sender, envelope.message)

    def _dispatch(self, event: Event) -> None:
        match event:
            case MessageReceived():
                envelope = self.mail.opened(event)
                if envelope is not None:
                    self.parts[envelope.to].hear(envelope.sender, envelope.message)
            case LinkLost(reason=reason, link=link):
                for name in self.mail.names_behind(link):
                    self._tell_all(PeerLost(name, f"link lost: {reason}"))
            case LinkRestored(peer_restarted=True, link=link):
                for name in self.mail.names_behind(link):
                    self._tell_all(PeerLost(name, f"{name} restarted"))
                    self._tell_all(PeerReturned(name))
            case StreamDone() | StreamFailed() | PeerReturned():
                self._tell_all(event)

    def _tell_all(self, happening: Happening) -> None:
        for part in self.parts.values():
            part.notice(happening)
