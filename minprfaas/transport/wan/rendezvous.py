"""How the two ends of a link meet: they agree on an epoch at the store, connect and authenticate lanes. Chapter 07.

Rank 1 knocks with a fresh word and rank 0 answers that word with a fresh epoch number, so an end that died and came
back never meets the other in an old epoch. No KV and no message passes through the store.
"""

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from minprfaas.config import LinkConfig
from minprfaas.errors import one_line
from minprfaas.transport.base import LinkDown, LinkRefused
from minprfaas.transport.wan.binding import choose_binding
from minprfaas.transport.wan.handshake import INCARNATION_BYTES, LinkIdentity, shake_hands
from minprfaas.transport.wan.lanes import STORE_POLL_S, Lane

REFUSAL_PAUSE_S = 0.2
SLOW_POLL_S = 0.2
LANE_TIMEOUT_S = 5.0  # for one attempt to connect and shake hands, once both sides are there

LaneType = Callable[..., Lane]  # called as (store, index, rank, payload_limit, timeout_s, binding)


@dataclass(frozen=True)
class Meeting:
    """Both ends are there: connected, authenticated lanes under a number that was never used before."""

    epoch: int
    lanes: list[Lane]
    peer: bytes  # its incarnation: another process, another word


class Rendezvous:
    """Meets the peer, as often as it has to be. One thread at a time."""

    def __init__(self, name: str, store: dist.Store, rank: int, config: LinkConfig, identity: LinkIdentity,
                 payload_limit: int, lane_type: LaneType):
        self._name, self._rank, self._identity = name, rank, identity
        self._lane_count, self._payload_limit, self._lane_type = config.lanes, payload_limit, lane_type
        self._owners_store = store  # kept alive: its server may be this object's
        self._store = store.clone()  # a store client does one thing at a time, and would make links wait for each other
        self._store.set_timeout(timedelta(seconds=config.timeout_s))  # one that stands still is awaited like a peer
        self._incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self._binding = choose_binding(store)

    def meet(self, give_up_at_s: float, given_up: threading.Event, bear_refusals: bool) -> Meeting:
        """Raises LinkDown when `give_up_at_s` passes or `given_up` is set; LinkRefused at once unless refusals are
        borne: a stranger may come while the peer is away, and the peer may come after it."""
        failure = "the peer did not come"
        while time.monotonic() < give_up_at_s and not given_up.is_set():
            epoch = self._agree_on_epoch(give_up_at_s, given_up)
            if epoch is None:
                break
            lanes: list[Lane] = []
            try:
                return Meeting(epoch, lanes, self._connect(epoch, lanes))
            except LinkDown as error:
                for lane in lanes:
                    lane.cut()
                if isinstance(error, LinkRefused):
                    if not bear_refusals:
                        raise
                    given_up.wait(REFUSAL_PAUSE_S)
                failure = str(error)
        raise LinkDown(f"link {self._name} did not connect: {failure}")

    def _agree_on_epoch(self, give_up_at_s: float, given_up: threading.Event) -> int | None:
        """None when the peer does not come by `give_up_at_s`."""
        knock = f"{self._name}/knock"
        try:
            if self._rank == 1:
                word = secrets.token_hex(8)
                self._store.set(knock, word)
                answer = f"{self._name}/answer/{word}"
                came = _poll(lambda: self._store.check([answer]), give_up_at_s, given_up)
                return int(self._store.get(answer)) if came else None
            if not _poll(lambda: self._store.check([knock]) and self._store.get(knock), give_up_at_s, given_up):
                return None
            word = self._store.get(knock).decode()
            epoch = self._store.add(f"{self._name}/epoch", 1)
            self._store.set(f"{self._name}/answer/{word}", str(epoch))
            # Last: a knock that is gone without an answer, because this end died here, would be awaited in vain.
            self._store.compare_set(knock, word, "")  # answered; a newer knock stays
            return epoch
        except RuntimeError as error:
            raise LinkDown(f"link {self._name}: its store does not answer: {one_line(error)}") from None

    def _connect(self, epoch: int, lanes: list[Lane]) -> bytes:
        """Fill `lanes` with connected, authenticated lanes; returns the peer's incarnation."""
        store = dist.PrefixStore(f"{self._name}/{epoch}", self._store)
        terms = f"link {self._name}, epoch {epoch}, {self._lane_count} lanes, frames of {self._payload_limit} bytes"

        def connect(index: int) -> None:
            lanes.append(self._lane_type(store, index, self._rank, self._payload_limit, LANE_TIMEOUT_S, self._binding))

        def shake(lane: Lane) -> bytes:
            return shake_hands(lane, f"{terms}, lane {lane.index}", self._incarnation, self._identity)

        connect(0)
        peer = shake(lanes[0])  # first, so that ends that disagree on the number of lanes hear of it
        for index in range(1, self._lane_count):
            connect(index)
        with ThreadPoolExecutor(self._lane_count) as pool:
            if {peer, *pool.map(shake, lanes[1:])} != {peer}:
                raise LinkDown("the lanes lead to different peers")
        return peer


def _poll(arrived: Callable[[], object], give_up_at_s: float, given_up: threading.Event) -> bool:
    pause_s = STORE_POLL_S
    while not arrived():
        if time.monotonic() >= give_up_at_s or given_up.wait(pause_s):
            return False
        pause_s = min(pause_s * 1.2, SLOW_POLL_S)  # one who is late need not be asked for often
    return True
