"""The sending side of a link: producers queue here, lanes pull from here, acknowledgements come back here. Chapter 07.

Lanes pull, so a slow lane takes fewer frames and holds nobody up. What leaves next and what is in flight is
`send_queue`'s business, when it leaves the emulated line's; this file is the lock around them and the two things to
wait for. Nothing in here calls a stream or a link while it holds the lock. Paper 3.3.
"""

import threading
import time
from collections import deque

from minprfaas.config import LinkConfig
from minprfaas.observe.timeline import Timeline
from minprfaas.transport.base import LinkDown, StreamAborted
from minprfaas.transport.wan.frames import Frame, Kind, StreamRecord, control_frame
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.monitor import LinkStats
from minprfaas.transport.wan.send_queue import SendQueue


class Outbox:
    """One for each side of a link; it outlives epochs. Any thread may call any method."""

    def __init__(self, name: str, config: LinkConfig, line: EmulatedLine | None, timeline: Timeline | None):
        self._name, self._config, self._line, self._timeline = name, config, line, timeline
        self._lock = threading.Lock()
        self._sendable = threading.Condition(self._lock)  # lanes wait here for something to send
        self._room = threading.Condition(self._lock)  # `put` waits here for room
        self._progress = threading.Condition(self._lock)  # and who waits for the last acknowledgement, here
        self._queue = SendQueue(config.max_inflight_bytes, time.monotonic())
        self._on_line: deque[tuple[float, Frame]] = deque()  # (arrival time, frame)
        self._timed_until_s: float | None = None  # the earliest moment for which a lane's wait is timed
        self._epoch = 0
        self._closed: str | None = None  # why nothing leaves any more

    def check_open(self) -> None:
        """Raises LinkDown when nothing leaves any more."""
        if self._closed is not None:
            raise LinkDown(self._closed)

    def send_control(self, kind: Kind, seq: int = 0) -> None:
        """Queue a control frame without payload."""
        with self._lock:
            self._queue.push_control(control_frame(kind, seq=seq), time.monotonic())
            self._sendable.notify()

    def acknowledge(self, seq: int) -> None:
        """Tell the peer that `seq` is taken."""
        with self._lock:
            if self._queue.push_ack(seq, time.monotonic()):  # else it goes with one for which a lane is awake already
                self._sendable.notify()

    def send_message(self, data: bytes) -> None:
        """Queue an encoded message. Raises LinkDown."""
        with self._lock:
            self.check_open()
            self._queue.push_message(data, time.monotonic())
            self._sendable.notify()

    @property
    def chunk_bytes(self) -> int:
        """That the next chunk should have at most, as far as the line has shown its speed."""
        return self._queue.monitor.chunk_bytes

    def wait_for_room(self, nbytes: int, stream: StreamRecord) -> float:
        """Block until `nbytes` more may be queued or in flight, and claim them; returns the seconds it took.

        Raises StreamAborted, and LinkDown when the link is gone or nothing is acknowledged for `timeout_s`.
        """
        began_at_s = time.monotonic()
        monitor = self._queue.monitor
        with self._lock:
            while not self._queue.has_room(nbytes):
                self._check(stream)
                patience_s = max(began_at_s, monitor.progress_at_s) + self._config.timeout_s - time.monotonic()
                if patience_s <= 0:
                    raise LinkDown(f"nothing was acknowledged for {self._config.timeout_s} s")
                self._room.wait(patience_s)
            self._check(stream)
            now_s = time.monotonic()
            monitor.queued(nbytes, now_s)
            if self._queue.has_room(nbytes):
                self._room.notify()
            return now_s - began_at_s

    def send_chunk(self, frame: Frame) -> None:
        """Queue a chunk for which `wait_for_room` made room. Raises StreamAborted, LinkDown."""
        with self._lock:
            self._check(frame.stream)  # it may have ended while the bytes were copied
            self._queue.push_chunk(frame, time.monotonic())
            self._sendable.notify()

    def give_room_back(self, nbytes: int) -> None:
        """What `wait_for_room` claimed is not used after all."""
        with self._lock:
            self._queue.monitor.queued_bytes -= nbytes
            self._room.notify_all()

    def wait_until_settled(self, stream: StreamRecord, deadline_s: float) -> None:
        """Block until every chunk of a stream is acknowledged. Raises TimeoutError, StreamAborted, LinkDown."""

        def is_settled() -> bool:
            self._check(stream)
            return not stream.outstanding

        with self._lock:
            if not self._progress.wait_for(is_settled, deadline_s):
                raise TimeoutError(f"stream {stream.stream_id}: {stream.outstanding} chunks are not acknowledged "
                                   f"after {deadline_s} s")

    def abort(self, stream: StreamRecord, reason: str) -> None:
        """What has not left of a stream never leaves, and the receiver is told. Harmless when it has ended."""
        with self._lock:
            if stream.failure is None:
                self._queue.fail(stream, reason)
                self._tell_that_it_failed(stream)

    def _tell_that_it_failed(self, stream: StreamRecord) -> None:
        self._queue.push_control(control_frame(Kind.ABORT, stream=stream.stream_id), time.monotonic())
        self._sendable.notify()
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        self._room.notify_all()
        self._progress.notify_all()

    def _check(self, stream: StreamRecord) -> None:
        if stream.failure is not None:
            raise StreamAborted(f"stream {stream.stream_id}: {stream.failure}")
        self.check_open()

    def next_frame(self, epoch: int) -> Frame | None:
        """The next frame to hand to Gloo: waits for one. None when `epoch` is over."""
        with self._lock:
            while self._epoch == epoch:
                frame, wake_at_s = self._pull(time.monotonic())
                if frame is not None:
                    if self._on_line or self._queue.queued_at_s() is not None:
                        self._sendable.notify()  # another lane looks at what comes next
                    return frame
                if wake_at_s is None or (self._timed_until_s is not None and self._timed_until_s <= wake_at_s):
                    self._sendable.wait()
                else:  # one lane keeps the time for all
                    self._timed_until_s = wake_at_s
                    self._sendable.wait(max(0.0, wake_at_s - time.monotonic()))
                    self._timed_until_s = None
            return None

    def _pull(self, now_s: float) -> tuple[Frame | None, float | None]:
        """A frame that may be handed to Gloo now, or the moment at which to look again."""
        if self._line is None:
            return self._queue.pop(now_s), None
        may_start_at_s = self._load_line(now_s)
        if not self._on_line:
            return None, may_start_at_s
        arrives_at_s = self._on_line[0][0]
        if arrives_at_s <= now_s:
            return self._on_line.popleft()[1], None
        return None, arrives_at_s if may_start_at_s is None else min(arrives_at_s, may_start_at_s)

    def _load_line(self, now_s: float) -> float | None:
        """Put on the line what may start by now; returns when the next frame may, None when none waits."""
        while True:
            queued_at_s = self._queue.queued_at_s()
            if queued_at_s is None:
                return None
            start_at_s = self._line.start_of(queued_at_s, now_s)
            if start_at_s > now_s:
                return start_at_s
            frame = self._queue.pop(now_s)
            self._on_line.append((self._line.carry(frame.nbytes, queued_at_s, now_s), frame))
            if self._timeline is not None:
                self._timeline.span(f"{self._name} line (emulated)", frame.header.kind.name, now_s,
                                    max(now_s, self._line.free_at_s()), waited_ms=(now_s - queued_at_s) * 1e3)

    def settle(self, seqs: list[int], written: bool = True) -> None:
        """`seqs` were acknowledged, or refused (not `written`): their memory is free."""
        with self._lock:
            now_s = time.monotonic()
            for frame in [self._queue.settle(seq, written, now_s) for seq in seqs]:
                if frame is None:
                    continue
                stream = frame.stream
                if stream is None or stream.failure is not None or not stream.outstanding:
                    self._wake_waiters()
                else:
                    self._room.notify()  # one: as many as wait would wake for each chunk, to find the room taken
                if self._timeline is not None and stream is not None:
                    self._timeline.instant(f"{self._name} acknowledgements", frame.header.label, now_s)
            if self._queue.queued_at_s() is not None:
                self._sendable.notify()  # the receiver's window for messages may have moved

    def send_again(self, seq: int) -> None:
        """The peer received `seq` damaged."""
        with self._lock:
            ended = self._queue.damaged(seq, time.monotonic())
            if ended is not None:
                self._tell_that_it_failed(ended)
            self._sendable.notify()

    def begin_epoch(self, epoch: int) -> None:
        """Lanes of `epoch` may pull; what no peer acknowledged leaves first, in its old order."""
        with self._lock:
            self._epoch = epoch
            self._timed_until_s = None  # a thread of the old epoch that has not woken yet keeps the time for nobody
            self._on_line.clear()
            self._queue.begin_epoch(time.monotonic())
            self._sendable.notify_all()
            self._wake_waiters()

    def end_epoch(self) -> None:
        """Lanes that wait in `next_frame` return."""
        with self._lock:
            self._epoch = 0
            self._sendable.notify_all()

    def forget_peer(self, reason: str) -> None:
        """The peer is a new process: what the old one may have received is worth nothing."""
        with self._lock:
            self._queue.forget_peer(reason, time.monotonic())
            self._wake_waiters()

    def close(self, reason: str) -> None:
        """Nothing leaves any more; whoever waits here gets LinkDown with the first reason that was given."""
        with self._lock:
            if self._closed is None:
                self._closed = reason
            self._sendable.notify_all()
            self._wake_waiters()

    def messages_are_acknowledged_within(self, patience_s: float) -> bool:
        """Block until they are or the link is closed: True; False when that takes too long."""
        with self._lock:
            return self._progress.wait_for(lambda: self._closed is not None or not self._queue.owes_messages,
                                           patience_s)

    def tick(self, now_s: float) -> None:
        """Take a sample when one is due."""
        rate = None if self._line is None else self._line.rate(now_s)
        with self._lock:
            sample = self._queue.monitor.tick(now_s, rate)
        if sample is not None and self._timeline is not None:
            values = {"egress Gbps": sample.gbps, "queued MB": sample.queued_bytes / 1e6,
                      "acknowledged after ms": sample.ack_delay_s * 1e3}
            self._timeline.counter(self._name, values, now_s)

    def stats(self) -> LinkStats:
        """What has left, what waits, and the samples of the last minute."""
        with self._lock:
            return self._queue.monitor.stats()
