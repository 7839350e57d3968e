"""A PD node: one PD role at a time over one engine and its cache, changed live. Chapters 12 and 13; paper 3.4.3."""

from minprfaas.cluster import messages
from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.mail import FRONT, Mail
from minprfaas.cluster.node import Happening
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.config import Role
from minprfaas.engine.engine import Engine


class PDNode:
    """The part called `name`, which begins as `role` and becomes what the front end tells it to, once it has nothing
    left to do in the old role. Its cache stays, and is told anew with the new role. Deadlines as in the two roles."""

    def __init__(self, name: str, role: Role, engine: Engine, mail: Mail, room_deadline_s: float,
                 transfer_deadline_s: float, overlap: bool = True, decodes: type[DecodeRole] = DecodeRole):
        self.name, self.engine, self._overlap = name, engine, overlap
        self.upkeep = Upkeep(name, role, engine, mail, transfer_deadline_s)
        self._mail, self._room_deadline_s, self._transfer_deadline_s = mail, room_deadline_s, transfer_deadline_s
        self._wanted, self._decodes = role, decodes
        self.part = self._playing(role)

    def _playing(self, role: Role) -> PrefillRole | DecodeRole:
        if role is Role.PDP:
            return PrefillRole(self.name, role, self.engine, self._mail, self._transfer_deadline_s, self._overlap,
                               self.upkeep)
        return self._decodes(self.name, self.engine, self._mail, self._room_deadline_s, self._transfer_deadline_s,
                             self.upkeep)

    @property
    def role(self) -> Role:
        """The role that it plays."""
        return self.upkeep.role

    @property
    def is_ready(self) -> bool:
        """Whether the next step will compute something."""
        return self.part.is_ready

    @property
    def has_work(self) -> bool:
        """Whether a request or a stream is under way."""
        return self.part.has_work

    def hear(self, sender: str, message: messages.Message) -> None:
        """Take a message. Work for the other role was sent before its sender knew, and is to be given to another."""
        match message:
            case messages.ChangeRole(role=Role.PDP.value | Role.PDD.value as role) if sender == FRONT:
                self._wanted = Role(role)
            case messages.PrefillOrder(id=id) if self.role is Role.PDD:
                self._mail.send(self.name, sender, messages.PrefillFailed(id, f"{self.name} decodes now", "lost"))
            case messages.Serve(id=id) if self.role is Role.PDP and sender == FRONT:
                self._mail.send(self.name, sender, messages.PrefillLost(id, f"{self.name} prefills now", "lost"))
            case _:
                self.part.hear(sender, message)

    def notice(self, happening: Happening) -> None:
        """Take what has happened to a stream or to a peer."""
        self.part.notice(happening)

    def step(self) -> None:
        """A step of the role; then the other one, if that is wanted and nothing is left to do in this one."""
        self.part.step()
        if self._wanted is not self.role and not self.part.has_work:
            self.upkeep.role = self._wanted
            self.part = self._playing(self._wanted)
            self.upkeep.introduce()
