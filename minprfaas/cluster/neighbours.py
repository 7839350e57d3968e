"""A process's links to the others of its run: each is made when the other one is there, and again when it was lost.

Chapters 13, 14; the paper does not discuss it. Nobody waits for anybody here: a process that starts late, or died and
was started again, is met by a thread of its own, and its parts are then announced to the node's loop as returned.
"""

import threading
import time
from collections.abc import Callable

from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import PeerReturned
from minprfaas.cluster.topology import Place
from minprfaas.errors import UserError
from minprfaas.transport.base import LinkDown, LinkRefused
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.supervision import patiently

MEETING_S = 3600.0  # one attempt's; another one follows
PAUSE_S = 1.0  # after an attempt that failed
CLOSING_STEPS = 50  # of a tenth of a second each


class Neighbours:
    """`make_link` makes this process's end of the link to another process, not yet connected. UserError when there can
    be none, at this moment or at all."""

    def __init__(self, here: Place, peers: list[Place], make_link: Callable[[Place], Link | Fabric], mail: Mail):
        self.met: set[str] = set()  # names of the processes that were met at least once
        self.refused: dict[str, str] = {}  # why, by the name of the process, until it is met
        self._here, self._make_link, self._mail = here, make_link, mail
        self._closing = threading.Event()
        self._links = {peer.name: make_link(peer) for peer in peers}
        for peer in peers:
            threading.Thread(target=self._keep, args=(peer,), name=f"meeting {peer.name}", daemon=True).start()

    def _keep(self, peer: Place) -> None:
        while True:
            try:
                self._meet(peer)
            except (LinkRefused, UserError) as error:  # a machine without descriptors has no ports either
                self.refused[peer.name] = str(error)
            except LinkDown:
                pass  # it did not come, or came and went
            if self._closing.wait(PAUSE_S):
                return
            self._links[peer.name].close()  # of a fabric, the link may have come up without the rest
            try:
                self._links[peer.name] = self._make_link(peer)
            except UserError:
                pass  # the store is away; the old link will say that it is no use any more

    def _meet(self, peer: Place) -> None:
        link = self._links[peer.name]

        def met() -> None:
            self.met.add(peer.name)
            self.refused.pop(peer.name, None)
            self._mail.add_link(link, peer.parts, crosses_sites=peer.site != self._here.site)
            for part in peer.parts:
                self._mail.events.put(PeerReturned(part))

        link.connect(MEETING_S, met)
        link.wait_until_lost()

    def wait_for_all(self, deadline_s: float) -> None:
        """Until every process was met once, or the time is up: one that is away must not keep the others waiting."""
        give_up_at_s = time.monotonic() + deadline_s
        while not {*self._links} <= self.met and time.monotonic() < give_up_at_s:
            self._closing.wait(0.02)

    def close(self) -> None:
        """Say goodbye to all of them at once."""
        self._closing.set()
        closing = [threading.Thread(target=link.close, daemon=True) for link in self._links.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            patiently(lambda step_s: thread.join(step_s) or not thread.is_alive(), range(CLOSING_STEPS))
