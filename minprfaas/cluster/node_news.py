"""What a node tells the front end unasked: who it is, what it holds, how its links are doing. Chapter 13; paper 3.4.3."""

from minprfaas.cluster import messages
from minprfaas.cluster.mail import FRONT, Mail
from minprfaas.cluster.node import peak_memory_bytes
from minprfaas.config import Role
from minprfaas.engine.engine import Engine

TIMELINE_PART = 4096  # events a message


class NodeNews:
    """One part's news. The front end's directory follows its cache through numbered events, and asks for an inventory
    when a number is missing."""

    def __init__(self, name: str, role: Role, engine: Engine, mail: Mail):
        self._name, self._role, self._engine, self._mail = name, role, engine, mail
        self._ledger = engine.kvcache.ledger
        self._ledger.take_news()  # from now on there are some
        self._sequence = 0  # of the last cache event told
        self._sampled_at_s = 0.0

    def introduce(self) -> None:
        """Say who is here. The front end then asks for an inventory."""
        device, blocks = str(self._engine.model.device), self._ledger.num_blocks
        self._tell(messages.NodeReady(self._role.value, device, blocks))

    def tell_inventory(self) -> None:
        """Everything that a prefill could begin with here. News that were not told yet are part of it."""
        self._sequence += len(self._ledger.take_news())
        held = self._ledger.inventory()
        self._tell(messages.CacheNews(self._sequence, [one.key.hex() for one in held], [one.tokens for one in held],
                                      inventory=True))

    def tell(self) -> None:
        """Cache events since the last time, and the newest sample of the link that carries KVCache away."""
        news = self._ledger.take_news()
        if news:
            keys, tokens = [one.key.hex() for one in news], [one.tokens for one in news]
            self._tell(messages.CacheNews(self._sequence + 1, keys, tokens, inventory=False))
            self._sequence += len(news)
        if self._role is not Role.PDD:  # where one process plays both PD roles, one of them is enough
            self._tell_samples()

    def _tell_samples(self) -> None:
        for link in self._mail.links:
            samples = link.stats().samples
            if samples and samples[-1].time_s > self._sampled_at_s:
                self._sampled_at_s = samples[-1].time_s
                self._tell(samples[-1])

    def say_goodbye(self) -> None:
        """The last words: the timeline, and what this process took."""
        events = self._engine.timeline.events() if self._engine.timeline else []
        for first in range(0, len(events), TIMELINE_PART):
            self._tell(messages.TimelinePart(events[first:first + TIMELINE_PART]))
        self._tell(messages.Goodbye(peak_memory_bytes(self._engine.model.device)))

    def _tell(self, message: messages.Message) -> None:
        self._mail.send(self._name, FRONT, message)
