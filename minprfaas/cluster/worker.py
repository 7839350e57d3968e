"""A part with an engine: it plays one role at a time, over one cache, and changes it live.

Chapters 12 and 13; paper 3.4.3.
"""

from collections.abc import Callable

from minprfaas.cluster import messages
from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.node import Happening, Part
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.config import FRONT, Role


class Worker(Part):
    """Plays the upkeep's role and, once nothing is left to do in it, the one that the front end wants instead. Its
    cache stays, and is told anew with the new role. `plays` makes the object for a role."""

    def __init__(self, upkeep: Upkeep, plays: Callable[[Role], PrefillRole | DecodeRole]):
        self.name, self.engine, self.upkeep = upkeep.name, upkeep.engine, upkeep
        self.playing = plays(upkeep.role)
        self._plays, self._wanted = plays, upkeep.role

    @property
    def is_ready(self) -> bool:
        return self.playing.is_ready

    @property
    def has_work(self) -> bool:
        """Whether a request or a stream is under way."""
        return self.playing.has_work

    def hear(self, sender: str, message: messages.Message) -> None:
        """Take a message. Work for the other role was sent before its sender knew, and is to be given to another."""
        decodes = self.upkeep.role is Role.PDD
        match message:
            case messages.ChangeRole(role=Role.PDP.value | Role.PDD.value as role) if sender == FRONT:
                self._wanted = Role(role)
            case messages.PrefillOrder(id=id) if decodes:
                self.upkeep.mail.send(self.name, sender, messages.Failed(id, f"{self.name} decodes now", "lost"))
            case messages.Serve(id=id) if sender == FRONT and not decodes:
                self.upkeep.mail.send(self.name, sender, messages.Failed(id, f"{self.name} prefills now", "lost"))
            case _:
                self.upkeep.hear(sender, message)
                self.playing.hear(sender, message)

    def notice(self, happening: Happening) -> None:
        self.upkeep.notice(happening)
        self.playing.notice(happening)

    def step(self) -> None:
        """A step of the role; then the other one, if that is wanted and nothing is left to do in this one."""
        self.playing.step()
        self.upkeep.step()
        if self._wanted is not self.upkeep.role and not self.has_work:
            self.upkeep.role = self._wanted
            self.playing = self._plays(self._wanted)
            self.upkeep.introduce()
