"""Can the KVCache of a real prefill leave its datacenter? A dense and a hybrid model, over lines of 1, 10, 100 Gbps.

    python scripts/bench.py figure_1                        the embedded model twice, on two cores
    python scripts/bench.py figure_1 --device cuda --models DENSE HYBRID    GPU 0 to GPU 1; both on one, if it is alone

What the paper's figure 1 draws, run: one process prefills and ships each layer while the next one computes, the other
one writes what arrives into its blocks. The lines are emulated; the link under them is real. Chapters 00, 08.
"""

import queue
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benches import above_zero, at_least_one
from benches.link import IDENTITY, in_two_processes
from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.kv_send import KVSend
from minprfaas.cluster.launch import own_device
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import LineConfig, LinkConfig, SamplingParams
from minprfaas.engine.engine import Engine
from minprfaas.engine.reference import pool_for
from minprfaas.errors import ArgumentParser
from minprfaas.kvcache.pool import BlockPool
from minprfaas.model.checkpoint import EMBEDDED, load
from minprfaas.observe.tables import human_bytes, table
from minprfaas.transport.base import KVTransport, StreamPlan
from minprfaas.transport.events import MessageReceived, StreamDone, StreamReport
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

DEADLINE_S = 120.0
RTT_MS = 20.0
NEAR = 1.15  # times the prefill, and a round trip: KVCache that is there by then was bound by prefill
SLOW_S = 4.0  # of a line that takes so long one reading is enough
MOST_OF_A_LINE = 0.7  # a line of which KVCache gets less is not what holds it up


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", metavar="DIR", default=[str(EMBEDDED)])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=at_least_one, nargs="+", default=[8192, 32768])
    parser.add_argument("--gbps", type=above_zero, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--prefill-chunk", type=at_least_one, default=1024)
    parser.add_argument("--repeats", type=at_least_one, default=3, help="readings of which the median is shown (3)")
    args = parser.parse_args(argv)
    steps = len(args.models) * len(args.tokens) * (1 + len(args.gbps))
    found = in_two_processes(_measure, args, steps=steps)
    rows, verdicts = [], []
    for model in args.models:
        for tokens in args.tokens:
            alone, *shipped = [row for row in found if (row["model"], row["tokens"]) == (model, tokens)]
            of = [Path(model).name, tokens, human_bytes(alone["kv_bytes"]), f"{alone['prefill_s']:.3f}",
                  f"{phi_gbps(alone):.3g}"]
            rows += [[*of, f"{gbps:g}", f"{row['transfer_s']:.3f}", f"{row['hidden']:.0%}", f"{row['arrived_s']:.3f}",
                      f"{row['arrived_s'] / alone['prefill_s']:.2f}", binding(alone, row, gbps)]
                     for gbps, row in zip(args.gbps, shipped)]
            verdicts.append(f"  {Path(model).name}, {tokens:,} tokens: {crossing(alone, shipped, args.gbps)}")
    print(table(["model", "tokens", "KVCache", "prefill, s", "Phi_kv, Gbps", "line, Gbps", "transfer, s", "hidden",
                 "TTFT, s", "x prefill", "bound by"], rows))
    print(f"""
  {args.dtype}, {args.device} ({found[0]["device"]}), {args.prefill_chunk} tokens a prefill chunk; medians of
  {args.repeats}. The lines and their round trip of {RTT_MS:g} ms are emulated; the link over them is real, and may
  be slower than its line.
  prefill: nothing shipped; Phi_kv is of that (eq. 1). transfer: from its first byte until the last one is in its block
  in the other process; hidden: the share of it that ran while prefill still did. TTFT: from the beginning of the
  prefill, which draws the first token, until all KVCache is there and it can be told; nobody waits.
""" + "\n".join(verdicts))
    return 0


def phi_gbps(alone: dict) -> float:
    """Phi_kv of a prefill that ships nothing (eq. 1)."""
    return alone["kv_bytes"] * 8e-9 / alone["prefill_s"]


def binding(alone: dict, shipped: dict, gbps: float) -> str:
    """What a prefill's KVCache waits for: "prefill", the "line", or the "link" that is slower than its line."""
    if shipped["arrived_s"] <= NEAR * alone["prefill_s"] + RTT_MS * 1e-3:
        return "prefill"
    carried_gbps = alone["kv_bytes"] * 8e-9 / (shipped["arrived_s"] - RTT_MS * 0.5e-3)
    return "line" if carried_gbps >= MOST_OF_A_LINE * gbps else "link"


def crossing(alone: dict, shipped: list[dict], rates_gbps: list[float]) -> str:
    """At which lines KVCache is bound by the line and where by prefill, in words that follow from the readings."""
    bound = {gbps: binding(alone, row, gbps) for gbps, row in zip(rates_gbps, shipped)}
    words = {"line": "bound by the line", "link": "bound by the link, not its line,", "prefill": "bound by prefill"}
    said = [f"{words[what]} at {', '.join(f'{gbps:g}' for gbps in bound if bound[gbps] == what)} Gbps"
            for what in words if what in bound.values()]
    slow, fast = ([gbps for gbps in bound if bound[gbps] == what] for what in ("line", "prefill"))
    if slow and fast:
        measured = f"between {max(slow):g} and {min(fast):g} Gbps"
    else:
        measured = f"below {min(rates_gbps):g} Gbps" if fast else f"above {max(slow, default=min(rates_gbps)):g} Gbps"
    return f"{'; '.join(said)}. Crosses over {measured}; by eq. 1 at {phi_gbps(alone):.3g}"


def _measure(rank, store, report, args) -> None:
    for model in args.models:
        node = KVNode(model, own_device(args.device, rank), args.dtype, max(args.tokens), args.prefill_chunk)
        for tokens in args.tokens:
            plan = node.plan(1, tokens)
            if rank == 0:  # the first of a length also plans kernels, and takes memory
                alone_s = [node.prefill(plan, None).prefill_s for _ in range(1 + args.repeats)][1:]
                report({"model": model, "tokens": tokens, "kv_bytes": plan.total_bytes, "prefill_s": median(alone_s),
                        "device": _devices(args.device)})
            for gbps in args.gbps:
                row = {"model": model, "tokens": tokens}
                _ship_over_a_line(rank, store, args, node, plan, gbps, row)
                if rank == 0:
                    report(row)
        del node


def _devices(kind: str) -> str:
    if kind == "cpu":
        return "both processes on the same cores"
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    return f"both processes on one {name}" if count == 1 else f"a {name} each"


def _ship_over_a_line(rank, store, args, node: "KVNode", plan: StreamPlan, gbps: float, row: dict) -> None:
    sizes = dict(chunk_bytes=32 * 2**20, max_inflight_bytes=512 * 2**20) if args.device == "cuda" else {}
    link = Link(f"{row['model']} {plan.end} {gbps}", store, rank, LinkConfig(lanes=8, **sizes), IDENTITY,
                EmulatedLine(LineConfig(gbps, RTT_MS)))
    link.connect(DEADLINE_S)
    readings = []
    is_slow = plan.total_bytes * 8e-9 / gbps > SLOW_S
    for number in range(1 if is_slow else 1 + args.repeats):  # the first also pins memory
        numbered = replace(plan, stream_id=plan.stream_id + number)
        if rank == 0:
            shipped, arrived_at_s = node.send_and_compare(numbered, link)
            began_at_s = shipped.report.first_put_at_s
            transfer_s, hidden_s = arrived_at_s - began_at_s, shipped.ended_at_s - began_at_s
            readings.append({"arrived_s": arrived_at_s - shipped.ended_at_s + shipped.prefill_s,
                             "transfer_s": transfer_s, "hidden": max(0.0, min(1.0, hidden_s / transfer_s))})
        else:
            node.receive(numbered, link)
    if rank == 0:
        row.update({name: median(one[name] for one in readings[1:] or readings) for name in readings[0]})
    link.close()


@dataclass(frozen=True)
class Shipped:
    """One prefill, whose state left during it (`report`), or did not (None)."""

    prefill_s: float
    ended_at_s: float
    report: StreamReport | None


class KVNode:
    """Ships what it prefills, or receives what the other one does. Nothing is cached between two prompts."""

    def __init__(self, model_dir: str | None, device: torch.device | str, dtype: str, max_tokens: int,
                 prefill_chunk: int | None):
        model, tokenizer = load(model_dir, getattr(torch, dtype), device)
        cache = replace(pool_for(model, [max_tokens + 1]), prefix_cache=False)
        self.engine = Engine(model, tokenizer, cache, prefill_chunk, max_batch=1)
        self._threads = ThreadPoolExecutor(1)

    def plan(self, stream_id: int, tokens: int) -> StreamPlan:
        """Everything of a prompt of so many tokens."""
        return stream_plan(self.engine.layout, stream_id, 0, tokens)

    def prefill(self, plan: StreamPlan, transport: KVTransport | None, overlap: bool = True) -> Shipped:
        """Prefill a random prompt and ship its state, layer by layer while it is computed, or when all is there."""
        engine, sends = self.engine, []
        request = self._request(plan)
        engine.add(request)

        def ship(request, layer, start, end):
            if not sends:
                sends.append(KVSend(engine.kvcache, transport, plan, request.cache.block_tables, self._threads,
                                    DEADLINE_S, overlap))
            sends[0].ready(layer, end)

        began_s = time.monotonic()
        while engine.has_work:
            engine.step(on_kv=ship if transport is not None else None)
        if engine.model.device.type == "cuda":
            torch.cuda.current_stream(engine.model.device).synchronize()
        ended_s = time.monotonic()
        report = None
        if sends:
            sends[0].finish()
            report = sends[0].outcome.result(DEADLINE_S)
        self._sums = checksums(engine.kvcache.pool, request.cache.block_tables, plan.end)
        engine.release(request)
        return Shipped(ended_s - began_s, ended_s, report)

    def send_and_compare(self, plan: StreamPlan, transport, overlap: bool = True) -> tuple[Shipped, float]:
        """`prefill` for the other end's `receive`; also when the last byte was in its block. SystemExit when what
        arrived is not what left."""
        hear(transport, "ready")
        shipped = self.prefill(plan, transport, overlap)
        arrived = hear(transport, "arrived")
        if arrived["sums"] != self._sums:
            raise SystemExit(f"stream {plan.stream_id}: what arrived is not what was sent")
        return shipped, arrived["at_s"]

    def receive(self, plan: StreamPlan, transport) -> None:
        """The other end of `send_and_compare`."""
        request = self._request(plan)
        if not self.engine.reserve_remote(request):
            raise SystemExit("no room for the prompt")
        tables = request.cache.block_tables
        KVReceive(self.engine.kvcache, transport, plan, tables)
        transport.send_message({"kind": "ready"})
        event = next_event(transport)
        arrived_at_s = time.monotonic()  # of this host, and so of both processes
        if not isinstance(event, StreamDone):
            raise SystemExit(f"the receiver met {event}")
        transport.send_message({"kind": "arrived", "at_s": arrived_at_s,
                                "sums": checksums(self.engine.kvcache.pool, tables, plan.end)})
        self.engine.abort(request)

    def _request(self, plan: StreamPlan):
        prompt = torch.randint(0, self.engine.model.config.vocab_size, (plan.end,)).tolist()
        return self.engine.request(str(plan.stream_id), prompt, SamplingParams(max_tokens=1), prefill_only=True)


def checksums(pool: BlockPool, tables: Sequence[array], tokens: int) -> list[int]:
    """Of each layer's bytes, weighted by their places."""
    sums = []
    for layer, group in enumerate(pool.layout.group_of_layer):
        data = pool.read_bytes(layer, tables[group.index], 0, tokens).reshape(-1)
        weights = torch.arange(len(data), device=data.device) % 251 + 1
        sums.append(int((data * weights).sum()))
    return sums


def next_event(transport, deadline_s: float = DEADLINE_S):
    """What the transport tells next. SystemExit when it tells nothing."""
    try:
        return transport.events.get(timeout=deadline_s)
    except queue.Empty:
        raise SystemExit(f"nothing happened for {deadline_s:g} s") from None


def hear(transport, kind: str) -> dict:
    """The other end's next message, which must be of this kind."""
    event = next_event(transport)
    if not isinstance(event, MessageReceived) or event.message["kind"] != kind:
        raise SystemExit(f"expected {kind}, got {event}")
    return event.message
