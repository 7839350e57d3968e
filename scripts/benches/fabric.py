"""The fabric: its speed beside raw send and receive, what it costs a prefill, and how it survives its peer. Chapter 09.

    python scripts/bench.py fabric                              two processes on this machine, Gloo
    python scripts/bench.py fabric --device cuda --model DIR    GPU 0 to GPU 1, NCCL

Every ratio compares medians of readings that took turns in one run.
"""

import itertools
import time
from dataclasses import replace
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benches import at_least_one
from benches.figure_1 import KVNode, hear, next_event
from benches.link import IDENTITY, in_two_processes
from minprfaas.config import LinkConfig, StateKind
from minprfaas.engine.fast_runner import chunk_for
from minprfaas.errors import ArgumentParser
from minprfaas.observe.tables import table
from minprfaas.transport.base import LayerPlan, StreamAborted, StreamPlan
from minprfaas.transport.events import LinkRestored, StreamDone, StreamFailed
from minprfaas.transport.fabric import Fabric

DEADLINE_S = 60.0
OPERATION_DEADLINE_S = 2.0  # of a fabric whose peer is killed
SILENCE_S = 2.0
ROW_BYTES = 4096
LAYERS = 8  # of the stream whose peer is killed


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--table", choices=["speed", "prefill", "failures"], nargs="+",
                        default=["speed", "prefill", "failures"])
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=at_least_one, default=8192, help="of the prompt (8192)")
    parser.add_argument("--prefill-chunk", type=at_least_one, help="tokens of a prefill chunk (what the engine takes "
                        "here)")
    parser.add_argument("--batch-mib", type=at_least_one, help="of a fabric's batch (what it takes by itself)")
    parser.add_argument("--mib", type=at_least_one, nargs="+", default=[16, 256, 1024], help="raw sizes (16 256 1024)")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    args = parser.parse_args(argv)
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda needs two GPUs; there are {torch.cuda.device_count()}")
    if "speed" in args.table:
        print_speed(args)
    if "prefill" in args.table:
        print_prefill(args)
    if "failures" in args.table:
        print_failures(args)
    return 0


def new_fabric(store, rank: int, device: str, name: str, batch_mib: int | None = None) -> Fabric:
    """A connected one; its peer is the other process."""
    where = f"cuda:{rank}" if device == "cuda" else "cpu"
    fabric = Fabric(name, store, rank, LinkConfig(silence_s=SILENCE_S), IDENTITY, where,
                    deadline_s=OPERATION_DEADLINE_S, batch_bytes=batch_mib and batch_mib * 2**20)
    fabric.connect(DEADLINE_S)
    wait_until(lambda: fabric.epoch > 0)
    return fabric


def close_together(fabric: Fabric, rank: int) -> None:
    """Not before the sending side, rank 0, has heard that all is written."""
    if rank == 0:
        fabric.send_message({"kind": "over"})
    else:
        hear(fabric, "over")
    fabric.close()


def wait_until(reached) -> None:
    """SystemExit when it is not within DEADLINE_S."""
    until_s = time.monotonic() + DEADLINE_S
    while not reached():
        if time.monotonic() > until_s:
            raise SystemExit(f"not reached within {DEADLINE_S:g} s")
        time.sleep(0.005)


# ---- speed

def print_speed(args) -> None:
    found = in_two_processes(_speed, args, steps=2 * len(args.mib) + 2)
    rows = [[row["what"], f"{row['nbytes'] / 2**20:.0f} MiB", f"{row['raw']:.2f} GB/s", f"{row['fabric']:.2f} GB/s",
             f"{row['fabric'] / row['raw']:.0%}"] for row in found]
    raw = "NCCL" if args.device == "cuda" else "Gloo"
    print(f"\nThe fabric beside raw {raw} send and receive, {args.device}, median of {args.repeats}")
    print(table(["what crosses", "size", f"raw {raw}", "fabric", "fabric / raw"], rows))
    print("  raw: one operation of that size after the other. fabric: until the last byte is digested, compared, "
          "written and\n  acknowledged; bytes from the first put on, KV from when all of it is there and its sending "
          "thread is told.\n  KV is read from one pool and written into another's.")


def _speed(rank, store, report, args) -> None:
    fabric, raw = new_fabric(store, rank, args.device, "speed", args.batch_mib), RawPair(store, rank, args.device)
    ids = itertools.count(1)  # what is done is taken for sent again if its number comes once more
    for mib in args.mib:
        plan = StreamPlan(0, (LayerPlan(0, 0, StateKind.TOKEN, ROW_BYTES),), 0, mib * 2**20 // ROW_BYTES)
        memory = torch.zeros(plan.end, ROW_BYTES, dtype=torch.uint8, device=fabric.device)
        move = _put_whole if rank == 0 else _take_whole
        readings = [(raw.gb_per_s(plan.total_bytes), move(fabric, replace(plan, stream_id=next(ids)), memory))
                    for _ in range(args.repeats + 1)]
        _report(report, rank, "bytes", plan.total_bytes, readings)
    node = KVNode(args.model, str(fabric.device), args.dtype, args.tokens, args.prefill_chunk)
    readings = []
    for _ in range(args.repeats + 1):
        plan = node.plan(next(ids), args.tokens)
        raw_gb_per_s, gb_per_s = raw.gb_per_s(plan.total_bytes), 0.0
        if rank == 0:
            shipped, _ = node.send_and_compare(plan, fabric, overlap=False)
            gb_per_s = plan.total_bytes / (shipped.report.acked_at_s - shipped.ended_at_s) / 1e9
        else:
            node.receive(plan, fabric)
        readings.append((raw_gb_per_s, gb_per_s))
    _report(report, rank, f"KV of {args.tokens:,} tokens", plan.total_bytes, readings)
    close_together(fabric, rank)
    raw.close()


def _report(report, rank, what, nbytes, readings) -> None:
    if rank == 0:  # the first reading warms up
        raw, fabric = (median(values) for values in zip(*readings[1:]))
        report({"what": what, "nbytes": nbytes, "raw": raw, "fabric": fabric})


def _put_whole(fabric: Fabric, plan: StreamPlan, memory: torch.Tensor) -> float:
    hear(fabric, "ready")
    stream = fabric.open(plan)
    stream.put(0, 0, plan.end, memory.view(-1))
    report = stream.finish(DEADLINE_S)
    return plan.total_bytes / (report.acked_at_s - report.first_put_at_s) / 1e9


def _take_whole(fabric: Fabric, plan: StreamPlan, memory: torch.Tensor) -> float:
    def sink(layer, start, end, data):
        memory[start:end].copy_(data.view(end - start, ROW_BYTES))

    fabric.expect(plan, sink)
    fabric.send_message({"kind": "ready"})
    event = next_event(fabric)
    if not isinstance(event, StreamDone):
        raise SystemExit(f"the receiver met {event}")
    return 0.0


class RawPair:
    """A process group of two and nothing else."""

    def __init__(self, store, rank: int, device: str):
        self._rank, self._device = rank, torch.device(device, rank if device == "cuda" else None)
        if device == "cuda":
            self._group = dist.ProcessGroupNCCL(dist.PrefixStore("raw", store), rank, 2,
                                                dist.ProcessGroupNCCL.Options())
            self._group.eager_connect_single_device(self._device)
        else:
            self._group = dist.ProcessGroupGloo(dist.PrefixStore("raw", store), rank, 2, timedelta(seconds=DEADLINE_S))

    def gb_per_s(self, nbytes: int, times: int = 4) -> float:
        """From rank 0 to rank 1, `times` operations one after the other."""
        data = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        self._move(data[:1])  # both are here
        began_s = time.monotonic()
        for _ in range(times):
            self._move(data)
        return times * nbytes / (time.monotonic() - began_s) / 1e9

    def close(self) -> None:
        """Before the process ends: NCCL's threads must not outlive it."""
        if self._device.type == "cuda":
            self._group.abort()

    def _move(self, data: torch.Tensor) -> None:
        move = self._group.send if self._rank == 0 else self._group.recv
        move([data], 1 - self._rank, 0).wait()
        if data.is_cuda:
            torch.cuda.synchronize(self._device)


# ---- a prefill that streams

def print_prefill(args) -> None:
    (row,) = in_two_processes(_prefill, args, steps=1)
    print(f"\nA prefill of {args.tokens:,} tokens whose KVCache leaves meanwhile, {args.device}, {args.dtype}, "
          f"{chunk_for(torch.device(args.device), args.prefill_chunk):,} tokens a chunk, median of {args.repeats}")
    print(table(["prefill alone", "prefill while streaming", "slowed by", "left after its end"],
                [[f"{row['alone_s']:.4f} s", f"{row['streaming_s']:.4f} s", f"{row['ratio'] - 1:.1%}",
                  f"{row['tail_s'] * 1e3:.1f} ms"]]))
    print("  slowed by: median over pairs. left after its end: until the last byte was in the other side's blocks.")


def _prefill(rank, store, report, args) -> None:
    fabric = new_fabric(store, rank, args.device, "prefill", args.batch_mib)
    node = KVNode(args.model, str(fabric.device), args.dtype, args.tokens, args.prefill_chunk)
    pairs = []
    for number in range(args.repeats + 1):
        plan = node.plan(number, args.tokens)
        if rank == 1:
            node.receive(plan, fabric)
            continue
        alone = node.prefill(plan, None)
        streaming, arrived_at_s = node.send_and_compare(plan, fabric)
        pairs.append((alone.prefill_s, streaming.prefill_s, streaming.prefill_s / alone.prefill_s,
                      arrived_at_s - streaming.ended_at_s))
    if rank == 0:
        alone_s, streaming_s, ratio, tail_s = (median(values) for values in zip(*pairs[1:]))
        report({"alone_s": alone_s, "streaming_s": streaming_s, "ratio": ratio, "tail_s": tail_s})
    close_together(fabric, rank)


# ---- a peer that is killed in the middle of a transfer

def print_failures(args) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=DEADLINE_S), wait_for_workers=False)
    context = multiprocessing.get_context("spawn")

    def start():
        process = context.Process(target=_peer, args=(store.port, args.device), daemon=True)
        process.start()
        return process

    peer = start()
    survivor = Survivor(new_fabric(store, 0, args.device, "failures"))
    rows = []
    for victim, survive in (("sender (PD-P)", survivor.while_receiving), ("receiver (PD-D)", survivor.while_sending)):
        epoch = survivor.fabric.epoch
        noticed_s = survive(peer.kill)
        began_s = time.monotonic()
        peer = start()
        survivor.meet_again(epoch)
        rows.append([victim, f"{noticed_s:.2f} s", f"{time.monotonic() - began_s:.1f} s",
                     f"{epoch} → {survivor.fabric.epoch}", survivor.exchange()])
    peer.kill()
    survivor.fabric.close()
    print(f"\nA peer killed in the middle of a transfer, {args.device}; stated deadline: {OPERATION_DEADLINE_S:g} s "
          f"for an operation, {SILENCE_S:g} s for silence")
    print(table(["killed", "survivor goes on after", "successor met after", "epoch", "a stream then"], rows))
    print("  Every row that a broken stream reported as arrived was compared with what had been sent. met after: with "
          "the\n  start of its process, and loading PyTorch.")


def _plan(stream_id: int, tokens: int) -> StreamPlan:
    layers = tuple(LayerPlan(layer, 0, StateKind.TOKEN, ROW_BYTES) for layer in range(LAYERS))
    return StreamPlan(stream_id, layers, 0, tokens)


def _rows(layer: int, start: int, end: int, device: torch.device) -> torch.Tensor:
    """Bytes that are known on both sides, `[end - start, ROW_BYTES]`."""
    places = torch.arange(start, end, device=device)[:, None] * 7 + torch.arange(ROW_BYTES, device=device) * 3 + layer
    return (places % 251).to(torch.uint8)


def _send(fabric: Fabric, stream_id: int, tokens: int, step: int) -> None:
    stream = fabric.open(_plan(stream_id, tokens))
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        for layer in range(LAYERS):
            stream.put(layer, start, end, _rows(layer, start, end, fabric.device).view(-1))
    stream.finish(DEADLINE_S)


def _peer(port: int, device: str) -> None:
    """The process that is killed: takes or sends the stream that it is told to."""
    torch.set_num_threads(1)
    fabric = new_fabric(dist.TCPStore("127.0.0.1", port, None, False), 1, device, "failures")
    while True:
        order = hear(fabric, "order")
        if order["sends"]:
            _send(fabric, order["stream"], order["tokens"], order["step"])
        else:
            fabric.expect(_plan(order["stream"], order["tokens"]), lambda *piece: None)
            fabric.send_message({"kind": "ready"})
            next_event(fabric)


class Survivor:
    """This process, whose peer is killed again and again."""

    def __init__(self, fabric: Fabric):
        self.fabric, self._streams = fabric, 0
        self._step = 4096 if fabric.device.type == "cuda" else 256
        self._written = 0

    def while_receiving(self, kill) -> float:
        """The peer sends without an end and is killed; returns after how many seconds its stream has failed."""
        tokens = 2**20
        received = torch.zeros(LAYERS, 64 * self._step, ROW_BYTES, dtype=torch.uint8, device=self.fabric.device)
        self._expect(tokens, received)
        self._order(sends=True, tokens=tokens)
        wait_until(lambda: self._written >= 4 * LAYERS)
        kill()
        killed_s = time.monotonic()
        event = next_event(self.fabric)
        noticed_s = time.monotonic() - killed_s
        if not isinstance(event, StreamFailed):
            raise SystemExit(f"the survivor met {event}")
        end = min(event.arrived_end, received.shape[1])
        for layer in range(LAYERS):
            if not torch.equal(received[layer, :end], _rows(layer, 0, end, self.fabric.device)):
                raise SystemExit(f"layer {layer} of a stream that was broken off holds other bytes than were sent")
        return noticed_s

    def while_sending(self, kill) -> float:
        """The peer takes a stream without an end and is killed; returns after how many seconds `put` has raised."""
        self._streams += 1
        self._order(sends=False, tokens=2**20)
        hear(self.fabric, "ready")
        stream, killed_s = self.fabric.open(_plan(self._streams, 2**20)), None
        try:
            for start in range(0, 2**20, self._step):
                if killed_s is None and start >= 8 * self._step:
                    kill()
                    killed_s = time.monotonic()
                for layer in range(LAYERS):
                    data = _rows(layer, start, start + self._step, self.fabric.device)
                    stream.put(layer, start, start + self._step, data.view(-1))
        except StreamAborted:
            return time.monotonic() - killed_s
        raise SystemExit("a stream to a dead peer did not end")

    def meet_again(self, epoch: int) -> None:
        """Wait for the successor."""
        event = next_event(self.fabric, DEADLINE_S)
        if not isinstance(event, LinkRestored):
            raise SystemExit(f"the survivor met {event}")
        wait_until(lambda: self.fabric.epoch > epoch)

    def exchange(self) -> str:
        """A stream from the successor, as it should be."""
        tokens = 4 * self._step
        received = torch.zeros(LAYERS, tokens, ROW_BYTES, dtype=torch.uint8, device=self.fabric.device)
        self._expect(tokens, received)
        self._order(sends=True, tokens=tokens)
        event = next_event(self.fabric, DEADLINE_S)
        sent = torch.stack([_rows(layer, 0, tokens, self.fabric.device) for layer in range(LAYERS)])
        return "identical" if isinstance(event, StreamDone) and torch.equal(received, sent) else f"wrong: {event}"

    def _expect(self, tokens: int, received: torch.Tensor) -> None:
        self._streams, self._written = self._streams + 1, 0

        def sink(layer, start, end, data):
            if end <= received.shape[1]:
                received[layer, start:end].copy_(data.view(end - start, ROW_BYTES))
            self._written += 1

        self.fabric.expect(_plan(self._streams, tokens), sink)

    def _order(self, **what) -> None:
        self.fabric.send_message({"kind": "order", "stream": self._streams, "step": self._step, **what})
