"""Control messages: JSON objects of any size that a prompt or an inventory has, in parts of a frame each. Chapter 07.

A part carries its number (in the header's `stream`) and how many parts of its message follow (`start`). Lanes bring
parts in any order; at most `MESSAGE_WINDOW` are under way ahead of a missing one, so a message of any length costs the
same few megabytes beside its own bytes.
"""

import json
from collections import deque

from minprfaas.transport.wan.frames import CONTROL_LIMIT_BYTES, Frame, FrameError, Kind, control_frame

# A context of ten million tokens is about 70 MB of JSON. A peer has shaken hands before it may send any message; where
# there is no secret anybody can, and can make this process hold so much (and several times more while it is parsed).
MESSAGE_LIMIT_BYTES = 256 * 2**20
MESSAGE_WINDOW = 512  # parts


def encode_message(message: dict) -> bytes:
    """A control message as bytes. Raises ValueError when it is no JSON object or too long."""
    if not isinstance(message, dict):
        raise ValueError(f"a control message is a dict, not {type(message).__name__}")
    data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise ValueError(f"control message of {len(data)} bytes is above the limit of {MESSAGE_LIMIT_BYTES}")
    return data


def decode_message(data: bytes | bytearray) -> dict:
    """The message in `data`. Raises FrameError for anything but a JSON object."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a control message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError(f"a control message is a JSON {type(message).__name__}, not an object")
    return message


class PartsOut:
    """Messages that wait to leave. A frame is made when it leaves, so a long message is in memory once, not thrice."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[memoryview, float]] = deque()  # (what is left of a message, since when)
        self._next_part = 0
        self._unacked: dict[int, None] = {}  # part numbers in order, the oldest first

    def push(self, data: bytes, now_s: float) -> None:
        """Queue an encoded message."""
        self._waiting.append((memoryview(data), now_s))

    @property
    def is_settled(self) -> bool:
        """Whether every part has left and the peer has taken it."""
        return not self._waiting and not self._unacked

    @property
    def queued_at_s(self) -> float | None:
        """Since when the next part has waited; None when there is none, or the receiver's window is full."""
        oldest = next(iter(self._unacked), self._next_part)
        if not self._waiting or self._next_part >= oldest + MESSAGE_WINDOW:
            return None
        return self._waiting[0][1]

    def pop(self) -> Frame:
        """The next part, when `queued_at_s` says that there is one."""
        data, queued_at_s = self._waiting.popleft()
        rest = data[CONTROL_LIMIT_BYTES:]
        if rest:
            self._waiting.appendleft((rest, queued_at_s))
        parts_left = -(-len(rest) // CONTROL_LIMIT_BYTES)
        frame = control_frame(Kind.MESSAGE, data[:CONTROL_LIMIT_BYTES], stream=self._next_part, start=parts_left)
        self._unacked[self._next_part] = None
        self._next_part += 1
        return frame

    def settled(self, part: int) -> None:
        """The peer has taken this part."""
        self._unacked.pop(part, None)


class PartsIn:
    """Puts parts together again, whatever their order."""

    def __init__(self) -> None:
        self._next_part = 0
        self._early: dict[int, tuple[int, bytes]] = {}  # number -> (how many follow, bytes)
        self._message = bytearray()

    def add(self, number: int, parts_left: int, payload: bytes) -> list[dict]:
        """Take one part, unless it came before; returns the messages that are whole now. Raises FrameError: no sound
        peer sends that."""
        if number < self._next_part:
            return []
        if number >= self._next_part + MESSAGE_WINDOW:
            raise FrameError(f"message part {number} is outside the window that begins at {self._next_part}")
        if parts_left * CONTROL_LIMIT_BYTES > MESSAGE_LIMIT_BYTES:  # said in the first part: nothing is kept of it
            raise FrameError(f"a control message is longer than {MESSAGE_LIMIT_BYTES} bytes")
        self._early[number] = (parts_left, payload)
        messages = []
        while self._next_part in self._early:
            parts_left, payload = self._early.pop(self._next_part)
            self._next_part += 1
            self._message += payload
            if len(self._message) > MESSAGE_LIMIT_BYTES:
                raise FrameError(f"a control message is longer than {MESSAGE_LIMIT_BYTES} bytes")
            if parts_left == 0:
                whole, self._message = self._message, bytearray()
                messages.append(decode_message(whole))
        return messages
