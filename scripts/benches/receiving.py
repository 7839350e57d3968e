"""How much KVCache that arrives slows a decode node down: steps alone, and while streams cross. Chapters 05, 08.

    python scripts/bench.py receiving                      a GPU (a tiny model where there is none, to rehearse)
    python scripts/bench.py receiving --gbps 10 --batch 8

One process sends KVCache of prompts, two at a time, over a link of eight lanes; the other one decodes a batch, and what
arrives is checked and written into its blocks meanwhile. The line's rate is emulated; without one the link goes as
fast as it can. Steps alone are read before and after.
"""

import argparse
import json
import os
import statistics
import time

import torch
from random_checkpoint import SHAPES

from benches.gpu_cases import decoding_engine, random_model
from benches.link import DEADLINE_S, IDENTITY, in_two_processes
from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.engine.engine import Engine
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.families import config_from_hf
from minprfaas.model.spec import model_state_specs
from minprfaas.observe.report import table
from minprfaas.transport import EmulatedLine, Link, MessageReceived, StreamDone, StreamPlan

LIMIT = 0.05  # of a step: issue 12's goal
AT_ONCE = 2  # streams, so that one crosses while the next is agreed on
LANES = 8
WARM_UP = 8


def main(argv: list[str]) -> int:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python scripts/bench.py receiving", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES),
                        default=["qwen3-0.6b", "hybrid-1b"] if has_gpu else ["tiny-dense"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="of a decoding request (1024)")
    parser.add_argument("--tokens", type=int, default=8192, help="of an arriving prompt (8192)")
    parser.add_argument("--gbps", type=float, nargs="+", default=[10.0, 100.0], help="emulated lines (10 100)")
    parser.add_argument("--steps", type=int, default=150, help="of each reading (150)")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    args = parser.parse_args(argv)
    args.device = "cuda" if has_gpu else "cpu"
    rates = [*args.gbps, None]
    found = in_two_processes(_measure, args, rates, steps=len(args.shapes) * len(rates))
    if args.json:
        print(json.dumps(found))
        return 0
    print(table(["model", "line", "step alone ms", "while receiving ms", "slower by", "received"],
                [[row["shape"], f"{row['gbps']:g} Gbps" if row["gbps"] else "none", f"{row['alone_ms']:.3f}",
                  f"{row['receiving_ms']:.3f}", f"{slower(row):+.1%}", f"{row['received_gbps']:.1f} Gbps"]
                 for row in found]))
    within = [row for row in found if slower(row) <= LIMIT]
    device = torch.cuda.get_device_name() if has_gpu else "CPU"
    print(f"\n{len(within)} of {len(found)} within {LIMIT:.0%}. {device}, {os.cpu_count()} cores, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}: bf16, batch {args.batch} at {args.context:,} tokens, "
          f"prompts of {args.tokens:,}, {LANES} lanes, medians of {args.steps} steps. The lines are emulated.")
    return 0


def slower(row: dict) -> float:
    """By which share a step takes longer while KVCache arrives."""
    return row["receiving_ms"] / row["alone_ms"] - 1


def _measure(rank, store, report, args, rates) -> None:
    chunk = 16 * 2**20 if args.device == "cuda" else 2**20
    config = LinkConfig(LANES, chunk, max_inflight_bytes=4 * LANES * chunk)
    for shape in args.shapes:
        node = None
        if rank == 1:
            node = DecodeNode(random_model(SHAPES[shape], False, args.device), args, readings=2 + len(rates))
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

    def __init__(self, model, args, readings: int):
        self.args, steps = args, 2 * readings * args.steps
        self.engine: Engine = decoding_engine(model, args.batch, args.context, min(steps, args.context - 1),
                                              others=[args.tokens] * AT_ONCE)
        self.caches = [self.engine.kvcache.open([1] * args.tokens) for _ in range(AT_ONCE)]
        for cache in self.caches:
            self.engine.kvcache.reserve(cache, args.tokens)
        self.next_id, self.received_bytes = 1, 0

    def read(self, link: Link, steps: int) -> dict:
        """Median steps: alone, while streams arrive, alone again."""
        before = self.steps(steps // 2)
        expected = {}
        for cache in self.caches:
            self._ask(link, expected, cache)
        began_at_s, self.received_bytes = time.monotonic(), 0
        during = self.steps(steps, lambda: self._hear(link, expected))
        rate_gbps = self.received_bytes * 8e-9 / (time.monotonic() - began_at_s)
        deadline_at_s = time.monotonic() + DEADLINE_S
        while expected and time.monotonic() < deadline_at_s:
            self._hear(link, expected, again=False)
        link.send_message({"stop": True})
        after = self.steps(steps // 2)
        return {"alone_ms": statistics.median(before + after), "receiving_ms": statistics.median(during),
                "received_gbps": rate_gbps}

    def steps(self, count: int, between=lambda: None) -> list[float]:
        """Milliseconds of each of `count` decode steps, with what comes `between` two, as in a node's loop."""
        times = []
        for _ in range(count):
            began_s = time.perf_counter()
            between()
            self.engine.step()
            times.append((time.perf_counter() - began_s) * 1e3)
        return times

    def _ask(self, link: Link, expected: dict, cache) -> None:
        plan: StreamPlan = stream_plan(self.engine.layout, self.next_id, 0, self.args.tokens)
        expected[plan.stream_id] = KVReceive(self.engine.kvcache, link, plan, cache.block_tables), cache
        link.send_message({"id": plan.stream_id})
        self.next_id += 1

    def _hear(self, link: Link, expected: dict, again: bool = True) -> None:
        """Take every event that is there; for a stream that has ended, ask for another."""
        while (event := link.receive(0)) is not None:
            if not isinstance(event, StreamDone):
                raise SystemExit(f"the decode node met {event}")
            receive, cache = expected.pop(event.stream_id)
            self.received_bytes += receive.plan.total_bytes
            if again:
                self._ask(link, expected, cache)
