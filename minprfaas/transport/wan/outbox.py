"""What waits to leave, what is on the emulated line, and what is not acknowledged yet. Chapter 07, paper 3.3.

Lanes pull from here, so a slow lane takes fewer frames and holds nobody up. Acknowledgements and control messages leave
before chunks; streams take turns. A frame that must arrive keeps its memory until it is acknowledged, so that it can be
sent again: on another lane if it was damaged, under the next epoch if the link died.
"""

import threading
import time
from collections import OrderedDict, deque
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from minprfaas.config import LinkConfig
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import LinkDown
from minprfaas.transport.wan.frames import ACKS_PER_FRAME, HEADER_BYTES, Header, Kind, Slot, encode_acks
from minprfaas.transport.wan.monitor import LinkStats, Monitor
from minprfaas.transport.throttle import EmulatedLine

if TYPE_CHECKING:
    from minprfaas.transport.wan.sending import SendStream

RELIABLE = (Kind.CHUNK, Kind.MESSAGE, Kind.ABORT)


class Frame:
    """One frame on its way out. `ready` is a CUDA event to wait for before the bytes are there."""

    def __init__(self, header: Header, slot: Slot, stream: "SendStream | None" = None,
                 ready: torch.cuda.Event | None = None):
        self.header, self.slot = header, slot
        self.stream = stream  # is told of the acknowledgement
        self.ready = ready
        self.queued_at = self.sent_at = 0.0

    @property
    def nbytes(self) -> int:
        return HEADER_BYTES + self.header.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """Exactly the bytes that cross."""
        return self.slot.tensor[:self.nbytes]


def control_frame(kind: Kind, payload: bytes = b"", **fields) -> Frame:
    """A frame that is no chunk, with its payload in place."""
    slot = Slot(len(payload))
    slot.view[HEADER_BYTES:] = payload
    return Frame(Header(kind, nbytes=len(payload), **fields), slot)


class Outbox:
    """The shared queue of one side of a link. It outlives epochs."""

    def __init__(self, name: str, config: LinkConfig, timeline: Timeline | None):
        self.line: EmulatedLine | None = None  # set once the link is up, which is when its weather begins
        self._name = name
        self._timeline = timeline
        self.monitor = Monitor(time.monotonic())
        self._config = config
        self._lock = threading.RLock()
        self._frames = threading.Condition(self._lock)  # lanes wait here for something to send
        self.progress = threading.Condition(self._lock)  # senders wait here for room and for acknowledgements
        # In the order in which they leave; then what has left.
        self._acks: list[tuple[int, float]] = []  # (sequence number, since when)
        self._control: deque[Frame] = deque()
        self._again: deque[Frame] = deque()  # numbered already
        self._streams: OrderedDict[SendStream, deque[Frame]] = OrderedDict()
        self._on_line: deque[tuple[float, Frame]] = deque()  # (arrival time, frame)
        self._unacked: dict[int, Frame] = {}  # by sequence number
        self._next_seq = 1
        self._timed_until: float | None = None  # the earliest moment for which a lane's wait is timed
        self._epoch = 0
        self.closed: str | None = None  # why nothing leaves any more

    # What producers call

    def send_control(self, frame: Frame) -> None:
        with self._lock:
            frame.queued_at = time.monotonic()
            self._control.append(frame)
            self._frames.notify()

    def acknowledge(self, seq: int) -> None:
        with self._lock:
            self._acks.append((seq, time.monotonic()))
            self._frames.notify()

    def send_chunk(self, frame: Frame) -> None:
        """Queue a chunk for which `wait_for_room` made room; raises what `stream.check` raises."""
        with self._lock:
            try:
                frame.stream.check()  # it may have failed while the bytes were copied
            except Exception:
                self.monitor.queued_bytes -= frame.nbytes
                self.progress.notify_all()
                raise
            frame.stream.queued()
            frame.queued_at = time.monotonic()
            self._streams.setdefault(frame.stream, deque()).append(frame)
            self._frames.notify()

    def wait_for_room(self, nbytes: int, stream: "SendStream") -> float:
        """Block until `nbytes` more may be queued or in flight, and claim them; returns the seconds it took.

        Raises what `stream.check` raises, and LinkDown when nothing is acknowledged for `timeout_s`.
        """
        began = time.monotonic()
        with self._lock:
            while True:
                stream.check()
                held = self.monitor.queued_bytes + self.monitor.inflight_bytes
                if held == 0 or held + nbytes <= self._config.max_inflight_bytes:
                    self.monitor.queued(nbytes, time.monotonic())
                    return time.monotonic() - began
                patience = max(began, self.monitor.progress_at) + self._config.timeout_s - time.monotonic()
                if patience <= 0:
                    raise LinkDown(f"nothing was acknowledged for {self._config.timeout_s} s")
                self.progress.wait(patience)

    def chunk_limit(self) -> int | None:
        """The most bytes that a chunk should have at the emulated rate of this moment; None without one."""
        with self._lock:
            return None if self.line is None else self.line.chunk_limit(time.monotonic())

    def drop_stream(self, stream: "SendStream") -> None:
        """Forget the chunks of `stream` that have not left; the others settle when the peer answers."""
        with self._lock:
            dropped = [*self._streams.pop(stream, ()), *(f for f in self._again if f.stream is stream)]
            self._again = deque(frame for frame in self._again if frame.stream is not stream)
            for frame in dropped:
                self.monitor.queued_bytes -= frame.nbytes
                self._unacked.pop(frame.header.seq, None)
            self.progress.notify_all()

    # What lanes call

    def next_frame(self, epoch: int, block: bool) -> Frame | None:
        """The next frame to hand to Gloo. None when `epoch` is over, and if not `block` also when there is none yet."""
        with self._lock:
            while self._epoch == epoch:
                frame, wake_at = self._pull(time.monotonic())
                if frame is not None:
                    self._frames.notify()  # another lane looks at what comes next
                    return frame
                if not block:
                    return None
                if wake_at is None or (self._timed_until is not None and self._timed_until <= wake_at):
                    self._frames.wait()
                else:  # one lane keeps the time for all
                    self._timed_until = wake_at
                    self._frames.wait(max(0.0, wake_at - time.monotonic()))
                    self._timed_until = None
            return None

    def _pull(self, now: float) -> tuple[Frame | None, float | None]:
        if self.line is None:
            return self._dequeue(now), None
        wake_at = None
        while (queued_at := self._queued_at()) is not None:
            start = self.line.start_of(queued_at, now)
            if start > now:
                wake_at = start
                break
            frame = self._dequeue(now)
            self._on_line.append((self.line.carry(frame.nbytes, queued_at, now), frame))
            if self._timeline is not None and self.line.free_at > now:
                self._timeline.span(f"{self._name} line (emulated)", frame.header.kind.name, now, self.line.free_at,
                                    waited_ms=(now - queued_at) * 1e3)
        if self._on_line and self._on_line[0][0] <= now:
            return self._on_line.popleft()[1], None
        if self._on_line:
            wake_at = min(self._on_line[0][0], wake_at or float("inf"))
        return None, wake_at

    def _queued_at(self) -> float | None:
        """Since when the frame that `_dequeue` would take has waited."""
        if self._acks:
            return self._acks[0][1]
        if waiting := self._control or self._again or next(iter(self._streams.values()), None):
            return waiting[0].queued_at
        return None

    def _dequeue(self, now: float) -> Frame | None:
        """Take the next frame; a reliable one is numbered here, so that only dropped streams leave holes."""
        if self._acks:
            taken, self._acks = self._acks[:ACKS_PER_FRAME], self._acks[ACKS_PER_FRAME:]
            return control_frame(Kind.ACK, encode_acks([seq for seq, _ in taken]))
        if self._control or self._again:
            frame = (self._control or self._again).popleft()
        elif self._streams:
            stream, waiting = next(iter(self._streams.items()))
            frame = waiting.popleft()
            self._streams.move_to_end(stream)  # the next chunk is another stream's
            if not waiting:
                del self._streams[stream]
        else:
            return None
        frame.sent_at = now
        if frame.header.kind in RELIABLE:
            if not frame.header.seq:
                frame.header = replace(frame.header, seq=self._next_seq)
                self._next_seq += 1
            self._unacked[frame.header.seq] = frame
        if frame.header.kind == Kind.CHUNK:
            self.monitor.sent(frame.nbytes, now)
        return frame

    # What the receiving lanes report

    def settle(self, seqs: list[int], written: bool = True) -> None:
        """`seqs` were acknowledged, or refused (not `written`): their memory is free."""
        now = time.monotonic()
        with self._lock:
            for seq in seqs:
                frame = self._unacked.pop(seq, None)
                if frame is None:
                    continue  # acknowledged twice, after a resend
                if frame.header.kind == Kind.CHUNK:
                    if frame in self._again:  # acknowledged while it waited to be sent again
                        self._again.remove(frame)
                        self.monitor.sent(frame.nbytes, now)
                    self.monitor.settled(frame.nbytes, now - frame.sent_at if written else None, now)
                if frame.stream is not None:
                    frame.stream.settled(written, now)
                    if self._timeline is not None:
                        self._timeline.instant(f"{self._name} acknowledgements", frame.header.label, now)
            self.progress.notify_all()

    def send_again(self, seq: int) -> None:
        """The peer received `seq` damaged."""
        with self._lock:
            frame = self._unacked.get(seq)
            if frame is None or frame in self._again or frame.header.kind != Kind.CHUNK:
                return
            self._requeue(frame)
            self.monitor.damaged_chunks += 1
            self._frames.notify()

    def _requeue(self, frame: Frame) -> None:
        if frame.header.kind == Kind.CHUNK:
            self.monitor.settled(frame.nbytes, None, time.monotonic())
            self.monitor.queued(frame.nbytes, time.monotonic())
            self.monitor.resent_chunks += 1
            frame.stream.resent_chunks += 1
        self._again.append(frame)

    @property
    def settled_below(self) -> int:
        """Every sequence number below it needs nothing more from the peer."""
        with self._lock:
            return min(self._unacked, default=self._next_seq)

    # Epochs

    def begin_epoch(self, epoch: int) -> None:
        """Lanes of `epoch` may pull; what no peer acknowledged leaves first, in its old order."""
        with self._lock:
            self._epoch = epoch
            self._on_line.clear()
            self._acks.clear()
            self._control = deque(frame for frame in self._control if frame.header.kind in RELIABLE)
            for frame in [frame for frame in self._unacked.values() if frame not in self._again]:
                if frame.stream is not None and frame.stream.failed:
                    self.settle([frame.header.seq], written=False)
                else:
                    self._requeue(frame)
            self._again = deque(sorted(self._again, key=lambda frame: frame.header.seq))
            self._frames.notify_all()

    def end_epoch(self) -> None:
        """Lanes that wait in `next_frame` return."""
        with self._lock:
            self._epoch = 0
            self._frames.notify_all()

    def forget_peer(self, reason: str) -> None:
        """The peer is a new process: what the old one may have received is worth nothing."""
        with self._lock:
            streams = {frame.stream for frame in self._unacked.values()} | set(self._streams)
            for stream in streams - {None}:
                stream.fail(reason)
            self.settle([*self._unacked], written=False)
            self._control.clear()

    def close(self, reason: str) -> None:
        with self._lock:
            self.closed = self.closed or reason
            self._frames.notify_all()
            self.progress.notify_all()

    def wait_until_messages_are_acknowledged(self, until: float) -> None:
        with self.progress:
            while self.closed is None and time.monotonic() < until and (
                    self._control or any(frame.header.kind != Kind.CHUNK for frame in self._unacked.values())):
                self.progress.wait(max(0.0, until - time.monotonic()))

    def tick(self, now: float) -> None:
        """Take a sample when one is due."""
        with self._lock:
            sample = self.monitor.tick(now, None if self.line is None else self.line.rate)
        if sample is not None and self._timeline is not None:
            values = {"egress Gbps": sample.egress_gbps, "queued MB": sample.queued_bytes / 1e6,
                      "acknowledged after ms": sample.ack_delay_s * 1e3}
            self._timeline.counter(self._name, values, now)

    def stats(self) -> LinkStats:
        with self._lock:
            return self.monitor.stats()
