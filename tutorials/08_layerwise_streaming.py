"""Chapter 08: layer-wise streaming. Hide the transfer behind the computation that produces it.

    python tutorials/08_layerwise_streaming.py [--timeline OUT.json]      (opens in ui.perfetto.dev)

The prefill here is emulated: each layer of each chunk takes a fixed time in which this process waits, as it would for a
GPU. The blocks, the threads, the link and the far end's blocks are real; the line's rate and round trip are emulated.
Chapter 13 does the same with a real model.

Modules: cluster/kv_send.py, cluster/kv_receive.py, cluster/stream_plans.py, transport/streams.py,
         observe/timeline.py, files.py
Tests: test_transport_streams.py, test_transport_link.py, test_two_datacenters.py, test_timeline.py,
       test_kv_arrives.py
Paper: 3.3
"""
import helper

args = helper.begin(__doc__, {"--timeline": dict(metavar="OUT.json", help="write the pictured run as trace events")})

import time
from typing import NamedTuple

import torch
from nodes import FarEnd, ask, contents, hybrid_cache

from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.kv_send import KVSend, SendingThreads
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import LineConfig, LinkConfig, StateKind
from minprfaas.files import write_whole
from minprfaas.observe.tables import human_bytes, table
from minprfaas.observe.timeline import Timeline, timeline_json
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.streams import Coverage

torch.set_num_threads(1)
far = FarEnd()

# %% [markdown]
# ## 1. What is final, and when
#
# Prefill takes the prompt in chunks, and each chunk through one layer after the other. Once a full-attention layer has
# seen a chunk, its rows for those tokens never change again: they may leave. A linear layer's state changes with every
# chunk: it is final only with the last token ([token state and request
# state](../docs/glossary.md#token-state-and-request-state)).
#
# *Guess first:* a prompt of 2,048 tokens in 8 chunks through 8 layers, of which every fourth is full attention. How
# many pieces can be sent, and what part of the bytes may leave before the last chunk begins?

# %%
TOKENS, CHUNK_TOKENS, LAYER_S, RTT_MS = 2048, 256, 0.020, 20.0
kvcache, request = hybrid_cache(TOKENS)
layout, tables = kvcache.layout, request.block_tables
generator = torch.Generator().manual_seed(8)
for layer, (spec, group) in enumerate(zip(layout.specs, layout.group_of_layer)):  # what a model would have computed
    count = spec.nbytes * (TOKENS if spec.kind is StateKind.TOKEN else 1)
    floats = torch.rand(count // 4, generator=generator)
    kvcache.pool.write_bytes(layer, tables[group.index], 0, TOKENS, floats.view(torch.uint8))
plan = stream_plan(layout, stream_id=1, start=0, end=TOKENS)
is_rows = {entry.layer: entry.kind is StateKind.TOKEN for entry in plan.entries}


class Ready(NamedTuple):
    """Tokens [start, end) of a layer are final."""

    layer: int
    start: int
    end: int
    nbytes: int


def prefill_order() -> list[Ready]:
    """What becomes final, in the order in which it does."""
    order = []
    for start in range(0, TOKENS, CHUNK_TOKENS):
        for entry in plan.entries:
            if is_rows[entry.layer]:
                order.append(Ready(entry.layer, start, start + CHUNK_TOKENS, entry.row_bytes * CHUNK_TOKENS))
            elif start + CHUNK_TOKENS == TOKENS:
                order.append(Ready(entry.layer, 0, TOKENS, entry.row_bytes))
    return order


order = prefill_order()
early = sum(piece.nbytes for piece in order if piece.end < TOKENS)
covered = {layer: Coverage(0, TOKENS) for layer in is_rows}
for piece in order:
    covered[piece.layer].add(piece.start, piece.end)  # raises ValueError if one came twice
print("1. What is final, and when\n")
is_exact = all(one.complete for one in covered.values()) and sum(piece.nbytes for piece in order) == plan.total_bytes
print(f"   {len(order)} pieces, {human_bytes(plan.total_bytes)} in all; {early / plan.total_bytes:.0%} of the bytes "
      f"are final before the last chunk begins.\n"
      f"   Together they are the plan, no more and no less: {'true' if is_exact else 'FALSE'}.\n")

# %% [markdown]
# *Why a plan, and not just pieces?* Both ends make it from their own layout before a byte moves (`stream_plan`), so the
# receiver can check each piece, and knows when it has everything.
#
# *Change this line:* `CHUNK_TOKENS = 256` → `2048`, one chunk. What is final early then?

# %% [markdown]
# ## 2. How long it must take
#
# Let C be the time of prefill, X that of the whole transfer alone (bytes over rate), R the round trip. Shipped *after*
# prefill, decode can start at C + X + R. Shipped layer by layer it cannot start before either of these:
#
#     C + (what became final last) / rate + R        compute never waits; the last piece must still cross
#     (first piece is final) + X + R                 the line never waits; it begins with the first piece
#
# *Guess first:* C = 1.28 s. On four lines X is 0.25, 0.5, 1 and 2 times C. Which of the two bounds counts on which, and
# how much of X is hidden at best?


# %%
def played_s(shares: float) -> tuple[float, float, float]:
    """When the last byte is acknowledged, by playing it: each piece enters the line when it is final and the line is
    free. Then the two bounds."""
    rate = plan.total_bytes / (shares * COMPUTE_S)
    free_s, final_s, pieces = 0.0, 0.0, []
    for start in range(0, TOKENS, CHUNK_TOKENS):
        for layer in is_rows:
            final_s += LAYER_S
            pieces += [(final_s, piece.nbytes) for piece in order
                       if piece.layer == layer and piece.end == start + CHUNK_TOKENS]
    for ready_s, nbytes in pieces:
        free_s = max(free_s, ready_s) + nbytes / rate
    by_compute = COMPUTE_S + pieces[-1][1] / rate
    return free_s + RTT_MS / 1e3, by_compute + RTT_MS / 1e3, pieces[0][0] + shares * COMPUTE_S + RTT_MS / 1e3


COMPUTE_S = TOKENS // CHUNK_TOKENS * len(plan.entries) * LAYER_S
SHARES = (0.25, 0.5, 1.0, 2.0)
print("2. How long it must take (by arithmetic)\n")
rows = []
for share in SHARES:
    played, by_compute, by_line = played_s(share)
    after = COMPUTE_S * (1 + share) + RTT_MS / 1e3
    rows.append([f"{share:g} C", f"{by_compute:.2f} s", f"{by_line:.2f} s",
                 "compute" if by_compute > by_line else "the line",
                 f"{played:.2f} s", f"{after:.2f} s", f"{(after - played) / (share * COMPUTE_S):.0%}"])
print(table(["transfer alone", "bound by compute", "bound by the line", "binds", "played", "shipped after",
             "hidden"], rows))
print(f"\n   C = {COMPUTE_S:.2f} s, R = {RTT_MS:g} ms, {human_bytes(plan.total_bytes)}.\n")

# %% [markdown]
# *Why is "played" above both bounds where these are nearly equal?* The states of the linear layers all become final
# within the last chunk, one layer after the other, and queue up behind each other. A hybrid ships little, and a part of
# it late.
#
# *Change this line:* `RTT_MS = 20.0` → `200.0`. Which column does not care?

# %% [markdown]
# ## 3. The sending thread
#
# The model's thread must not wait for a line. So it only *says* what is final, between two layers, and goes on; a
# sending thread reads the blocks and puts them into the stream, and there it waits for room (`KVSend`). Nothing is
# copied before: the blocks keep it, and are held until the stream has ended. `KVReceive` on the other side writes what
# comes into its own blocks.
#
# *Guess first:* the same over `Loopback` in this process, without any prefill: how many µs does `ready` cost the
# model's thread, for a piece of 256 KiB?

# %%
threads = SendingThreads("A")
here = Loopback()
there_cache, there_request = hybrid_cache(TOKENS)
KVReceive(there_cache, here, plan, there_request.block_tables)
sending = KVSend(kvcache, here, plan, tables, threads, helper.DEADLINE_S)
calls_us = []
for start in range(0, TOKENS, CHUNK_TOKENS):
    for layer in is_rows:
        began_s = time.perf_counter()
        sending.ready(layer, start + CHUNK_TOKENS)
        calls_us.append((time.perf_counter() - began_s) * 1e6)
sending.finish()
sending.outcome.result(helper.DEADLINE_S)
same = contents(kvcache, request, TOKENS) == contents(there_cache, there_request, TOKENS)
print("3. The sending thread\n")
print(f"   {len(calls_us)} calls of `ready`, {sorted(calls_us)[len(calls_us) // 2]:.0f} µs each (median). "
      f"The other pool's blocks then hold {'the same bytes' if same else 'DIFFERENT bytes'}.\n")

# %% [markdown]
# *Why not put from the model's thread?* `put` blocks while the window is full. One slow receiver would stop the forward
# pass, and with it every other request of the batch.
#
# *Change this line:* `KVSend(…, overlap=False)`. What does `ready` do then?

# %% [markdown]
# ## 4. Over a line, to another process
#
# Now with the emulated prefill, to the far end's blocks. Each line twice: shipped as it becomes final, and shipped
# after.
#
# *Guess first:* by how many ms will what is measured miss section 2's arithmetic?


# %%
class Run(NamedTuple):
    """What was measured of one run: seconds from the start of prefill."""

    prefilled_s: float
    acked_s: float
    is_same: bool
    timeline: Timeline


def run(share: float, overlap: bool) -> Run:
    """Prefill (emulated) and ship to the far end, over a line on which the KVCache takes `share` of C."""
    line = LineConfig(gbps=plan.total_bytes * 8e-9 / (share * COMPUTE_S), rtt_ms=RTT_MS)
    timeline = Timeline("prefill datacenter")
    link = far.meet(line, LinkConfig(lanes=2, chunk_bytes=64 * 1024), TOKENS, blocks=True, timeline=timeline)
    sending = KVSend(kvcache, link, plan, tables, threads, helper.DEADLINE_S, overlap)
    began_s = due_s = time.monotonic()
    for start in range(0, TOKENS, CHUNK_TOKENS):
        for layer in is_rows:
            layer_began_s, due_s = time.monotonic(), due_s + LAYER_S
            time.sleep(max(0.0, due_s - time.monotonic()))  # the GPU computes
            timeline.span("prefill (emulated)", f"layer {layer}", layer_began_s, time.monotonic())
            sending.ready(layer, start + CHUNK_TOKENS)
    prefilled_s = time.monotonic() - began_s
    sending.finish()
    report = sending.outcome.result(helper.DEADLINE_S)
    answer, _ = ask(link, "what have you got?")
    link.close()
    is_right = answer["answer"] == contents(kvcache, request, TOKENS)
    return Run(prefilled_s, report.acked_at_s - began_s, is_right, timeline)


rows, runs, sooner = [], {}, 0
for share in SHARES:
    runs[share], after = run(share, overlap=True), run(share, overlap=False)
    streamed = runs[share]
    late_s = streamed.prefilled_s - COMPUTE_S  # this machine was late with the emulated prefill itself
    sooner += streamed.acked_s < after.acked_s
    tail_s = max(0.0, streamed.acked_s - streamed.prefilled_s - RTT_MS / 1e3)
    rows.append([f"{plan.total_bytes * 8e-6 / (share * COMPUTE_S):.0f} Mbps", f"{share * COMPUTE_S:.2f} s",
                 f"{streamed.acked_s:.2f} s", f"{(streamed.acked_s - late_s - played_s(share)[0]) * 1e3:+.0f} ms",
                 f"{after.acked_s:.2f} s", f"{max(0.0, 1 - tail_s / (share * COMPUTE_S)):.0%}"])
sound = all(run.is_same for run in runs.values())
print("4. Over a line, to another process\n")
print(table(["line (emulated)", "transfer alone", "layer by layer", "against the arithmetic", "shipped after",
             "hidden"], rows))
print(f"""
   From the start of prefill until the last byte is acknowledged: then decode may start. hidden: the part of the
   transfer that ran while prefill still did. Layer by layer was sooner in {sooner} of {len(SHARES)} cases.
   The far end's blocks hold {'the same bytes' if sound else 'DIFFERENT bytes'} each time.
""")

# %% [markdown]
# *What is left over against the arithmetic?* Acknowledgements and headers, which the arithmetic leaves out, the two
# ends' copying and hashing, and whatever else this machine does: on a busy one this column grows, and shows nothing
# else.
#
# *Change this line:* `LAYER_S = 0.020` → `0.005`: a faster GPU in front of the same lines. What is hidden now?

# %% [markdown]
# ## 5. A picture of it
#
# *Guess first:* where the transfer takes half as long as prefill: what share of the time is the line busy, and is that
# in one piece?


# %%
def draw(timeline: Timeline, width: int = 88) -> tuple[str, dict[str, float]]:
    """One row a track, where it was busy; and the share of the time in which it was."""
    spans = [event for event in timeline.events() if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in timeline.events() if event["name"] == "thread_name"}
    begin, end = min(span["ts"] for span in spans), max(span["ts"] + span["dur"] for span in spans)
    rows = {tid: ["·"] * width for tid in sorted({span["tid"] for span in spans})}
    for span in spans:
        first, last = (int((at - begin) / (end - begin) * (width - 1)) for at in (span["ts"], span["ts"] + span["dur"]))
        rows[span["tid"]][first:last + 1] = "█" * (last + 1 - first)
    busy = {names[tid]: row.count("█") / width for tid, row in rows.items()}
    longest = max(map(len, names.values()))
    return "\n".join(f"  {names[tid]:>{longest}} {''.join(row)}" for tid, row in rows.items()), busy


picture, busy = draw(runs[0.5].timeline)
(line_name,) = [name for name in busy if "line" in name]
print("5. A picture of it: the transfer takes half of the prefill's time\n")
print(picture)
print(f"\n   The line (emulated) is busy in {busy[line_name]:.0%} of the columns.\n")
if args.timeline:
    write_whole(args.timeline, timeline_json(runs[0.5].timeline.events()))
    print(f"   {args.timeline} holds it for ui.perfetto.dev\n")

# %% [markdown]
# *Why bursts?* Three of four layers have nothing to send until the end. A line for many requests at once is smoother:
# their bursts fall into each other's pauses.
#
# *Change this line:* `runs[0.5]` → `runs[2.0]`. When does the line begin, and when does it end?

# %%
print("A transfer that fits into prefill is hidden but for its last pieces; one that does not still begins early.\n"
      "Next: tutorials/09_inside_a_datacenter.py, where no line is in the way.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_08.py`, then `python tutorials/08_layerwise_streaming.py --check 1`.
# 1. `final_pieces`: what becomes final, and in which order.
# 2. `done_s`: when the last piece has crossed.
# 3. `hidden_share`: what part of a transfer prefill hides.
