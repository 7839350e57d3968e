"""The pool: what is written into a block is read from it, and from no other, by any thread. Chapter 03."""

import threading

import pytest
import torch

from minprfaas.config import StateKind
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.pool import BlockPool, put_rows
from minprfaas.kvcache.pool_copies import WholeBlocks
from minprfaas.model.spec import StateSpec, TensorSpec
from kvcache_helpers import DENSE, HYBRID, KV, LATENT, LINEAR, WINDOWED

TABLE = [5, 2, 9]  # blocks out of order, 4 tokens each


def pool_of(specs, num_blocks=12, block_tokens=4):
    pool = BlockPool(plan_layout(specs, block_tokens), num_blocks, "cpu")
    pool.bytes[:num_blocks] = 255  # as NaN in every dtype: nothing may be read that was not written
    return pool


def random_state(spec, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *t.shape, generator=generator).to(t.torch_dtype) for t in spec.tensors)


def state_rows(pool, layer, blocks):
    return pool.state_rows(pool.layout.group_of_layer[layer], torch.tensor([blocks]))


def test_tokens_come_back_from_any_range_across_block_borders():
    pool, rows = pool_of(HYBRID), torch.randn(12, 6)
    pool.write_tokens(3, TABLE, 0, rows[:5])
    pool.write_tokens(3, TABLE, 5, rows[5:])
    for start in range(13):
        for end in range(start, 13):
            assert torch.equal(pool.read_tokens(3, TABLE, start, end), rows[start:end])


def test_the_token_view_is_the_pool_itself():
    pool, rows = pool_of(DENSE), torch.randn(12, 16).bfloat16()
    pool.write_tokens(1, TABLE, 0, rows)
    view = pool.token_view(1)
    assert torch.equal(view[TABLE].reshape(12, 16), rows)
    view[2, 0] = 7
    assert pool.read_tokens(1, TABLE, 4, 5).tolist() == [[7.0] * 16]
    assert view.untyped_storage().data_ptr() == pool.bytes.untyped_storage().data_ptr()


def test_layers_and_requests_do_not_write_into_each_other():
    pool = pool_of(DENSE)
    written = {}
    for layer in range(3):
        for table in ([5, 2], [0, 11]):
            written[layer, tuple(table)] = torch.randn(8, 16).bfloat16()
            pool.write_tokens(layer, table, 0, written[layer, tuple(table)])
    for (layer, table), rows in written.items():
        assert torch.equal(pool.read_tokens(layer, list(table), 0, 8), rows)


@pytest.mark.parametrize("specs, block_tokens", [
    (HYBRID, 4),  # the state runs across several blocks
    (HYBRID, 64),  # and fits into part of one
    ((LINEAR, LINEAR), 4),
])
def test_request_state_comes_back_for_a_batch_and_leaves_its_neighbours_alone(specs, block_tokens):
    pool = pool_of(specs, num_blocks=64, block_tokens=block_tokens)
    order, state = torch.randperm(64, generator=torch.Generator().manual_seed(1)), {}
    for layer, spec in enumerate(specs):
        if spec.kind is not StateKind.TOKEN:
            group = pool.layout.group_of_layer[layer]
            first = group.index * 16
            rows = pool.state_rows(group, order[first:first + 3 * group.state_blocks].view(3, -1))
            state[layer] = rows, random_state(spec, 3, layer)
            pool.write_state(layer, rows, *state[layer][1])
    for layer, (rows, tensors) in state.items():
        for read, written in zip(pool.read_state(layer, rows), tensors):
            assert torch.equal(read, written)


def test_bytes_cross_from_one_pool_to_another_whatever_the_blocks():
    source, target = pool_of(HYBRID), pool_of(HYBRID)
    rows = torch.randn(12, 6)
    source.write_tokens(3, TABLE, 0, rows)
    data = source.read_bytes(3, TABLE, 3, 11)
    assert data.shape == (8, LATENT.nbytes) and data.dtype == torch.uint8
    target.write_bytes(3, [0, 1, 2], 3, 11, data)
    assert torch.equal(target.read_tokens(3, [0, 1, 2], 3, 11), rows[3:11])

    blocks = list(range(source.layout.groups[0].state_blocks))
    state = random_state(LINEAR, 1)
    source.write_state(0, state_rows(source, 0, blocks), *state)
    data = source.read_bytes(0, blocks, 0, 12)
    assert data.shape == (LINEAR.nbytes,)
    target.write_bytes(0, blocks[::-1], 0, 12, data)
    for read, written in zip(target.read_state(0, state_rows(target, 0, blocks[::-1])), state):
        assert torch.equal(read, written)


@pytest.mark.parametrize("specs", [DENSE, HYBRID])
@pytest.mark.parametrize("start, end", [(0, 8), (4, 12), (0, 11), (4, 5), (1, 8), (5, 6)])
def test_whole_blocks_go_by_one_kernel_and_every_byte_is_where_the_reference_puts_it(specs, start, end):
    source, target, reference = (pool_of(specs) for _ in range(3))
    source.bytes.copy_(torch.randint(0, 255, source.bytes.shape, dtype=torch.uint8))
    for layer, group in enumerate(source.layout.group_of_layer):
        reads, writes = ([table] * len(source.layout.groups) for table in (TABLE, [0, 1, 2]))
        if group.spec.kind is not StateKind.TOKEN:
            reads, writes = ([table[:group.state_blocks]] * len(source.layout.groups)
                             for table in ([3, 8, 0, 7, 1], [4, 6, 5, 10, 11]))
        data = source.read_bytes(layer, reads[group.index], start, end).reshape(-1)
        blocks, out = WholeBlocks(source, reads, is_fast=True), torch.full_like(data, 1)
        assert torch.equal(blocks.read(layer, start, end, None), data)
        assert torch.equal(blocks.read(layer, start, end, out), data) and torch.equal(out, data)
        WholeBlocks(target, writes, is_fast=True).write(layer, start, end, out)
        reference.write_bytes(layer, writes[group.index], start, end, data)
        assert torch.equal(target.bytes, reference.bytes), "nothing else was touched"
        with pytest.raises(ValueError, match="they must be"):
            WholeBlocks(target, writes, is_fast=True).write(layer, start, end, data[1:])


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("start, end", [(0, 8), (4, 12), (0, 11), (5, 6)])
def test_layers_of_one_group_go_together_one_behind_the_other(start, end, is_fast):
    source, target, reference = (pool_of(DENSE) for _ in range(3))
    source.bytes.copy_(torch.randint(0, 255, source.bytes.shape, dtype=torch.uint8))
    layers = source.layout.groups[0].layers[1:]
    assert len(layers) > 1
    rows = [source.read_bytes(layer, TABLE, start, end).reshape(-1) for layer in layers]
    out = torch.empty(sum(map(len, rows)), dtype=torch.uint8)
    assert torch.equal(WholeBlocks(source, [TABLE], is_fast).read(layers[0], start, end, out), torch.cat(rows))
    WholeBlocks(target, [[0, 1, 2]], is_fast).write(layers[0], start, end, out)
    for layer, data in zip(layers, rows):
        reference.write_bytes(layer, [0, 1, 2], start, end, data)
    assert torch.equal(target.bytes, reference.bytes), "each in its place, and nothing else was touched"


def test_a_block_table_may_grow_under_a_stream_that_reads_by_it():
    pool, table = pool_of(DENSE), [5]
    rows = torch.randn(12, 16).bfloat16()
    pool.write_tokens(1, TABLE, 0, rows)
    blocks, out = WholeBlocks(pool, [table], is_fast=True), torch.empty(4 * 32, dtype=torch.uint8)
    assert torch.equal(blocks.read(1, 0, 4, out).view(torch.bfloat16).view(4, 16), rows[:4])
    with pytest.raises(ValueError, match="outside the block table's 0 to 4"):
        blocks.read(1, 4, 8, out)
    table.extend(TABLE[1:])
    assert torch.equal(blocks.read(1, 8, 12, out).view(torch.bfloat16).view(4, 16), rows[8:])


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 100])
def test_of_a_window_the_last_rows_cross_that_there_are_and_arrive_in_their_places(tokens):
    source, target = pool_of(WINDOWED), pool_of(WINDOWED)
    blocks, rows = list(range(source.layout.groups[1].state_blocks)), torch.randn(1, 5, 6)
    rows[:, :max(5 - tokens, 0)] = 0
    target.bytes.fill_(0x7F)
    source.write_state(1, state_rows(source, 1, blocks), rows)
    data = source.read_bytes(1, blocks, 0, tokens)
    assert data.numel() == min(tokens, 5) * 24
    target.write_bytes(1, blocks, 0, tokens, data)
    assert torch.equal(target.read_state(1, state_rows(target, 1, blocks))[0], rows)


def test_bytes_may_lie_at_any_place_of_a_message():
    pool, rows = pool_of(DENSE), torch.randn(4, 16).bfloat16()
    message = torch.cat([torch.zeros(3, dtype=torch.uint8), rows.reshape(-1).view(torch.uint8)])
    pool.write_bytes(0, TABLE, 0, 4, message[3:])
    assert torch.equal(pool.read_tokens(0, TABLE, 0, 4), rows)


def test_bad_ranges_sizes_and_blocks_are_refused_before_anything_is_written():
    pool = pool_of((LATENT, KV, LINEAR))
    before = pool.bytes.clone()
    rows = torch.zeros(4, 6)
    for write in (
        lambda: pool.write_tokens(0, TABLE, 9, rows),
        lambda: pool.write_tokens(0, TABLE, -1, rows),
        lambda: pool.write_tokens(0, TABLE, 0, rows[:, :5]),
        lambda: pool.write_tokens(0, TABLE, 0, rows.bfloat16()),
        lambda: pool.write_tokens(0, [12], 0, rows),  # the null block
        lambda: pool.write_tokens(0, [-1], 0, rows),
        lambda: pool.write_bytes(0, TABLE, 0, 4, torch.zeros(95, dtype=torch.uint8)),
        lambda: pool.write_bytes(2, [0], 0, 4, torch.zeros(LINEAR.nbytes - 1, dtype=torch.uint8)),
        lambda: pool.write_bytes(0, TABLE, 12, 16, torch.zeros(96, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError):
            write()
    with pytest.raises(ValueError):
        pool.read_tokens(0, TABLE, 0, 13)
    assert torch.equal(pool.bytes, before)


def test_rows_go_into_their_blocks_however_they_lie_in_memory():
    """In words of eight bytes only where all of them are whole words."""
    blocks, offsets = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0])
    numbers = torch.arange(1, 37.0)
    for rows in (numbers.view(3, 12)[:, 4:8], numbers.view(3, 12)[:, 1:5], numbers[:33].view(3, 11)[:, :4],
                 numbers.view(3, 12)[:, :8:2], numbers.view(12, 3).T[:, :4]):
        for view in (torch.zeros(3, 4, 4), torch.zeros(3, 4, 8)[..., 1:5], torch.zeros(3, 4, 5)[..., :4]):
            put_rows(view, blocks, offsets, rows)
            assert torch.equal(view[blocks, offsets], rows) and view.count_nonzero() == rows.numel()


def test_a_pools_device_is_that_of_its_tensors():
    """Streams compare the two: what they think lies elsewhere goes a slower way."""
    pool = BlockPool(plan_layout(DENSE, 4), 1, "cpu:0")  # as with "cuda", what is asked for is spelled otherwise
    assert pool.device == pool.token_view(0).device


def test_a_pool_larger_than_the_machine_is_a_users_mistake():
    with pytest.raises(UserError, match="10,000,000,000,000 blocks"):
        BlockPool(plan_layout(DENSE, 64), 10**13, "cpu")


def test_a_receiving_thread_fills_its_blocks_while_other_blocks_are_written():
    specs = (StateSpec(StateKind.TOKEN, (TensorSpec("kv", (64,), "float32"),)),)
    pool = pool_of(specs, num_blocks=64, block_tokens=16)
    arriving, computed = torch.randn(512, 64), torch.randn(512, 64)
    theirs, ours = list(range(0, 64, 2)), list(range(1, 64, 2))
    started = threading.Event()

    def receive():
        for start in range(0, 512, 7):
            end = min(start + 7, 512)
            pool.write_bytes(0, theirs, start, end, arriving[start:end].contiguous().view(torch.uint8))
            started.set()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    assert started.wait(timeout=30)
    for start in range(0, 512, 4):
        pool.write_tokens(0, ours, start, computed[start:start + 4])
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert torch.equal(pool.read_tokens(0, theirs, 0, 512), arriving)
    assert torch.equal(pool.read_tokens(0, ours, 0, 512), computed)
