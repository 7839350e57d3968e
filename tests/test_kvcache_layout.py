"""The layout: layers of the same state form groups, one block size serves all, and nothing overlaps. Chapter 03."""

import pytest

from minprfaas.config import StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.spec import StateSpec, TensorSpec, kv_bytes
from kvcache_helpers import ALL_LINEAR, DENSE, HYBRID, KV, LATENT, LINEAR, WINDOW, WINDOWED


def test_a_three_to_one_stack_gives_three_linear_groups_and_one_full_group_of_equally_many_layers():
    layout = plan_layout(HYBRID, block_tokens=4)
    assert [group.layers for group in layout.groups] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [group.spec.kind is StateKind.TOKEN for group in layout.groups] == [False, False, False, True]
    assert layout.request_groups == layout.groups[:3] and layout.token_groups == layout.groups[3:]
    assert [(group.state_blocks, group.row_bytes) for group in layout.token_groups] == [(0, 0)]


def test_a_stack_that_does_not_divide_leaves_only_the_last_groups_short():
    specs = ((LINEAR,) * 3 + (LATENT,)) * 6 + (LINEAR, LINEAR, LATENT)  # Kimi Linear's 27 layers: 20 and 7
    layout = plan_layout(specs, block_tokens=4)
    assert [len(group.layers) for group in layout.groups] == [7, 7, 6, 7]
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(27))
    assert all(layout.group_of_layer[layer].spec == spec for layer, spec in enumerate(specs))


def test_a_dense_model_is_one_token_group_without_state_blocks():
    layout = plan_layout(DENSE, block_tokens=64)
    assert len(layout.groups) == 1 and layout.state_blocks == 0
    assert layout.block_bytes == 3 * 64 * KV.nbytes


def test_a_block_without_token_state_is_one_groups_whole_state():
    layout = plan_layout(ALL_LINEAR, block_tokens=4)
    assert [group.state_blocks for group in layout.groups] == [1]
    assert layout.block_bytes - layout.groups[0].used_bytes < 256
    assert layout.blocks_for(1) == layout.blocks_for(10_000) == 1


@pytest.mark.parametrize("specs", [HYBRID, DENSE, ALL_LINEAR, WINDOWED, (LATENT, KV, KV, LINEAR)])
@pytest.mark.parametrize("block_tokens", [1, 4, 64])
def test_no_two_tensors_overlap_and_all_lie_inside_their_blocks(specs, block_tokens):
    layout = plan_layout(specs, block_tokens)
    assert layout.block_bytes % 256 == 0
    for group in layout.groups:
        end, span = 0, layout.block_bytes * max(group.state_blocks, 1)
        for layer in group.layers:
            for tensor, offset in group.places[layer]:
                assert offset >= end and offset % 16 == 0
                end = offset + tensor.nbytes * (block_tokens if group.spec.kind is StateKind.TOKEN else 1)
        assert end == group.used_bytes <= span
        assert layout.waste(group) == pytest.approx(1 - end / span)


def test_the_blocks_of_a_request_hold_its_kvcache_and_little_more():
    big = StateSpec(StateKind.REQUEST, (TensorSpec("memory", (32, 128, 128), "float32"),))
    latent = StateSpec(StateKind.TOKEN, (TensorSpec("latent", (576,), "bfloat16"),))
    layout = plan_layout((big, big, big, latent) * 7, block_tokens=64)
    for tokens in (1, 1024, 128 * 1024):
        held, needed = layout.blocks_for(tokens) * layout.block_bytes, kv_bytes(layout.specs, tokens)
        assert needed <= held <= needed + 4 * layout.block_bytes  # at most one block of each group partly empty


def test_a_window_weighs_a_row_a_token_until_it_is_full_and_then_no_more():
    assert [kv_bytes((WINDOW,), tokens) for tokens in (0, 1, 5, 6, 10_000)] == [0, 24, 120, 120, 120]
    layout = plan_layout(WINDOWED, block_tokens=4)
    assert layout.blocks_for(10_000) - layout.blocks_for(4) == 10_000 // 4 - 1, "only the token layer's blocks"
