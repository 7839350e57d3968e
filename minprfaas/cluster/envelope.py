"""Messages on the wire: JSON with the names of who says it and who shall read it. Chapter 13; paper 3.1.

A message from another datacenter is input from outside: `decode` accepts exactly the known types with exactly their
fields, or raises `BadMessage`.
"""

from dataclasses import dataclass, fields

from minprfaas.cluster.messages import Message

MAX_ITEMS = 1 << 24  # of one list; far above any prompt or inventory here, far below what could exhaust memory
TYPES = {kind.__name__: kind for kind in Message.__args__}


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
    message = envelope.message
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {"to": envelope.to, "from": envelope.sender, "type": type(message).__name__, "fields": values}


def decode(raw: dict) -> Envelope:
    """What `raw` encodes. Raises BadMessage on an unknown type and on a missing, extra or ill-typed field."""
    if set(raw) != {"to", "from", "type", "fields"} or not isinstance(raw["fields"], dict):
        raise BadMessage("not an envelope")
    if not all(isinstance(raw[name], str) for name in ("to", "from", "type")) or raw["type"] not in TYPES:
        raise BadMessage("unknown message type, or no names")
    kind, values = TYPES[raw["type"]], raw["fields"]
    types = {field.name: field.type for field in fields(kind)}
    if set(values) != set(types):
        raise BadMessage(f"{kind.__name__} has fields {sorted(values)}")
    for name, wanted in types.items():
        if not _is_a(values[name], wanted):
            raise BadMessage(f"{kind.__name__}.{name} is not {wanted}")
    return Envelope(raw["to"], raw["from"], kind(**values))


def _is_a(value: object, wanted: type) -> bool:
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted in (list[int], list[str], list[dict]):
        (item_type,) = wanted.__args__
        return isinstance(value, list) and len(value) <= MAX_ITEMS and all(_is_a(item, item_type) for item in value)
    return isinstance(value, wanted)
