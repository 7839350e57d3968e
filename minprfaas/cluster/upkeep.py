"""What every node does beside its role: say who and what is here, ship prefixes. Chapters 11 and 13; paper 3.4.3."""

import itertools
import math
import resource
import secrets
import sys
from dataclasses import replace

import torch

from minprfaas.cluster import messages
from minprfaas.cluster.kv_send import Outgoing
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Happening, PeerLost, PeerReturned
from minprfaas.cluster.prefix_shipping import PrefixShipping
from minprfaas.config import FRONT, LinkSample, Role
from minprfaas.engine.engine import Engine

TIMELINE_PART = 4096  # events a message
FIGURES_S = 1.0  # how often a node says how things stand; also a link that carries nothing


class Upkeep:
    """The upkeep of one node. The front end's directory follows the node's cache through numbered news, and asks for an
    inventory when a number is missing. `transfer_deadline_s` is how long a prefix may be under way, and how long the
    last byte of any stream may lack its acknowledgement."""

    def __init__(self, name: str, role: Role, engine: Engine, mail: Mail, transfer_deadline_s: float):
        self.is_stopping = False  # the front end sends no more requests
        self.tells_of_links = True  # one part of a process does
        self.front_gone_at_s: float | None = None  # since when there is nobody to work for
        self.name, self.role, self.engine, self.mail = name, role, engine, mail
        # At random: what an earlier process of this name expected may still arrive, and must meet no stream of ours.
        self.stream_ids = itertools.count(secrets.randbits(32) << 16)
        self.outgoing = Outgoing(name, engine.kvcache, mail, engine.clock, transfer_deadline_s)
        self.prefixes = PrefixShipping(name, engine.kvcache, mail, self.outgoing, engine.clock, transfer_deadline_s,
                                       self.stream_ids)
        self._ledger = engine.kvcache.ledger
        self._ledger.take_news()  # from now on there are some
        self._sequence = 0  # of the last cache event told
        self._told: dict[str, LinkSample] = {}  # the last of each link
        self._began_at_s = engine.clock()
        self._figures_at_s = -math.inf  # when they were told last

    @property
    def has_streams(self) -> bool:
        """Whether a stream leaves, or a prefix comes."""
        return bool(self.outgoing or self.prefixes)

    def hear(self, sender: str, message: messages.Message) -> None:
        """Take a message that is not about the role."""
        match message:
            case messages.PrefixOrder():
                self.prefixes.order(sender, message)
            case messages.PrefixAbort(stream_id=stream_id):
                self.prefixes.aborted(sender, stream_id)
            case messages.SendInventory() if sender == FRONT:
                self._tell_inventory()
            case messages.Shutdown() if sender == FRONT:
                self.is_stopping = True

    def notice(self, happening: Happening) -> None:
        """Take what has happened to a stream or to a peer."""
        match happening:
            case PeerLost(name=name):
                self.prefixes.peer_lost(name)
                if name == FRONT:
                    self.front_gone_at_s = self.engine.clock()
            case PeerReturned(name=name):
                if name == FRONT:
                    self.is_stopping, self.front_gone_at_s = False, None
                    self.introduce()
            case _:
                self.prefixes.notice(happening)

    def step(self) -> None:
        """Look after the streams, tell the news and, now and then, how things stand."""
        self.outgoing.step()
        self.prefixes.step()
        self.tell_news()
        if self.engine.clock() - self._figures_at_s >= FIGURES_S:
            self._tell_figures()

    def introduce(self) -> None:
        """Say who is here. The front end then asks for an inventory."""
        device, blocks = str(self.engine.model.device), self._ledger.num_blocks
        self._tell(messages.NodeReady(self.role.value, device, blocks))

    def mark_stream(self, stream_id: int, request_id: str) -> None:
        """Note on the timeline whose KVCache a stream carries: lanes know only its number."""
        if self.engine.timeline is not None:
            self.engine.timeline.instant("streams", "stream opened", self.engine.clock(), stream=stream_id,
                                         request=request_id)

    def say_goodbye(self) -> None:
        """The last words: the timeline, what this process did and took, and whether its books are right."""
        events = self.engine.timeline.events() if self.engine.timeline else []
        for first in range(0, len(events), TIMELINE_PART):
            self._tell(messages.TimelinePart(events[first:first + TIMELINE_PART]))
        self._tell_figures()
        pace = getattr(self.engine.runner, "pace", None)
        kept = (pace.allowed_s, pace.needed_s, pace.late_s) if pace is not None else ()
        self._tell(messages.Goodbye(peak_memory_bytes(self.engine.model.device), self._wrong_in_books(), *kept))

    def tell_news(self) -> None:
        """Cache events since the last time, and what the links to the other datacenter carry away."""
        news = self._ledger.take_news()
        if news:
            self._tell_cache(self._sequence + 1, news, inventory=False)
            self._sequence += len(news)
        for link in self.mail.links_between_sites if self.tells_of_links else []:
            samples = link.stats().samples
            if samples and self._is_news(samples[-1], self._told.get(link.name)):
                self._told[link.name] = samples[-1]
                self._tell(replace(samples[-1], link=link.name))

    def _is_news(self, sample: LinkSample, told: LinkSample | None) -> bool:
        """In a large cluster most links carry nothing at most times: each sample of each would be most of the mail."""
        if told is None or sample.at_s <= told.at_s:
            return told is None
        carries = any(one.utilization or one.queued_bytes or one.inflight_bytes for one in (sample, told))
        return carries or sample.at_s - told.at_s >= FIGURES_S

    def _tell_figures(self) -> None:
        engine, stats = self.engine, self.engine.kvcache.stats()
        self._figures_at_s = engine.clock()
        self._tell(messages.NodeFigures(
            self._figures_at_s - self._began_at_s, engine.computed_s, engine.prefilled_tokens, engine.decoded_tokens,
            stats.free, stats.cached, stats.in_use))

    def _wrong_in_books(self) -> str:
        try:
            self.engine.kvcache.check()
        except RuntimeError as error:
            return str(error)
        in_use = self.engine.kvcache.stats().in_use
        return f"{in_use} blocks are held for nobody" if in_use else ""

    def _tell_inventory(self) -> None:
        """Everything that a prefill could begin with here. News that were not told yet are part of it."""
        self._sequence += len(self._ledger.take_news())
        self._tell_cache(self._sequence, self._ledger.inventory(), inventory=True)

    def _tell_cache(self, sequence: int, entries: list, inventory: bool) -> None:
        keys, tokens = [one.key.hex() for one in entries], [one.tokens for one in entries]
        self._tell(messages.CacheNews(sequence, keys, tokens, inventory))

    def _tell(self, message: messages.Message) -> None:
        self.mail.send(self.name, FRONT, message)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: resident, plus what it took of its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
