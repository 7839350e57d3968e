"""Keeps a link alive: begins epochs, beats, notices death, meets the peer again, and at last gives up. Chapters 07, 14.

In an *epoch*, the time between two breaks, all lanes live and die together: what was on any of them is sent again in
the next one, from the last acknowledged chunk. Threads: those of the lanes, and the supervisor's own.
"""

import atexit
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch.distributed as dist

from minprfaas.config import LinkConfig
from minprfaas.errors import one_line
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import LinkDown
from minprfaas.transport.events import EventQueue, LinkLost, LinkRestored
from minprfaas.transport.wan.frames import Frame, Kind, Slot, control_frame
from minprfaas.transport.wan.inbox import Inbox
from minprfaas.transport.wan.lanes import RECEIVERS, SENDERS, Lane, compute_alone
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.monitor import SAMPLE_EVERY_S
from minprfaas.transport.wan.outbox import Outbox
from minprfaas.transport.wan.parts import PartsIn
from minprfaas.transport.wan.rendezvous import LANE_TIMEOUT_S, Meeting, Rendezvous

log = logging.getLogger(__name__)
BEATS_IN_SILENCE = 5  # so many heartbeats must be lost before a lane is taken for dead
KEPT_BEATS = 4 * BEATS_IN_SILENCE  # of a lane: one that has not left by then is of a dead lane
GOODBYE_S = 5.0  # for the last messages to be acknowledged, by a peer that is alive and busy
STEP_S = 0.1  # of patience


class Supervisor:
    """Of one side of a link; owns its lanes."""

    def __init__(self, name: str, config: LinkConfig, rendezvous: Rendezvous, outbox: Outbox, inbox: Inbox,
                 line: EmulatedLine | None, events: EventQueue, timeline: Timeline | None):
        self.epoch = 0
        self._name, self._config, self._line, self._timeline = name, config, line, timeline
        self._rendezvous, self._outbox, self._inbox, self._events = rendezvous, outbox, inbox, events
        self._peer: bytes | None = None
        self._lanes: list[Lane] = []
        self._lane_threads: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        self._broken = threading.Event()  # this epoch is over
        self._closing = threading.Event()  # and there will be no other
        self._reason = ""
        _of_this_process.add(self)

    def connect(self, deadline_s: float, met: Callable[[], None]) -> None:
        """Begin the first epoch. Raises LinkRefused, LinkDown."""
        if self._thread is not None:
            raise LinkDown(f"link {self._name} was connected before; a lost link is replaced by a new one")
        give_up_at_s = time.monotonic() + deadline_s
        meeting = self._rendezvous.meet(give_up_at_s, self._closing, bear_refusals=False)
        met()
        self._begin_epoch(meeting)
        thread = threading.Thread(target=self._run, name=f"{self._name} supervisor", daemon=True)
        thread.start()
        self._thread = thread  # only now: `close` may come at any moment, and joins what it finds

    @property
    def is_up(self) -> bool:
        """Whether an epoch is under way."""
        return bool(self._lanes) and not self._broken.is_set()

    def wait_until_over(self) -> None:
        """Block until there will be no other epoch."""
        self._thread.join()

    def close(self) -> None:
        """Say goodbye and end. Harmless twice."""
        self._closing.set()
        if self._thread is not None and self.is_up:  # else no epoch comes any more in which the peer could answer
            rtt_s = self._line.config.rtt_ms / 1e3 if self._line is not None else 0.0
            steps = iter(range(math.ceil((GOODBYE_S + rtt_s) / STEP_S)))
            patiently(self._outbox.messages_are_acknowledged_within, steps)
            self._outbox.send_control(Kind.BYE)
            patiently(self._broken.wait, steps)  # the peer cuts the lanes when it reads the goodbye
        self._break("closed on this side")
        if self._thread is not None:
            self._thread.join(LANE_TIMEOUT_S)
        self._outbox.close("the link is closed on this side")

    def _run(self) -> None:
        while True:
            self._watch()
            self._tear_down()
            if self._closing.is_set():
                return self._lose(self._reason)
            log.warning("link %s: epoch %d ended: %s", self._name, self.epoch, self._reason)
            try:
                give_up_at_s = time.monotonic() + self._config.timeout_s
                self._begin_epoch(self._rendezvous.meet(give_up_at_s, self._closing, bear_refusals=True))
            except Exception as error:  # whatever it is: nobody else would tell the owner that the link is gone
                return self._lose(one_line(error))

    def _begin_epoch(self, meeting: Meeting) -> None:
        returned = self._peer is not None
        restarted = returned and meeting.peer != self._peer
        if restarted:
            self._inbox.streams.fail_all("the peer restarted")
            self._inbox.forget_peer()
            self._outbox.forget_peer("the peer restarted")
        if self._line is not None:
            self._line.begin(time.monotonic())
        self._peer, self.epoch, self._lanes = meeting.peer, meeting.epoch, meeting.lanes
        self._broken.clear()
        self._outbox.begin_epoch(meeting.epoch)
        if returned:  # said first: what a new peer sends must not be heard as the old one's
            self._events.put(LinkRestored(meeting.epoch, restarted, self._name))
        received = partial(self._received, self._inbox.parts)
        for lane in meeting.lanes:
            lane.heard_at_s = time.monotonic()
            for _ in range(SENDERS):
                self._start_thread(lane, "send", lambda lane=lane: lane.send_frames(
                    lambda: self._outbox.next_frame(meeting.epoch), self._sent))
            for _ in range(RECEIVERS):
                self._start_thread(lane, "receive", lambda lane=lane: lane.receive_frames(received))
        if self._closing.is_set():  # `close` came while the two met, and found no epoch in which to say goodbye
            self._outbox.send_control(Kind.BYE)

    def _start_thread(self, lane: Lane, role: str, work: Callable[[], None]) -> None:
        def run() -> None:
            compute_alone()
            try:
                work()
            except Exception as error:  # whatever it is, the lane is dead and the supervisor must know
                self._break(one_line(error), lane)

        thread = threading.Thread(target=run, name=f"{self._name} lane {lane.index} {role}", daemon=True)
        self._lane_threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        """Send heartbeats and take samples until the epoch breaks, or a lane is silent for too long."""
        beat_at_s, beat_every_s, looked_at_s = 0.0, self._config.silence_s / BEATS_IN_SILENCE, time.monotonic()
        # Gloo forgets a send whose handle is dropped, and says of none that it has ended unless somebody waits for it.
        beats: deque[tuple[dist.Work, Frame]] = deque(maxlen=KEPT_BEATS * len(self._lanes))
        while not self._broken.wait(min(SAMPLE_EVERY_S, beat_every_s)):  # no more often: an idle process has many links
            now_s = time.monotonic()
            pause_s = now_s - looked_at_s
            if pause_s > self._config.silence_s / 2:  # this process stood still, and with it what it would have heard
                for lane in self._lanes:
                    lane.heard_at_s += pause_s
            looked_at_s = now_s
            self._outbox.tick(now_s)
            beat_is_due = now_s >= beat_at_s
            if beat_is_due:
                beat_at_s = now_s + beat_every_s
            for lane in self._lanes:
                if beat_is_due:  # not through the queue: a line that is slow or stalled is not dead
                    frame = control_frame(Kind.HEARTBEAT)
                    try:
                        beats.append((lane.post(frame), frame))
                    except RuntimeError as error:
                        self._break(one_line(error), lane)
                heard_at_s = lane.silent_since()
                if heard_at_s is not None and now_s - heard_at_s > self._config.silence_s:
                    self._break(f"lane {lane.index} was silent for {self._config.silence_s} s", lane)

    def _break(self, reason: str, lane: Lane | None = None) -> None:
        if lane is not None and lane not in self._lanes:
            return  # of an epoch that is over
        if not self._broken.is_set():
            self._reason = reason
            self._broken.set()

    def _tear_down(self) -> None:
        self._outbox.end_epoch()
        for lane in self._lanes:
            lane.cut()
        give_up_at_s = time.monotonic() + 1.0
        for thread in self._lane_threads:  # one may still be in a sink; what it takes counts in the next epoch as well
            thread.join(max(0.0, give_up_at_s - time.monotonic()))
        self._lane_threads, self._lanes = [], []

    def _lose(self, reason: str) -> None:
        self._outbox.close(reason)
        self._inbox.streams.fail_all(reason)
        self._events.put(LinkLost(reason, self._name))

    def _sent(self, lane: Lane, frame: Frame, began_at_s: float) -> None:
        if self._timeline is not None and frame.header.kind == Kind.CHUNK:
            label, ended_at_s = frame.header.label, time.monotonic()
            self._timeline.span(f"{self._name} lane {lane.index} send", label, began_at_s, ended_at_s)

    def _received(self, parts: PartsIn, lane: Lane, slot: Slot) -> None:
        began_at_s = time.monotonic()
        header = lane.codec.open(slot.view)
        if header.kind == Kind.BYE:
            self._closing.set()
            return self._break("closed by the peer", lane)
        self._inbox.handle(header, slot, lane.codec, parts)
        if self._timeline is not None and header.kind == Kind.CHUNK:
            self._timeline.span(f"{self._name} lane {lane.index} receive", header.label, began_at_s, time.monotonic())


def patiently(wait: Callable[[float], object], steps: Iterable[object]) -> None:
    """Let `wait` wait for so many steps, or until it says that there is no need. By the clock, a machine that stood
    still for as long would leave its peers no time to answer."""
    for _ in steps:
        if wait(STEP_S):
            return


_of_this_process: "weakref.WeakSet[Supervisor]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End links that nobody has closed. Python ends each thread that comes back from C++ while it takes itself down,
    and C++ takes that for an error that nobody caught: the process would end by SIGABRT."""
    ending = list(_of_this_process)
    for supervisor in ending:
        supervisor._closing.set()
        supervisor._break("this process ends")
    for supervisor in ending:
        if supervisor._thread is not None:
            supervisor._thread.join(LANE_TIMEOUT_S)
