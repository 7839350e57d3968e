"""A cached prefix is shipped to the node that will compute; whatever goes wrong, the answer is right. Chapter 11."""

import time

import pytest
from cluster_support import DEADLINE_S, serve, two_datacenters
from test_two_datacenters import GREEDY, prompts_of, reference, tokens

from minprfaas.cluster import messages
from minprfaas.cluster.desk import HERE, THERE
from minprfaas.config import LinkConfig, StateKind
from minprfaas.scheduling.monitor import LinkSample

FAMILIES = pytest.mark.parametrize("family", ["kimi_linear", "qwen3"])
PREFIX, CACHED = prompts_of(200)[0], 192  # its full blocks of 16
LONGER = PREFIX + prompts_of(40, seed=9)[0]


def abundant(local):
    """Bandwidth is abundant for the rest of the test, whatever a busy machine's own samples would say."""
    local.desk.monitor.observe(LinkSample(local.engine.clock() + 3600, gbps=1.0, utilization=0.1, queued_bytes=0))


def step_until(local, condition):
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        local.step()


def evict_everything(engine):
    engine.kvcache.ledger.release(engine.kvcache.ledger.allocate(engine.kvcache.config.num_blocks))


def prefix_only_there(local):
    """The prefix was computed across the link, and this side has forgotten it. Returns the first journey."""
    local.desk.router.threshold = 100
    journeys = serve(local, [PREFIX], GREEDY)
    keys = [key.hex() for key in local.engine.kvcache.keys(PREFIX)]
    step_until(local, lambda: local.desk.directory.match(keys).nodes.get(THERE) == CACHED)
    evict_everything(local.engine)
    return journeys


def prefix_only_here(local):
    local.desk.router.threshold = 300
    journeys = serve(local, [PREFIX], GREEDY)
    local.desk.router.threshold = 30
    return journeys


def nothing_in_use(*nodes):
    return all(node.engine.kvcache.stats().in_use == 0 for node in nodes)


@FAMILIES
def test_a_prefix_that_only_the_prefill_node_has_is_fetched_and_only_the_rest_computed_here(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        first = prefix_only_there(local)
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        assert nothing_in_use(local)
        layout = local.engine.layout
    assert journey.route == "pdp" and journey.request.cached_tokens == CACHED and THERE in journey.reason
    assert journey.prefix_bytes == sum(spec.nbytes * (CACHED if spec.kind is StateKind.TOKEN else 1) for spec in layout.specs)
    assert tokens(first + [journey]) == reference(model, tokenizer, [PREFIX, LONGER], GREEDY)
    assert nothing_in_use(remote)


@FAMILIES
def test_a_prefix_that_only_the_local_node_has_is_shipped_before_the_prompt_is_offloaded(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=300, ship_prefixes=True) as (local, remote):
        first = prefix_only_here(local)
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        assert nothing_in_use(local)
    assert journey.route == "prfaas" and journey.fallback is None and HERE in journey.reason
    assert journey.prefix_bytes > 0 and remote.engine.kvcache.stats().hit_tokens == CACHED
    assert tokens(first + [journey]) == reference(model, tokenizer, [PREFIX, LONGER], GREEDY)
    assert nothing_in_use(remote)


@FAMILIES
def test_only_what_the_receiver_lacks_of_a_prefix_crosses(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, _):
        prefix_only_there(local)
        local.desk.router.threshold = 300
        serve(local, [PREFIX[:100]], GREEDY)  # 96 tokens of it are here again
        local.desk.router.threshold = 100
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        layout = local.engine.layout
    assert journey.request.cached_tokens == CACHED
    assert journey.prefix_bytes == sum(spec.nbytes * (CACHED - 96 if spec.kind is StateKind.TOKEN else 1) for spec in layout.specs)
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)


def test_what_a_token_costs_to_compute_is_learned_from_the_prefills_of_each_side(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, _):
        (away,) = serve(local, prompts_of(200), GREEDY)
        assert local.desk.costs.prfaas_s_per_token == local.desk.costs.pdp_s_per_token == away.prefill_s / 200
        (here,) = serve(local, prompts_of(80, seed=2), GREEDY)
        costs, specs = local.desk.costs, local.engine.layout.specs
    assert (costs.prfaas_s_per_token, costs.pdp_s_per_token) == (away.prefill_s / 200, here.prefill_s / 80)
    assert costs.token_bytes == sum(spec.nbytes for spec in specs if spec.kind is StateKind.TOKEN)
    assert costs.state_bytes == sum(spec.nbytes for spec in specs if spec.kind is not StateKind.TOKEN)


def test_without_the_option_or_with_scarce_bandwidth_no_prefix_is_shipped(hybrid):
    model, tokenizer = hybrid
    for option in (False, True):
        with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=option) as (local, _):
            prefix_only_there(local)
            if option:  # a queue of 8 s at this rate
                local.desk.monitor.observe(LinkSample(local.engine.clock() + 3600, 0.001, 1.0, queued_bytes=10**6))
            else:
                abundant(local)
            (journey,) = serve(local, [LONGER], GREEDY)
        assert journey.prefix is None and journey.route == "prfaas"


def test_a_directory_entry_that_turns_out_stale_costs_a_prefill_and_is_forgotten(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        step_until(local, lambda: not local.desk.directory.needs_resync(THERE))
        keys = [key.hex() for key in local.engine.kvcache.keys(PREFIX)]
        local.desk.hear_events(messages.CacheEvents(0, keys[-1:], [CACHED], inventory=True))
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        assert THERE not in local.desk.directory.match(keys).nodes, "the next one is not sent for it again"
        assert nothing_in_use(local)
    assert journey.prefix.source == THERE and journey.prefix_bytes == 0
    assert journey.route == "prfaas", "each side by its own cache: 240 tokens are above the threshold"
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    assert nothing_in_use(remote)


@pytest.mark.parametrize("direction", [prefix_only_there, prefix_only_here])
@FAMILIES
def test_a_link_that_dies_while_a_prefix_is_shipped_costs_a_prefill_here(models, family, direction):
    model, tokenizer = models[family]
    slow = LinkConfig(gbps=5e-4, lanes=2, chunk_bytes=1024, timeout_s=0.5)  # a prefix takes a third of a second
    with two_datacenters(model, tokenizer, threshold=100, link=slow, ship_prefixes=True) as (local, remote):
        direction(local)
        receiver = (remote if direction is prefix_only_here else local).engine.kvcache.pool
        write, written = receiver.write_bytes, []

        def die_at_the_first_bytes(layer, table, start, end, data):
            write(layer, table, start, end, data)
            written.append(layer)
            remote.link._closing = True  # no goodbye, and it does not come back: as a killed process looks from here
            for lane in remote.link._lanes:
                lane.cut()

        receiver.write_bytes = die_at_the_first_bytes
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        assert nothing_in_use(local)
    assert written and journey.prefix is not None and journey.prefix_bytes == 0 and journey.route == "pdp"
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    assert nothing_in_use(remote)


@pytest.mark.parametrize("direction", [prefix_only_there, prefix_only_here])
@pytest.mark.parametrize("end", ["deadline", "client"])
def test_a_prefix_that_takes_too_long_or_is_wanted_no_more_is_given_up_on_both_sides(hybrid, direction, end):
    model, tokenizer = hybrid
    crawl = LinkConfig(gbps=5e-4, lanes=2, chunk_bytes=1024)
    with two_datacenters(model, tokenizer, threshold=100, link=crawl, ship_prefixes=True) as (local, remote):
        direction(local)
        abundant(local)
        remote.prefixes.deadline_s = local.prefixes.deadline_s = 10 * DEADLINE_S  # each side must be told
        if end == "deadline":
            local.prefixes.deadline_s = 0.05
        journey = local.submit(local.engine.request("last", LONGER, GREEDY))
        local._dispatch()  # no more than that: the client is to go away before the other side has answered
        assert journey.prefix is not None and local.prefixes
        if end == "client":
            local.abort("last")
        local.run()
        step_until(local, lambda: not remote.prefixes and not remote.exports)
        assert nothing_in_use(local)
    assert journey.prefix_bytes == 0 and nothing_in_use(remote)
    if end == "deadline":
        assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    else:
        receiver = local if direction is prefix_only_there else remote
        assert receiver.engine.kvcache.match(LONGER) == 0, "it did not go on arriving"


def test_an_offer_that_a_dead_link_never_answers_is_given_up(hybrid):
    model, tokenizer = hybrid
    brief = LinkConfig(lanes=2, timeout_s=0.5)
    with two_datacenters(model, tokenizer, threshold=300, link=brief, ship_prefixes=True) as (local, remote):
        prefix_only_here(local)
        abundant(local)
        local.prefixes.deadline_s = 10 * DEADLINE_S
        remote.link.close()
        journey = local.submit(local.engine.request("last", LONGER, GREEDY))
        step_until(local, lambda: not local.has_work)
        assert nothing_in_use(local)
    assert journey.prefix is not None and journey.prefix_bytes == 0 and journey.route == "pdp"
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)


def test_absurd_messages_about_prefixes_hold_nothing_and_hurt_nobody(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        prefix_only_there(local)
        known, unknown = PREFIX[:CACHED + 1], prompts_of(100, seed=3)[0]
        for message in (messages.PrefixOrder(1, known, CACHED), messages.PrefixOrder(2, known, -1),
                        messages.PrefixOrder(-3, known, 0), messages.PrefixOrder(4, [], 0),
                        messages.PrefixOrder(5, [2**63] * 99, 0), messages.PrefixOffer(-6, unknown),
                        messages.PrefixOffer(7, unknown * 99), messages.PrefixOffer(8, []), messages.PrefixReady(9, 0),
                        messages.PrefixOffer(10, unknown), messages.PrefixOffer(10, unknown),
                        messages.PrefixReady(10, 0)):
            local.link.send_message(messages.encode(message))
        journeys = serve(local, [unknown, LONGER], GREEDY)
        for stream_id in range(12):
            local.link.send_message(messages.encode(messages.PrefixAbort(stream_id)))
    assert tokens(journeys) == reference(model, tokenizer, [unknown, LONGER], GREEDY)
    assert nothing_in_use(remote)
