"""The link: goodput at emulated rates, control messages beside bulk, memory, and lanes against raw Gloo. Chapter 07.

    python scripts/bench.py link                  two processes on this machine; GPU memory, too, where there is a GPU
    python scripts/bench.py link --table lanes    only what is not throttled

Every ratio compares readings of one run. Rates are emulated in user space; both ends run on this machine.
"""

import json
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from tqdm import tqdm

from benches import above_zero, at_least_one
from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.errors import ArgumentParser
from minprfaas.transport.base import LayerPlan, StreamPlan
from minprfaas.transport.events import MessageReceived, StreamDone
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.monitor import largest_chunk_bytes

RTT_MS = 20.0
ROW_BYTES = 4096
IDENTITY = LinkIdentity(bytes(32), "none", "none", b"bench")
DEADLINE_S = 120.0


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=above_zero, default=5.0, help="how long each emulated rate is measured (5)")
    parser.add_argument("--table", choices=["rates", "lanes", "both"], default="both")
    parser.add_argument("--lanes", type=at_least_one, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--chunk-mib", type=above_zero, help="size of an unthrottled chunk (without a GPU 4; with one "
                        "as in a live cluster, 4 for each lane and at most 32)")
    parser.add_argument("--mib", type=at_least_one, default=128 * os.cpu_count(), help="MiB a reading (128 a core)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="readings of which the median is shown (3)")
    parser.add_argument("--json", action="store_true", help="print what was measured as one JSON object")
    args = parser.parse_args(argv)
    found, total = {}, args.mib * 2**20
    if args.chunk_mib is None and torch.cuda.is_available():
        chunks = [largest_chunk_bytes(lanes) for lanes in args.lanes]
    else:
        chunks = [int((args.chunk_mib or 4) * 2**20)] * len(args.lanes)
    if args.table != "lanes":
        found["rates"] = measure_rates(args.seconds)
    if args.table != "rates":
        found["lanes"] = measure_lanes(list(zip(args.lanes, chunks)), total, args.repeats)
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, **found}))
        return 0
    if "rates" in found:
        print_rates(found["rates"])
    if "lanes" in found:
        print_lanes(found["lanes"], total)
    return 0


def in_two_processes(work, *arguments, steps: int) -> list:
    """Run `work(rank, store, report, *arguments)` in two processes behind a bar; returns what was reported."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=DEADLINE_S), wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(work, rank, store.port, reports, arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = []
    with tqdm(total=steps, disable=None, leave=False) as bar:
        while any(process.is_alive() for process in processes) or not reports.empty():
            if reports.empty():
                time.sleep(0.05)
                if any(process.exitcode not in (None, 0) for process in processes):
                    for process in processes:
                        process.kill()
                    raise SystemExit("a process of the benchmark failed; its error is above")
            else:
                found.append(reports.get())
                bar.update()
    return found


def _run(work, rank, port, reports, arguments):
    torch.set_num_threads(1)
    work(rank, TCPStore("127.0.0.1", port, None, False), reports.put, *arguments)


# ---- emulated rates

LINES = [LineConfig(gbps, RTT_MS) for gbps in (0.01, 0.1, 1.0)] + [LineConfig()]


def measure_rates(seconds: float) -> list[dict]:
    return in_two_processes(_rates, LINES, seconds, steps=len(LINES))


def print_rates(found: list[dict]) -> None:
    print(f"\nGoodput over 4 lanes (rates and the {RTT_MS:g} ms round trip are emulated; the last row is unthrottled)")
    print(f"{'rate':>10} {'goodput':>12} {'of rate':>8} {'busiest 1 s':>12} {'message p50 / p99':>18} {'bound':>9} "
          f"{'memory, sender / receiver':>26}")
    for line, row in zip(LINES, found):
        rate = line.gbps
        bound = f"{row['bound_ms']:.1f} ms" if rate else "–"
        share = f"{row['gbps'] / rate:8.1%} {row['busiest_gbps'] / rate:12.1%}" if rate else f"{'–':>8} {'–':>12}"
        print(f"{f'{rate * 1e3:g} Mbps' if rate else 'none':>10} {row['gbps'] * 1e3:7.1f} Mbps {share} "
              f"{row['p50_ms']:6.1f} / {row['p99_ms']:6.1f} ms {bound:>9} "
              f"{row['sender_mib']:14.1f} / {row['receiver_mib']:.1f} MiB")
    print("message: a control message beside the stream, one way. bound: one chunk's time on the line + round trip.\n"
          "memory: growth of the process while the stream ran.")


def _rates(rank, store, report, lines, seconds):
    for number, line in enumerate(lines):
        emulated = EmulatedLine(line) if line != LineConfig() else None
        link = Link(f"rate{number}", store, rank, LinkConfig(lanes=4), IDENTITY, emulated)
        link.connect(DEADLINE_S)
        rate = line.gbps * 1e9 / 8 if line.gbps else 100e6
        tokens = int(rate * seconds) // ROW_BYTES
        plan = StreamPlan(1, (LayerPlan(0, 0, StateKind.TOKEN, ROW_BYTES),), 0, tokens)
        row = _send_beside_messages(link, plan, line) if rank == 0 else _receive_and_time(link, plan)
        if rank == 0:
            report(row)
        link.close()


def _send_beside_messages(link: Link, plan: StreamPlan, line: LineConfig) -> dict:
    """Rank 0: one stream as fast as `put` lets it, and a small message every 40 ms all the while."""
    _expect(link, "ready")
    data, stream = torch.zeros(256 * ROW_BYTES, dtype=torch.uint8), link.open(plan)
    done = threading.Event()

    def send():
        for start in range(0, plan.end, 256):
            end = min(start + 256, plan.end)
            stream.put(0, start, end, data[:(end - start) * ROW_BYTES])
        done.report = stream.finish(DEADLINE_S)
        done.set()

    memory = PeakMemory()
    threading.Thread(target=send, daemon=True).start()
    while not done.is_set():
        link.send_message({"kind": "ping", "left_s": time.monotonic()})
        memory.look()
        done.wait(0.04)
    growth = memory.growth_mib
    link.send_message({"kind": "summary"})
    summary = _expect(link, "summary")
    # the first byte needs half a round trip to arrive, and so does the last acknowledgement: not the line's rate
    elapsed = done.report.acked_at_s - done.report.first_put_at_s - line.rtt_ms / 1e3
    chunk = min(link.config.chunk_bytes, line.gbps * 1e9 / 8 * 0.01) if line.gbps else link.config.chunk_bytes
    return {"gbps": plan.total_bytes * 8 / 1e9 / elapsed, "busiest_gbps": summary["busiest_bytes"] * 8 / 1e9,
            "bound_ms": line.rtt_ms + chunk * 8 / line.gbps / 1e6 if line.gbps else None,
            "sender_mib": growth, **summary}


def _receive_and_time(link: Link, plan: StreamPlan) -> None:
    """Rank 1: note when bytes and messages arrive; one chunk that is overwritten stands for the pool."""
    pool, arrivals, delays = torch.zeros(link.config.chunk_bytes, dtype=torch.uint8), [], []
    memory = PeakMemory()

    def sink(layer, start, end, data):
        pool[:data.numel()] = data
        arrivals.append((time.monotonic(), data.numel()))

    link.expect(plan, sink)
    link.send_message({"kind": "ready"})
    while True:
        event = link.receive(DEADLINE_S)
        memory.look()
        if isinstance(event, MessageReceived) and event.message["kind"] == "ping":
            delays.append((time.monotonic() - event.message["left_s"]) * 1e3)  # one host, one clock
        elif isinstance(event, MessageReceived):
            delays.sort()
            link.send_message({"kind": "summary", "busiest_bytes": busiest_second(arrivals),
                               "p50_ms": delays[len(delays) // 2], "p99_ms": delays[int(len(delays) * 0.99)],
                               "receiver_mib": memory.growth_mib})
            return
        elif not isinstance(event, StreamDone):
            raise SystemExit(f"the receiver met {event}")


def busiest_second(arrivals: list[tuple[float, int]]) -> int:
    """The most bytes that arrived within any one second."""
    best = total = first = 0
    for at, nbytes in arrivals:
        total += nbytes
        while arrivals[first][0] <= at - 1.0:
            total -= arrivals[first][1]
            first += 1
        best = max(best, total)
    return best


def _expect(link: Link, kind: str) -> dict:
    event = link.receive(DEADLINE_S)
    while isinstance(event, MessageReceived) and event.message["kind"] != kind:
        event = link.receive(DEADLINE_S)
    if not isinstance(event, MessageReceived):
        raise SystemExit(f"expected {kind}, got {event}")
    return event.message


class PeakMemory:
    """Growth of this process's resident memory since the start, at its highest look."""

    def __init__(self):
        self.start = self.peak = self._resident()

    def look(self) -> None:
        self.peak = max(self.peak, self._resident())

    @property
    def growth_mib(self) -> float:
        return (self.peak - self.start) / 2**20

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- lanes

_stream_ids = count()  # one that is used again is taken for what has come already, and not written


def measure_lanes(cases: list[tuple[int, int]], total: int, repeats: int) -> list[dict]:
    """For each number of lanes, with chunks of so many bytes, the medians of raw Gloo and of the link in GB/s, taken in
    turns."""
    places = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = in_two_processes(_lanes, places, cases, total, repeats, steps=len(cases))
    return [{name: statistics.median(value) if isinstance(value, list) else value for name, value in row.items()}
            for row in rows]


def print_lanes(rows: list[dict], total: int) -> None:
    print(f"\nUnthrottled goodput against lanes: {total / 2**20:g} MiB over loopback, {os.cpu_count()} cores, torch "
          f"{torch.__version__}, medians")
    places = [place for place in ("cpu", "cuda") if place in rows[0]]
    links = "".join(f" {f'link, {place} memory':>24}" for place in places)
    print(f"{'lanes':>6} {'chunks of':>10} {'raw Gloo':>13}{links}")
    for row in rows:
        ours = "".join(f" {row[place]:13.2f} GB/s {row[place] / row['raw']:5.0%}" for place in places)
        print(f"{row['lanes']:>6} {row['chunk_bytes'] / 2**20:6g} MiB {row['raw']:8.2f} GB/s{ours}")
    print("link: with a secret; checked, written by the sink, acknowledged. raw: sent and received, nothing else.\n"
          "Both go through two chunks of memory a lane again and again, touched before the first reading; both ends\n"
          "share a GPU if there is only one.")


def _lanes(rank, store, report, places, cases, total, repeats):
    for lanes, chunk in cases:
        streams = min(lanes, 8)  # so that their sinks write in parallel
        memory = {place: torch.ones(streams, 2 * chunk * lanes // streams, dtype=torch.uint8,
                                    device=place if place == "cpu" else f"cuda:{rank % torch.cuda.device_count()}")
                  for place in places}
        groups = [ProcessGroupGloo(PrefixStore(f"raw{lanes}/{lane}", store), rank, 2, timedelta(seconds=DEADLINE_S))
                  for lane in range(lanes)]
        buffers = [[torch.ones(chunk, dtype=torch.uint8) for _ in range(2)] for _ in groups]
        config = LinkConfig(lanes=lanes, chunk_bytes=chunk, max_inflight_bytes=max(64 * 2**20, 4 * lanes * chunk))
        link = Link(f"lanes{lanes}", store, rank, config, IDENTITY)
        link.connect(DEADLINE_S)
        row = {"lanes": lanes, "chunk_bytes": chunk, "raw": [], **{place: [] for place in places}}
        for number in range(1 + repeats):
            readings = {"raw": _raw_gloo(rank, groups, buffers, total)}
            for place in places:
                readings[place] = _link_goodput(link, rank, memory[place], total)
            if number:  # the first is to warm up
                for name, reading in readings.items():
                    row[name].append(reading)
        link.close()
        if rank == 0:
            report(row)


def _raw_gloo(rank, groups, buffers, total) -> float:
    """Each lane sends its share in messages of one of its two buffers, both posted ahead; GB/s over all lanes."""
    def pump(group, pair):
        posted = []
        for number in range(total // len(groups) // pair[0].numel()):
            if len(posted) == 2:
                posted.pop(0).wait()
            move = group.send if rank == 0 else group.recv
            posted.append(move([pair[number % 2]], 1 - rank, 0))
        for work in posted:
            work.wait()

    groups[0].barrier().wait()
    began = time.monotonic()
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(pump, groups, buffers))
    groups[0].barrier().wait()
    return total / (time.monotonic() - began) / 1e9


def _link_goodput(link, rank, memory, total) -> float:
    """A stream for each row of `memory`; GB/s from the first put to the last acknowledgement."""
    tokens = total // len(memory) // ROW_BYTES
    plans = [StreamPlan(next(_stream_ids), (LayerPlan(0, 0, StateKind.TOKEN, ROW_BYTES),), 0, tokens) for _ in memory]
    return _send_all(link, plans, memory) if rank == 0 else _receive_all(link, plans, memory)


def _send_all(link, plans, memory) -> float:
    _expect(link, "ready")
    step = memory.shape[1] // ROW_BYTES  # tokens that the memory holds

    def send(plan, slab):
        stream = link.open(plan)
        for start in range(0, plan.end, step):
            end = min(start + step, plan.end)
            stream.put(0, start, end, slab[:(end - start) * ROW_BYTES])
        return stream.finish(DEADLINE_S)

    with ThreadPoolExecutor(len(plans)) as pool:
        reports = list(pool.map(send, plans, memory))
    link.send_message({"kind": "done"})
    elapsed = max(report.acked_at_s for report in reports) - min(report.first_put_at_s for report in reports)
    return sum(report.bytes for report in reports) / elapsed / 1e9


def _receive_all(link, plans, memory) -> float:
    rows = memory.shape[1] // ROW_BYTES

    def write_into(slab):
        def sink(layer, start, end, data):
            at = start % rows * ROW_BYTES
            slab[at:at + data.numel()].copy_(data)

        return sink

    for plan, slab in zip(plans, memory):
        link.expect(plan, write_into(slab), slab.device)
    link.send_message({"kind": "ready"})
    while not isinstance(link.receive(DEADLINE_S), MessageReceived):
        pass
    return 0.0
