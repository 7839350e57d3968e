"""Small state specs, and a toy model whose state is a function of the whole prefix: a wrongly shared block shows."""

import torch

from minprfaas.config import CacheConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.spec import StateSpec, TensorSpec

LINEAR = StateSpec(
    StateKind.REQUEST, (TensorSpec("memory", (2, 8, 8), "float32"), TensorSpec("conv", (10, 3), "bfloat16")))
LATENT = StateSpec(StateKind.TOKEN, (TensorSpec("latent", (6,), "float32"),))
KV = StateSpec(StateKind.TOKEN, (TensorSpec("kv", (16,), "bfloat16"),))
WINDOW = StateSpec(StateKind.WINDOW, (TensorSpec("kv", (5, 6), "float32"),))
HYBRID = (LINEAR, LINEAR, LINEAR, LATENT) * 2
DENSE = (KV,) * 3
WINDOWED = (LATENT, WINDOW, WINDOW)
ALL_LINEAR = (LINEAR,) * 2


def manager(specs, num_blocks, block_tokens=4, root=b"model", **config):
    cache_config = CacheConfig(num_blocks, block_tokens, **config)
    return KVCacheManager(plan_layout(specs, block_tokens), cache_config, "cpu", root)


def hear(told, news):
    """Bring `told` (key -> tokens) up to date, as a directory does; fails if the news contradict it."""
    for one in news:
        if one.tokens:
            assert told.setdefault(one.key, one.tokens) == one.tokens
        else:
            told.pop(one.key)


def prefix_values(tokens):
    """One number a token, of it and all tokens before it; exact in bfloat16."""
    values, value = [], 1
    for token in tokens:
        value = (value * 31 + token + 7) % 251
        values.append(value)
    return values


def step(kvcache, cache, tokens, end):
    """One forward pass of the toy model over `tokens[cache.num_tokens:end]`; fails if the state before it is not that
    of the tokens before it."""
    start, values, state = cache.num_tokens, prefix_values(tokens[:end]), kvcache.state([cache])
    for layer, spec in enumerate(kvcache.layout.specs):
        if spec.kind is StateKind.TOKEN:
            rows = torch.tensor(values[start:], dtype=spec.tensors[0].torch_dtype)[None, :, None]
            context = state.layer(layer).append(rows.expand(1, -1, spec.tensors[0].shape[0])).rows()
            assert context[0, :, 0].tolist() == values
        elif spec.kind is StateKind.WINDOW:
            step_window(state.layer(layer), values, start)
        else:
            memory, conv = state.layer(layer).load()
            before = values[start - 1] if start else 0
            assert memory.unique().tolist() == [before] and conv.unique().tolist() == [before]
            state.layer(layer).store(torch.full_like(memory, values[-1]), torch.full_like(conv, values[-1]))
            for offset in state.layer(layer).snapshot_offsets:
                there = values[start + offset - 1]
                state.layer(layer).store_snapshot(offset, torch.full_like(memory, there), torch.full_like(conv, there))
    kvcache.advance(cache, tokens[:end])


def step_window(layer, values, start):
    """A row a token, of its value: the last five of them, after zeros where the request has fewer."""
    rows = torch.tensor([0] * 5 + values, dtype=torch.float32)[None, :, None].expand(1, -1, 6)
    assert torch.equal(layer.load()[0], rows[:, start:start + 5])
    for offset in layer.snapshot_offsets:
        layer.store_snapshot(offset, rows[:, start + offset:start + offset + 5])
    layer.store(rows[:, -5:])


def prefill(kvcache, tokens, max_chunk=16):
    """Open a request and prefill it whole."""
    cache = kvcache.open(tokens)
    while cache.num_tokens < len(tokens):
        end = kvcache.plan_chunk(cache, len(tokens), max_chunk)
        assert kvcache.reserve(cache, end)
        step(kvcache, cache, tokens, end)
        kvcache.check()
    return cache


def decode(kvcache, cache, tokens, new_tokens):
    """Append tokens one by one; returns all of them."""
    for token in new_tokens:
        tokens = [*tokens, token]
        assert kvcache.reserve(cache, len(tokens))
        step(kvcache, cache, tokens, len(tokens))
        kvcache.check()
    return tokens
