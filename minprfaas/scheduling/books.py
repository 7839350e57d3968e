"""Load books: what each node has been given to do and has not finished. Chapter 11 (paper 3.3).

Kept from the control plane's own decisions and from what nodes report of each request, so that the simulator's nodes
and live ones are weighed alike, and a node need not be asked how busy it is.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from minprfaas.config import Role
from minprfaas.scheduling.router import NodeView


@dataclass(slots=True)
class PrefillBook(NodeView):
    """A prefill node. Its requests run in the order in which they were given; `expected_s` holds the seconds of prefill
    of each that has not ended, where a profile says how long that takes."""

    expected_s: dict[Hashable, float] = field(default_factory=dict)
    total_s: float = 0.0

    @property
    def waiting_s(self) -> float:
        """Seconds of prefill that wait behind the request in work."""
        return self.total_s - next(iter(self.expected_s.values()), 0.0)


@dataclass(slots=True)
class DecodeBook(NodeView):
    """A decode node; of the `load` requests that it was given, `decoding` have their KVCache."""

    decoding: int = 0


@dataclass(slots=True)
class Booking:
    """Where one request stands. A node that has left keeps its book, which then counts for nothing."""

    route: Role
    prefill: PrefillBook
    decode: DecodeBook
    load_tokens: int  # 0 when the prefill has ended
    is_decoding: bool = False


class LoadBooks:
    """Books of all requests on their way."""

    def __init__(self) -> None:
        self._bookings: dict[Hashable, Booking] = {}

    def open(self, id: Hashable, booking: Booking, expected_s: float) -> None:
        """A request was given to two nodes. What was booked for an earlier attempt is cancelled."""
        self.close(id)
        self._bookings[id] = booking
        booking.prefill.load += booking.load_tokens
        booking.prefill.expected_s[id] = expected_s
        booking.prefill.total_s += expected_s
        booking.decode.load += 1

    def end_prefill(self, id: Hashable) -> Booking | None:
        """Its prefill node has nothing more to do for this request; None for an unknown one."""
        booking = self._bookings.get(id)
        if booking is None or id not in booking.prefill.expected_s:
            return booking
        prefill = booking.prefill
        prefill.load -= booking.load_tokens
        prefill.total_s -= prefill.expected_s.pop(id)
        booking.load_tokens = 0
        if not prefill.expected_s:
            prefill.total_s = 0.0  # rounding must not add up over a million requests
        return booking

    def start_decode(self, id: Hashable) -> None:
        """Its KVCache is on the decode node, in a batch or waiting for a place in one."""
        booking = self._bookings.get(id)
        if booking is not None and not booking.is_decoding:
            booking.is_decoding = True
            booking.decode.decoding += 1

    def close(self, id: Hashable) -> None:
        """The request has ended, or is to begin again. Harmless for an unknown one."""
        booking = self.end_prefill(id)
        if booking is None:
            return
        del self._bookings[id]
        booking.decode.load -= 1
        booking.decode.decoding -= booking.is_decoding


def busy_share(nodes: Sequence[PrefillBook]) -> float:
    """The share of these nodes that have something to prefill."""
    return sum(bool(node.expected_s) for node in nodes) / max(len(nodes), 1)


def batch_share(nodes: Sequence[DecodeBook], bs_max: int) -> float:
    """The share of decode places in use; what has no place yet waits."""
    return sum(min(node.decoding, bs_max) for node in nodes) / (max(len(nodes), 1) * bs_max)
