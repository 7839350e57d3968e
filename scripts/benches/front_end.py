"""How many requests a second one front end routes, and how long one decision takes, with stubs in the nodes' place.

`python scripts/bench.py front_end [--nodes N] [--requests N] [--tokens N]`. Everything is in one process on one core:
the front end, its control plane, the messages as JSON both ways, and the stubs, which answer at once and compute
nothing. Times are CPU time, the stubs' counted apart: other programs take none of it. A prompt is written when its
client comes, and that is not counted. Chapter 13; paper 3.3.
"""

import gc
import json
import random
import time

from benches import at_least_one
from minprfaas.cluster import messages
from minprfaas.cluster.envelope import Envelope, decode, encode
from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Node
from minprfaas.cluster.processes import COLLECT_AFTER
from minprfaas.config import FRONT, Role, SamplingParams
from minprfaas.errors import ArgumentParser
from minprfaas.kvcache.ledger import chain_keys
from minprfaas.observe.tables import table
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.transport.events import EventQueue, MessageReceived

GOAL_RPS, GOAL_P99_MS = 500.0, 1.0
BLOCK_TOKENS, THRESHOLD, VOCABULARY = 64, 1024, 1216
SHARED = 256  # prefixes that prompts begin with, each cached by a few nodes
BURST = 32  # requests that are under way at once
PARAMS = SamplingParams(max_tokens=8)


class Stub:
    """The link to a node, and the node: what it is sent is read, and what a node would answer is there at once."""

    def __init__(self, name: str, events: EventQueue):
        self.name, self._events, self.cpu_s = name, events, 0.0

    def send_message(self, raw: dict) -> None:
        """See `MessageChannel.send_message`."""
        text, began_s = json.dumps(raw), time.thread_time()
        message = decode(json.loads(text)).message
        if isinstance(message, messages.Serve):
            tokens = len(message.token_ids)
            self.say(messages.Prefilled(message.id, tokens, 0.001, 0))
            self.say(messages.Started(message.id, 0, 0, 0.0, 0.001, 0.0, 0.0))
            for number in range(PARAMS.max_tokens):
                is_last = number == PARAMS.max_tokens - 1
                self.say(messages.TokenDrawn(message.id, 7, " word", "length" if is_last else "",
                                             "max_tokens" if is_last else ""))
        self.cpu_s += time.thread_time() - began_s

    def say(self, message: messages.Message) -> None:
        """To the front end."""
        raw = encode(Envelope(FRONT, self.name, message))
        self._events.put(MessageReceived(json.loads(json.dumps(raw)), self.name))  # a link's thread parses it


class TimedPlane(ControlPlane):
    """The control plane, with the CPU seconds of each decision."""

    def __init__(self, settings: ControlSettings):
        super().__init__(settings)
        self.decisions_s: list[float] = []

    def route(self, request, now_s):
        """See `ControlPlane.route`."""
        began_s = time.thread_time()
        decision = super().route(request, now_s)
        self.decisions_s.append(time.thread_time() - began_s)
        return decision


def main(arguments: list[str]) -> int:
    """Print the rates beside the goals."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=at_least_one, default=64)
    parser.add_argument("--requests", type=at_least_one, default=2000)
    parser.add_argument("--tokens", type=at_least_one, nargs="+", default=[512, 2048, 8192], help="of a prompt")
    args = parser.parse_args(arguments)
    gc.set_threshold(COLLECT_AFTER)  # as in every front end's process
    rows = []
    for tokens in args.tokens:
        cpu_s, stubs_s, decisions_s = run(args.nodes, args.requests, tokens)
        quantile = [1000 * decisions_s[int(share * len(decisions_s))] for share in (0.5, 0.99)]
        rows.append([tokens, f"{args.requests / (cpu_s - stubs_s):.0f}", f"{args.requests / cpu_s:.0f}",
                     *[f"{one:.3f}" for one in quantile]])
    print(table(["prompt tokens", "requests/s", "with the stubs", "decision p50 ms", "p99 ms"], rows))
    print(f"  {args.nodes} nodes, {args.requests:,} requests of {PARAMS.max_tokens} tokens, {BURST} at once; goal: at "
          f"least {GOAL_RPS:.0f} requests/s on one core, p99 under {GOAL_P99_MS:g} ms")
    return 0


def run(nodes: int, requests: int, tokens: int) -> tuple[float, float, list[float]]:
    """Seconds of CPU, those of the stubs among them, and those of each decision, sorted."""
    rng, events = random.Random(0), EventQueue()
    plane, mail = TimedPlane(ControlSettings(THRESHOLD, link_gbps=100.0)), Mail(events)

    def block_keys(token_ids: list[int]) -> list[bytes]:
        return chain_keys(b"bench", token_ids, BLOCK_TOKENS)

    front = FrontEnd(plane, mail, block_keys, BLOCK_TOKENS, 300.0, time.monotonic)
    node = Node(mail, [front])
    prefixes = [rng.choices(range(VOCABULARY), k=tokens // 2) for _ in range(SHARED)]
    stubs = join(mail, events, nodes, [block_keys(prefix) for prefix in prefixes], rng)
    node.step()
    before_s, began_s, clients_s, submitted = sum(stub.cpu_s for stub in stubs), time.process_time(), 0.0, 0
    while submitted < requests or front.has_work:
        while submitted < requests and len(front.journeys) < BURST:
            writing_s = time.process_time()
            prompt = rng.choice(prefixes) + rng.choices(range(VOCABULARY), k=tokens - tokens // 2)
            clients_s += time.process_time() - writing_s
            front.submit(str(submitted), prompt, PARAMS)
            submitted += 1
        node.step()
        front.take_updates()
    elapsed_s = time.process_time() - began_s - clients_s
    return elapsed_s, sum(stub.cpu_s for stub in stubs) - before_s, sorted(plane.decisions_s)


def join(mail: Mail, events: EventQueue, nodes: int, prefixes: list[list[bytes]], rng: random.Random) -> list[Stub]:
    """A half PrfaaS nodes, a quarter PD-P, a quarter PD-D; each with a cache of a few of the prefixes."""
    roles, stubs = [Role.PRFAAS, Role.PDP, Role.PRFAAS, Role.PDD], []
    for number in range(nodes):
        role = roles[number % len(roles)]
        stub = Stub(f"{role.value}-{number}", events)
        mail.add_link(stub, [stub.name])
        stub.say(messages.NodeReady(role.value, "stub", 10_000))
        cached = [(key.hex(), (place + 1) * BLOCK_TOKENS) for keys in rng.sample(prefixes, 16)
                  for place, key in enumerate(keys)]
        stub.say(messages.CacheNews(1, [key for key, _ in cached], [end for _, end in cached], True))
        stubs.append(stub)
    return stubs
