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
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Node
from minprfaas.cluster.prefill_role import PrefillRole
from minprfaas.cluster.relay import RelayedDecodeRole, RelayingPrefillRole
from minprfaas.cluster.upkeep import Upkeep
from minprfaas.cluster.worker import Worker
from minprfaas.config import UNTHROTTLED_GBPS, Role, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.kvcache.layout import Layout
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.router import ShippingCosts

COLLECT_AFTER = 20_000  # new containers, not 700: each look goes through every token of the prompts under way
ASSUMED_S_PER_TOKEN = 1e-4  # of prefill, until one was seen
REST_S = 0.25  # that a node with nothing under way waits for news: only samples of its links are due before


@dataclass(frozen=True)
class Process:
    """The node's loop with the parts that it runs: workers, the front end, or both."""

    node: Node
    front: FrontEnd | None
    workers: list[Worker]

    def serve(self, patience_s: float = 0.0) -> None:
        """Take orders until the front end says that no more come, or is gone for `patience_s`; then say goodbye."""
        while (has_work := any(worker.has_work for worker in self.workers)) or not self._is_dismissed(patience_s):
            self.node.step(None if has_work else REST_S)
        self._say_goodbye()

    def _is_dismissed(self, patience_s: float) -> bool:
        upkeep = self.workers[0].upkeep
        if upkeep.front_gone_at_s is not None and upkeep.engine.clock() - upkeep.front_gone_at_s >= patience_s:
            return True
        return upkeep.is_stopping

    def run_until(self, reached: Callable[[], bool], deadline_s: float) -> bool:
        """Step until `reached()`; False if that has not come to hold within `deadline_s`."""
        give_up_at_s = time.monotonic() + deadline_s
        while not reached() and time.monotonic() < give_up_at_s:
            self.node.step()
        return reached()

    def shut_down(self, deadline_s: float) -> None:
        """Where the front end lives: tell all nodes that no more requests come, and wait for the last word of those
        that are there; then those of this process have theirs."""
        self.front.shut_down_nodes()
        self.run_until(lambda: not any(worker.has_work for worker in self.workers)
                       and not {*self.node.mail.links} & {*self.front.ready} - {*self.front.goodbyes}, deadline_s)
        self._say_goodbye()
        self.node.step()  # the front end hears them

    def _say_goodbye(self) -> None:
        for worker in self.workers:
            worker.upkeep.say_goodbye()


def worker(name: str, role: Role, engine: Engine, mail: Mail, transfer_deadline_s: float,
           room_deadline_s: float = LOCAL_DEADLINE_S, overlap: bool = True, relay: bool = False) -> Worker:
    """The part called `name`, which begins as `role`. `room_deadline_s` is how long a request may wait for blocks. With
    `relay`, PrfaaS nodes go on decoding while KVCache crosses (see `relay.py`)."""
    upkeep = Upkeep(name, role, engine, mail, transfer_deadline_s)

    def plays(role: Role) -> PrefillRole | DecodeRole:
        if role is Role.PDD:
            return (RelayedDecodeRole if relay else DecodeRole)(upkeep, room_deadline_s)
        return (RelayingPrefillRole if relay and role is Role.PRFAAS else PrefillRole)(upkeep, overlap)

    return Worker(upkeep, plays)


def front_end(plane: ControlPlane, mail: Mail, engine: Engine, deadline_s: float) -> FrontEnd:
    """The front end. `deadline_s` is what an offloaded prefill may take; of the engine it wants keys and the clock."""
    gc.set_threshold(COLLECT_AFTER)
    return FrontEnd(plane, mail, engine.kvcache.keys, engine.layout.block_tokens, deadline_s, engine.clock)


def process(mail: Mail, front: FrontEnd | None, workers: list[Worker]) -> Process:
    """The process of these parts. Workers introduce themselves to a front end beside them; to one elsewhere they do
    when it is met."""
    decode_first = sorted(workers, key=lambda worker: worker.upkeep.role is not Role.PDD)  # its step is the shorter one
    node = Node(mail, decode_first if front is None else [front, *decode_first])
    for other in workers[1:]:
        other.upkeep.tells_of_links = False
    if front is not None:
        for one in workers:
            one.upkeep.introduce()
    return Process(node, front, workers)


def control_settings(threshold: float, gbps: float | None, layout: Layout, **others) -> ControlSettings:
    """The control plane's settings for a model whose state has this layout, over a line of `gbps` (None: unlimited)."""
    token_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN)
    state_bytes = sum(spec.nbytes for spec in layout.specs if spec.kind is not StateKind.TOKEN)
    costs = ShippingCosts(token_bytes, state_bytes, ASSUMED_S_PER_TOKEN, ASSUMED_S_PER_TOKEN)
    return ControlSettings(threshold, gbps or UNTHROTTLED_GBPS, costs, **others)
