"""A link between two processes of two datacenters, as its owner sees it. Chapters 07, 14; paper 3.3.

`outbox` (what leaves) and `inbox` (what arrives) live as long as the link; `supervision` keeps lanes under them and
replaces them when they break; `rendezvous` and `handshake` find the peer and make sure of it.
"""

import queue
from collections.abc import Callable

import torch
import torch.distributed as dist

from minprfaas.config import LinkConfig, StateKind
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import KVTransport, MessageChannel, Sink, StreamPlan
from minprfaas.transport.events import Event, EventQueue
from minprfaas.transport.wan.frames import CONTROL_LIMIT_BYTES, SlotPool
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.inbox import Inbox
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.monitor import LinkStats
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import encode_message
from minprfaas.transport.wan.rendezvous import LaneType, Rendezvous
from minprfaas.transport.wan.sending import LinkStream
from minprfaas.transport.wan.supervision import Supervisor


class Link(KVTransport, MessageChannel):
    """One side of a pairwise link. Any thread may call any method."""

    def __init__(self, name: str, store: dist.Store, rank: int, config: LinkConfig, identity: LinkIdentity,
                 line: EmulatedLine | None = None, events: EventQueue | None = None, timeline: Timeline | None = None,
                 lane_type: LaneType = Lane):
        """`rank` is 0 on one side and 1 on the other; `line` is what this side's egress crosses (None: the wire as it
        is). Raises UserError for an impossible interface."""
        self.name, self.rank, self.config, self.line = name, rank, config, line
        self._secret = identity.secret
        self.events = EventQueue() if events is None else events
        self._payload_limit = max(config.chunk_bytes, CONTROL_LIMIT_BYTES)
        self._slots = SlotPool(config.chunk_bytes)
        self._outbox = Outbox(name, config, line, timeline)
        self._inbox = Inbox(name, self._outbox, self.events)
        rendezvous = Rendezvous(name, store, rank, config, identity, self._payload_limit, lane_type)
        self._supervisor = Supervisor(name, config, rendezvous, self._outbox, self._inbox, line, self.events, timeline)

    def connect(self, deadline_s: float, met: Callable[[], None] = lambda: None) -> None:
        """Meet the peer and shake hands; call `met` before anything that the peer sends is heard. Raises LinkRefused,
        or LinkDown when `deadline_s` passes."""
        self._supervisor.connect(deadline_s, met)

    def wait_until_lost(self) -> None:
        """Block until the link is lost for good, or closed."""
        self._supervisor.wait_until_over()

    @property
    def epoch(self) -> int:
        """How often the two sides have met; 0 before they do."""
        return self._supervisor.epoch

    @property
    def is_up(self) -> bool:
        """Whether the peer is there at present, as far as this side has noticed."""
        return self._supervisor.is_up

    def send_message(self, message: dict) -> None:
        """See `MessageChannel.send_message`. Messages overtake chunks; a long one shares the line with them."""
        self._outbox.check_open()  # a dead link raises LinkDown, whatever the message is
        self._outbox.send_message(encode_message(message))

    def receive(self, timeout_s: float) -> Event | None:
        """The next event of the queue, or None after `timeout_s`."""
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def open(self, plan: StreamPlan) -> LinkStream:
        self._check(plan)
        return LinkStream(plan, self._outbox, self._slots, self.config.chunk_bytes, self.line, self._secret)

    def expect(self, plan: StreamPlan, sink: Sink, device: torch.device | None = None) -> None:
        self._check(plan)
        self._inbox.streams.expect(plan, sink, device)

    def forget(self, stream_id: int) -> int | None:
        return self._inbox.streams.forget(stream_id)

    def stats(self) -> LinkStats:
        """Of this side's egress."""
        return self._outbox.stats()

    def close(self) -> None:
        """Say goodbye and end; the peer's link is lost at once instead of waiting for this one to come back."""
        self._supervisor.close()

    def _check(self, plan: StreamPlan) -> None:
        for entry in plan.entries:
            if entry.kind is StateKind.TOKEN and entry.row_bytes > self._payload_limit:
                raise ValueError(f"layer {entry.layer}: a row of {entry.row_bytes} bytes does not fit into a chunk of "
                                 f"{self._payload_limit}; raise chunk_bytes")
        self._outbox.check_open()
