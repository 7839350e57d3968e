"""What crosses for a request: the plan that both ends make before a byte moves. Chapter 08; paper 3.3."""

from minprfaas.config import StateKind
from minprfaas.kvcache.layout import Layout
from minprfaas.transport.base import StreamPlan
from minprfaas.transport.encoding import Wire


def stream_plan(layout: Layout, stream_id: int, start: int, end: int, wire: Wire = Wire()) -> StreamPlan:
    """The plan for tokens [start, end) of a request: its rows in token layers, its state as of `end` in the others (of
    a window the last rows that there are).

    Both ends make it from their own layout and their own view of the request; the sender's bytes must fit it. It speaks
    of tokens and layers, never of blocks. Raises ValueError for a range or an id that no stream can have.
    """
    entries = tuple(wire.entry(layer, layout.group_of_layer[layer].index, spec, end)
                    for layer, spec in enumerate(layout.specs))
    return StreamPlan(stream_id, entries, start, end)


def snapshot_plan(layout: Layout, stream_id: int, at: int) -> StreamPlan:
    """The plan for a snapshot: the request-level state at the block boundary `at`, and no rows. It crosses exactly, for
    a prefill will begin with it."""
    everything = stream_plan(layout, stream_id, 0, at)
    state = tuple(entry for entry in everything.entries if entry.kind is not StateKind.TOKEN)
    return StreamPlan(stream_id, state, 0, at)
