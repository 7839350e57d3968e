"""Chapter 07: a link between two processes. Paper 3.3.

    python tutorials/07_a_link.py

Two datacenters share nothing but a line. This chapter starts a second process, meets it, sends it bytes at emulated
rates, looks at one frame under the microscope, turns an impostor away, and watches bad weather arrive.
"""

import logging
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed import TCPStore

from minprfaas.config import LineConfig, LinkConfig, StateKind, WeatherChange
from minprfaas.observe.report import table
from minprfaas.transport import (EmulatedLine, LayerPlan, Link, LinkIdentity, LinkLost, LinkRefused, MessageReceived,
                                 StreamPlan)
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, FrameError, Header, Kind, Slot

IDENTITY = LinkIdentity(fingerprint=bytes(32), dtype="float32", block_layout="64 tokens", secret=b"chapter seven")
ROW_BYTES, TOKENS = 1024, 2048  # one layer of token state: 2 MiB
LAYER = LayerPlan(layer=0, group=0, kind=StateKind.TOKEN, row_bytes=ROW_BYTES)
PLAN = StreamPlan(stream_id=1, entries=(LAYER,), start=0, end=TOKENS)
LINES = [LineConfig(gbps=0.01), LineConfig(gbps=0.1), LineConfig(gbps=0.1, rtt_ms=80), LineConfig(gbps=1, rtt_ms=20),
         LineConfig()]
LANES = [1, 1, 1, 4, 4]
LONG_PLAN = StreamPlan(stream_id=2, entries=(LAYER,), start=0, end=40 * TOKENS)
WEATHER = (WeatherChange(1.0, gbps=0.03), WeatherChange(2.0, stall_s=1.0), WeatherChange(3.0, gbps=0.2))
WEATHER_LINE = LineConfig(gbps=0.1, rtt_ms=10, weather=WEATHER)


def datacenter_b(port: int) -> None:
    """The other process: on each line, expect one stream, answer messages, leave when the peer leaves."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, None, False)
    for number, (line, lanes) in enumerate(zip([*LINES, WEATHER_LINE], [*LANES, 1])):
        link = Link(f"line {number}", store, 1, LinkConfig(lanes), IDENTITY, EmulatedLine(line))
        link.connect(deadline_s=30)
        arrived = torch.zeros(TOKENS, ROW_BYTES, dtype=torch.uint8)  # in the real thing: the decode node's blocks

        def write(layer: int, start: int, end: int, data: torch.Tensor) -> None:
            arrived[start % TOKENS:][:end - start] = data.view(end - start, ROW_BYTES)

        link.expect(PLAN if line in LINES else LONG_PLAN, write)
        link.send_message({"ready": number})
        while not isinstance(event := link.receive(timeout_s=30), LinkLost):
            if isinstance(event, MessageReceived):
                link.send_message({"checksum": int(arrived.sum())})
        link.close()


def meet(store: TCPStore, number: int, line: LineConfig, lanes: int = 1) -> Link:
    link = Link(f"line {number}", store, 0, LinkConfig(lanes), IDENTITY, EmulatedLine(line))
    link.connect(deadline_s=30)
    link.receive(timeout_s=30)  # "ready": the other side expects the stream
    return link


def rates(store: TCPStore) -> None:
    print(f"\n1. One stream of {PLAN.total_bytes / 2**20:g} MiB over different lines (rate, round trip: emulated)\n")
    data, rows = torch.randint(0, 256, (TOKENS * ROW_BYTES,), dtype=torch.uint8), []
    for number, (line, lanes) in enumerate(zip(LINES, LANES)):
        link = meet(store, number, line, lanes)
        stream = link.open(PLAN)
        stream.put(0, 0, TOKENS, data)
        report = stream.finish(deadline_s=30)
        began = time.monotonic()
        link.send_message({"what": "is your checksum?"})
        answer = link.receive(timeout_s=30).message
        message_s = time.monotonic() - began
        link.close()
        took_s = report.acked_s - report.first_put_s
        goodput_mbps = report.bytes * 8e-6 / (took_s - line.rtt_ms / 1e3)  # the round trip is delay, not rate
        rate = f"{line.gbps * 1e3:g} Mbps" if line.gbps else "no limit"
        rows.append([rate, f"{line.rtt_ms:g} ms", lanes, f"{goodput_mbps:.1f} Mbps",
                     f"{took_s * 1e3:.0f} ms", f"{message_s * 1e3:.1f} ms",
                     "identical" if answer["checksum"] == int(data.sum()) else "DAMAGED"])
    print(table(["rate", "round trip", "lanes", "goodput", "last ack after", "then a message and its answer", "bytes"],
                rows))


def microscope() -> None:
    print("\n2. A frame: a fixed header, then raw bytes. No pickle, nothing to execute, nothing to believe\n")
    codec, slot = Codec(payload_limit=64, send_key=b"k" * 32, receive_key=b"k" * 32), Slot(64)
    codec.seal(Header(Kind.CHUNK, seq=7, stream=1, layer=3, group=0, start=64, end=128, nbytes=64), slot.view)
    read = codec.open(slot.view)
    print(f"   {HEADER_BYTES} bytes say: {read.kind.name} {read.seq} of stream {read.stream}, layer {read.layer}, "
          f"tokens {read.start}-{read.end}, {read.nbytes} bytes follow")
    refused = 0
    for bit in range(HEADER_BYTES * 8):
        slot.view[bit // 8] ^= 1 << bit % 8
        try:
            codec.open(slot.view)
        except FrameError:
            refused += 1
        slot.view[bit // 8] ^= 1 << bit % 8
    print(f"   flip any one of its {HEADER_BYTES * 8} bits: {refused} of {HEADER_BYTES * 8} are noticed before a field "
          "is used")


def impostor(store: TCPStore) -> None:
    print("\n3. A peer without the secret\n")
    thief = LinkIdentity(IDENTITY.fingerprint, IDENTITY.dtype, IDENTITY.block_layout, secret=b"a guess")

    def attempt(rank: int, identity: LinkIdentity) -> str:
        link = Link("a door", store, rank, LinkConfig(), identity)
        try:
            link.connect(deadline_s=10)
        except LinkRefused as error:
            return str(error)
        return "connected"

    with ThreadPoolExecutor(2) as pool:
        ours, _ = pool.map(attempt, (0, 1), (IDENTITY, thief))
    print(f"   our log: {ours!r}. The thief learns only that it was refused, and no frame of its was read")


def weather(store: TCPStore, number: int) -> None:
    print("\n4. Weather: 100 Mbps, after 1 s 30 Mbps, after 2 s nothing for a second, then 200 Mbps (emulated)\n")
    link = meet(store, number, WEATHER_LINE)
    began, stream = time.monotonic(), link.open(LONG_PLAN)
    print(table(["second", "egress", "queued + in flight", "acknowledged after"],
                [[f"{sample.time_s - began:.2f}", f"{sample.gbps * 1e3:.1f} Mbps",
                  f"{(sample.queued_bytes + sample.inflight_bytes) / 1e6:.2f} MB", f"{sample.ack_delay_s * 1e3:.0f} ms"]
                 for sample in push_until(stream, link, until=began + 4.0)]))
    print("\n   These samples are what the scheduler reads in chapter 12")
    stream.abort()
    link.close()


def push_until(stream, link: Link, until: float) -> list:
    """Put 64 KiB pieces until the deadline; `put` itself holds back when too much is in flight."""
    piece = torch.zeros(64 * ROW_BYTES, dtype=torch.uint8)
    for start in range(0, stream.plan.end, 64):
        if time.monotonic() > until:
            break
        stream.put(0, start, start + 64, piece)
    return link.stats().samples


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the refusal is told below
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    other = multiprocessing.get_context("spawn").Process(target=datacenter_b, args=(store.port,))
    other.daemon = True
    other.start()
    print("Datacenter A is this process, datacenter B another. They share a store for addresses, and a line.")
    rates(store)
    microscope()
    impostor(store)
    weather(store, len(LINES))
    other.join(10)
    print("\nA line keeps its rate whatever its delay, a header vouches for itself, and a stranger gets nothing. "
          "Next: tutorials/08_layerwise_streaming.py, layer by layer.")


if __name__ == "__main__":
    main()
