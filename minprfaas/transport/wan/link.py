"""A link between two datacenters: connects, notices death, comes back under the next epoch. Chapters 07, 14; paper 3.3.

    link = Link("a-b", store, rank, LinkConfig(gbps=1, rtt_ms=20, lanes=4), identity)
    link.connect(deadline_s=10)
    link.send_message({"hello": "there"})          # the other side: link.receive(timeout_s) -> MessageReceived
    link.expect_stream(plan, sink)                 # the other side: sender = link.open_stream(plan); sender.put(...)

Threads: two a lane (sending, receiving) and one supervisor. The store is only where the two sides agree on an epoch
and Gloo exchanges addresses; no KV and no message passes through it. Gloo binds to the interface that the host's name
resolves to; the environment variable GLOO_SOCKET_IFNAME names another.
"""

import logging
import queue
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from minprfaas.config import LinkConfig, StateKind
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import Event, LinkDown, LinkLost, LinkRefused, LinkRestored
from minprfaas.transport.wan.frames import CONTROL_LIMIT_BYTES, Kind, Slot, encode_message
from minprfaas.transport.wan.handshake import INCARNATION_BYTES, LinkIdentity, shake_hands
from minprfaas.transport.wan.inbox import Inbox
from minprfaas.transport.wan.lanes import Lane, one_line
from minprfaas.transport.wan.monitor import LinkStats
from minprfaas.transport.wan.outbox import Frame, Outbox, control_frame
from minprfaas.transport.wan.sending import SendStream
from minprfaas.transport.streams import IncomingStream, Sink, StreamPlan
from minprfaas.transport.throttle import EmulatedLine, WeatherChange

log = logging.getLogger(__name__)
TICK_S = 0.1
POLL_S = 0.01  # of the store, while the other side is awaited
REFUSAL_PAUSE_S = 0.2
LANE_TIMEOUT_S = 5.0  # for one attempt to connect and shake hands, once both sides are there


class Link:
    """One side of a pairwise link; `rank` is 0 on one side and 1 on the other. Any thread may call any method."""

    lane_type = Lane

    def __init__(self, name: str, store: dist.Store, rank: int, config: LinkConfig, identity: LinkIdentity,
                 timeline: Timeline | None = None, weather: tuple[WeatherChange, ...] = ()):
        self.name, self.rank, self.config, self.epoch = name, rank, config, 0
        self._owners_store = store  # kept alive: its server may be this object's
        self._store = store.clone()  # a store client does one thing at a time, and would make links wait for each other
        self._identity = identity
        self._timeline = timeline
        self._payload_limit = max(config.chunk_bytes, CONTROL_LIMIT_BYTES)
        self._weather = weather
        self._outbox = Outbox(name, config, timeline)
        self._inbox = Inbox(self._outbox)
        self._incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self._peer_incarnation: bytes | None = None
        self._message_lock = threading.Lock()
        self._next_message = 0
        self._lanes: list[Lane] = []
        self._threads: list[threading.Thread] = []
        self._supervisor: threading.Thread | None = None
        self._broken = threading.Event()
        self._reason = ""
        self._closing = False

    def connect(self, deadline_s: float) -> None:
        """Meet the peer and shake hands. Raises LinkRefused, or LinkDown when `deadline_s` passes."""
        if self._supervisor is not None:
            raise LinkDown(f"link {self.name} was connected before; a lost link is replaced by a new one")
        self._establish(time.monotonic() + deadline_s)
        self._supervisor = threading.Thread(target=self._supervise, name=f"{self.name} supervisor", daemon=True)
        self._supervisor.start()

    def send_message(self, message: dict) -> None:
        """Queue a JSON control message: arrives once and in order, ahead of chunks. Raises LinkDown, ValueError."""
        if self._outbox.closed is not None:
            raise LinkDown(self._outbox.closed)
        parts = encode_message(message)
        with self._message_lock:
            for left, part in zip(range(len(parts) - 1, -1, -1), parts):
                self._outbox.send_control(control_frame(Kind.MESSAGE, part, stream=self._next_message, start=left))
                self._next_message += 1

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None after `timeout_s`."""
        try:
            return self._inbox.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def open_stream(self, plan: StreamPlan) -> SendStream:
        """Begin to send what the receiver expects. Raises LinkDown, or ValueError for an impossible plan."""
        self._check_rows(plan)
        if self._outbox.closed is not None:
            raise LinkDown(self._outbox.closed)
        return SendStream(plan, self._outbox, self.config.chunk_bytes)

    def expect_stream(self, plan: StreamPlan, sink: Sink) -> None:
        """Accept `plan` from now on. `sink` runs on receiving threads, one call at a time for one stream."""
        self._check_rows(plan)
        if self._outbox.closed is not None:
            raise LinkDown(self._outbox.closed)
        self._inbox.expect(IncomingStream(plan, sink))

    def forget_stream(self, stream_id: int) -> int | None:
        """Drop what still arrives of a stream: after this returns, its sink is not called again. Returns the token up
        to which all token state is written, None if the stream has ended before."""
        return self._inbox.forget(stream_id)

    def stats(self) -> LinkStats:
        return self._outbox.stats()

    def close(self) -> None:
        """Say goodbye and end; the peer's link is lost at once instead of waiting for this one to come back."""
        self._closing = True
        if self._supervisor is not None and self._lanes:
            until = time.monotonic() + 1.0 + self.config.rtt_ms / 1e3
            self._outbox.wait_until_messages_are_acknowledged(until)
            self._outbox.send_control(control_frame(Kind.BYE))
            self._broken.wait(max(0.0, until - time.monotonic()))  # the peer cuts the lanes when it reads the goodbye
        self._break("closed on this side")
        if self._supervisor is not None:
            self._supervisor.join(LANE_TIMEOUT_S)
        self._outbox.close("the link is closed on this side")

    def _check_rows(self, plan: StreamPlan) -> None:
        for entry in plan.entries:
            if entry.kind is StateKind.TOKEN and entry.row_bytes > self._payload_limit:
                raise ValueError(f"layer {entry.layer}: a row of {entry.row_bytes} bytes does not fit into a chunk of "
                                 f"{self._payload_limit}; raise chunk_bytes")

    # Connecting

    def _establish(self, until: float) -> None:
        failure = "the peer did not come"
        while time.monotonic() < until and not self._closing:
            epoch = self._agree_on_epoch(until)
            if epoch is None:
                break
            lanes: list[Lane] = []
            try:
                peer = self._connect_lanes(epoch, lanes)
            except LinkDown as error:
                for lane in lanes:
                    lane.cut()
                if isinstance(error, LinkRefused):
                    if not self.epoch:
                        raise
                    time.sleep(REFUSAL_PAUSE_S)  # a stranger came while the peer was away, and may come again
                failure = str(error)
                continue
            self._begin_epoch(epoch, lanes, peer)
            return
        raise LinkDown(f"link {self.name} did not connect: {failure}")

    def _agree_on_epoch(self, until: float) -> int | None:
        """Rank 1 knocks with a fresh word and rank 0 answers it with a fresh epoch. None when `until` passes."""
        knock = f"{self.name}/knock"
        try:
            if self.rank == 1:
                word = secrets.token_hex(8)
                self._store.set(knock, word)
                answer = f"{self.name}/answer/{word}"
                if not self._await_store(lambda: self._store.check([answer]), until):
                    return None
                return int(self._store.get(answer))
            if not self._await_store(lambda: self._store.check([knock]) and self._store.get(knock), until):
                return None
            word = self._store.get(knock).decode()
            self._store.compare_set(knock, word, "")  # answered; a newer knock stays
            epoch = self._store.add(f"{self.name}/epoch", 1)
            self._store.set(f"{self.name}/answer/{word}", str(epoch))
            return epoch
        except RuntimeError as error:
            raise LinkDown(f"link {self.name}: its store does not answer: {one_line(error)}") from None

    def _await_store(self, arrived, until: float) -> bool:
        while not arrived():
            if time.monotonic() >= until or self._closing:
                return False
            time.sleep(POLL_S)
        return True

    def _connect_lanes(self, epoch: int, lanes: list[Lane]) -> bytes:
        """Fill `lanes` with connected, authenticated lanes; returns the peer's incarnation."""
        store = dist.PrefixStore(f"{self.name}/{epoch}", self._store)
        terms = f"link {self.name}, epoch {epoch}, {self.config.lanes} lanes, frames of {self._payload_limit} bytes"

        def connect(index: int) -> None:
            lanes.append(self.lane_type(store, index, self.rank, self._payload_limit, LANE_TIMEOUT_S))

        def shake(lane: Lane) -> bytes:
            return shake_hands(lane, f"{terms}, lane {lane.index}", self._incarnation, self._identity)

        connect(0)
        peer = shake(lanes[0])  # first, so that ends that disagree on the number of lanes hear of it
        for index in range(1, self.config.lanes):
            connect(index)
        with ThreadPoolExecutor(self.config.lanes) as pool:
            if {peer, *pool.map(shake, lanes[1:])} != {peer}:
                raise LinkDown("the lanes lead to different peers")
        return peer

    def _begin_epoch(self, epoch: int, lanes: list[Lane], peer: bytes) -> None:
        restarted = self._peer_incarnation not in (None, peer)
        if restarted:
            self._inbox.fail_all("the peer restarted")
            self._inbox.forget_peer()
            self._outbox.forget_peer("the peer restarted")
            self._next_message = 0
        returned = self._peer_incarnation is not None
        if not returned and (self.config.gbps is not None or self.config.rtt_ms or self._weather):
            self._outbox.line = EmulatedLine(self.config, self._weather, time.monotonic())
        self._peer_incarnation, self.epoch = peer, epoch
        self._broken.clear()
        self._lanes = lanes
        self._outbox.begin_epoch(epoch)
        for lane in lanes:
            lane.waiting_since = time.monotonic()
            for role, run in (("send", self._send_on), ("receive", self._receive_on)):
                thread = threading.Thread(target=run, args=(lane, epoch), name=f"{self.name} lane {lane.index} {role}",
                                          daemon=True)
                self._threads.append(thread)
                thread.start()
        if returned:
            self._inbox.events.put(LinkRestored(epoch, restarted))

    # Lane threads

    def _send_on(self, lane: Lane, epoch: int) -> None:
        try:
            lane.send_frames(lambda block: self._outbox.next_frame(epoch, block), self._sent)
        except Exception as error:  # whatever it is, the lane is dead and the supervisor must know
            self._break(one_line(error), lane)

    def _receive_on(self, lane: Lane, epoch: int) -> None:
        try:
            lane.receive_frames(self._received)
        except Exception as error:
            self._break(one_line(error), lane)

    def _sent(self, lane: Lane, frame: Frame, began: float) -> None:
        if self._timeline is not None and frame.header.kind == Kind.CHUNK:
            self._timeline.span(f"{self.name} lane {lane.index} send", frame.header.label, began, time.monotonic())

    def _received(self, lane: Lane, slot: Slot) -> None:
        began = time.monotonic()
        header = lane.codec.open(slot.view)
        if header.kind == Kind.BYE:
            self._closing = True
            return self._break("closed by the peer", lane)
        self._inbox.handle(header, slot, lane.codec)
        if self._timeline is not None and header.kind == Kind.CHUNK:
            self._timeline.span(f"{self.name} lane {lane.index} receive", header.label, began, time.monotonic())

    # The supervisor

    def _break(self, reason: str, lane: Lane | None = None) -> None:
        if lane is not None and lane not in self._lanes:
            return  # of an epoch that is over
        if not self._broken.is_set():
            self._reason = reason
            self._broken.set()

    def _supervise(self) -> None:
        while True:
            self._watch()
            self._tear_down()
            if self._closing:
                return self._lose(self._reason)
            log.warning("link %s: epoch %d ended: %s", self.name, self.epoch, self._reason)
            try:
                self._establish(time.monotonic() + self.config.timeout_s)
            except Exception as error:
                return self._lose(one_line(error))

    def _watch(self) -> None:
        """Send heartbeats and take samples until the epoch breaks, or a lane is silent for too long."""
        beat_at, beats = 0.0, []
        while not self._broken.wait(TICK_S):
            now = time.monotonic()
            self._outbox.tick(now)
            if now >= beat_at:
                beat_at = now + self.config.silence_s / 5
                beats = [(work, frame) for work, frame in beats if not work.is_completed()]
                for lane in self._lanes:  # directly: the emulated line is slow or stalled, not dead
                    frame = control_frame(Kind.HEARTBEAT, seq=self._outbox.settled_below)
                    try:
                        beats.append((lane.post(frame), frame))  # Gloo forgets a send whose handle is dropped
                    except RuntimeError as error:
                        self._break(one_line(error), lane)
            for lane in self._lanes:
                since = lane.waiting_since
                if since is not None and now - since > self.config.silence_s:
                    self._break(f"lane {lane.index} was silent for {self.config.silence_s} s", lane)

    def _tear_down(self) -> None:
        self._outbox.end_epoch()
        for lane in self._lanes:
            lane.cut()
        until = time.monotonic() + 1.0
        for thread in self._threads:  # one may still be in a sink; what it takes counts in the next epoch as well
            thread.join(max(0.0, until - time.monotonic()))
        self._threads, self._lanes = [], []

    def _lose(self, reason: str) -> None:
        self._outbox.close(reason)
        self._inbox.fail_all(reason)
        self._inbox.events.put(LinkLost(reason))
