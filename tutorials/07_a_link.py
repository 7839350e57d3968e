"""Chapter 07: a link between two processes. What carries KVCache when two datacenters share nothing but a line.

    python tutorials/07_a_link.py

The far end is another process (tutorials/nodes.py). The line's rate, round trip and weather are emulated; processes,
connections, frames and handshake are real.

Modules: transport/base.py, transport/events.py, transport/loopback.py, transport/wan/
Tests: test_transport_seam.py, test_transport_frames.py, test_transport_line.py, test_transport_link.py,
       test_transport_lanes.py, test_transport_handshake.py, test_transport_monitor.py, test_transport_binding.py,
       test_transport_messages.py, test_transport_shared_line.py, test_transport_inbox.py, test_transport_outbox.py,
       test_transport_gpu.py
Paper: 3.3
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import hashlib
import statistics
import struct
import time

import torch
from nodes import ROW_BYTES, FarEnd, as_bytes, ask, cargo, plan

from minprfaas.config import LineConfig, LinkConfig, WeatherChange
from minprfaas.observe.tables import human_bytes, table
from minprfaas.transport.base import LinkRefused, StreamAborted
from minprfaas.transport.events import StreamDone
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.wan.digest import Digest, row_sums
from minprfaas.transport.wan.frames import HEADER_BYTES, Codec, FrameError, Header, Kind, Slot
from minprfaas.transport.wan.line import EmulatedLine

torch.set_num_threads(1)
far = FarEnd()

# %% [markdown]
# ## 1. What a transport is
#
# KVCache moves in [streams](../docs/glossary.md#stream). Before a byte moves, both ends hold the same *plan*: which
# layers, which tokens, how many bytes a row. Who receives says `expect(plan, sink)`, who sends `open(plan)`, then
# `put` for each piece, then `finish`. Nothing but what the plan says can arrive. In one process that is all of it:
# `Loopback`.
#
# *Guess first:* a piece twice, a piece of a layer that is not in the plan, a piece whose bytes are too few, an end
# before everything was put: how many of the four does it refuse?

# %%
TOKENS = 1024  # of 2 KiB: 2 MiB
rows = cargo(1, TOKENS)


def refused(call, *arguments) -> bool:
    """Whether a call raises, as it should."""
    try:
        call(*arguments)
    except (ValueError, StreamAborted):
        return True
    return False


transport, landed = Loopback(), torch.zeros_like(rows)
transport.expect(plan(1, TOKENS), lambda layer, start, end, data: landed[start:end].copy_(data.view(end - start, -1)))
stream = transport.open(plan(1, TOKENS))
half = rows[:512].reshape(-1)
stream.put(0, 0, 512, half)
mistakes = {"a piece twice": refused(stream.put, 0, 0, 512, half),
            "a layer that is not in the plan": refused(stream.put, 5, 512, 1024, half),
            "too few bytes": refused(stream.put, 0, 512, 1024, half[:-1].contiguous()),
            "the end too soon": refused(stream.finish, 1.0)}
stream.put(0, 512, 1024, rows[512:].reshape(-1))
report, event = stream.finish(deadline_s=1.0), transport.events.get(timeout=1.0)
print("1. What a transport is\n")
print(table(["mistake", "refused"], [[what, "yes" if was else "NOT"] for what, was in mistakes.items()]))
print(f"\n   Then the rest: {human_bytes(report.bytes)} in {report.chunks} pieces, "
      f"{'every byte is the same' if torch.equal(landed, rows) else 'the bytes are DIFFERENT'}, and the event "
      f"{'StreamDone' if isinstance(event, StreamDone) else 'is NOT StreamDone'}.\n")

# %% [markdown]
# *Why so strict in one process?* Because the same rules hold when the sender is somewhere else and cannot be trusted,
# and a node should not have to know which transport it has. `Link` below and chapter 09's `Fabric` have the same four
# calls.
#
# *Change this line:* leave out the second `put`. What does `finish` say?

# %% [markdown]
# ## 2. A line: rate and delay
#
# What lies between two datacenters is a [line](../docs/glossary.md#line): a rate (how many bits may enter in a second)
# and a round trip (how long until an answer can come). A laptop has neither, so both are imposed on the sender: a frame
# enters when the line is free, and arrives when its last bit would have, half a round trip later.
#
#     free = max(free, now) + bytes / rate          arrives = free + round trip / 2
#
# *Guess first:* 2 MiB in chunks over 100 Mbps, 80 ms round trip. When is the last byte acknowledged? How much of that
# is because of the round trip: each chunk's 80 ms, or 80 ms once?

# %%
config = LineConfig(gbps=0.1, rtt_ms=80)
line, chunk = EmulatedLine(config), 64 * 1024
line.begin(now_s=0.0)
free_s, by_hand, by_package = 0.0, [], []
for number in range(len(rows) * ROW_BYTES // chunk):
    free_s = max(free_s, 0.0) + chunk * 8 / (config.gbps * 1e9)
    by_hand.append(free_s + config.rtt_ms / 2e3)
    by_package.append(line.carry(chunk, queued_at_s=0.0, now_s=0.0))
line.close()
differs_s = max(abs(a - b) for a, b in zip(by_hand, by_package))
print("2. A line\n")
print(f"   {len(by_hand)} chunks: the first arrives after {by_hand[0] * 1e3:.0f} ms, the last after "
      f"{by_hand[-1] * 1e3:.0f}, and its acknowledgement {config.rtt_ms / 2:.0f} ms later.\n"
      f"   Two lines of arithmetic and `EmulatedLine`: {'the same' if differs_s < 1e-9 else 'DIFFERENT'}.\n")

# %% [markdown]
# *Why only once?* Nobody waits for an acknowledgement before the next chunk leaves. Up to 16 MiB (`max_inflight_bytes`)
# may be on their way; only what does not fit waits.
#
# *Change this line:* let each chunk wait for the acknowledgement of the one before: `free_s = by_hand[-1] + 0.04`. That
# is what a protocol costs that asks after each piece.

# %% [markdown]
# ## 3. The link
#
# `Link` puts it together between two processes: *lanes* (connections, of which a chunk takes whichever is free),
# frames, acknowledgements, messages that overtake chunks. Both sides meet through a store of addresses.
#
# *Guess first:* a stream of 2 MiB over each of the lines below: what part of the line's rate remains? And how long does
# an empty message and its answer take where the round trip is 0?

# %%
LINES = [LineConfig(gbps=0.02), LineConfig(gbps=0.1), LineConfig(gbps=0.1, rtt_ms=80), LineConfig(gbps=0.5, rtt_ms=20),
         LineConfig()]
LANES = [1, 1, 1, 4, 4]
sent_hash = hashlib.blake2b(as_bytes(rows), digest_size=16).hexdigest()
results, goodputs, extras_ms, adding_up_ms, sound = [], [], [], [], []
for line, lanes in zip(LINES, LANES):
    link = far.meet(line, LinkConfig(lanes=lanes), TOKENS)
    pings_ms = [ask(link, "are you there?")[1] * 1e3 for _ in range(5)]
    stream = link.open(plan(1, TOKENS))
    stream.put(0, 0, TOKENS, rows.reshape(-1))
    report = stream.finish(deadline_s=helper.DEADLINE_S)
    answer, took_s = ask(link, "what have you got?")
    link.close()
    acked_ms = (report.acked_at_s - report.first_put_at_s) * 1e3
    mbps = report.bytes * 8e-3 / (acked_ms - line.rtt_ms)  # the round trip is delay, not rate
    goodputs += [mbps / (line.gbps * 1e3)] if line.gbps else []
    extras_ms.append(statistics.median(pings_ms) - line.rtt_ms)
    adding_up_ms.append(answer["took_s"] * 1e3)
    sound.append(answer["answer"] == sent_hash)
    results.append([f"{line.gbps * 1e3:g} Mbps" if line.gbps else "no limit", f"{line.rtt_ms:g} ms", lanes,
                    f"{mbps:,.1f} Mbps", f"{acked_ms:,.0f} ms", f"{statistics.median(pings_ms):.1f} ms",
                    f"{took_s * 1e3:.0f} ms", f"{answer['took_s'] * 1e3:.0f} ms",
                    "identical" if sound[-1] else "DAMAGED"])
print("3. The link\n")
print(table(["rate", "round trip", "lanes", "goodput", "last ack", "empty message", "\"what have you got?\"",
             "of it hashing", "bytes"], results))
hashing_ms = statistics.median(adding_up_ms)
extra_ms = f"{min(extras_ms):.1f} to {max(extras_ms):.1f} ms"
print(f"""
   Rate and round trip are emulated. Where there is a rate, {min(goodputs):.0%} to {max(goodputs):.0%} of it remain.
   An empty message and its answer take the round trip and {extra_ms} besides. "What have you got?"
   makes the far end hash 2 MiB before it answers: {hashing_ms:.0f} ms (median) that the line has no part in.
""")

# %% [markdown]
# *Where does the rest of the rate go?* To headers (80 bytes a chunk) and acknowledgements; and above some hundred Mbps
# to this machine, which plays both datacenters: it hashes each byte twice and copies it several times. Run this chapter
# while something else computes, and the first thing to suffer is the goodput of the fast lines, not of the slow ones.
#
# *Why several lanes?* One connection seldom fills a long line, because TCP's window and its recovery from loss are each
# connection's own. Others have measured 14.7 Gbps with a pool of 4 to 8 connections between two sites, and 3.6 with one
# (HarshavardhanK/Mooncake, 2026). The emulated line has no loss, so here it cannot show.
#
# *Change this line:* `LinkConfig(lanes=lanes)` → `LinkConfig(lanes=lanes, max_inflight_bytes=256 * 1024)`. Which line
# suffers? (What fits on a line is its rate times its round trip.)

# %% [markdown]
# ## 4. A frame: a fixed header, then raw bytes
#
# No pickle, nothing to execute, nothing to believe: a header of numbers, with a *tag* over all of them and a *digest*
# over the bytes behind it. Both are keyed hashes, made with a key that the handshake left on both sides.
#
# *Guess first:* one bit of the header is flipped on the way; any one. How many of the 640 such damages go unnoticed?
# And what if a bit of the payload is flipped?

# %%
KEY = b"k" * 32
codec, slot = Codec(payload_limit=64, send_key=KEY, receive_key=KEY), Slot(64)
header = Header(Kind.CHUNK, seq=7, stream=1, layer=3, group=0, start=64, end=128, nbytes=64)
codec.seal(header, slot.view)
read = codec.open(slot.view)


def is_noticed(bit: int) -> bool:
    """Whether a frame with this bit flipped is refused; afterwards the bit is as it was."""
    slot.view[bit // 8] ^= 1 << bit % 8
    try:
        return not codec.payload_is_intact(codec.open(slot.view), slot.view)
    except FrameError:
        return True
    finally:
        slot.view[bit // 8] ^= 1 << bit % 8


in_header = sum(is_noticed(bit) for bit in range(HEADER_BYTES * 8))
in_payload = sum(is_noticed(bit) for bit in range(HEADER_BYTES * 8, (HEADER_BYTES + 64) * 8))
(seq,) = struct.unpack_from("<Q", slot.view, 28)  # the header is plain numbers: this is where the sequence number lies
by_hand = hashlib.blake2b(bytes(slot.view[HEADER_BYTES:HEADER_BYTES + 64]), key=KEY, digest_size=16).digest()
same = by_hand == Digest(KEY, row_sums(KEY, False)).of(slot.view[HEADER_BYTES:HEADER_BYTES + 64]) == read.payload_digest
print("4. A frame\n")
print(f"   {HEADER_BYTES} bytes say: {read.kind.name} {read.seq} of stream {read.stream}, layer {read.layer}, "
      f"tokens {read.start}-{read.end}, {read.nbytes} bytes follow.\n"
      f"   `struct` reads {'the same' if seq == read.seq else 'a DIFFERENT'} number at byte 28, and the digest is "
      f"{'a' if same else 'NOT a'} keyed BLAKE2b.\n"
      f"   Flipped one by one: {in_header} of the header's {HEADER_BYTES * 8} bits are noticed, {in_payload} of the "
      f"payload's {64 * 8}.\n")

# %% [markdown]
# *Why are header and payload told apart?* A wrong payload has a sequence number that can be believed: it is asked for
# again. A wrong header says nothing about where the next frame begins: that connection is cut, and all that was not
# acknowledged is sent again on a new one (chapter 14).
#
# *Who computes them?* Of long data a digest covers sums, one set for each 16 KiB, and those are exact integers, the
# same whoever adds them up. So bytes that lie on a GPU are summed there (`transport/wan/gpu_sums.py`): on 16 cores
# eight lanes then carry 12.0 GB/s from GPU to GPU where they carried 9.5. What they wait for after that is Python's one
# interpreter, some twenty times a chunk: in chunks of 32 MiB instead of 16 they carry 15 GB/s.
#
# *Change this line:* `key=KEY` → `key=b"guessed"`. Without the key nobody can make a digest that fits.

# %% [markdown]
# ## 5. A peer without the secret
#
# Whoever reaches the port can knock. In the handshake both sides prove, by a hash over everything that was said so far,
# that they hold the same secret, and compare what model they mean; only then does a frame cross.
#
# *Guess first:* why it was refused, which model is here, how many lanes there are: how many of the three does an
# impostor learn?

# %%
try:
    far.meet(LineConfig(), LinkConfig(), TOKENS, guess=b"a guess")
    verdict = "an impostor was NOT refused"
except LinkRefused as error:
    verdict = f"Our log: {str(error)!r}"
print("5. A peer without the secret\n")
print(f"   {verdict}. The impostor learns only that it was refused.\n")

# %% [markdown]
# *Why does the model matter?* KVCache of one model is noise to another of the same shapes. So the fingerprint of
# weights and configuration is compared, and a link between two models is refused before a byte could land in a block.
#
# *Change this line:* `guess=b"a guess"` → the right secret, `nodes.SECRET`. What does `far.meet` return?

# %% [markdown]
# ## 6. Weather
#
# *Guess first:* 100 Mbps; after 1 s only 30; after 2 s nothing for a second; then 200. Someone keeps putting. How many
# MB wait at most?

# %%
WEATHER = (WeatherChange(1.0, gbps=0.03), WeatherChange(2.0, stall_s=1.0), WeatherChange(3.0, gbps=0.2))
MANY = 32 * TOKENS
link = far.meet(LineConfig(gbps=0.1, rtt_ms=10, weather=WEATHER), LinkConfig(), MANY)
began_s, stream, piece = time.monotonic(), link.open(plan(1, MANY)), rows[:64].reshape(-1)
for start in range(0, MANY, 64):
    if time.monotonic() > began_s + 3.8:
        break
    stream.put(0, start, start + 64, piece)  # holds back when too much is queued or on its way
samples = [sample for sample in link.stats().samples if sample.at_s > began_s]
stream.abort()
link.close()
print("6. Weather\n")
print(table(["second", "egress", "queued + in flight", "acknowledged after"], [
    [f"{sample.at_s - began_s:.2f}", f"{sample.gbps * 1e3:.1f} Mbps",
     f"{(sample.queued_bytes + sample.inflight_bytes) / 1e6:.2f} MB", f"{sample.ack_delay_s * 1e3:.0f} ms"]
    for sample in samples]))
most = max(sample.queued_bytes + sample.inflight_bytes for sample in samples)
limit = LinkConfig().max_inflight_bytes
within = "within" if most <= limit else "NOT within"
print(f"\n   Rate, delay, stall: emulated. At most {most / 1e6:.1f} MB were queued or on their way,\n"
      f"   {within} the window of {limit / 1e6:.1f} MB.\n")

# %% [markdown]
# *Why hold back who puts?* What was put must be kept until it is acknowledged, so that it can be sent again. Without a
# window a stalled line would fill the sender's memory. And it is the sending *thread* that waits, not the model's: the
# forward pass goes on (chapter 08).
#
# *What are these samples for?* They are what the monitor of chapter 11 reads, and the loop of chapter 12 follows.
#
# *Change this line:* `stall_s=1.0` → `stall_s=40.0`, with a `LinkConfig(timeout_s=5)`. What does `put` raise, and when?

# %%
print(f"{sum(sound)} of {len(sound)} streams arrived as they were sent. Next: tutorials/08_layerwise_streaming.py, "
      "which hides them behind prefill.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_07.py`, then `python tutorials/07_a_link.py --check 1`.
# 1. `arrivals_s`: when each frame arrives at the far end of a line.
# 2. `chunks_on_their_way`: how many must be allowed, so that a line is never idle.
# 3. `uncovered`: what of a stream is still missing, given the pieces that came.
