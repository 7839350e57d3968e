"""How the layers' state is laid into equal blocks: KVCache groups and byte offsets. Chapters 03 and 06 (paper 3.2).

Layers that need the same state form groups of equally many layers, so that one block size suits every group: a block
holds `block_tokens` tokens of all layers of a token group, and a request group's whole state some whole blocks.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from minprfaas.config import StateKind
from minprfaas.model.spec import StateSpec, TensorSpec

BLOCK_ALIGN = 256  # bytes: what a device copies well, and a multiple of every element size
TENSOR_ALIGN = 16


@dataclass(frozen=True)
class KVGroup:
    """Layers of one `spec` that share a block table. `places`: each layer's tensors with their offsets in bytes, into
    the block for token state (where the layer's rows begin), into the `state_blocks` end to end for request state."""

    index: int
    spec: StateSpec
    layers: tuple[int, ...]
    places: dict[int, tuple[tuple[TensorSpec, int], ...]]
    used_bytes: int  # of one block (token state) or of the whole state (request state)
    state_blocks: int = 0  # blocks of one request's state; 0 for token state
    row_bytes: int = 0  # of request state: each of its tensors, and a block, is a whole number of rows of so many


@dataclass(frozen=True)
class Layout:
    """The groups of a model, and the one block size that serves them all."""

    specs: tuple[StateSpec, ...]
    groups: tuple[KVGroup, ...]
    block_tokens: int
    block_bytes: int

    @cached_property
    def group_of_layer(self) -> tuple[KVGroup, ...]:
        """The group of each layer."""
        owner = {layer: group for group in self.groups for layer in group.layers}
        return tuple(owner[layer] for layer in range(len(self.specs)))

    @cached_property
    def token_groups(self) -> tuple[KVGroup, ...]:
        """Groups with a row a token."""
        return tuple(group for group in self.groups if group.spec.kind is StateKind.TOKEN)

    @cached_property
    def request_groups(self) -> tuple[KVGroup, ...]:
        """Groups with one state a request, whatever its length."""
        return tuple(group for group in self.groups if group.spec.kind is not StateKind.TOKEN)

    @cached_property
    def state_blocks(self) -> int:
        """Blocks of one request's state in all request groups; what a snapshot costs too."""
        return sum(group.state_blocks for group in self.request_groups)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a running request needs."""
        return len(self.token_groups) * -(-tokens // self.block_tokens) + self.state_blocks

    def waste(self, group: KVGroup) -> float:
        """Share of the group's blocks that alignment leaves empty, from 0 to 1."""
        return 1 - group.used_bytes / (self.block_bytes * max(group.state_blocks, 1))


def plan_layout(specs: tuple[StateSpec, ...], block_tokens: int) -> Layout:
    """Lay state out in blocks of `block_tokens` tokens. Groups have as many layers as the rarest spec; a spec's layers
    are dealt to its groups in turn, so the last may be one short. Without token state, a block is one group's state.
    >>> tensors = (TensorSpec("rows", (8,), "bfloat16"),)
    >>> linear, full = StateSpec(StateKind.REQUEST, tensors), StateSpec(StateKind.TOKEN, tensors)
    >>> [group.layers for group in plan_layout((linear, linear, linear, full) * 2, block_tokens=64).groups]
    [(0, 4), (1, 5), (2, 6), (3, 7)]"""
    layers_of: dict[StateSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    group_size = min(len(layers) for layers in layers_of.values())

    groups: list[KVGroup] = []
    for spec, layers in layers_of.items():
        count = -(-len(layers) // group_size)
        for first in range(count):
            groups.append(_place(len(groups), spec, tuple(layers[first::count]), block_tokens))
    token_sizes = [group.used_bytes for group in groups if group.spec.kind is StateKind.TOKEN]
    block_bytes = _round_up(max(token_sizes or [group.used_bytes for group in groups]), BLOCK_ALIGN)
    for index, group in enumerate(groups):
        if group.spec.kind is not StateKind.TOKEN:
            sizes = (size for places in group.places.values() for tensor, at in places for size in (at, tensor.nbytes))
            row_bytes = gcd(block_bytes, *sizes)
            groups[index] = replace(group, state_blocks=-(-group.used_bytes // block_bytes), row_bytes=row_bytes)
    return Layout(tuple(specs), tuple(groups), block_tokens, block_bytes)


def _place(index: int, spec: StateSpec, layers: tuple[int, ...], block_tokens: int) -> KVGroup:
    """A group whose layers' tensors lie one after another. A layer's rows of a block lie together, so that it is one
    strided view of the pool; request state runs on across block borders, so that only its last block has room."""
    places, end = {}, 0
    for layer in layers:
        places[layer] = ()
        for tensor in spec.tensors:
            offset = _round_up(end, TENSOR_ALIGN)
            places[layer] += ((tensor, offset),)
            end = offset + tensor.nbytes * (block_tokens if spec.kind is StateKind.TOKEN else 1)
    return KVGroup(index, spec, layers, places, used_bytes=end)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
