"""Load books: what each node has been given to do and has not finished. Chapter 11 (paper 3.3).

Kept from decisions and from what is told of each request, so that a node need not be asked how busy it is.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from minprfaas.scheduling.router import Decision, NodeView


@dataclass(slots=True)
class NodeBook(NodeView):
    """A node's page. A prefill node computes its requests in the order in which they were given; `expected_s` holds the
    seconds of each that has not ended (0 without a profile). A decode node is `decoding` what it has all KVCache of."""

    expected_s: dict[Hashable, float] = field(default_factory=dict)
    decoding: set[Hashable] = field(default_factory=set)

    @property
    def waiting_s(self) -> float:
        """Seconds of prefill that wait behind the request in work."""
        in_work_s = next(iter(self.expected_s.values()), 0.0)
        return sum(self.expected_s.values()) - in_work_s


@dataclass(slots=True)
class Booking:
    """Where one request stands. The page of a node that has left counts for nothing, but may be written to."""

    decision: Decision
    prefill: NodeBook
    decode: NodeBook
    load_tokens: int


class LoadBooks:
    """The pages of all nodes that are up, and what each request has booked on them."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeBook] = {}
        self._bookings: dict[Hashable, Booking] = {}

    def open(self, id: Hashable, decision: Decision, load_tokens: int, expected_s: float) -> None:
        """A request was given to two nodes."""
        booking = Booking(decision, self.nodes[decision.node], self.nodes[decision.decode_node], load_tokens)
        self._bookings[id] = booking
        booking.prefill.load += load_tokens
        booking.prefill.expected_s[id] = expected_s
        booking.decode.load += 1

    def end_prefill(self, id: Hashable) -> Decision | None:
        """Its prefill node has nothing more to do for this request. None for one that is not known."""
        booking = self._bookings.get(id)
        if booking is None:
            return None
        if booking.prefill.expected_s.pop(id, None) is not None:
            booking.prefill.load -= booking.load_tokens
        return booking.decision

    def start_decode(self, id: Hashable) -> None:
        """Its KVCache is on the decode node, in a batch or waiting for a place in one."""
        booking = self._bookings.get(id)
        if booking is not None:
            booking.decode.decoding.add(id)

    def close(self, id: Hashable) -> None:
        """The request has ended, or is to begin again. Harmless for an unknown one."""
        if self.end_prefill(id) is None:
            return
        decode = self._bookings.pop(id).decode
        decode.load -= 1
        decode.decoding.discard(id)
