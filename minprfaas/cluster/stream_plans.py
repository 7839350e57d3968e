"""What crosses for a request: the plan that both ends make before a byte moves. Chapter 08; paper 3.3."""

from minprfaas.config import StateKind
from minprfaas.kvcache.layout import Layout
from minprfaas.transport.base import LayerPlan, StreamPlan
from minprfaas.transport.encoding import Encoding, row_codec


def stream_plan(layout: Layout, stream_id: int, start: int, end: int,
                encoding: Encoding = Encoding.EXACT) -> StreamPlan:
    """The plan for tokens [start, end) of a request: its rows in token layers, its state as of `end` in the others (of
    a window the last rows that there are).

    Both ends make it from their own layout and their own view of the request; the sender's bytes must fit it. Rows of
    attention cross in `encoding`; request-level state crosses exactly: its error would stay in all that follows.
    Raises ValueError for a range or an id that no stream can have.
    """
    entries = []
    for layer, spec in enumerate(layout.specs):
        nbytes = spec.nbytes if spec.kind is StateKind.TOKEN else spec.bytes_at(end)
        group = layout.group_of_layer[layer].index
        if spec.kind is StateKind.REQUEST:
            entries.append(LayerPlan(layer, group, spec.kind, nbytes))
        else:
            entries.append(LayerPlan(layer, group, spec.kind, row_codec(spec, encoding).wire_bytes(nbytes), encoding))
    return StreamPlan(stream_id, tuple(entries), start, end)


def snapshot_plan(layout: Layout, stream_id: int, at: int) -> StreamPlan:
    """The plan for a snapshot: the request-level state at the block boundary `at`, and no rows. It crosses exactly, for
    a prefill will begin with it."""
    everything = stream_plan(layout, stream_id, 0, at)
    state = tuple(entry for entry in everything.entries if entry.kind is not StateKind.TOKEN)
    return StreamPlan(stream_id, state, 0, at)
