"""Chapter 14: when things break. A cut line, a damaged byte, an impostor, dead nodes; and no answer lost.

    python tutorials/14_when_things_break.py

First a link and the process at its far end; then a cluster of five processes, of which one of each kind is killed in
the middle of a request. Each answer is compared, token by token, with that of one process to which nothing happens. The
line's rate and round trip are emulated; connections, kills and recovery are real. The paper is silent here.

Modules: transport/wan/, cluster/recovery.py, cluster/journey.py
Tests: test_transport_recovery.py, test_faults.py, test_cluster_kills.py, test_cluster_life.py, test_errors.py
Paper: –
"""
import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from nodes import IDENTITY, FarEnd, LiveCluster, as_bytes, ask, cargo, plan

from minprfaas import SamplingParams, generate
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.recovery import MOST_ATTEMPTS
from minprfaas.cluster.topology import Topology
from minprfaas.config import LineConfig, LinkConfig
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.observe.tables import table
from minprfaas.transport.base import LinkRefused, StreamAborted
from minprfaas.transport.events import LinkRestored, MessageReceived
from minprfaas.transport.wan.frames import HEADER_BYTES, Frame, Header, Kind, Slot, StreamRecord
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.send_queue import SendQueue

torch.set_num_threads(1)
far = FarEnd()

# %% [markdown]
# ## 1. What must be kept, and for how long
#
# When a connection breaks, what was on it is lost, and nobody can say how much of it had arrived. So each chunk
# has a number, and stays in memory until the far end has *acknowledged* it: written into a block. After a break the
# two sides meet again (a new *epoch*), and what has no acknowledgement is sent again, under the number that it had;
# the far end takes each number once.
#
# *Guess first:* six chunks have left, two still wait. Numbers 1, 2 and 4 were acknowledged. The connection breaks:
# which leave in the next epoch, in which order?

# %%
left, acknowledged, waiting = [1, 2, 3, 4, 5, 6], {1, 2, 4}, [7, 8]
by_hand = [number for number in left if number not in acknowledged] + waiting

queue, record = SendQueue(max_inflight_bytes=2**20, now_s=0.0), StreamRecord(1)
for _ in range(8):
    frame = Frame(Header(Kind.CHUNK, stream=1, nbytes=1024), Slot(1024), record)
    queue.monitor.queued(frame.nbytes, now_s=0.0)
    queue.push_chunk(frame, now_s=0.0)
for _ in left:
    queue.pop(now_s=0.0)
for number in acknowledged:
    queue.settle(number, written=True, now_s=0.1)
queue.begin_epoch(now_s=0.2)
by_package = [queue.pop(now_s=0.3).header.seq for _ in by_hand]
print("1. What must be kept\n")
print(f"   They leave in the order {by_hand}; the package's queue: "
      f"{'the same' if by_package == by_hand else 'DIFFERENT'}. {record.resent_chunks} cross twice.\n")

# %% [markdown]
# *Why not begin the stream anew?* It may be 90% there, and it holds blocks on both sides. *What if a chunk comes that
# the far end has already?* An acknowledgement may have been lost, too. It need not remember numbers for that: it knows
# which rows of the stream's plan are in their blocks, writes none twice, and says again that they are there.
#
# *Change this line:* `acknowledged = {1, 2, 4}` → `set()`, a line whose way back was dead.

# %% [markdown]
# ## 2. A line on which something happens
#
# A stream of 2 MiB over three [lanes](../docs/glossary.md#lane), and in its middle something happens to chunk 40: its
# connection is cut, or one of its bits is flipped on the way.
#
# *Guess first:* how many chunks cross twice in each case? Must the lanes be connected anew?

# %%
TOKENS, HALF = 1024, 40
LINE, LINK = LineConfig(gbps=0.02, rtt_ms=20), LinkConfig(lanes=3, chunk_bytes=32 * 1024, timeout_s=helper.DEADLINE_S)
rows = cargo(1, TOKENS)
right = hashlib.blake2b(as_bytes(rows), digest_size=16).hexdigest()


class TroubledLane(Lane):
    """A lane on which something happens, once, to the chunk number HALF that leaves this process."""

    left, strike = 0, None
    struck_s = 0.0

    def transmit(self, tensor: torch.Tensor):
        mine = TroubledLane
        mine.left += int(tensor[5]) == Kind.CHUNK  # byte 5 of a header is its kind
        if mine.left == HALF and mine.strike is not None:
            strike, mine.strike, mine.struck_s = mine.strike, None, time.monotonic()
            tensor = strike(self, tensor)
        return super().transmit(tensor)


def nothing(lane: Lane, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def cut(lane: Lane, tensor: torch.Tensor) -> torch.Tensor:
    """The connection breaks; whatever is on it is gone."""
    lane.cut()
    return tensor


def flip_a_bit(lane: Lane, tensor: torch.Tensor) -> torch.Tensor:
    """One of the bits that are sent is not the one that was sealed."""
    damaged = tensor.clone()
    damaged[HEADER_BYTES + 1000] ^= 4
    return damaged


def send(link: Link) -> object:
    """The whole stream; returns its report."""
    stream = link.open(plan(1, TOKENS))
    stream.put(0, 0, TOKENS, rows.reshape(-1))
    return stream.finish(helper.DEADLINE_S)


lines, again, sound = [], {}, []
for what, strike in (("nothing", nothing), ("a lane is cut", cut), ("a bit is flipped", flip_a_bit)):
    TroubledLane.left, TroubledLane.strike = 0, strike
    link = far.meet(LINE, LINK, TOKENS, lane_type=TroubledLane)
    report = send(link)
    answer, _ = ask(link, "what have you got?")
    again[what] = report.resent_chunks
    sound.append(answer["answer"] == right)
    took_s, after_s = report.acked_at_s - report.first_put_at_s, report.acked_at_s - TroubledLane.struck_s
    lines.append([what, link.epoch, report.chunks, report.resent_chunks, f"{took_s:.2f} s", f"{after_s:.2f} s",
                  "identical" if sound[-1] else "DAMAGED"])
    link.close()
print("2. A line on which something happens\n")
print(table(["what happens", "epoch", "chunks", "sent again", "took", "of it after chunk 40", "bytes"], lines))
print(f"\n   Sent again: {again['a lane is cut']} after the cut, {again['a bit is flipped']} after the flipped bit.\n")

# %% [markdown]
# *Why are the two not treated alike?* A frame with a wrong payload has a header that can be believed: that one number
# is asked for again, and nothing else. A cut ends the epoch of *all* lanes, so that no late frame of an old connection
# can be taken for a new one's; all of them come back together, and what was in flight on any of them crosses twice.
#
# *Change this line:* `HEADER_BYTES + 1000` → `10`, a bit of the header. Which of the two costs does that have?

# %% [markdown]
# ## 3. The far end dies, and somebody knocks
#
# Now the process at the far end is killed (`kill -9`) in the middle of the stream. Before a new one comes, an impostor
# takes its place at the link, with a guessed secret.
#
# *Guess first:* the far end had acknowledged half of the stream. How much of it need not be sent again to the new
# process?


# %%
def kill(lane: Lane, tensor: torch.Tensor) -> torch.Tensor:
    far.kill()
    return tensor


TroubledLane.left, TroubledLane.strike = 0, kill
link = far.meet(LINE, LINK, TOKENS, lane_type=TroubledLane)
stream = link.open(plan(1, TOKENS))
stream.put(0, 0, TOKENS, rows.reshape(-1))
helper.wait_until(lambda: TroubledLane.strike is None, "the kill")
impostor = Link(link.name, far.store, 1, LINK, replace(IDENTITY, secret=b"a guess"))
try:
    impostor.connect(helper.DEADLINE_S)
    met = "was let in, which is NOT right"
except LinkRefused as error:
    met = f"is refused ({error})"
far.start_again()
try:
    stream.finish(helper.DEADLINE_S)
    ended = "did NOT end"
except StreamAborted as error:
    ended = f"ended: {error}"
heard = []
while not heard or not isinstance(heard[-1], MessageReceived):  # "ready", from the new process
    heard.append(link.receive(helper.DEADLINE_S))
is_known_as_new = any(isinstance(event, LinkRestored) and event.peer_restarted for event in heard)
returned_s = time.monotonic() - TroubledLane.struck_s
report = send(link)
answer, _ = ask(link, "what have you got?")
sound.append(answer["answer"] == right)
link.close()
far.kill()
print("3. The far end dies, and somebody knocks\n")
print(f"   The impostor {met}.\n   The stream {ended}.\n"
      f"   {returned_s:.1f} s after the kill a new process is there, known as "
      f"{'new' if is_known_as_new else 'NOT new'}.\n"
      f"   The stream is sent again, all {report.chunks} chunks: {'identical' if sound[-1] else 'DAMAGED'}.\n")

# %% [markdown]
# *Why nothing of it?* What was acknowledged lay in the dead process's memory. The handshake tells a peer that returned
# from a new one (each process draws an *incarnation*), and then the link ends its streams: who sends must decide anew.
#
# *Change this line:* leave out `far.start_again()`, with `LinkConfig(…, timeout_s=5)`. How does `finish` end, and when?

# %% [markdown]
# ## 4. A cluster: one of each kind is killed
#
# `prfaas-0` prefills there; here are `pd-0`, which prefills, `pd-1` and `pd-2`, which decode, and the front end in this
# process. A request runs; when it has come as far as the table says, the node that works for it is killed.
#
# *Guess first:* three requests lose their PD-D, their PrfaaS node, their PD-P. How many of the three clients get a
# wrong token, or one twice? And how many seconds is the longest silence?

# %%
THRESHOLD, ANSWER = 512, SamplingParams(max_tokens=30, ignore_eos=True)
PATIENCE_S = 2.0  # for a link that has broken to come back
cluster = LiveCluster(Topology(prfaas=1, pd=3, split=1), THRESHOLD, LINE, PATIENCE_S)
cluster.wait_for(*(node.name for node in cluster.nodes))
silences_s: list[float] = []


def nobody(journey: Journey) -> str | None:
    """Whom to kill, now that the request has come so far; None: wait."""
    return None


def who_decodes(journey: Journey) -> str | None:
    """In the middle of the answer."""
    return journey.decision.decode_node if len(journey.output_ids) >= 12 else None


def who_prefills(journey: Journey) -> str | None:
    """When a chunk is computed, and from a PrfaaS node some of its KVCache has crossed."""
    if not journey.prefilled_tokens or (journey.route == "prfaas" and not journey.received_bytes):
        return None
    return journey.decision.node


def serve(tokens: int, whom: Callable[[Journey], str | None]) -> tuple[Journey, list]:
    """One request, and what its client saw; on the way a node is killed. Returns its journey and a table's line."""
    document = make_document(EVALUATION_SEEDS + tokens, tokens, cluster.tokenizer.encode)
    prompt = cluster.tokenizer.encode(document.prompt(document.questions[0]))
    journey = cluster.front.submit(f"document of {tokens}", prompt, ANSWER)
    seen: list[tuple[float, int]] = []  # when the client got which token
    victim, killed_s, before, first_route = None, 0.0, 0, ""
    while cluster.front.has_work:
        cluster.step()
        seen += [(time.monotonic(), update.token_id) for update in cluster.front.take_updates()
                 if update.token_id is not None]
        first_route = first_route or journey.route
        if victim is None and journey.decision is not None and (victim := whom(journey)) is not None:
            cluster.kill(victim)
            killed_s, before = time.monotonic(), len(seen)
    if journey.error is not None:
        raise journey.error
    (alone,) = generate(cluster.model, cluster.tokenizer, [prompt], ANSWER)
    if victim is not None and before < len(seen):
        silences_s.append(seen[before][0] - killed_s)
        silence = f"{silences_s[-1]:.2f} s"
    else:
        silence = "–"
    sound.append(journey.output_ids == alone.token_ids and [token for _, token in seen] == journey.output_ids)
    return journey, [victim or "nobody", f"{journey.prompt_tokens:,}", f"{first_route} → {journey.route}",
                     journey.attempts, before, silence, f"{seen[-1][0] - journey.arrived_at_s:.2f} s",
                     "each once" if [token for _, token in seen] == journey.output_ids else "BROKEN",
                     "identical" if journey.output_ids == alone.token_ids else "DIFFERENT"]


_, undisturbed = serve(640, nobody)
_, without_decoder = serve(641, who_decodes)
offloaded, without_prfaas = serve(642, who_prefills)
cluster.start("prfaas-0")  # it returns, as a new process
cluster.wait_for("prfaas-0")
local, without_pdp = serve(THRESHOLD, who_prefills)
cluster.close()
print("4. A cluster: one of each kind is killed\n")
print(table(["killed", "tokens", "route", "attempts", "drawn before", "silence", "all", "tokens seen", "answer"],
            [undisturbed, without_decoder, without_prfaas, without_pdp]))
print(f"""
   silence: from the kill to the next token that the client got. prfaas-0 had returned when the last one was killed.
   Of the third request the front end says: {offloaded.fallback!r}.
   The last was routed anew: {local.reason}.
   The longest silence took {max(silences_s):.1f} s, where a link that has broken is given {PATIENCE_S:g} s to come back.
""")

# %% [markdown]
# *Why does nobody see a wrong token?* When a PD-D dies, the KVCache of its requests is lost. The tokens that the client
# has become part of the prompt: it is prefilled again, best by a node that has the prefix cached, and another PD-D
# draws the next token. It is the same token, because a draw depends on the token's number in the answer and not on the
# node (chapter 05). When a prefill node dies, only work is lost.
#
# *Why is not even a part of the broken stream used?* A dense model would go on after the last full block that arrived.
# This hybrid needs the state of its linear layers as well, and that comes last (chapter 08).
#
# *What are the seconds of silence?* A connection that breaks may come back (section 2), so a link waits before its peer
# counts as dead; only then is the request routed anew, and prefilled. The fabric between two PD nodes does not wait: its
# streams fail with the connection (chapter 09), and the decode node reports the lost prefill at once.
#
# *And if it goes on dying?* An *attempt* is one pair of nodes; nodes that failed a request are avoided, and after 64
# attempts (`MOST_ATTEMPTS`) it ends in an error that says so. No request disappears.
#
# *Change this line:* `Topology(prfaas=1, pd=3, split=1)` → `pd=2`, so that there is only one PD-D. What does the second
# request wait for?

# %%
worst = max(journey.attempts for journey in (offloaded, local))
print(f"{sum(sound)} of {len(sound)} streams and answers are what they are when nothing happens; "
      f"at most {worst} attempts of {MOST_ATTEMPTS}.\nNext: tutorials/15_the_road_to_production.py.")

# %% [markdown]
# ### Exercises
# Write the functions of `tutorials/exercises/ex_14.py`, then `python tutorials/14_when_things_break.py --check 1`.
# 1. `leaves_next`: what leaves in a new epoch, and in which order.
# 2. `resume_tokens`: after how many tokens a prefill can begin when a stream broke off.
