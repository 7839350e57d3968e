"""Chapter 08: layer-wise streaming. Hide the transfer behind the computation that produces it. Paper 3.3.

    python tutorials/08_layerwise_streaming.py [--timeline OUT.json]      (opens in ui.perfetto.dev)

The KVCache of a layer is final as soon as the layer has seen a chunk of the prompt. Ship it then, and only what prefill
makes last is left to ship when prefill ends. The prefill here is emulated: each layer of each chunk takes a fixed time
in which this process waits, as it would for a GPU. The link is real, its rate and round trip are emulated. Chapter 13
does the same with a real model.
"""

import argparse
import multiprocessing
import time

import torch
from torch.distributed import TCPStore

from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.files import write_whole
from minprfaas.observe.report import human_bytes, table
from minprfaas.observe.timeline import Timeline, timeline_json
from minprfaas.transport import EmulatedLine, LayerPlan, Link, LinkIdentity, LinkLost, StreamPlan, StreamReport

IDENTITY = LinkIdentity(bytes(32), "uint8", "none", b"chapter eight")
TOKENS, CHUNK_TOKENS, LAYER_S = 4096, 512, 0.020
RTT_MS = 20.0
# Three linear layers to one of full attention, twice: a state each, and rows for each token (paper table 1).
LAYERS = tuple(LayerPlan(layer, group=0, kind=StateKind.TOKEN, row_bytes=1024) if layer % 4 == 3 else
               LayerPlan(layer, group=1, kind=StateKind.REQUEST, row_bytes=65_536) for layer in range(8))
PLAN = StreamPlan(stream_id=8, entries=LAYERS, start=0, end=TOKENS)
PREFILL_S = TOKENS // CHUNK_TOKENS * len(LAYERS) * LAYER_S
SHARES = (0.25, 0.5, 1.0, 2.0)  # how long the transfer takes, as a share of the prefill
RUNS = [(share, overlap) for share in SHARES for overlap in (True, False)]


LINK = LinkConfig(lanes=2, chunk_bytes=64 * 1024)


def line(share: float) -> LineConfig:
    """A line on which the KVCache takes `share` of the prefill's time."""
    return LineConfig(gbps=PLAN.total_bytes * 8e-9 / (share * PREFILL_S), rtt_ms=RTT_MS)


def decode_datacenter(port: int) -> None:
    """The receiver: writes what arrives where it belongs. A real one writes into blocks."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, None, False)
    rows, state = torch.zeros(TOKENS, 1024, dtype=torch.uint8), torch.zeros(65_536, dtype=torch.uint8)

    def write(layer: int, start: int, end: int, data: torch.Tensor) -> None:
        if LAYERS[layer].kind is StateKind.TOKEN:
            rows[start:end] = data.view(-1, 1024)
        else:
            state.copy_(data)

    for number, (share, _) in enumerate(RUNS):
        link = Link(f"run {number}", store, 1, LINK, IDENTITY, EmulatedLine(line(share)))
        link.connect(deadline_s=30)
        link.expect(PLAN, write)
        link.send_message({"ready": number})
        while not isinstance(link.receive(timeout_s=30), LinkLost):
            pass
        link.close()


def prefill(stream, overlap: bool, timeline: Timeline) -> None:
    """Chunk by chunk and layer by layer. `overlap` ships each piece at once, otherwise all of them at the end."""
    rows, state = torch.zeros(CHUNK_TOKENS * 1024, dtype=torch.uint8), torch.zeros(65_536, dtype=torch.uint8)
    ready, due = [], time.monotonic()
    for start in range(0, TOKENS, CHUNK_TOKENS):
        end = start + CHUNK_TOKENS
        for entry in LAYERS:
            began, due = time.monotonic(), due + LAYER_S
            time.sleep(max(0.0, due - time.monotonic()))  # the GPU computes
            timeline.span("prefill (emulated)", f"layer {entry.layer}, tokens {start}-{end}", began, time.monotonic())
            if entry.kind is not StateKind.TOKEN and end < TOKENS:
                continue  # a linear layer's state is final only with the last token
            piece = (entry.layer, start, end, rows if entry.kind is StateKind.TOKEN else state)
            if overlap:
                stream.put(*piece)
            else:
                ready.append(piece)
    for piece in ready:
        stream.put(*piece)


def run(store: TCPStore, number: int) -> tuple[float, float, StreamReport, Timeline]:
    """Returns seconds from the start of prefill to the last acknowledgement and to its end, report and timeline."""
    share, overlap = RUNS[number]
    timeline = Timeline("prefill datacenter")
    link = Link(f"run {number}", store, 0, LINK, IDENTITY, EmulatedLine(line(share)), timeline=timeline)
    link.connect(deadline_s=30)
    link.receive(timeout_s=30)  # "ready"
    stream, began = link.open(PLAN), time.monotonic()
    prefill(stream, overlap, timeline)
    prefilled_s = time.monotonic() - began
    report = stream.finish(deadline_s=30)
    link.close()
    return report.acked_s - began, prefilled_s, report, timeline


def draw(timeline: Timeline, width: int = 96) -> str:
    """One row a track: where it was busy."""
    spans = [event for event in timeline.events() if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in timeline.events() if event["name"] == "thread_name"}
    begin, end = min(span["ts"] for span in spans), max(span["ts"] + span["dur"] for span in spans)
    rows = {tid: ["·"] * width for tid in sorted({span["tid"] for span in spans})}
    for span in spans:
        first, last = (int((at - begin) / (end - begin) * (width - 1)) for at in (span["ts"], span["ts"] + span["dur"]))
        rows[span["tid"]][first:last + 1] = "█" * (last + 1 - first)
    return "\n".join(f"  {names[tid]:>18} {''.join(row)}" for tid, row in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeline", metavar="OUT.json", help="write the pictured run as Chrome trace events")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    multiprocessing.get_context("spawn").Process(target=decode_datacenter, args=(store.port,), daemon=True).start()
    print(f"A prompt of {TOKENS} tokens, {len(LAYERS)} layers, {PREFILL_S:.2f} s of prefill (emulated), "
          f"{human_bytes(PLAN.total_bytes)} of KVCache, {RTT_MS:g} ms round trip (emulated)\n")
    rows, pictures = [], {}
    for share in SHARES:
        ttft_s, prefill_s, report, pictures[share] = run(store, RUNS.index((share, True)))
        plain_s, *_ = run(store, RUNS.index((share, False)))
        transfer_s = share * PREFILL_S
        first_s = 4 * LAYER_S  # the first full layer is the fourth
        layer_s = transfer_s * 1024 * CHUNK_TOKENS / PLAN.total_bytes
        bound_s = (1.05 * prefill_s + layer_s if share < 1 else 1.05 * transfer_s + first_s) + RTT_MS / 1e3
        tail_s = max(0.0, report.acked_s - report.last_put_s - RTT_MS / 1e3)
        rows.append([f"{line(share).gbps * 1e3:.0f} Mbps", f"{transfer_s:.2f} s", f"{ttft_s:.2f} s", f"{bound_s:.2f} s",
                     f"{plain_s:.2f} s", f"{max(0.0, 1 - tail_s / transfer_s):.0%}"])
    print(table(["line (emulated)", "transfer alone", "TTFT, layer by layer", "goal", "TTFT, shipped after", "hidden"],
                rows))
    print("""
  TTFT: from the start of prefill until the last byte is acknowledged and decode may start. goal: for a transfer shorter
  than prefill 1.05 x prefill + round trip + one layer's transfer; for a longer one 1.05 x transfer + round trip + the
  time until the first layer is there. hidden: the share of the transfer that ran while prefill still computed.

  The run in which the transfer takes half of the prefill's time:
""")
    print(draw(pictures[0.5]))
    if args.timeline:
        write_whole(args.timeline, timeline_json(pictures[0.5].events()))
        print(f"\n  {args.timeline} holds it for ui.perfetto.dev")
    print("\nA transfer that fits into the prefill all but vanishes; one that does not still starts early. "
          "Next: tutorials/10_the_throughput_model.py, which requests should go at all.")


if __name__ == "__main__":
    main()
