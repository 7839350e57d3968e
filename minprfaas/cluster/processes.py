"""One process of a run: which parts live there, and how long it serves. Chapter 13; paper 3.1.

A node plays one role, with an engine and a pool of its own. In the smallest topology the one PD node plays both PD
roles over the one model; KVCache then goes from its prefill role to its decode role over the loopback, as it comes
from the PrfaaS node over the link.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.front_end import LOCAL_DEADLINE_S, FrontEnd
from minprfaas.cluster.mail import Connection, Mail
from minprfaas.cluster.node import Node
from minprfaas.cluster.pd_node import PDNode
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.relay import RelayedDecodeRole, RelayingPrefillRole
from minprfaas.cluster.topology import PRFAAS_SITE, Place, Topology
from minprfaas.config import Role, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.kvcache.layout import Layout
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.router import TransferCosts
from minprfaas.transport.events import EventQueue
from minprfaas.transport.encoding import Wire

PRFAAS = "prfaas-0"
UNTHROTTLED_GBPS = 100.0  # the paper's link; a first guess that the monitor corrects from what it observes
COLLECT_AFTER = 20_000  # new containers, not 700: each look goes through every token of the prompts under way
ASSUMED_S_PER_TOKEN = 1e-4  # of prefill, until one was seen
RolePart = PrefillRole | DecodeRole | PDNode


@dataclass(frozen=True)
class Process:
    """The node's loop with the parts that it runs: roles, the front end, or both."""

    node: Node
    front: FrontEnd | None
    roles: list[RolePart]

    @property
    def prefill(self) -> PrefillRole:
        """The prefill role; the process has one."""
        return next(role for role in self.roles if isinstance(role, PrefillRole))

    @property
    def decode(self) -> DecodeRole:
        """The decode role; the process has one."""
        return next(role for role in self.roles if isinstance(role, DecodeRole))

    @property
    def links(self) -> dict[str, Connection]:
        """By the names of the parts that they lead to."""
        return self.node.mail.links

    def serve(self, patience_s: float = 0.0) -> None:
        """Take orders until the front end says that no more come, or is gone for `patience_s`; then say goodbye."""
        while any(role.has_work for role in self.roles) or not self._is_dismissed(patience_s):
            self.node.step()
        self._say_goodbye()

    def _is_dismissed(self, patience_s: float) -> bool:
        upkeep = self.roles[0].upkeep
        gone_at_s = upkeep.front_gone_at_s
        return upkeep.is_stopping or (gone_at_s is not None and self.roles[0].engine.clock() - gone_at_s >= patience_s)

    def run(self) -> None:
        """Where the front end lives: step until every request has ended."""
        while self.front.has_work:
            self.node.step()

    def run_until(self, reached: Callable[[], bool], deadline_s: float) -> bool:
        """Step until `reached()`; False if that has not come to hold within `deadline_s`."""
        give_up_at_s = time.monotonic() + deadline_s
        while not reached() and time.monotonic() < give_up_at_s:
            self.node.step()
        return reached()

    def shut_down(self, deadline_s: float) -> None:
        """Where the front end lives: tell all nodes that no more requests come, and wait for the last word of those that
        are there; then those of this process have theirs."""
        self.front.shut_down_nodes()
        self.run_until(lambda: not any(role.has_work for role in self.roles)
                       and not {*self.links} & {*self.front.ready} - {*self.front.goodbyes}, deadline_s)
        self._say_goodbye()
        self.node.step()  # the front end hears them

    def _say_goodbye(self) -> None:
        for role in self.roles:
            role.upkeep.close()
        for role in self.roles:
            role.upkeep.say_goodbye()


def roles_of(place: Place, new_engine: Callable[[], Engine], mail: Mail, transfer_deadline_s: float,
             room_deadline_s: float = LOCAL_DEADLINE_S, overlap: bool = True, relay: bool = False) -> list[RolePart]:
    """The roles of a process, each with a pool of its own. `room_deadline_s` is how long a request may wait for
    blocks. With `relay`, PrfaaS nodes go on decoding while KVCache crosses (see `relay.py`)."""
    decodes, offloaded = (RelayedDecodeRole, RelayingPrefillRole) if relay else (DecodeRole, PrefillRole)
    roles: list[RolePart] = []
    for name, role in place.roles.items():
        if role is not Role.PRFAAS and len(place.roles) == 1:
            roles.append(PDNode(name, role, new_engine(), mail, room_deadline_s, transfer_deadline_s, overlap, decodes))
        elif role is Role.PDD:
            roles.append(decodes(name, new_engine(), mail, room_deadline_s, transfer_deadline_s))
        else:
            prefills = offloaded if role is Role.PRFAAS else PrefillRole
            roles.append(prefills(name, role, new_engine(), mail, transfer_deadline_s, overlap))
    return roles


def front_end(plane: ControlPlane, mail: Mail, engine: Engine, deadline_s: float) -> FrontEnd:
    """The front end. `deadline_s` is what an offloaded prefill may take; of the engine it wants keys and the clock."""
    gc.set_threshold(COLLECT_AFTER)
    return FrontEnd(plane, mail, engine.kvcache.keys, engine.layout.block_tokens, deadline_s, engine.clock)


def process(mail: Mail, front: FrontEnd | None, roles: list[RolePart]) -> Process:
    """The process of these parts. Roles introduce themselves to a front end beside them; to one elsewhere they do when
    it is met."""
    decode_first = sorted(roles, key=lambda role: isinstance(role, PrefillRole))  # its step is the shorter one
    node = Node(mail, [*([front] if front is not None else []), *decode_first])
    for role in roles if front is not None else []:
        role.upkeep.introduce()
    return Process(node, front, roles)


# The two processes of the topology prfaas=1,pd=1, for who has their links at hand


def prfaas_process(engine: Engine, link: Connection, events: EventQueue, transfer_deadline_s: float,
                   overlap: bool = True, name: str = PRFAAS, wire: Wire = Wire(),
                   relay: bool = False) -> Process:
    """The PrfaaS node over a link whose events go into `events`. The link need not be connected yet."""
    mail = Mail(events, wire)
    _, pd = Topology(1, 1).two_places()
    mail.add_link(link, pd.parts)
    place = Place(name, PRFAAS_SITE, {name: Role.PRFAAS})
    made = process(mail, None, roles_of(place, lambda: engine, mail, transfer_deadline_s, overlap=overlap,
                                          relay=relay))
    made.prefill.upkeep.introduce()
    return made


def pd_process(prefill_engine: Engine, decode_engine: Engine, links: dict[str, Connection], events: EventQueue,
               plane: ControlPlane, deadline_s: float, room_deadline_s: float = LOCAL_DEADLINE_S,
               wire: Wire = Wire(), relay: bool = False) -> Process:
    """The PD node and the front end over links, by PrfaaS node, whose events go into `events`. The engines share the
    model, not the pool."""
    mail = Mail(events, wire)
    for name, link in links.items():
        mail.add_link(link, [name])
    front = front_end(plane, mail, decode_engine, deadline_s)
    _, pd = Topology(1, 1).two_places()
    engines = iter((prefill_engine, decode_engine))
    return process(mail, front, roles_of(pd, lambda: next(engines), mail, deadline_s, room_deadline_s, relay=relay))


def control_settings(threshold: float, gbps: float | None, layout: Layout, ship_prefixes: bool = False,
                     fleet: Fleet | None = None) -> ControlSettings:
    """The control plane's settings for a model whose state has this layout, over a line of `gbps` (None: unlimited).
    With a fleet, that is with profiles, the threshold follows what is observed (the short-term loop)."""
    token_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN)
    state_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is not StateKind.TOKEN)
    costs = TransferCosts(token_bytes, state_bytes, ASSUMED_S_PER_TOKEN, ASSUMED_S_PER_TOKEN)
    return ControlSettings(threshold=threshold, link_gbps=gbps or UNTHROTTLED_GBPS, costs=costs,
                           ship_prefixes=ship_prefixes, fleet=fleet, adaptive=fleet is not None)
