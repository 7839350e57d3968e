"""A cached prefix is shipped to the node that will compute; whatever goes wrong, the answer is right. Chapter 11."""

import threading

import pytest
from cluster_support import DEADLINE_S, kill, nothing_in_use, serve, step_until, two_datacenters
from desk import PEER, PROMPT, Desk, expecting, ordered, prefilled, ship
from desk import step_until as tick_until
from test_two_datacenters import GREEDY, prompts_of, reference, tokens

from minprfaas import SamplingParams
from minprfaas.cluster import messages
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import LineConfig, LinkConfig, LinkSample, Role, StateKind
from minprfaas.scheduling.control import LinkMeasured
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.transport.events import StreamDone, StreamFailed

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
@pytest.mark.parametrize("end", ["deadline", "client", "sender"])
def test_a_prefix_that_takes_too_long_or_is_wanted_no_more_is_given_up_on_both_sides(hybrid, direction, end):
    model, tokenizer = hybrid
    link, crawl = LinkConfig(lanes=2, chunk_bytes=1024), LineConfig(gbps=5e-4)
    with two_datacenters(model, tokenizer, THRESHOLD[direction], link, crawl, ship_prefixes=True) as (local, remote):
        direction(local)
        abundant(local)
        receiver = (remote if direction is prefix_only_here else local).prefill
        for part in (local.prefill, local.decode, remote.prefill):
            part.upkeep.prefixes.deadline_s = 10 * DEADLINE_S  # each side must be told
        sender = remote.prefill if direction is prefix_only_there else local.prefill
        if end == "deadline":
            receiver.upkeep.prefixes.deadline_s = 0.05
        elif end == "sender":
            sender.upkeep.prefixes.deadline_s = 0.05
        fetch, begun = receiver.upkeep.prefixes.fetch, threading.Event()

        def noted(*order):
            begun.set()
            return fetch(*order)

        receiver.upkeep.prefixes.fetch = noted
        journey = local.front.submit("last", LONGER, GREEDY)
        step_until(local, begun.is_set)
        assert journey.decision.shipment is not None
        if end == "client":
            local.front.abort("last")
        step_until(local, lambda: not local.front.has_work)
        step_until(local, lambda: not remote.prefill.has_work and nothing_in_use(local))
    assert journey.prefix_bytes == 0 and nothing_in_use(remote)
    if end != "client":
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


# ---- one node alone, word by word


WANTED = PROMPT[:97]  # the prefix is all but its last token: six blocks of 16


def holding(hybrid):
    """A node that has computed the prompt, and has nothing to do."""
    desk = Desk(hybrid, Role.PRFAAS)
    desk.engine.add(desk.engine.request("r", PROMPT, SamplingParams(max_tokens=1)))
    while desk.engine.has_work:
        desk.engine.step()
    return desk, desk.upkeep.prefixes


def test_a_node_that_holds_a_prefix_streams_what_the_other_lacks_and_holds_it_meanwhile(hybrid):
    desk, prefixes = holding(hybrid)
    arrived, plan = [], stream_plan(desk.engine.layout, 9, 32, 96)
    desk.there.expect(plan, lambda layer, start, end, data: arrived.append((layer, start, end)))
    desk.line.room.clear()
    prefixes.order(PEER, messages.PrefixOrder(9, WANTED, 32))
    assert desk.upkeep.has_streams and desk.engine.kvcache.stats().in_use and desk.told() == []
    desk.upkeep.step()
    prefixes.aborted("pd-9", 9)
    prefixes.aborted(PEER, 8)
    assert desk.upkeep.has_streams
    desk.line.room.set()
    done = desk.far.get(timeout=DEADLINE_S)
    tick_until(desk, lambda: not desk.upkeep.has_streams)
    assert isinstance(done, StreamDone) and done.report.bytes == plan.total_bytes
    assert {(start, end) for _, start, end in arrived} == {(32, 96)} and len(arrived) == len(plan.entries)
    assert desk.engine.kvcache.stats().in_use == 0


@pytest.mark.parametrize("end", [
    lambda desk: desk.upkeep.prefixes.aborted(PEER, 9), lambda desk: setattr(desk, "now_s", desk.now_s + 0.1)])
def test_a_prefix_that_is_not_taken_is_let_go_of(hybrid, end):
    desk, prefixes = holding(hybrid)
    desk.there.expect(stream_plan(desk.engine.layout, 9, 0, 96), lambda *_: None)
    desk.line.room.clear()
    prefixes.order(PEER, messages.PrefixOrder(9, WANTED, 0))
    desk.now_s += 60.0
    desk.upkeep.step()
    assert desk.upkeep.has_streams, "it may take a minute"
    end(desk)
    tick_until(desk, lambda: not desk.upkeep.has_streams)
    assert isinstance(desk.far.get(timeout=DEADLINE_S), StreamFailed) and desk.engine.kvcache.stats().in_use == 0


@pytest.mark.parametrize("tokens, start", [(PROMPT[:65] + [7] * 40, 0), ([], 0), ([2**63] * 30, 0), (WANTED, 96),
                                           (WANTED, -1), (PROMPT[:90], 0)])
def test_a_prefix_that_is_not_here_to_its_end_is_refused(hybrid, tokens, start):
    desk, prefixes = holding(hybrid)
    prefixes.order(PEER, messages.PrefixOrder(9, tokens, start))
    assert desk.told() == [messages.PrefixAbort(9)] and not desk.upkeep.has_streams
    assert desk.engine.kvcache.stats().in_use == 0


def fetching(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)
    fetch = desk.upkeep.prefixes.fetch(WANTED, PEER)
    (order,) = desk.told()
    assert order == messages.PrefixOrder(order.stream_id, WANTED, 0) and fetch.nbytes is None
    assert desk.upkeep.prefixes and desk.engine.kvcache.stats().in_use
    return desk, desk.upkeep.prefixes, fetch, order


def test_a_prefix_that_has_come_is_in_the_cache_with_the_state_at_its_end(hybrid):
    desk, prefixes, fetch, order = fetching(hybrid)
    sender, sent = prefilled(hybrid, WANTED[:96])
    stream = desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 96))
    ship(stream, sender, sent.cache.block_tables)
    prefixes.notice(StreamDone(order.stream_id + 100, None))
    assert fetch.nbytes is None, "that was another's"
    prefixes.notice(desk.events.get(timeout=DEADLINE_S))
    assert fetch.nbytes == stream.plan.total_bytes and not prefixes and desk.engine.kvcache.stats().in_use == 0
    assert desk.engine.kvcache.match(WANTED) == 96 and prefixes.fetch(WANTED, PEER) is None, "it is here already"
    prefixes.give_up(fetch)
    assert desk.told() == [] and fetch.nbytes > 0


@pytest.mark.parametrize("end, is_told", [
    (lambda desk, prefixes, fetch: prefixes.give_up(fetch), True),
    (lambda desk, prefixes, fetch: prefixes.aborted(PEER, fetch.arriving.plan.stream_id), True),
    (lambda desk, prefixes, fetch: prefixes.notice(StreamFailed(fetch.arriving.plan.stream_id, "x", 0)), True),
    (lambda desk, prefixes, fetch: prefixes.peer_lost(PEER), True),
    (lambda desk, prefixes, fetch: setattr(desk, "now_s", 1060.1), True)])
def test_a_prefix_that_does_not_come_leaves_nothing_and_its_sender_is_told(hybrid, end, is_told):
    desk, prefixes, fetch, order = fetching(hybrid)
    prefixes.aborted("pd-9", order.stream_id)
    prefixes.peer_lost("pd-9")
    desk.now_s = 1060.0
    prefixes.step()
    assert fetch.nbytes is None
    end(desk, prefixes, fetch)
    prefixes.step()
    assert fetch.nbytes == 0 and not prefixes and desk.engine.kvcache.stats().in_use == 0
    assert desk.told() == [messages.PrefixAbort(order.stream_id)]
    assert desk.engine.kvcache.ledger.common(desk.engine.kvcache.keys(WANTED)) == 0


def test_what_cannot_be_fetched_is_not_asked_for(hybrid):
    desk = Desk(hybrid, Role.PRFAAS, pool=10)
    for tokens, source in ((WANTED * 3, PEER), (PROMPT[:17], "nobody"), ([2**63] * 30, PEER)):
        assert desk.upkeep.prefixes.fetch(tokens, source) is None
    assert desk.told() == [] and not desk.upkeep.prefixes and desk.engine.kvcache.stats().in_use == 0


def test_an_order_with_a_prefix_begins_when_that_is_here_and_fails_when_it_does_not_come(hybrid):
    for comes in (True, False):
        desk = Desk(hybrid, Role.PRFAAS)
        asked = ordered(start=0, snapshot_at=0, prefix_source=PEER, prefix_tokens=96)
        expecting(desk, asked)
        desk.role.hear(PEER, asked)
        (order,) = desk.told()
        assert order == messages.PrefixOrder(order.stream_id, WANTED, 0)
        desk.after(1.0)
        assert desk.told() == [] and not desk.engine.has_work and desk.role.has_work
        if comes:
            sender, sent = prefilled(hybrid, WANTED[:96])
            stream = desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 96))
            ship(stream, sender, sent.cache.block_tables)
            desk.upkeep.prefixes.notice(desk.events.get(timeout=DEADLINE_S))
            done = []
            tick_until(desk, lambda: done.extend(
                one for one in desk.told() if isinstance(one, messages.PrefillDone)) or done)
            assert (done[0].cached_tokens, done[0].prefix_bytes > 0) == (96, True)
        else:
            desk.upkeep.prefixes.aborted(PEER, order.stream_id)
            desk.after(0.0)
            words = [word for word in desk.told() if not isinstance(word, messages.PrefixAbort)]
            assert words == [messages.Failed("a#1", f"the prefix at {PEER} did not come", "no_prefix")]
            assert desk.engine.prefilled_tokens == 0
        desk.role.hear(PEER, messages.Abort("a#1"))
        tick_until(desk, lambda: not desk.role.has_work)
        assert desk.engine.kvcache.stats().in_use == 0


def test_an_order_that_is_dropped_while_its_prefix_is_on_its_way_gives_that_up_too(hybrid):
    desk = Desk(hybrid, Role.PRFAAS)
    desk.role.hear(PEER, ordered(start=0, prefix_source=PEER, prefix_tokens=96))
    (order,) = desk.told()
    desk.role.hear(PEER, messages.Abort("a#1"))
    assert desk.told() == [messages.PrefixAbort(order.stream_id)]
    assert not desk.upkeep.prefixes and desk.engine.kvcache.stats().in_use == 0
