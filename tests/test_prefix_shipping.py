"""A cached prefix is shipped to the node that will compute; whatever goes wrong, the answer is right. Chapter 11."""

import pytest
from cluster_support import DEADLINE_S, kill, nothing_in_use, serve, step_until, two_datacenters
from test_two_datacenters import GREEDY, prompts_of, reference, tokens

from minprfaas.cluster import messages
from minprfaas.config import LineConfig, LinkConfig, LinkSample, StateKind
from minprfaas.scheduling.control import LinkMeasured
from minprfaas.scheduling.directory import CacheChanged

FAMILIES = pytest.mark.parametrize("family", ["kimi_linear", "qwen3"])
THERE, HERE = "prfaas-0", "pd-0/pdp"
PREFIX, CACHED = prompts_of(200)[0], 192  # its full blocks of 16
LONGER = PREFIX + prompts_of(40, seed=9)[0]


def measure(local, gbps, utilization, queued_bytes):
    """This is how the line is for the rest of the test, whatever a busy machine's own samples would say."""
    sample, later_s = LinkSample(0.0, gbps, utilization, queued_bytes), local.decode.engine.clock() + 3600
    local.front.plane.hear(LinkMeasured(THERE, sample), later_s)
    local.front.plane.hear(LinkMeasured(HERE, sample, ingress=True), later_s)


def abundant(local):
    measure(local, gbps=1.0, utilization=0.1, queued_bytes=0)


def evict_everything(engine):
    engine.kvcache.ledger.give_back(engine.kvcache.ledger.allocate(engine.kvcache.config.num_blocks))


def keys_of(local, prompt):
    return [key.hex() for key in local.decode.engine.kvcache.keys(prompt)]


def held_by(local, prompt):
    """Tokens of the prompt that the directory knows on each node."""
    return local.front.plane.directory.match(keys_of(local, prompt))


def prefix_only_there(local):
    """The prefix was computed across the link, and this side has forgotten it. Returns the first journey."""
    journeys = serve(local, [PREFIX], GREEDY)
    assert journeys[0].route == "prfaas"
    evict_everything(local.decode.engine)
    step_until(local, lambda: held_by(local, PREFIX) == {THERE: CACHED})
    return journeys


def prefix_only_here(local):
    """The prefix was computed on this side, in steps that are each too short to be offloaded."""
    journeys = [serve(local, [PREFIX[:length]], GREEDY)[0] for length in (45, 77, 109, 141, 173, 200)]
    assert {journey.route for journey in journeys} == {"pdp"}
    evict_everything(local.decode.engine)
    step_until(local, lambda: held_by(local, PREFIX) == {HERE: CACHED})
    return journeys[-1:]


THRESHOLD = {prefix_only_there: 100, prefix_only_here: 45}
DIRECTIONS = pytest.mark.parametrize("direction", [prefix_only_there, prefix_only_here])


@FAMILIES
def test_a_prefix_that_only_the_prefill_node_has_is_fetched_and_only_the_rest_computed_here(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        first = prefix_only_there(local)
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        step_until(local, lambda: nothing_in_use(local))
        layout = local.decode.engine.layout
    assert journey.route == "pdp" and journey.cached_tokens == CACHED and THERE in journey.reason
    assert journey.prefix_bytes == sum(
        spec.nbytes * (CACHED if spec.kind is StateKind.TOKEN else 1) for spec in layout.specs)
    assert tokens(first + [journey]) == reference(model, tokenizer, [PREFIX, LONGER], GREEDY)
    assert nothing_in_use(remote)


@FAMILIES
def test_a_prefix_that_only_the_local_node_has_is_shipped_before_the_prompt_is_offloaded(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=45, ship_prefixes=True) as (local, remote):
        first = prefix_only_here(local)
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        step_until(local, lambda: nothing_in_use(local))
    assert journey.route == "prfaas" and journey.fallback is None and HERE in journey.reason
    assert journey.prefix_bytes > 0 and journey.cached_tokens == CACHED
    assert tokens(first + [journey]) == reference(model, tokenizer, [PREFIX, LONGER], GREEDY)
    assert nothing_in_use(remote)


@FAMILIES
def test_only_what_the_receiver_lacks_of_a_prefix_crosses(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, _):
        prefix_only_there(local)
        serve(local, [PREFIX[:100]], GREEDY)  # 96 tokens of it are here again
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        layout = local.decode.engine.layout
    assert journey.cached_tokens == CACHED
    assert journey.prefix_bytes == sum(
        spec.nbytes * (CACHED - 96 if spec.kind is StateKind.TOKEN else 1) for spec in layout.specs)
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)


@FAMILIES
def test_inside_the_pd_cluster_a_prefix_goes_to_where_it_is_continued_without_being_asked_for(models, family):
    model, tokenizer = models[family]
    with two_datacenters(model, tokenizer, threshold=100) as (local, _):
        (first,) = serve(local, [PREFIX], GREEDY)
        turn = first.token_ids + prompts_of(40, seed=9)[0]
        (journey,) = serve(local, [turn], GREEDY)
    assert (first.route, journey.route) == ("prfaas", "pdp"), "PD-D holds the first turn, so only 44 tokens are new"
    assert journey.decision.shipment.source == "pd-0/pdd" and journey.cached_tokens == 208
    assert tokens([first, journey]) == reference(model, tokenizer, [PREFIX, turn], GREEDY)


def test_without_the_option_or_with_scarce_bandwidth_no_prefix_is_shipped(hybrid):
    model, tokenizer = hybrid
    for option in (False, True):
        with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=option) as (local, _):
            prefix_only_there(local)
            if option:
                measure(local, gbps=0.001, utilization=1.0, queued_bytes=10**6)  # a queue of 8 s at this rate
            else:
                abundant(local)
            (journey,) = serve(local, [LONGER], GREEDY)
        assert journey.decision.shipment is None and journey.route == "prfaas"


def test_a_directory_entry_that_turns_out_stale_costs_a_prefill_and_is_forgotten(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        serve(local, prompts_of(150, seed=4), GREEDY)  # by then its inventory has come
        stale = CacheChanged(THERE, 0, [(keys_of(local, PREFIX)[-1], CACHED)], inventory=True)
        local.front.plane.hear(stale, local.decode.engine.clock())
        abundant(local)
        journey = local.front.submit("stale", LONGER, GREEDY)
        local.front.step()
        assert journey.decision.shipment.source == THERE and journey.route == "pdp"
        step_until(local, lambda: not local.front.has_work)
        assert THERE not in held_by(local, PREFIX), "the next one is not sent for it again"
        step_until(local, lambda: nothing_in_use(local))
    assert journey.prefix_bytes == 0 and journey.fallback is None
    assert journey.route == "prfaas", "each side by its own cache: 240 tokens are above the threshold"
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    assert nothing_in_use(remote)


@DIRECTIONS
@FAMILIES
def test_a_link_that_dies_while_a_prefix_is_shipped_costs_a_prefill_here(models, family, direction):
    model, tokenizer = models[family]
    link, slow = LinkConfig(lanes=2, chunk_bytes=1024, timeout_s=0.5), LineConfig(gbps=5e-4)  # a third of a second
    with two_datacenters(model, tokenizer, THRESHOLD[direction], link, slow, ship_prefixes=True) as (local, remote):
        direction(local)
        receiver = (remote if direction is prefix_only_here else local).prefill.engine.kvcache.pool
        write, written = receiver.write_bytes, []

        def die_at_the_first_bytes(layer, table, start, end, data):
            write(layer, table, start, end, data)
            written.append(layer)
            kill(remote.node.mail.links["front"])

        receiver.write_bytes = die_at_the_first_bytes
        abundant(local)
        (journey,) = serve(local, [LONGER], GREEDY)
        step_until(local, lambda: nothing_in_use(local))
    assert written and journey.prefix_bytes == 0 and journey.route == "pdp"
    assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    assert nothing_in_use(remote)


@DIRECTIONS
@pytest.mark.parametrize("end", ["deadline", "client"])
def test_a_prefix_that_takes_too_long_or_is_wanted_no_more_is_given_up_on_both_sides(hybrid, direction, end):
    model, tokenizer = hybrid
    link, crawl = LinkConfig(lanes=2, chunk_bytes=1024), LineConfig(gbps=5e-4)
    with two_datacenters(model, tokenizer, THRESHOLD[direction], link, crawl, ship_prefixes=True) as (local, remote):
        direction(local)
        abundant(local)
        receiver = (remote if direction is prefix_only_here else local).prefill
        for part in (local.prefill, local.decode, remote.prefill):
            part.upkeep.prefixes.deadline_s = 10 * DEADLINE_S  # each side must be told
        if end == "deadline":
            receiver.upkeep.prefixes.deadline_s = 0.05
        journey = local.front.submit("last", LONGER, GREEDY)
        step_until(local, lambda: receiver.upkeep.prefixes)
        assert journey.decision.shipment is not None
        if end == "client":
            local.front.abort("last")
        step_until(local, lambda: not local.front.has_work)
        step_until(local, lambda: not remote.prefill.has_work and nothing_in_use(local))
    assert journey.prefix_bytes == 0 and nothing_in_use(remote)
    if end == "deadline":
        assert tokens([journey]) == reference(model, tokenizer, [LONGER], GREEDY)
    else:
        assert receiver.engine.kvcache.match(LONGER) == 0, "it did not go on arriving"


def test_absurd_messages_about_prefixes_hold_nothing_and_hurt_nobody(hybrid):
    model, tokenizer = hybrid
    with two_datacenters(model, tokenizer, threshold=100, ship_prefixes=True) as (local, remote):
        prefix_only_there(local)
        known, unknown = PREFIX[:CACHED + 1], prompts_of(100, seed=3)[0]
        for message in (messages.PrefixOrder(1, known, CACHED), messages.PrefixOrder(2, known, -1),
                        messages.PrefixOrder(-3, known, 0), messages.PrefixOrder(4, [], 0),
                        messages.PrefixOrder(5, [2**63 - 1] * 99, 0), messages.PrefixOrder(6, unknown, 0),
                        messages.PrefixOrder(7, unknown * 99, 0), messages.PrefixOrder(8, known, 0),
                        messages.PrefixOrder(8, known, 0)):
            local.node.mail.send(HERE, THERE, message)
        journeys = serve(local, [unknown, LONGER], GREEDY)
        for stream_id in range(12):
            local.node.mail.send(HERE, THERE, messages.PrefixAbort(stream_id))
        step_until(local, lambda: not remote.prefill.has_work)
    assert tokens(journeys) == reference(model, tokenizer, [unknown, LONGER], GREEDY)
    assert nothing_in_use(remote)
