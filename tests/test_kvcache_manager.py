"""The manager: a request's blocks, prefixes that are used again, snapshots inside and after a pass. Chapter 06."""

import random
from dataclasses import replace

import pytest
import torch

from minprfaas.kvcache.ledger import PrefixNews
from minprfaas.model.spec import model_state_specs
from kvcache_helpers import ALL_LINEAR, DENSE, HYBRID, KV, LATENT, LINEAR, WINDOWED, decode, manager, prefill, step
from test_kvcache_paged import MODELS, model_of

SPECS = {"hybrid": HYBRID, "dense": DENSE, "linear only": ALL_LINEAR, "windows": WINDOWED,
         "two token groups": (LATENT, KV, KV, LINEAR)}
PROMPT = list(range(100, 142))  # 10 blocks of 4, and 2 tokens


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_a_repeated_prompt_is_found_up_to_its_last_full_boundary(specs):
    kvcache = manager(specs, 800)
    cold = prefill(kvcache, PROMPT)
    kvcache.close(cold)
    warm = prefill(kvcache, PROMPT)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 40)
    assert kvcache.match(PROMPT) == 40


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_at_least_one_token_is_always_computed(specs):
    kvcache = manager(specs, 800)
    kvcache.close(prefill(kvcache, PROMPT[:40]))
    assert kvcache.match(PROMPT[:40]) == 36
    assert kvcache.match(PROMPT[:41]) == 40
    assert kvcache.match(PROMPT[:1]) == kvcache.match([]) == 0
    single = manager(specs, 800, block_tokens=1, snapshot_every=1)
    single.close(prefill(single, PROMPT[:3]))
    assert [single.match(PROMPT[:length]) for length in range(5)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_the_next_turn_begins_at_the_last_full_boundary_of_the_answer(specs):
    kvcache = manager(specs, 800)
    cache = prefill(kvcache, PROMPT)
    answered = decode(kvcache, cache, PROMPT, range(21))  # 63 tokens: 15 full blocks
    kvcache.close(cache)
    assert prefill(kvcache, [*answered, 7, 8, 9]).cached_tokens == 60


def test_decoding_keeps_one_snapshot_in_the_index_not_one_a_block():
    kvcache = manager(HYBRID, 800, snapshot_every=1000)
    cache = prefill(kvcache, PROMPT)
    before = len(kvcache.ledger.snapshots)
    decode(kvcache, cache, PROMPT, range(40))
    assert len(kvcache.ledger.snapshots) == before + 1
    assert kvcache.match([*PROMPT[:40], 7]) == 40, "and the prompt's own"


def test_of_the_snapshots_of_one_pass_the_longest_is_evicted_last():
    kvcache = manager(HYBRID, 800, snapshot_every=3)
    cache, ledger = prefill(kvcache, PROMPT, max_chunk=1000), kvcache.ledger
    for left in ([12, 24, 36, 40], [24, 36, 40], [36, 40], [40]):
        assert sorted(news.tokens for news in ledger.inventory()) == left
        ledger.allocate(len(ledger.free) + 1)
    assert cache.num_tokens == 42 and ledger.inventory() == []


def test_snapshots_fall_on_every_nth_block_and_on_the_last_boundary():
    kvcache = manager(HYBRID, 800, snapshot_every=3)
    cache = prefill(kvcache, PROMPT, max_chunk=7)
    assert sorted(news.tokens for news in kvcache.ledger.inventory()) == [12, 24, 36, 40]
    kvcache.close(cache)
    for length, hit in ((12, 0), (13, 12), (30, 24), (39, 36), (42, 40)):
        assert kvcache.match(PROMPT[:length]) == hit


def test_where_two_prompts_part_a_third_can_begin():
    kvcache = manager(HYBRID, 2000, snapshot_every=1000)
    hits = []
    for tail in (1, 2, 3):
        cache = prefill(kvcache, PROMPT[:24] + [tail] * 20)
        hits.append(cache.cached_tokens)
        kvcache.close(cache)
    assert hits == [0, 0, 24]


def chunk_ends(kvcache, tokens, max_chunk):
    """Where the chunks of a prompt end, if every one is as long as it may be."""
    cache, ends = kvcache.open(tokens), []
    while cache.num_tokens < len(tokens):
        cache.num_tokens = kvcache.plan_chunk(cache, len(tokens), max_chunk)
        ends.append(cache.num_tokens)
    return ends


def test_a_chunk_runs_to_its_limit_where_the_layers_hold_their_state_at_every_wanted_boundary():
    """With a stride of one token; and without any request-level state there is nothing to stop for."""
    for specs in (HYBRID, DENSE):
        assert chunk_ends(manager(specs, 800, snapshot_every=3), PROMPT, 7) == [7, 14, 21, 28, 35, 42]
        assert chunk_ends(manager(specs, 800, snapshot_every=3), PROMPT, 1000) == [42]


def test_a_chunk_ends_at_a_wanted_boundary_at_which_the_layers_do_not_hold_their_state():
    """Wanted are 12, 24, 36 and 40; the state is held every 8 tokens from where a pass began."""
    strided = [replace(spec, snapshot_stride=8) if spec is LINEAR else spec for spec in HYBRID]
    assert chunk_ends(manager(strided, 800, snapshot_every=3), PROMPT, 1000) == [12, 24, 36, 40, 42]
    assert chunk_ends(manager(strided, 800, snapshot_every=6), PROMPT, 1000) == [42]  # 24 and 40 are multiples of 8
    assert chunk_ends(manager(strided, 800, snapshot_every=6), PROMPT[:39], 1000) == [36, 39]
    assert chunk_ends(manager(strided, 800, snapshot_every=3), PROMPT, 7) == [7, 12, 19, 24, 31, 36, 40, 42]
    strided = [replace(spec, snapshot_stride=16) if spec is LINEAR else spec for spec in HYBRID]
    kvcache = manager(strided, 800, snapshot_every=5)  # 20 and 40 are wanted
    cache = kvcache.open(PROMPT)
    cache.num_tokens = 4
    assert kvcache.plan_chunk(cache, 42, 1000) == 40, "20 is 16 tokens on, 40 is 36"


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_snapshot_inside_a_pass_is_the_state_of_its_own_boundary(stride):
    """The toy model stores what it is asked for; whoever begins there later fails on anything else."""
    specs = [replace(spec, snapshot_stride=stride) if spec is LINEAR else spec for spec in HYBRID]
    kvcache = manager(specs, 3000, snapshot_every=2)
    kvcache.close(prefill(kvcache, PROMPT, max_chunk=1000))
    assert sorted(news.tokens for news in kvcache.ledger.inventory()) == [8, 16, 24, 32, 40]
    for at in (8, 16, 24, 32, 40):
        assert prefill(kvcache, [*PROMPT[:at], 7, 7, 7]).cached_tokens == at


def test_the_snapshots_of_a_pass_take_only_blocks_that_its_chunk_can_spare():
    """The latest are taken first. So a prompt that fits the pool is never stopped by its own snapshots."""
    needed, one = manager(HYBRID, 1).layout.blocks_for(42), manager(HYBRID, 1).layout.state_blocks
    for spare, kept in ((0, []), (one, [40]), (2 * one, [36, 40]), (3 * one + 1, [24, 36, 40])):
        kvcache = manager(HYBRID, needed + spare, snapshot_every=3)
        cache = kvcache.open(PROMPT)
        end = kvcache.plan_chunk(cache, 42, 1000)
        kvcache.check()
        assert end == 42 and kvcache.reserve(cache, 42)
        step(kvcache, cache, PROMPT, 42)
        kvcache.check()
        assert sorted(news.tokens for news in kvcache.ledger.inventory()) == kept


def test_a_plan_replaces_the_one_before_and_goes_with_an_aborted_request():
    kvcache = manager(HYBRID, 800, snapshot_every=3)
    cache = kvcache.open(PROMPT)
    for max_chunk, snapshots in ((1000, 4), (1000, 4), (13, 1), (3, 0), (30, 2)):
        kvcache.plan_chunk(cache, 42, max_chunk)
        kvcache.check()
        assert kvcache.stats().in_use == snapshots * kvcache.layout.state_blocks
    kvcache.close(cache)
    kvcache.check()
    assert kvcache.stats().free == 800


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_without_the_prefix_cache_nothing_is_kept(specs):
    kvcache = manager(specs, 800, prefix_cache=False)
    cache = prefill(kvcache, PROMPT)
    decode(kvcache, cache, PROMPT, range(9))
    kvcache.close(cache)
    assert prefill(kvcache, PROMPT).cached_tokens == kvcache.match(PROMPT) == 0
    assert kvcache.stats().cached == 0


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_running_requests_share_the_blocks_of_a_common_prefix(specs):
    kvcache = manager(specs, 800, snapshot_every=2)
    first = prefill(kvcache, PROMPT)
    second = prefill(kvcache, PROMPT[:32] + [1, 2, 3])
    for group in kvcache.layout.token_groups:
        assert first.block_tables[group.index][:8] == second.block_tables[group.index][:8]
    for group in kvcache.layout.request_groups:
        assert first.block_tables[group.index]
        assert not set(first.block_tables[group.index]) & set(second.block_tables[group.index])
    kvcache.close(first)
    kvcache.check()
    decode(kvcache, second, PROMPT[:32] + [1, 2, 3], range(8))


def test_two_requests_that_compute_the_same_prompt_at_once_end_up_sharing_it():
    kvcache = manager(DENSE, 100)
    caches = [kvcache.open(PROMPT) for _ in range(2)]
    for cache in caches:
        assert kvcache.reserve(cache, len(PROMPT)) and cache.cached_tokens == 0
    for cache in caches:
        kvcache.advance(cache, PROMPT)
        kvcache.check()
    assert caches[0].block_tables[0][:10] == caches[1].block_tables[0][:10]
    assert kvcache.stats().in_use == 10 + 2


def test_blocks_that_a_sender_may_be_reading_are_not_handed_out_when_they_turn_out_to_be_doubles():
    """Its thread looks block ids up and then reads; in between, another request's equal blocks may be indexed first."""
    kvcache = manager(DENSE, 40)
    first, second = [kvcache.open(PROMPT) for _ in range(2)]
    assert kvcache.reserve(first, 42) and kvcache.reserve(second, 42)
    kvcache.hold(second)
    looked_up = list(second.block_tables[0])
    kvcache.advance(first, PROMPT)
    kvcache.advance(second, PROMPT)
    kvcache.check()
    assert second.block_tables[0][:10] == first.block_tables[0][:10]
    assert not set(looked_up) & set(kvcache.ledger.free)
    kvcache.close(second)
    kvcache.check()
    assert not set(looked_up) & set(kvcache.ledger.free)
    kvcache.release(second)
    kvcache.check()
    assert set(looked_up) <= set(kvcache.ledger.free)


def test_prompts_share_a_block_only_as_far_as_their_tokens_agree():
    kvcache = manager(HYBRID, 3000, snapshot_every=1)
    prompts = [[0] * 12, [0] * 11 + [1], [1 << 32] + [0] * 11, [-1] * 12, [256] + [0] * 11, [0] * 16]
    caches = [prefill(kvcache, prompt) for prompt in prompts]  # the toy model fails on a foreign prefix
    for first, cache in zip(prompts, caches):
        for second, other in zip(prompts, caches):
            agree = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
            same = set(cache.block_tables[3]) & set(other.block_tables[3])
            assert len(same) == agree // 4


def test_reserve_that_fails_changes_nothing():
    kvcache = manager(HYBRID, 60)
    running = prefill(kvcache, PROMPT[:9])
    cache, stats = kvcache.open([7] * 42), kvcache.stats()
    assert not kvcache.reserve(cache, 4 * 60)
    kvcache.check()
    assert kvcache.stats() == stats and not any(cache.block_tables)
    assert kvcache.reserve(cache, 8) and running.num_tokens == 9


@pytest.mark.parametrize("name", ["hybrid", "dense", "two token groups"])
def test_a_request_that_fits_the_pool_fits_it_whatever_is_cached(name):
    """Also where there is no room for a snapshot and a copy of it: its only holder takes it over."""
    kvcache = manager(SPECS[name], manager(SPECS[name], 1).layout.blocks_for(200), snapshot_every=4)
    rng, hit_tokens = random.Random(0), 0
    for _ in range(6):
        tokens = PROMPT[:rng.randrange(9, 42)]
        kvcache.close(prefill(kvcache, tokens))
        cache = kvcache.open(longest := [*tokens, *range(200 - len(tokens))])
        hit_tokens += cache.cached_tokens
        assert kvcache.reserve(cache, 200)
        kvcache.check()
        kvcache.close(cache)
        kvcache.close(prefill(kvcache, longest))
    assert hit_tokens > 0 and kvcache.max_tokens == 200


def test_the_pool_says_how_long_a_request_it_can_hold():
    assert manager(DENSE, 10).max_tokens == 40
    layout = manager(HYBRID, 1).layout
    assert manager(HYBRID, layout.state_blocks + 3).max_tokens == 12
    assert manager(HYBRID, layout.state_blocks - 1).max_tokens == 0
    assert manager(ALL_LINEAR, 1).max_tokens > 10**9


def test_advancing_beyond_what_is_reserved_is_refused():
    kvcache = manager(DENSE, 10)
    cache = kvcache.open(PROMPT)
    assert kvcache.reserve(cache, 8)
    with pytest.raises(ValueError, match="8 are reserved"):
        kvcache.advance(cache, PROMPT[:9])


def test_closing_twice_frees_once():
    kvcache = manager(HYBRID, 200)
    cache = prefill(kvcache, PROMPT)
    kvcache.close(cache)
    stats = kvcache.stats()
    kvcache.close(cache)
    kvcache.check()
    assert kvcache.stats() == stats and stats.in_use == 0


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_the_same_greedy_tokens_with_the_cache_cold_warm_partly_evicted_and_off(name):
    model = model_of(name)
    specs = model_state_specs(model.config, "float32")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 101, (length,), generator=generator).tolist() for length in (61, 90, 40)]
    prompts.append(prompts[0][:48] + prompts[2][:20])

    def answer(kvcache, prompt):
        cache, tokens = kvcache.open(prompt), list(prompt)
        while len(tokens) < len(prompt) + 12:
            end = kvcache.plan_chunk(cache, len(tokens), 32)
            assert kvcache.reserve(cache, end)
            logits = model(torch.tensor([tokens[cache.num_tokens:end]]), kvcache.state([cache]), last_only=True)
            kvcache.advance(cache, tokens[:end])
            if end == len(tokens):
                tokens.append(int(logits[0, -1].argmax()))
        kvcache.close(cache)
        kvcache.check()
        return tokens, cache.cached_tokens

    off = manager(specs, 400, block_tokens=8, prefix_cache=False)
    expected = [answer(off, prompt)[0] for prompt in prompts]
    ample = manager(specs, 3000, block_tokens=8, snapshot_every=4)
    hit_tokens = 0
    for prompt, tokens in [*zip(prompts, expected)] * 3:
        answered, cached_tokens = answer(ample, prompt)
        assert answered == tokens
        hit_tokens += cached_tokens
    assert ample.stats().evicted_entries == 0 and hit_tokens > sum(map(len, prompts))
    tight = manager(specs, ample.stats().cached * 2 // 3, block_tokens=8, snapshot_every=4)
    order, hit_tokens = random.Random(0), 0
    for _ in range(12):
        which = order.randrange(len(prompts))
        answered, cached_tokens = answer(tight, prompts[which])
        assert answered == expected[which]
        hit_tokens += cached_tokens
    assert tight.stats().evicted_entries > 0 and hit_tokens > 0


def test_where_the_next_turn_begins_is_as_recent_as_its_request():
    """The snapshot of a long-running request was taken before another's came and went; its request ended after."""
    kvcache = manager(HYBRID, 110, snapshot_every=1000)
    cache = prefill(kvcache, PROMPT)
    kvcache.close(prefill(kvcache, [7] * 42))
    kvcache.close(cache)
    ledger = kvcache.ledger
    ledger.give_back(ledger.allocate(len(ledger.free) + 1))  # the pool needs one block more than is free
    assert kvcache.match(PROMPT) == 40 and kvcache.match([7] * 42) == 0


def test_news_are_kept_for_who_watches_until_they_are_taken():
    kvcache = manager(DENSE, 100)
    kvcache.close(prefill(kvcache, PROMPT[:9]))
    assert kvcache.ledger.news is None and len(kvcache.ledger.inventory()) == 2
    assert kvcache.ledger.take_news() == []
    kvcache.close(prefill(kvcache, PROMPT[:13]))
    assert kvcache.ledger.take_news() == [PrefixNews(kvcache.keys(PROMPT)[2], 12)]
    assert kvcache.ledger.take_news() == []
    kvcache.ledger.give_back(kvcache.ledger.allocate(98))  # evicts a block of the three
    assert kvcache.ledger.take_news() == [PrefixNews(kvcache.keys(PROMPT)[2], 0)]


def test_two_models_never_agree_on_a_key():
    one, other = manager(DENSE, 10, root=b"one"), manager(DENSE, 10, root=b"other")
    assert one.keys(PROMPT) == manager(DENSE, 10, root=b"one").keys(PROMPT)
    assert not set(one.keys(PROMPT)) & set(other.keys(PROMPT))


def test_a_snapshot_that_another_request_is_about_to_begin_from_does_not_give_way_to_the_next():
    """While an answer grows, its newest snapshot takes the place of the one before, unless somebody holds that."""
    kvcache = manager(HYBRID, 400, snapshot_every=1000)
    answer = prefill(kvcache, list(range(8)))
    tokens = decode(kvcache, answer, list(range(8)), [50, 51, 52, 53])
    other_tokens = [*tokens, 60]
    other = kvcache.open(other_tokens)
    assert other.cached_tokens == 12
    tokens = decode(kvcache, answer, tokens, [54, 55, 56, 57])
    assert kvcache.match([*tokens, 1]) == 16 and kvcache.match(other_tokens) == 12
    assert kvcache.reserve(other, 13)
    step(kvcache, other, other_tokens, 13)  # fails if the state is not that of the twelve tokens before
    kvcache.check()
    decode(kvcache, answer, tokens, [58, 59, 60, 61])
    assert kvcache.match([*tokens, 1]) == 12, "that of sixteen tokens gave way: nobody held it"


def test_the_check_recounts_what_requests_own_and_hold():
    kvcache = manager(HYBRID, 800)
    cache = prefill(kvcache, PROMPT)
    kvcache.check()
    taken = kvcache.ledger.allocate(1)
    with pytest.raises(RuntimeError, match="of 800 blocks, 1 leaked"):
        kvcache.check()
    kvcache.ledger.give_back(taken)
    kvcache.ledger.hold(cache.entries[0])
    with pytest.raises(RuntimeError, match="counts 2 holders and has 1"):
        kvcache.check()
    kvcache.ledger.release(cache.entries[0])
    kvcache.check()
