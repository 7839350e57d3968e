"""How much KVCache that arrives slows a decode node down: steps alone, and while streams cross. Chapters 05, 08.

    python scripts/bench.py receiving                      a GPU (a tiny model where there is none, to rehearse)
    python scripts/bench.py receiving --gbps 10 --batch 8

One process sends KVCache of prompts, two at a time, over a link of eight lanes; the other one decodes a batch, and what
arrives is checked and written into its blocks meanwhile. The line's rate is emulated; without one the link goes as
fast as it can. Steps alone are read before and after, and what arrives where nobody decodes: a step is judged only if
beside it most of the line was filled (without a line: most of what arrives where nobody decodes).
"""

import json
import os
import statistics
import time

import torch
from random_checkpoint import SHAPES

from benches import above_zero, at_least_one
from benches.gpu_cases import decoding_engine, random_model
from benches.link import DEADLINE_S, IDENTITY, in_two_processes
from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.errors import ArgumentParser, UserError
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.request_cache import RequestCache
from minprfaas.model.families import config_from_hf
from minprfaas.model.spec import model_state_specs
from minprfaas.observe.tables import table
from minprfaas.transport.events import MessageReceived, StreamDone
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

LIMIT = 0.05  # of a step
MOST = 0.8  # of what should arrive
AT_ONCE = 2  # streams, so that one crosses while the next is agreed on
LANES = 8
WARM_UP = 8
IDLE_S = 1.0  # how long is read what arrives where nobody decodes


def main(argv: list[str]) -> int:
    has_gpu = torch.cuda.is_available()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES),
                        default=["qwen3-0.6b", "hybrid-1b"] if has_gpu else ["tiny-dense"])
    parser.add_argument("--batch", type=at_least_one, default=64)
    parser.add_argument("--context", type=at_least_one, default=1024, help="of a decoding request (1024)")
    parser.add_argument("--tokens", type=at_least_one, default=8192, help="of an arriving prompt (8192)")
    parser.add_argument("--gbps", type=above_zero, nargs="+", default=[10.0], help="emulated lines (10), beside none")
    parser.add_argument("--steps", type=at_least_one, default=60, help="of each reading (60)")
    parser.add_argument("--compile", action="store_true", help="compile the models' pieces first: for minutes")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    args = parser.parse_args(argv)
    args.device = "cuda" if has_gpu else "cpu"
    rates = [*args.gbps, None]
    if args.context <= steps_of(args, rates):
        raise UserError(f"--context {args.context}: {steps_of(args, rates)} steps are read, and begin before it")
    found = in_two_processes(_measure, args, rates, steps=len(args.shapes) * len(rates))
    if args.json:
        print(json.dumps(found))
        return 0
    print(table(["model", "line", "step alone ms", "while receiving ms", "slower by", "received", "idle", "verdict"],
                [[row["shape"], f"{row['gbps']:g} Gbps" if row["gbps"] else "none", f"{row['alone_ms']:.3f}",
                  f"{row['receiving_ms']:.3f}", f"{slower(row):+.1%}", f"{row['received_gbps']:.2f} Gbps",
                  f"{row['idle_gbps']:.2f} Gbps", verdict(row)] for row in found]))
    device = torch.cuda.get_device_name() if has_gpu else "CPU"
    print(f"\nidle: what arrives where nobody decodes. {device}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}: bf16, batch {args.batch} at up to {args.context:,} tokens, prompts of "
          f"{args.tokens:,}, {LANES} lanes, medians of {args.steps} steps. The lines are emulated.")
    return 0


def steps_of(args, rates: list[float | None]) -> int:
    """All steps of a model: for each rate half of a reading before, one beside the streams, half of one after."""
    return WARM_UP + 2 * args.steps * len(rates)


def slower(row: dict) -> float:
    """By which share a step takes longer while KVCache arrives."""
    return row["receiving_ms"] / row["alone_ms"] - 1


def verdict(row: dict) -> str:
    """Whether the goal is met; none where too little arrived to say it."""
    wanted_gbps = row["gbps"] or row["idle_gbps"]
    if row["received_gbps"] < MOST * wanted_gbps:
        return f"not judged: {row['received_gbps'] / wanted_gbps:.0%} of {wanted_gbps:.3g} Gbps arrived"
    return f"{'within' if slower(row) <= LIMIT else 'over'} {LIMIT:.0%}"


def _measure(rank, store, report, args, rates) -> None:
    chunk = 32 * 2**20 if args.device == "cuda" else 2**20
    config = LinkConfig(LANES, chunk, max_inflight_bytes=2 * LANES * chunk)
    for shape in args.shapes:
        node = None
        if rank == 1:
            node = DecodeNode(random_model(SHAPES[shape], args.compile, args.device), args, steps_of(args, rates))
            node.steps(WARM_UP)  # captures the graph of this bucket
        for number, gbps in enumerate(rates):
            line = EmulatedLine(LineConfig(gbps)) if gbps else None
            link = Link(f"{shape}-{number}", store, rank, config, IDENTITY, line)
            link.connect(DEADLINE_S)
            if rank == 0:
                send_until_stopped(link, SHAPES[shape], args)
            else:
                report({"shape": shape, "gbps": gbps, **node.read(link, args.steps)})
            link.close()


def send_until_stopped(link: Link, shape: dict, args) -> None:
    """Rank 0: the stream that each message asks for, out of memory that stands for a pool."""
    layout = plan_layout(model_state_specs(config_from_hf(shape), "bfloat16"), 256)
    memory = None
    while True:
        event = link.receive(DEADLINE_S)
        if not isinstance(event, MessageReceived):
            raise SystemExit(f"the sender met {event}")
        if "id" not in event.message:
            return
        plan = stream_plan(layout, event.message["id"], 0, args.tokens)
        sizes = [entry.row_bytes * (args.tokens if entry.kind is StateKind.TOKEN else 1) for entry in plan.entries]
        if memory is None:
            memory = torch.zeros(max(sizes), dtype=torch.uint8, pin_memory=args.device == "cuda")
        stream = link.open(plan)
        for entry, size in zip(plan.entries, sizes):
            stream.put(entry.layer, 0, args.tokens, memory[:size])
        stream.finish(DEADLINE_S)


class DecodeNode:
    """Rank 1: an engine in the middle of `batch` answers, and blocks for the prompts that arrive."""

    def __init__(self, model, args, steps: int):
        self.args = args
        self.engine: Engine = decoding_engine(model, args.batch, args.context, steps, others=[args.tokens] * AT_ONCE)
        self.caches = [self.engine.kvcache.open([1] * args.tokens) for _ in range(AT_ONCE)]
        for cache in self.caches:
            self.engine.kvcache.reserve(cache, args.tokens)
        self.next_id = 1

    def read(self, link: Link, steps: int) -> dict:
        """Median steps: alone, while streams arrive, alone again."""
        before = self.steps(steps // 2)
        arriving = Arriving(self, link)
        arriving.hear_for(IDLE_S)  # and more than once around: the sender's memory is touched, the link's threads run
        arriving.begin()
        arriving.hear_for(IDLE_S)
        idle_gbps = arriving.gbps
        arriving.begin()
        during = self.steps(steps, arriving.hear)
        received_gbps = arriving.gbps
        arriving.end()
        after = self.steps(steps // 2)
        return {"alone_ms": statistics.median(before + after), "receiving_ms": statistics.median(during),
                "received_gbps": received_gbps, "idle_gbps": idle_gbps}

    def steps(self, count: int, between=lambda: None) -> list[float]:
        """Milliseconds of each of `count` decode steps, with what comes `between` two, as in a node's loop."""
        times = []
        for _ in range(count):
            began_s = time.perf_counter()
            between()
            self.engine.step()
            times.append((time.perf_counter() - began_s) * 1e3)
        return times


class Arriving:
    """Streams that a decode node asks for one after another, `AT_ONCE` of them at a time, until `end`."""

    def __init__(self, node: DecodeNode, link: Link):
        self._node, self._link = node, link
        self._expected: dict[int, tuple[KVReceive, RequestCache]] = {}
        self._ended_bytes = 0
        for cache in node.caches:
            self._ask(cache)
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self._began_bytes, self._began_at_s = self._bytes, time.monotonic()

    @property
    def gbps(self) -> float:
        """What was written into blocks since `begin`."""
        return (self._bytes - self._began_bytes) * 8e-9 / (time.monotonic() - self._began_at_s)

    def hear(self, timeout_s: float = 0.0, again: bool = True) -> None:
        """Take every event that is there; for a stream that has ended, ask for another."""
        while (event := self._link.receive(timeout_s)) is not None:
            if not isinstance(event, StreamDone):
                raise SystemExit(f"the decode node met {event}")
            receive, cache = self._expected.pop(event.stream_id)
            receive.arrived(event.report)
            self._ended_bytes += receive.plan.total_bytes
            if again:
                self._ask(cache)
            timeout_s = 0.0

    def hear_for(self, seconds: float) -> None:
        """Do nothing else."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.hear(left_s)

    def end(self) -> None:
        """Take what is on its way, and tell the sender."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self._expected and time.monotonic() < deadline_s:
            self.hear(0.1, again=False)
        self._link.send_message({"stop": True})

    @property
    def _bytes(self) -> int:
        return self._ended_bytes + sum(receive.received_bytes for receive, _ in self._expected.values())

    def _ask(self, cache: RequestCache) -> None:
        node = self._node
        plan = stream_plan(node.engine.layout, node.next_id, 0, node.args.tokens)
        node.next_id += 1
        receive = KVReceive(node.engine.kvcache, self._link, plan, cache.block_tables)
        self._expected[plan.stream_id] = receive, cache
        self._link.send_message({"id": plan.stream_id})
