"""How the layers' state is laid into equal blocks: KVCache groups and byte offsets, no tensors. Chapters 03 and 06 (3.2).

Layers that need the same state form groups of equally many layers, so that one block size suits every group: a block
holds `block_tokens` tokens of all layers of a token group, and a request group's whole state fills a whole number of
blocks. A 3:1 stack of linear and full attention gives three request groups and one token group.
"""

from dataclasses import dataclass
from functools import cached_property

from minprfaas.model.spec import StateSpec, kv_bytes

BLOCK_ALIGN = 256  # bytes: what a device-to-device copy likes, and a multiple of every element size
TENSOR_ALIGN = 16


@dataclass(frozen=True)
class KVGroup:
    """Layers with the same `spec` that share one block table.

    `offsets[layer position][tensor position]` is a byte offset: within the block for token state (where the layer's
    `block_tokens` rows begin), within the `state_blocks` blocks, laid end to end, for request state.
    """

    index: int
    spec: StateSpec
    layers: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    used_bytes: int  # of one block (token state), of the whole state (request state)
    state_blocks: int  # blocks of one request's state; 0 for token state

    @property
    def per_token(self) -> bool:
        return self.spec.per_token


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
        return tuple(group for group in self.groups if group.per_token)

    @cached_property
    def request_groups(self) -> tuple[KVGroup, ...]:
        return tuple(group for group in self.groups if not group.per_token)

    @cached_property
    def state_blocks(self) -> int:
        """Blocks of one request's state in all request groups: the cost of a running request, or of one snapshot."""
        return sum(group.state_blocks for group in self.request_groups)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a running request of `tokens` tokens needs."""
        return len(self.token_groups) * -(-tokens // self.block_tokens) + self.state_blocks

    def capacity_tokens(self, num_blocks: int) -> int:
        """The longest request that a pool of `num_blocks` blocks holds; without token state, any length or none."""
        left = num_blocks - self.state_blocks
        if not self.token_groups:
            return 2**62 if left >= 0 else 0
        return max(0, left // len(self.token_groups) * self.block_tokens)

    def request_bytes(self, tokens: int) -> int:
        """Bytes that a request of `tokens` tokens takes of the pool: S_kv(l) plus what alignment wastes."""
        return self.blocks_for(tokens) * self.block_bytes

    def kv_bytes(self, tokens: int) -> int:
        """S_kv(l) (paper 2.1): bytes of state of a request of `tokens` tokens, without alignment."""
        return kv_bytes(self.specs, tokens)

    def waste(self, group: KVGroup) -> float:
        """Share of the group's blocks that alignment leaves empty, from 0 to 1."""
        return 1 - group.used_bytes / (self.block_bytes * max(group.state_blocks, 1))


def plan_layout(specs: tuple[StateSpec, ...], block_tokens: int) -> Layout:
    """Lay the layers' state out in blocks of `block_tokens` tokens.

    Group size is the smallest number of layers that share one spec. Layers are dealt to their spec's groups in turn,
    so the last groups may be one short. Without token state, a block is one group's whole state.
    """
    layers_of: dict[StateSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    group_size = min(len(layers) for layers in layers_of.values())

    groups = []
    for spec, layers in layers_of.items():
        count = -(-len(layers) // group_size)
        for dealt in range(count):
            members = tuple(layers[dealt::count])
            offsets, used = _token_offsets(spec, len(members), block_tokens) if spec.per_token else \
                _state_offsets(spec, len(members))
            groups.append((spec, members, offsets, used))

    sizes = [used for spec, _, _, used in groups if spec.per_token] or [used for *_, used in groups]
    block_bytes = _round_up(max(sizes), BLOCK_ALIGN)
    return Layout(tuple(specs), tuple(
        KVGroup(index, spec, members, offsets, used, 0 if spec.per_token else -(-used // block_bytes))
        for index, (spec, members, offsets, used) in enumerate(groups)), block_tokens, block_bytes)


def _token_offsets(spec: StateSpec, layers: int, block_tokens: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Each layer's rows of a block lie together, so that a layer is one strided view of the pool."""
    layer_bytes = block_tokens * spec.nbytes
    return tuple((position * layer_bytes,) for position in range(layers)), layers * layer_bytes


def _state_offsets(spec: StateSpec, layers: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Tensors follow each other across block borders: only the group's last block is partly empty."""
    offsets, end = [], 0
    for _ in range(layers):
        of_layer = []
        for tensor in spec.tensors:
            of_layer.append(_round_up(end, TENSOR_ALIGN))
            end = of_layer[-1] + tensor.nbytes
        offsets.append(tuple(of_layer))
    return tuple(offsets), end


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
