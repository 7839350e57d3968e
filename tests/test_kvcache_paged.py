"""What the model sees of blocks is what it would see of tensors of its own. Chapter 03."""

from array import array

import pytest
import torch

from minprfaas.config import LayerConfig, ModelConfig, RopeConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.paged import PagedState
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.attention import attend
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig, Positions
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import StateSpec, TensorSpec, model_state_specs
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from kvcache_helpers import DENSE, HYBRID, LINEAR, manager

KDA, MLA = KDAConfig(2, 16), MLAConfig(2, 24, 16, 8, 16)
GQA = GQAConfig(4, 2, 16, RopeConfig())
MODELS = {"hybrid": [KDA, KDA, KDA, MLA], "dense": [GQA, GQA]}


def model_of(name):
    torch.manual_seed(0)
    layers = tuple(LayerConfig(mixer, DenseConfig(64)) for mixer in MODELS[name])
    return Transformer(ModelConfig("kimi_linear", 101, 48, layers, 1e-6, False, 512)).eval()


def paged(pool, tables, starts):
    return PagedState(pool, [[array("q", group) for group in request] for request in tables], starts)


def test_append_returns_each_requests_own_context_however_its_blocks_lie():
    layout = plan_layout(DENSE, block_tokens=4)
    pool = BlockPool(layout, 16, "cpu")
    pool.zero(range(16))
    tables, lengths = [[[7, 3, 11]], [[2, 14]], [[5]]], [9, 6, 1]
    rows = [torch.randn(length + 2, 16).bfloat16() for length in lengths]
    for table, of_request, length in zip(tables, rows, lengths):
        pool.write_tokens(1, table[0], 0, of_request[:length])
    handle = paged(pool, tables, lengths).layer(1).append(
        torch.stack([of_request[length:] for of_request, length in zip(rows, lengths)]))
    context, pages = handle.rows(), handle.pages
    assert context.shape == (3, 11, 16)
    for of_request, got, length in zip(rows, context, lengths):
        assert torch.equal(got[:length + 2], of_request)
        assert got.isfinite().all()
    assert pages.lengths.tolist() == [11, 8, 3] and pages.view.data_ptr() == pool.token_view(1).data_ptr()
    for of_request, blocks, length in zip(rows, pages.block_table, pages.lengths):
        assert torch.equal(pages.view[blocks].flatten(0, 1)[:length], of_request)


def test_padding_is_finite_though_the_blocks_last_held_something_else():
    kvcache = manager(HYBRID, 64, prefix_cache=False)
    kvcache.pool.bytes[:64] = 255  # NaN in every dtype
    caches = [kvcache.open(list(range(length))) for length in (13, 2)]
    assert all(kvcache.reserve(cache, length) for cache, length in zip(caches, (13, 2)))
    caches[0].num_tokens, caches[1].num_tokens = 12, 1
    kvcache.pool.write_tokens(3, caches[0].block_tables[3], 0, torch.ones(12, 6))
    kvcache.pool.write_tokens(3, caches[1].block_tables[3], 0, torch.ones(1, 6))
    context = kvcache.state(caches).layer(3).append(torch.ones(2, 1, 6)).rows()
    assert context.isfinite().all() and context[1, 2:].eq(0).all()


def test_a_request_at_its_beginning_loads_zeros_beside_one_that_goes_on():
    layout = plan_layout((LINEAR,), block_tokens=4)
    pool = BlockPool(layout, 4, "cpu")
    pool.bytes[:4] = 255
    ones = tuple(torch.ones(1, *tensor.shape, dtype=tensor.torch_dtype) for tensor in LINEAR.tensors)
    paged(pool, [[[2]]], [0]).layer(0).store(*ones)
    for tensor in paged(pool, [[[1]], [[2]]], [0, 5]).layer(0).load():
        assert tensor[0].eq(0).all() and tensor[1].eq(1).all()


def test_a_pass_beyond_the_reserved_blocks_is_refused():
    pool = BlockPool(plan_layout(HYBRID, block_tokens=4), 16, "cpu")
    with pytest.raises(ValueError, match="reserved"):
        paged(pool, [[[], [], [], [1]]], [3]).layer(3).append(torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="reserved"):
        paged(pool, [[[], [], [], [1]]], [3]).layer(0).load()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_paged_equals_contiguous_in_chunked_prefill_and_decode(name):
    model = model_of(name)
    tokens = torch.randint(0, 101, (1, 75), generator=torch.Generator().manual_seed(1))
    contiguous = ContiguousState(model.config, "float32")
    kvcache = manager(model_state_specs(model.config, "float32"), 64, block_tokens=8, snapshot_every=1000)
    ids = tokens[0].tolist()
    cache = kvcache.open(ids)
    assert kvcache.reserve(cache, 75)
    start = 0
    for end in (7, 64, 70, 71, 72, 73, 74, 75):
        expected = model(tokens[:, start:end], contiguous)
        contiguous.advance(end - start)
        got = model(tokens[:, start:end], kvcache.state([cache]))
        kvcache.advance(cache, ids[:end])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        start = end


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_batch_of_unequal_lengths_decodes_as_each_request_alone(name):
    model = model_of(name)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 101, (length,), generator=generator).tolist() for length in (3, 40, 17)]
    kvcache = manager(model_state_specs(model.config, "float32"), 200, block_tokens=8)
    caches = []
    for prompt in prompts:
        cache = kvcache.open(prompt)
        assert kvcache.reserve(cache, len(prompt) + 1)
        model(torch.tensor([prompt]), kvcache.state([cache]))
        kvcache.advance(cache, prompt)
        caches.append(cache)
    logits = model(torch.tensor([[11], [12], [13]]), kvcache.state(caches))
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([[*prompt, 11 + row]]))
        torch.testing.assert_close(logits[row, 0], alone[0, -1], rtol=1e-4, atol=1e-4)


def attend_over_pages(q, pages, scale):
    """One query token a request `[batch, heads, dim]` over its own pages, key first and value after it in each row:
    what a kernel that follows a block table computes, written out. -> `[batch, heads, dim]`."""
    out, size = torch.zeros_like(q), pages.view.shape[1]
    for request, length in enumerate(pages.lengths.tolist()):
        for head in range(q.shape[1]):
            scores, values = [], []
            for token in range(length):
                row = pages.view[pages.block_table[request, token // size], token % size]
                key, value = row.unflatten(0, (2, q.shape[1], q.shape[2]))[:, head]
                scores.append((key * q[request, head]).sum() * scale)
                values.append(value)
            out[request, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


def test_attention_computed_from_pages_is_that_of_the_rows():
    """Two requests of unequal length in one batch: a kernel needs the view, the block table and the lengths only."""
    heads, dim, lengths = 2, 4, (9, 3)
    spec = StateSpec(StateKind.TOKEN, (TensorSpec("kv", (2 * heads * dim,), "float32"),))
    kvcache = manager((spec,), 16, prefix_cache=False)
    caches = [kvcache.open(list(range(length))) for length in lengths]
    torch.manual_seed(3)
    for cache, length in zip(caches, lengths):
        assert kvcache.reserve(cache, length + 1)
        kvcache.pool.write_tokens(0, cache.block_tables[0], 0, torch.randn(length, 2 * heads * dim))
        kvcache.advance(cache, list(range(length)))
    context = kvcache.state(caches).layer(0).append(torch.randn(2, 1, 2 * heads * dim))
    q = torch.randn(2, heads, dim)
    k, v = context.rows().unflatten(-1, (2, heads, dim)).unbind(2)
    positions = Positions(torch.tensor(lengths), 1)
    expected = attend(q[:, None], k, v, positions, scale=0.5)[:, 0]
    torch.testing.assert_close(attend_over_pages(q, context.pages, scale=0.5), expected)


@pytest.mark.parametrize("split", [64, 192])
@torch.inference_mode()
def test_a_snapshot_inside_a_pass_continues_as_if_the_pass_had_ended_there(split):
    """One pass over 230 tokens, with snapshots on its way, against a pass that ends at the boundary."""
    model = model_of("hybrid")
    specs = model_state_specs(model.config, "float32")
    tokens = torch.randint(0, 101, (230,), generator=torch.Generator().manual_seed(5)).tolist()

    def begin(kvcache, upto, max_chunk):
        cache = kvcache.open(tokens[:upto])
        while cache.num_tokens < upto:
            end = kvcache.plan_chunk(cache, upto, max_chunk)
            assert kvcache.reserve(cache, end)
            logits = model(torch.tensor([tokens[cache.num_tokens:end]]), kvcache.state([cache]), last_only=True)
            kvcache.advance(cache, tokens[:end])
        return cache, logits

    whole, ended = manager(specs, 900, block_tokens=64, snapshot_every=1), manager(specs, 900, block_tokens=64)
    long, expected = begin(whole, 230, 1000)
    at_boundary, _ = begin(ended, split, 1000)
    assert long.cached_tokens == 0 and long.planned == {}
    tables = whole.snapshots.hold(long, split)
    for layer, spec in enumerate(specs):
        if spec.kind is not StateKind.TOKEN:
            group = whole.layout.group_of_layer[layer].index
            inside = whole.pool.read_bytes(layer, tables[group], 0, split).view(torch.float32)
            after = ended.pool.read_bytes(layer, at_boundary.block_tables[group], 0, split).view(torch.float32)
            torch.testing.assert_close(inside, after, rtol=1e-5, atol=1e-6)

    whole.close(long)
    following = [*tokens[:split], *tokens[200:]]
    continued = whole.open(following)
    assert continued.cached_tokens == split and whole.reserve(continued, len(following))
    got = model(torch.tensor([following[split:]]), whole.state([continued]), last_only=True)
    alone = model(torch.tensor([following]), last_only=True)
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected, model(torch.tensor([tokens]), last_only=True), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_only_the_requests_of_a_batch_that_want_a_snapshot_get_one():
    layout = plan_layout((LINEAR,), block_tokens=4)
    pool = BlockPool(layout, 8, "cpu")
    pool.bytes[:8] = 0
    tables = [[array("q", [0])], [array("q", [1])]]
    state = PagedState(pool, tables, [4, 4], [{}, {4: [array("q", [5])]}])
    values = [torch.stack([torch.full(tensor.shape, 7), torch.full(tensor.shape, 9)]) for tensor in LINEAR.tensors]
    assert state.layer(0).snapshot_offsets == (4,)
    state.layer(0).store_snapshot(4, *values)
    for tensor in pool.read_state(0, pool.state_rows(layout.groups[0], torch.tensor([[5]]))):
        assert tensor.eq(9).all()
    assert pool.bytes[:5].eq(0).all() and pool.bytes[6:].eq(0).all()
