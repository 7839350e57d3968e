"""Chapter 14: when things break. A cut line, a damaged byte, an impostor and a dead datacenter, and no answer lost.

    python tutorials/14_when_things_break.py

Datacenter A, another process, prefills long documents; datacenter B, this process, decodes. While requests run, things
break: a line, and a datacenter of one node; then, in a cluster of five processes, one node of each kind. Each answer
is compared, token by token, with that of one process to which nothing happens. The line's rate and round trip are
emulated; the connections, the kills and the recovery are real. The paper is silent here.
"""

import helper

if __name__ == "__main__":
    helper.begin(__doc__)

import functools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from nodes import LiveCluster
from torch.distributed import TCPStore

from minprfaas import SamplingParams, generate, load
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.launch import link_identity
from minprfaas.cluster.processes import PRFAAS, Process, control_settings, pd_process, prfaas_process
from minprfaas.cluster.topology import Topology
from minprfaas.config import CacheConfig, LineConfig, LinkConfig
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.engine import Engine
from minprfaas.observe.report import human_bytes, table
from minprfaas.scheduling.control import ControlPlane
from minprfaas.transport import LinkDown
from minprfaas.transport.wan.frames import HEADER_BYTES, Kind
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

TOKENS, GREEDY = 1536, SamplingParams(max_tokens=12)
THRESHOLD, LONG_ANSWER = 512, SamplingParams(max_tokens=30, ignore_eos=True)
LINE = LineConfig(gbps=0.02, rtt_ms=20)
LINK = LinkConfig(lanes=3, chunk_bytes=32 * 1024, timeout_s=30)
HALF = 30  # chunks, of about 60
SECRET = "a secret that both datacenters were given"
MANY_HEADERS = ["killed", "tokens", "route", "attempts", "drawn before", "silence", "all", "tokens seen", "answer"]
HEADERS = ["what happens", "route", "epoch", "KV arrived", "chunks twice", "TTFT", "trouble to first token", "answer"]


def engines(count: int) -> list[Engine]:
    """The embedded model, and an engine with a pool of its own for each role."""
    torch.set_num_threads(1)
    model, tokenizer = load()
    return [Engine(model, tokenizer, CacheConfig(num_blocks=400), prefill_chunk=256) for _ in range(count)]


def end_of_link(store: TCPStore, rank: int, engine: Engine, events: queue.SimpleQueue, lane_type=Lane) -> Link:
    """What both datacenters have: one end of the link, over a line that is emulated on the way out."""
    identity = link_identity(engine.model, engine.layout)
    return Link("a-b", store, rank, LINK, identity, line=EmulatedLine(LINE), events=events, lane_type=lane_type)


def datacenter_a(port: int, turn: str) -> None:
    """A prefill node; the second one is a spare that waits until the first is dead."""
    logging.disable(logging.WARNING)
    (engine,), events = engines(1), queue.SimpleQueue()
    store = TCPStore("127.0.0.1", port, None, False)
    link = end_of_link(store, 0, engine, events)
    store.get(turn)  # waits for it
    link.connect(deadline_s=60)
    prfaas_process(engine, link, events, transfer_deadline_s=60).serve()
    link.close()


class Line:
    """What all lanes of B lead through: looks at every chunk that arrives, and once does something to it."""

    def watch(self, trouble=None) -> None:
        """Start counting; `trouble(lane, slot)` happens to chunk number `HALF`."""
        self.trouble, self.chunks, self.bytes, self.twice, self.struck_s = trouble, 0, 0, 0, None
        self._seen: set[tuple] = set()

    def pass_on(self, lane: Lane, slot) -> None:
        header = lane.codec.open(slot.view)
        if header.kind != Kind.CHUNK:
            return
        self.chunks, self.bytes = self.chunks + 1, self.bytes + header.nbytes
        place = (header.stream, header.layer, header.start, header.offset)
        self.twice += place in self._seen
        self._seen.add(place)
        if self.chunks == HALF and self.trouble is not None:
            self.struck_s = time.monotonic()
            self.trouble(lane, slot)


class WatchedLane(Lane):
    """A lane that shows the line what arrives before it is handled."""

    def __init__(self, line: Line, *arguments):
        self.line = line
        super().__init__(*arguments)

    def receive_frames(self, handle):
        def look_first(lane, slot):
            self.line.pass_on(lane, slot)
            handle(lane, slot)

        super().receive_frames(look_first)


def serve(local: Process, line: Line, seed: int, trouble=None) -> tuple:
    """One long request, in whose middle `trouble` strikes; returns its journey and whether the answer is right."""
    engine = local.decode.engine
    document = make_document(EVALUATION_SEEDS + seed, TOKENS, engine.tokenizer.encode)
    prompt = engine.tokenizer.encode(document.prompt(document.questions[0]))
    line.watch(trouble)
    journey = local.front.submit(f"document {seed}", prompt, GREEDY)
    local.run()
    (alone,) = generate(engine.model, engine.tokenizer, [prompt], GREEDY)
    return journey, journey.output_ids == alone.token_ids


def row(what: str, local: Process, line: Line, journey, same: bool) -> list:
    """One line of a table."""
    after = "–" if line.struck_s is None else f"{journey.first_token_at_s - line.struck_s:.2f} s"
    return [what, journey.route, local.links[PRFAAS].epoch, human_bytes(line.bytes), line.twice,
            f"{journey.ttft_s:.2f} s", after, "identical" if same else "DIFFERENT"]


def cut(lane: Lane, slot) -> None:
    """The connection breaks; whatever is on it is gone."""
    lane.cut()


def flip_a_bit(lane: Lane, slot) -> None:
    """One of the bits that arrived is not the one that was sent."""
    slot.view[HEADER_BYTES + 1000] ^= 4


def impostor(store: TCPStore, identity) -> None:
    """Takes the dead node's place at the link, with a guessed secret."""
    try:
        Link("a-b", store, 0, LINK, replace(identity, secret=b"a guess")).connect(deadline_s=10)
        print("   an impostor with a guessed secret was let in")
    except LinkDown as error:
        print(f"   an impostor with a guessed secret knocks first, and is refused: {error}\n")


# Many nodes


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


def stream_of(cluster: LiveCluster, tokens: int, whom: Callable[[Journey], str | None]) -> tuple[Journey, list]:
    """One request, and what its client saw; on the way a node is killed. Returns its journey and a table's line."""
    document = make_document(EVALUATION_SEEDS + tokens, tokens, cluster.tokenizer.encode)
    prompt = cluster.tokenizer.encode(document.prompt(document.questions[0]))
    journey = cluster.front.submit(f"document of {tokens}", prompt, LONG_ANSWER)
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
    (alone,) = generate(cluster.model, cluster.tokenizer, [prompt], LONG_ANSWER)
    silence = f"{seen[before][0] - killed_s:.2f} s" if victim and before < len(seen) else "–"
    return journey, [victim or "nobody", f"{journey.prompt_tokens:,}", f"{first_route} → {journey.route}",
                     journey.attempts, before, silence, f"{seen[-1][0] - journey.arrived_at_s:.2f} s",
                     "each once" if [token for _, token in seen] == journey.output_ids else "BROKEN",
                     "identical" if journey.output_ids == alone.token_ids else "DIFFERENT"]


def many_nodes() -> list[list]:
    """A PD-D, the PrfaaS node and the PD-P are killed, one after the other; returns the table's lines."""
    print("3. Many nodes: one of each kind is killed in the middle of a request\n")
    cluster = LiveCluster(Topology(prfaas=1, pd=3, split=1), THRESHOLD, LINE)
    cluster.wait_for(*(node.name for node in cluster.nodes))
    _, undisturbed = stream_of(cluster, 640, nobody)
    _, without_decoder = stream_of(cluster, 641, who_decodes)
    offloaded, without_prfaas = stream_of(cluster, 642, who_prefills)
    cluster.start("prfaas-0")  # it returns, as a new process
    cluster.wait_for("prfaas-0")
    local, without_pdp = stream_of(cluster, THRESHOLD, who_prefills)
    rows = [undisturbed, without_decoder, without_prfaas, without_pdp]
    print(table(MANY_HEADERS, rows))
    print(f"""
   silence: from the kill to the next token that the client got. prfaas-0 had returned when the last one was killed.
   Of the third request the front end says: {offloaded.fallback!r}.
   The last was routed anew: {local.reason}.

   A PD-D takes the KVCache of its requests along. The tokens that the client has are then part of the prompt, which
   is prefilled again, by whoever has its prefix cached, and another PD-D draws the next token. It is the same one: a
   draw depends on the token's number in the answer, not on the node. A prefill node takes nothing along but work.
""")
    cluster.close()
    return rows


def main() -> None:
    os.environ["MINPRFAAS_SECRET"] = SECRET
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    first, spare = [context.Process(target=datacenter_a, args=(store.port, turn), daemon=True)
                    for turn in ("first's turn", "spare's turn")]
    with helper.out_of_reach_of_the_keyboard():
        first.start()
        spare.start()
    store.set("first's turn", "")
    (prefill_engine, engine), events = engines(2), queue.SimpleQueue()
    line = Line()
    link = end_of_link(store, 1, engine, events, functools.partial(WatchedLane, line))
    link.connect(deadline_s=60)
    plane = ControlPlane(control_settings(512, LINE.gbps, engine.layout))
    local = pd_process(prefill_engine, engine, {PRFAAS: link}, events, plane, deadline_s=60)
    local.run_until(lambda: PRFAAS in local.front.ready, deadline_s=60)
    print(f"Documents of {TOKENS:,} tokens are prefilled in A; their KVCache crosses {LINK.lanes} lanes of a line of "
          f"{LINE.gbps * 1e3:g} Mbps,\n{LINE.rtt_ms:g} ms round trip (emulated), to B, where trouble strikes "
          f"at chunk {HALF}.\n")

    print("1. A line on which something happens\n")
    rows = [row("nothing", local, line, *serve(local, line, 0))]
    rows.append(row("a lane is cut", local, line, *serve(local, line, 1, cut)))
    rows.append(row("a bit is flipped", local, line, *serve(local, line, 2, flip_a_bit)))
    print(table(HEADERS, rows))
    print("""
   A cut ends the epoch: all lanes come back together under the next one and go on after the last acknowledged chunk,
   so only what was in flight crosses twice. A flipped bit costs one chunk: its digest is wrong, and it is sent again.
""")

    print("2. A is killed (SIGKILL), an impostor takes its place, and then a true spare comes\n")

    def succession():
        impostor(store, link_identity(engine.model, engine.layout))
        store.set("spare's turn", "")

    def kill(lane, slot):
        os.kill(first.pid, signal.SIGKILL)
        threading.Thread(target=succession, daemon=True).start()

    journey, same = serve(local, line, 3, kill)
    rows = [*rows, row("A is killed", local, line, journey, same)]
    local.run_until(lambda: PRFAAS in local.front.ready, deadline_s=60)  # the spare has introduced itself
    rows.append(row("nothing, by the spare", local, line, *serve(local, line, 4)))
    print(table(HEADERS, rows[3:]))
    print(f"""
   B says: {journey.fallback!r}. The request went by the route {journey.route} in the end. A dense model would have gone on
   from the last full block that arrived; this hybrid needs the state of its linear layers too, which comes last.
""")
    local.shut_down(deadline_s=10)
    link.close()
    engine.kvcache.check()
    stats = engine.kvcache.stats()
    print(f"   Of B's {stats.total} blocks {stats.free} are free, {stats.cached} cached and {stats.in_use} in use.\n")
    rows += many_nodes()
    right = sum(row[-1] == "identical" for row in rows)
    print(f"{right} of {len(rows)} answers are identical to those of one process to which nothing happened. "
          "Next: bash scripts/demo.sh, all of it at once.")


if __name__ == "__main__":
    main()
