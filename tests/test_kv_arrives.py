"""What is kept of a request's KVCache when its stream breaks off, and that a lost row is noticed. Chapters 08, 14."""

import threading

import pytest
import torch
from desk import DEADLINE_S, HERE, PEER, Desk, ordered, prefilled, served, serving, ship, step_until
from kv_oracle import KVOracle
from test_two_datacenters import GREEDY, prompts_of
from world import World

from minprfaas.cluster import messages
from minprfaas.cluster.kv_receive import STALL_S, KVReceive
from minprfaas.cluster.messages import Abort
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import FRONT, CacheConfig, Role, StateKind
from minprfaas.engine.engine import Engine, model_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.transport.loopback import Loopback


@pytest.fixture(autouse=True)
def _turns_are_short(monkeypatch):
    monkeypatch.setattr("minprfaas.cluster.node.IDLE_S", 0.0005)  # many nodes wait by turns here, in one thread


@pytest.mark.parametrize("family", ["kimi_linear", "qwen3"])
def test_rows_that_arrived_before_a_stream_broke_off_need_not_cross_again(models, family):
    with World(*models[family], prfaas=2, pd=1, split=0) as world:
        (journey,) = world.submit(prompts_of(400), GREEDY)
        world.step_until(lambda: 0 < world.part("prfaas-0").engine.prefilled_tokens >= 200)
        sent = world.part("prfaas-0").prefills["0#1"].stream
        decode = world.part("pd-0").servings["0#1"]
        rows = 144 * sum(spec.nbytes for spec in world.part("pd-0").engine.layout.specs if spec.kind is StateKind.TOKEN)
        world.step_until(lambda: decode.kv.received_bytes >= rows)
        arrived_bytes = decode.kv.received_bytes
        assert arrived_bytes < decode.kv.plan.total_bytes and not sent.outcome.done()
        world.kill("prfaas-0")
        world.step_until(lambda: not world.front.has_work)
        world.check([journey])
    assert (journey.attempts, journey.decision.node) == (2, "prfaas-1")
    assert journey.held_tokens >= 144 and journey.held_tokens % 16 == 0, "full blocks of what had arrived"


@pytest.mark.parametrize("family, kind", [("kimi_linear", StateKind.TOKEN), ("kimi_linear", StateKind.REQUEST),
                                          ("mimo_v2_flash", StateKind.WINDOW)])
def test_the_oracle_of_these_tests_notices_one_row_that_differs(models, family, kind):
    engine = Engine(*models[family], CacheConfig(100, 16), prefill_chunk=48)
    oracle = KVOracle(engine.model)
    layer = next(layer for layer, spec in enumerate(engine.layout.specs) if spec.kind is kind)
    oracle.watch(engine.kvcache)
    for damaged in (False, True):
        request = engine.add(engine.request("0", prompts_of(100, seed=int(damaged))[0], GREEDY))
        engine.step(), engine.step(), engine.step()
        table = request.cache.block_tables[engine.layout.group_of_layer[layer].index]
        if damaged:
            row = engine.kvcache.pool.read_bytes(layer, table, 70, 71)
            engine.kvcache.pool.write_bytes(layer, table, 70, 71, row * 0)
        engine.abort(request)
        assert oracle.compared == 1 + damaged and bool(oracle.wrong) == damaged, oracle.wrong
    assert f"layer {layer} ({kind.value})" in oracle.wrong[0]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["kimi_linear", "qwen3"])
def test_what_comes_over_a_link_is_written_while_the_models_stream_is_busy(models, family):
    kvcache = KVCacheManager(model_layout(models[family][0], 16), CacheConfig(40, 16), "cuda", b"")
    cache, transport = kvcache.open([1] * 100), Loopback()
    kvcache.reserve(cache, 100)
    for number in (1, 2):  # the first loads the kernels, for which a device may have to be idle
        plan = stream_plan(kvcache.layout, number, 0, 100)
        receive, stream, sent = KVReceive(kvcache, transport, plan, cache.block_tables), transport.open(plan), {}
        if number == 2:
            torch.cuda._sleep(2**31)  # about a second: a decode step that runs
        step = torch.cuda.current_stream().record_event()
        for entry in plan.entries:
            spec = kvcache.layout.specs[entry.layer]
            size = spec.nbytes * 100 if spec.kind is StateKind.TOKEN else spec.nbytes
            sent[entry.layer] = torch.randint(256, (size,), dtype=torch.uint8)
            stream.put(entry.layer, 0, 100, sent[entry.layer])
        done = transport.events.get(timeout=10)
    assert not step.query(), "the pieces have waited for the step"
    receive.arrived(done.report)
    for layer, data in sent.items():
        table = cache.block_tables[kvcache.layout.group_of_layer[layer].index]
        assert torch.equal(kvcache.pool.read_bytes(layer, table, 0, 100).flatten().cpu(), data)


def test_a_prefill_ends_at_once_when_its_decode_node_gives_it_up_and_at_nobody_elses_word(models):
    with World(*models["qwen3"], prfaas=1, pd=1, split=0) as world:
        world.submit(prompts_of(400), GREEDY)
        prefill = world.part("prfaas-0")
        world.step_until(lambda: "0#1" in prefill.prefills and prefill.engine.prefilled_tokens)
        prefill.hear("pd-7", Abort("0#1"))
        assert "0#1" in prefill.prefills
        world.front.abort("0")
        world.step_until(lambda: "0#1" not in prefill.prefills and not prefill.has_work)
        assert prefill.engine.prefilled_tokens < 400


def test_a_copy_within_a_node_that_stands_still_holds_up_its_own_request_only(hybrid):
    desk, may_go_on, written = Desk(hybrid, Role.PDP), threading.Event(), []
    plan = stream_plan(desk.engine.layout, 7, 16, 100)
    desk.mail.transport(HERE).expect(plan, lambda *_: written.append(may_go_on.wait(DEADLINE_S)))
    desk.role.hear(HERE, ordered(snapshot_at=0))
    step_until(desk, lambda: any(isinstance(word, messages.PrefillDone) for word in desk.said()))
    assert written == [], "the node was held up until the copy went on"
    may_go_on.set()
    step_until(desk, lambda: not desk.role.has_work)
    assert all(written) and desk.engine.kvcache.stats().in_use == 0


def test_kvcache_of_which_nothing_arrives_is_awaited_so_long_after_its_prefill_and_then_made_elsewhere(hybrid):
    """Whoever stands still with a piece of it: the request need not wait for its deadline."""
    desk, order = served(hybrid, deadline_s=1e6)
    sender, sent = prefilled(hybrid)
    desk.after(STALL_S + 1)
    desk.role.hear(PEER, messages.PrefillDone("a#1", sent.token_ids[-1], 0, 2.0, 0, False))
    desk.after(STALL_S + 1)
    stream = desk.there.open(stream_plan(desk.engine.layout, order.stream_id, 0, 100))
    ship(stream, sender, sent.cache.block_tables, stream.plan.entries[:1])
    desk.after(STALL_S + 1)
    desk.after(STALL_S - 1)
    assert not any(isinstance(word, messages.Failed) for word in desk.said()) and desk.told() == []
    desk.after(2.0)
    assert desk.said()[-1] == messages.Failed("a#1", "no KVCache arrived for 60 s", "lost")
    assert desk.told() == [messages.Abort("a#1")] and desk.is_empty


def test_a_line_that_is_lost_between_a_requests_two_streams_leaves_no_block_behind(hybrid):
    desk = Desk(hybrid, Role.PDD)
    expect = desk.line.expect

    def expect_and_be_cut(*plan):
        expect(*plan)
        desk.line.lose("it was cut")

    desk.line.expect = expect_and_be_cut  # the rows' stream is expected, the snapshot's cannot be
    desk.role.hear(FRONT, serving())
    desk.after(0.0)
    assert desk.said() == [messages.Failed("a#1", "line line is cut", "lost")]
    assert desk.is_empty
