"""The two processes of the topology prfaas=1, pd=1: which parts live where, and who is at the other end. Chapter 13.

Process A is the PrfaaS datacenter with its one node. Process B is the local PD datacenter: the front end, and its one
PD node, which has to play both PD roles, each with an engine and a pool of its own over the one model. Inside B,
KVCache goes from the prefill role to the decode role over the loopback, as it comes from A over the link.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.cluster.decode_role import DecodeRole
from minprfaas.cluster.front_end import LOCAL_DEADLINE_S, FrontEnd
from minprfaas.cluster.mail import FRONT, Connection, Mail
from minprfaas.cluster.node import Node
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.config import Role, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.kvcache.layout import Layout
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.router import TransferCosts
from minprfaas.transport.base import EventQueue

PRFAAS, PD_PREFILL, PD_DECODE = "prfaas-0", "pd-0/pdp", "pd-0/pdd"
UNTHROTTLED_GBPS = 100.0  # the paper's link; a first guess that the monitor corrects from what it observes
ASSUMED_S_PER_TOKEN = 1e-4  # of prefill, until one was seen


@dataclass(frozen=True)
class PrfaasProcess:
    """Process A."""

    node: Node
    prefill: PrefillRole
    link: Connection

    def serve(self) -> None:
        """Take orders until the front end says that no more come, or is gone; then say goodbye."""
        self.prefill.upkeep.introduce()
        while self.prefill.has_work or not self.prefill.upkeep.is_stopping:
            self.node.step()
        self.prefill.upkeep.close()
        self.prefill.upkeep.say_goodbye()


@dataclass(frozen=True)
class PDProcess:
    """Process B."""

    node: Node
    front: FrontEnd
    prefill: PrefillRole
    decode: DecodeRole
    links: dict[str, Connection]  # by the name of the PrfaaS node at the other end

    def run(self) -> None:
        """Step until every request has ended."""
        while self.front.has_work:
            self.node.step()

    def run_until(self, reached: Callable[[], bool], deadline_s: float) -> bool:
        """Step until `reached()`; False if that has not come to hold within `deadline_s`."""
        clock = self.decode.engine.clock
        give_up_at_s = clock() + deadline_s
        while not reached() and clock() < give_up_at_s:
            self.node.step()
        return reached()

    def shut_down(self, deadline_s: float) -> None:
        """Tell the other processes that no more requests come, and wait for the last word of those that are there."""
        self.front.shut_down_nodes()
        self.run_until(lambda: not {*self.links} & {*self.front.ready} - {*self.front.goodbyes}, deadline_s)
        self.prefill.upkeep.close()
        self.decode.upkeep.close()


def prfaas_process(engine: Engine, link: Connection, events: EventQueue, transfer_deadline_s: float,
                   overlap: bool = True, name: str = PRFAAS) -> PrfaasProcess:
    """Process A over a link whose events go into `events`. The link need not be connected yet."""
    mail = Mail(events)
    mail.add_link(link, [FRONT, PD_PREFILL, PD_DECODE])
    prefill = PrefillRole(name, Role.PRFAAS, engine, mail, transfer_deadline_s, overlap)
    return PrfaasProcess(Node(mail, [prefill]), prefill, link)


def pd_process(prefill_engine: Engine, decode_engine: Engine, links: dict[str, Connection], events: EventQueue,
               plane: ControlPlane, deadline_s: float, room_deadline_s: float = LOCAL_DEADLINE_S) -> PDProcess:
    """Process B over links, by PrfaaS node, whose events go into `events`. The engines share the model, not the pool.

    `deadline_s` is what an offloaded prefill may take, `room_deadline_s` how long a request may wait for blocks.
    """
    mail = Mail(events)
    for name, link in links.items():
        mail.add_link(link, [name])
    front = FrontEnd(plane, mail, decode_engine.kvcache.keys, decode_engine.layout.block_tokens, deadline_s,
                     decode_engine.clock)
    prefill = PrefillRole(PD_PREFILL, Role.PDP, prefill_engine, mail, deadline_s)
    decode = DecodeRole(PD_DECODE, decode_engine, mail, room_deadline_s, deadline_s)
    node = Node(mail, [front, decode, prefill])
    prefill.upkeep.introduce()
    decode.upkeep.introduce()
    return PDProcess(node, front, prefill, decode, links)


def control_settings(threshold: float, gbps: float | None, layout: Layout, ship_prefixes: bool = False,
                     fleet: Fleet | None = None) -> ControlSettings:
    """The control plane's settings for a model whose state has this layout, over a line of `gbps` (None: unlimited).
    With a fleet, that is with profiles, the threshold follows what is observed (the short-term loop)."""
    token_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN)
    state_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is not StateKind.TOKEN)
    costs = TransferCosts(token_bytes, state_bytes, ASSUMED_S_PER_TOKEN, ASSUMED_S_PER_TOKEN)
    return ControlSettings(threshold=threshold, link_gbps=gbps or UNTHROTTLED_GBPS, costs=costs,
                           ship_prefixes=ship_prefixes, fleet=fleet, adaptive=fleet is not None)
