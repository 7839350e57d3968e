"""Chapter 09: inside a datacenter. KVCache from GPU to GPU: a group of two, a digest, and then the blocks. Paper 3.1.

    python tutorials/09_inside_a_datacenter.py

This runs on CPUs, where Gloo carries the bytes; between two GPUs the same code takes NCCL. What is said of NCCL here is
marked so: nothing in this run measures it.

Modules: transport/fabric.py, transport/fabric_sending.py, transport/pair_group.py
Tests: test_transport_fabric.py, test_transport_fabric_parts.py, test_transport_seam.py
Paper: 3.1
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import time

import torch
from helper import Process
from nodes import DEADLINE_S, STARTER, STREAM_TOKENS, cargo, new_store, pair_end, plan, serve_streams

from minprfaas.observe.tables import human_bytes, table
from minprfaas.transport.events import EventQueue, LinkRestored, StreamDone, StreamFailed
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.pair_group import (ALIGN_BYTES, BATCH_BYTES, DIGEST_BYTES, WINDOW, PairGroup, digest, is_sound,
                                            require_error_handling, seal)
from minprfaas.transport.wan.binding import LOOPBACK

torch.set_num_threads(1)
CPU = torch.device("cpu")

# %% [markdown]
# ## 1. Two runners in one building
#
# Prefill and decode are different machines (chapter 04) also where they stand side by side. That is [PD
# disaggregation](../docs/glossary.md#pd), and serving clusters had it before anybody thought of two buildings: some
# nodes only prefill ([PD-P](../docs/glossary.md#pd-p)), others only decode ([PD-D](../docs/glossary.md#pd-d)), and each
# request's KVCache goes from one of the first to one of the second. PrfaaS keeps all of that, for the prompts that
# stay.
#
# *Guess first:* on an H200 a dense model made 896 MiB of KVCache of 8,192 tokens in 56 ms (`docs/measurements.md`). How
# many ms does the handover take from GPU to GPU in one host, and how many over the paper's line of 100 Gbps?

# %%
NCCL_GB_S, LINE_GB_S = 362, 12.5  # as READ from docs/measurements.md; 12.5 GB/s are the paper's 100 Gbps
READ = {"dense, Qwen3-0.6B's shape": (896, 56.3), "hybrid of its size": (84.7, 181.2)}  # MiB, ms of prefill
print("1. Two runners in one building: 8,192 tokens (by arithmetic, from what docs/measurements.md read on H200s)\n")
print(table(["model", "KVCache, MiB", "prefill, ms", "GPU to GPU, ms", "over the line, ms", "prefill hides that"], [
    (name, mib, prefill_ms, f"{mib * 2**20 / NCCL_GB_S / 1e6:.1f}", f"{mib * 2**20 / LINE_GB_S / 1e6:.1f}",
     "yes" if mib * 2**20 / LINE_GB_S / 1e6 < prefill_ms else "no") for name, (mib, prefill_ms) in READ.items()]))
print()

# %% [markdown]
# *Why is there a chapter about it, then?* In a building bandwidth is not the trouble: even the dense baton is handed
# over in a fraction of the time that it took to make. The trouble is that *nodes* die, in the middle of a handover, and
# that the network which is so fast does not tell. Who holds the baton when a runner falls is what the rest is about.
#
# *Change this line:* `LINE_GB_S = 12.5` → `50`, a line of 400 Gbps. Whose handover can it hide?

# %% [markdown]
# ## 2. A group of two
#
# Two datacenters are joined by a line that is slow and may break, so chapter 07 built lanes, frames, acknowledgements.
# The network inside one is driven by `torch.distributed`, whose processes act in *groups*, and a group is lost when one
# of its members is. What one node prefills goes to *any* node that decodes. If all nodes were one group, each death
# would end every handover. So every **pair** of nodes has a group of its own, and when one of the two dies, nobody else
# notices. Each direction has its own group, too: a group's operations queue up behind each other, and a send would wait
# for a receive that waits for a send.
#
# *Guess first:* how many groups does a datacenter of 8 nodes need, and how many MB/s pass between two CPUs here?

# %%
store = new_store()
here, there = helper.in_parallel(
    *[lambda rank=rank: PairGroup(store, 1, rank, CPU, BATCH_BYTES["cpu"], LOOPBACK) for rank in (0, 1)])
kvcache = here.new_batch(BATCH_BYTES["cpu"]).random_()


def cross(number: int) -> torch.Tensor:
    """One operation on either side; what has landed."""
    batch = here.new_batch(BATCH_BYTES["cpu"])
    batch.copy_(kvcache)
    landing = there.receive(batch.numel())
    here.send(number, batch)
    there.wait(landing)
    landed = landing.data.clone()
    there.release(landing)
    here.written(number)  # as the other side would tell
    return landed


cross(0)
began_s = time.monotonic()
for number in range(1, 33):
    landed = cross(number)
mb_s = 32 * kvcache.numel() / (time.monotonic() - began_s) / 1e6
print("2. A group of two\n")
print(f"   8 nodes: {8 * 7 // 2} pairs, {8 * 7} groups, one for each direction. Between two threads here\n"
      f"   {mb_s:,.0f} MB/s pass by Gloo, {human_bytes(kvcache.numel())} an operation; what landed is "
      f"{'the same' if torch.equal(landed, kvcache) else 'NOT the same'}.\n")

# %% [markdown]
# *Why so large an operation?* One costs some microseconds whatever it moves, and a row of KVCache may have only some
# hundred bytes. So the pieces that are ready, of several layers, are copied into one *batch*, and that crosses at once.
#
# *Change this line:* `batch = …` has room for a whole MiB; let it be `here.new_batch(4096)`, filled with as many
# bytes, and watch the rate.

# %% [markdown]
# ## 3. Land, digest, scatter
#
# The bytes could be received straight into the blocks of the pool. They are not. With NCCL an operation that is broken
# off *ends like one that succeeded*: no error, and memory that is half old, half new. So a batch ends with its
# *digest*, plus a *key* that is announced beside it and is no other batch's. It lands in memory of its own, and only
# when digest and key fit is it scattered into blocks. The digest is one pass over the bytes, on the device where they
# are: the receiver's host waits for its GPU once a batch, the sender's not at all.
#
# *Guess first:* one of 8,388,608 bits is flipped; one half never came; two rows are in each other's place; all of it is
# an earlier batch. How many of the four does a plain sum over all that landed notice?

# %%
KEY = 42
seal(kvcache, KEY)
one_bit, half, swapped, other = (kvcache.clone() for _ in range(4))
one_bit[100_000] ^= 4
half[:half.numel() // 2] = 0  # what an operation may leave that was broken off
rows = swapped[:-DIGEST_BYTES].view(-1, ALIGN_BYTES)
rows[[3, 7]] = rows[[7, 3]]
seal(other, KEY - 1)
cases = {"as it was sent": kvcache, "one bit flipped": one_bit, "one half missing": half,
         "two rows in each other's place": swapped, "an earlier batch, in the same memory": other}


def plain_sum(batch: torch.Tensor) -> int:
    """All its words of 8 bytes, added up."""
    return int(batch[:-DIGEST_BYTES].view(torch.int64).sum()) % 2**64


print("3. Land, digest, scatter\n")
print(table(["what landed", "a plain sum", "its digest", "scattered"],
            [[what, f"{plain_sum(data):016x}", f"{int(digest(data[:-DIGEST_BYTES])) % 2**64:016x}",
              "yes" if is_sound(data, KEY) else "no"] for what, data in cases.items()]))
damaged = list(cases.values())[1:]
by_sum = sum(plain_sum(data) != plain_sum(kvcache) for data in damaged)
noticed = sum(not is_sound(data, KEY) for data in damaged)
print(f"\n   Of 4 damages a plain sum notices {by_sum}, digest and key notice {noticed}.\n")

# %% [markdown]
# *Why are swapped rows noticed?* Each row's sum is multiplied by an odd number of its own before the sums are added; a
# plain sum is the same whatever their order. *And the earlier batch?* Its digest is right. Only the key is not the one
# that was announced.
#
# *Change this line:* `rows[[3, 7]] = rows[[7, 3]]` → `rows.view(-1, 8)[[0, 1]] = rows.view(-1, 8)[[1, 0]]`: two words
# of one row change places. This digest cannot see that; a wire does not do that either, and against malice it was
# never meant.

# %% [markdown]
# ## 4. What cannot be cancelled
#
# A receive is posted, and the peer does not send: it is dead, or stopped. There is no call that takes one operation
# back. What can be done is to end the *group*, with everything that is on its way in it.
#
# *Guess first:* two receives wait; how many of them end when the group is aborted?

# %%
waiting = [there.receive(4096), there.receive(4096)]
time.sleep(0.2)
oldest_s = there.oldest_s(time.monotonic())


def outcome(transfer) -> str:
    """How it ended."""
    try:
        there.wait(transfer)
        return "ended without a word"
    except RuntimeError:
        return "ended in an error"


began_s = time.monotonic()
there.abort()
ends = [outcome(transfer) for transfer in waiting]
ended_s = time.monotonic() - began_s
print("4. What cannot be cancelled\n")
print(f"   Two receives have waited for {oldest_s:.2f} s. Abort the group: {ended_s * 1e3:.0f} ms later "
      f"{sum(end.startswith('ended') for end in ends)} of 2 have ended ({', '.join(sorted(set(ends)))}).\n"
      "   NCCL's would end without a word (not measured here; the fabric's tests imitate it): hence the digest.\n")
here.abort()

# %% [markdown]
# *Why not wait longer?* Behind the receive are the blocks that it was to fill, and a request. So a watchdog looks at
# the oldest operation. When that is older than `deadline_s` it ends the *epoch*, which is these groups and all that is
# in them; the two nodes then meet again, in new groups under the next number.
#
# *Change this line:* `there.abort()` → `here.abort()`: the sender's side ends, not the one that waits. Do its receives
# end as soon?
#
# With NCCL there is one trap more: unless `TORCH_NCCL_ASYNC_ERROR_HANDLING` is 0 or 2, PyTorch's own watchdog then ends
# the *process*. So the fabric sets it, and refuses to start where the environment insists:

# %%
require_error_handling()

# %% [markdown]
# ## 5. The fabric: a stream from another process
#
# `Fabric` (see [fabric](../docs/glossary.md#fabric)) puts it together. Messages go over a link as in chapter 07, bytes
# and what is said of them (announcements, acknowledgements) through the groups. For whoever uses it, it is a
# `KVTransport` like the link: `expect` here, `open` and `put_ready` there. The other node is now another process; it
# sends what it is asked for, in pieces of 64 tokens.
#
# *Guess first:* 64 pieces of 128 KiB are ready together: how many operations would you make of them?

# %%
store = new_store()
peer = Process(STARTER, serve_streams, store.port)


class Counted(PairGroup):
    """A group that knows how many operations brought it something."""

    received = 0

    def receive(self, nbytes: int):
        Counted.received += 1
        return super().receive(nbytes)


fabric: Fabric = pair_end(store, 0, group_type=Counted)
fabric.connect(DEADLINE_S)
helper.wait_until(lambda: fabric.epoch > 0, "the first epoch")


class Blocks:
    """Where a stream arrives, and how."""

    def __init__(self, number: int):
        self.number, self.rows, self.calls = number, torch.zeros_like(cargo(number)), 0

    def write(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        self.rows[start:end] = data.view(end - start, -1)
        self.calls += 1

    @property
    def is_identical(self) -> bool:
        return torch.equal(self.rows, cargo(self.number))


def ask(number: int, pause_s: float = 0.0) -> Blocks:
    """Expect stream `number`, then ask for it: the order in which a decode node does it."""
    blocks = Blocks(number)
    fabric.expect(plan(number), blocks.write)
    fabric.send_message({"stream": number, "pause_s": pause_s})
    return blocks


def next_of(kind: type, events: EventQueue = fabric.events):
    """The next event of this kind."""
    while not isinstance(event := events.get(timeout=DEADLINE_S), kind):
        pass
    return event


first = ask(1)
done = next_of(StreamDone)
took_s = done.report.last_byte_at_s - done.report.first_byte_at_s
print("5. A stream from another process\n")
print(f"   epoch {fabric.epoch}: {human_bytes(done.report.bytes)} in {first.calls} pieces, "
      f"by {Counted.received} operations, in {took_s * 1e3:.0f} ms, at most {WINDOW} of them posted at a time;\n"
      f"   {'every byte is the same' if first.is_identical else 'the bytes are NOT the same'}.\n")

# %% [markdown]
# *Why did nobody say "go" in between?* A batch is announced, then sent: its size, its key and what is in it; and the
# next one is announced while this one is on its way. The receiver posts exactly that receive. NCCL matches operations
# by their order alone, so both sides must make the same ones in the same order; the announcements are that order. And
# what is announced needs nothing more of its sender than the send itself: a receive that waited for a sender's kernels
# could keep them from loading. Only the first batch each way goes unannounced, before any stream: NCCL connects two
# GPUs in their first operation, and whoever calls it waits until the other does too.
#
# *Change this line:* `ask(1, pause_s=0.005)`, as if a layer were computed in between. Are there more operations now?

# %% [markdown]
# ## 6. A peer is killed, and the next epoch
#
# The same stream, but in its middle the other node is killed, as `kill -9` does it. Another process then takes its
# place.
#
# *Guess first:* how long until this side knows? Which of the bytes that had arrived may be used?

# %%
second = ask(2, pause_s=0.02)
helper.wait_until(lambda: second.calls >= 8, "the eighth piece")
epoch, killed_s = fabric.epoch, time.monotonic()
peer.kill()
failed = next_of(StreamFailed)
known_s = time.monotonic() - killed_s
arrived, before = failed.arrived_end, second.rows.clone()
is_unharmed = torch.equal(second.rows[:arrived], cargo(2)[:arrived])

peer = Process(STARTER, serve_streams, store.port)
while not (restored := next_of(LinkRestored)).peer_restarted:
    pass  # on a busy machine a link may also blink
helper.wait_until(lambda: fabric.epoch > epoch, "the next epoch")
met_s = time.monotonic() - killed_s
third = ask(3)
next_of(StreamDone)
is_untouched = torch.equal(before, second.rows)
print("6. A peer is killed, and the next epoch\n")
print(table(["what happened", "s after the kill"], [
    [f"the stream failed: {failed.reason}", f"{known_s:.2f}"],
    [f"a new process is met, epoch {epoch} → {fabric.epoch}", f"{met_s:.2f}"]]))
print(f"\n   Of {STREAM_TOKENS:,} tokens {arrived:,} had arrived, and they are "
      f"{'sound' if is_unharmed else 'DAMAGED'}; nothing was written once the stream\n   had failed: "
      f"{'true' if is_untouched else 'FALSE'}. A stream of the next epoch: "
      f"{'every byte is the same' if third.is_identical else 'NOT the same'}.\n")
peer.kill()
fabric.close()

# %% [markdown]
# *How does this side know?* A killed process's connections are reset by its kernel, and the link notices. One that is
# only stopped (`SIGSTOP`), or whose machine has lost its power, says nothing: then it takes the link's `silence_s`, or
# the operation's `deadline_s`, whichever is over first.
#
# *Why an epoch, and not just a new group?* What the old process said may still be on its way. Whatever is said of an
# epoch bears its number, and what belongs to another one is not heard.
#
# *Change this line:* the first `peer.kill()` → `peer.send_signal(19)` (SIGSTOP: it stands still). How long now?

# %%
sound = [first.is_identical, third.is_identical, is_unharmed, is_untouched, noticed == 4]
print(f"{sum(sound)} of {len(sound)} promises kept. Next: tutorials/10_the_throughput_model.py, which requests should "
      "leave at all;\ntests/test_transport_fabric.py holds more of this, and between two GPUs with NCCL.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_09.py`, then `python tutorials/09_inside_a_datacenter.py --check 1`.
# 1. `digest_of`: the digest of section 3.
# 2. `batches_of`: which pieces share a batch.
#
# To go on: give `pair_end` a `Fabric(…, batch_bytes=65_536)` on both sides. What happens to the pieces, and why does
# the link refuse a pair that does not agree about it? And send in both directions at once in section 2, first through
# two groups, then through one, and abort what does not end.
