"""Messages on the wire: JSON with the names of who says it and who shall read it. Chapter 13; paper 3.1.

A message from another datacenter is input from outside: `decode` accepts exactly the known types with exactly their
fields, or raises `BadMessage`. A list of integers, which may be a long prompt, crosses packed: as JSON's digits it took
a front end longer than all else that it does for a request.
"""

from array import array
from base64 import b64decode, b64encode
from dataclasses import dataclass, fields

from minprfaas.cluster.messages import Message

MAX_ITEMS = 1 << 24  # of one list; far above any prompt or inventory here, far below what could exhaust memory
FIELDS = {kind: {field.name: field.type for field in fields(kind)} for kind in Message.__args__}
TYPES = {kind.__name__: kind for kind in FIELDS}


class BadMessage(Exception):
    """A message that is not one of ours."""


@dataclass(frozen=True)
class Envelope:
    """A message with the names of its sender and of who shall read it."""

    to: str
    sender: str
    message: Message


def encode(envelope: Envelope) -> dict:
    """A JSON-ready object, to be written at once: it shares the message's lists. (`asdict` would copy them token by
    token, which took most of a front end's time.)"""
    message, values = envelope.message, {}
    for name, kind in FIELDS[type(message)].items():
        value = getattr(message, name)
        values[name] = _packed(value) if kind == list[int] else value
    return {"to": envelope.to, "from": envelope.sender, "type": type(message).__name__, "fields": values}


def decode(raw: dict) -> Envelope:
    """What `raw` encodes. Raises BadMessage on an unknown type and on a missing, extra or ill-typed field."""
    if set(raw) != {"to", "from", "type", "fields"} or not isinstance(raw["fields"], dict):
        raise BadMessage("not an envelope")
    if not all(isinstance(raw[name], str) for name in ("to", "from", "type")) or raw["type"] not in TYPES:
        raise BadMessage("unknown message type, or no names")
    kind, values = TYPES[raw["type"]], dict(raw["fields"])
    if set(values) != set(FIELDS[kind]):
        raise BadMessage(f"{kind.__name__} has fields {sorted(values)}")
    for name, wanted in FIELDS[kind].items():
        if wanted == list[int]:
            values[name] = _unpacked(values[name])
        elif not _is_a(values[name], wanted):
            raise BadMessage(f"{kind.__name__}.{name} is not {wanted}")
    return Envelope(raw["to"], raw["from"], kind(**values))


def _packed(numbers: list[int]) -> str:
    """As 4-byte numbers where they fit, which any vocabulary's do, else as 8-byte ones; the first letter says which."""
    try:
        data = array("I", numbers)
    except OverflowError:
        data = array("q", numbers)
    return data.typecode + b64encode(data).decode()


def _unpacked(text: object) -> list[int]:
    if not isinstance(text, str) or text[:1] not in ("I", "q") or len(text) > 12 * MAX_ITEMS:
        raise BadMessage("no packed list of integers")
    numbers = array(text[0])
    try:
        numbers.frombytes(b64decode(text[1:], validate=True))
    except ValueError as error:
        raise BadMessage(f"no packed list of integers: {error}") from None
    return numbers.tolist()


def _is_a(value: object, wanted: type) -> bool:
    if wanted in (int, float):
        is_number = isinstance(value, (int, wanted)) and not isinstance(value, bool)
        return is_number and abs(value) < 2**64  # no NaN either, and no whole number that no float can hold
    if wanted in (list[str], list[dict]):
        return isinstance(value, list) and len(value) <= MAX_ITEMS and set(map(type, value)) <= {*wanted.__args__}
    return isinstance(value, wanted)
