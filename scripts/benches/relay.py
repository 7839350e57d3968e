"""Relay decode on slow lines: what it gives to first tokens, and what it costs the prefill node. Chapter 15.

    python scripts/bench.py relay

For each line two datacenters are started, without relay decode and with it. Each answers the same documents, one after
another; the front end notes when each token comes. The handover is where the KVCache is complete on the decode node.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from benches import above_zero, at_least_one
from minprfaas import load
from minprfaas.cluster.launch import Launch, start_processes, watch_parent
from minprfaas.cluster.topology import Topology
from minprfaas.commands import two_datacenters
from minprfaas.commands.live_options import Run
from minprfaas.commands.live_run import Seat, play
from minprfaas.config import LineConfig, LinkConfig, SamplingParams
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.engine.reference import generate
from minprfaas.errors import ArgumentParser, UserError
from minprfaas.observe.tables import table

HEADERS = ["line, Mbit/s*", "relay", "TTFT s*", "last token s*", "before handover", "gap there ms*", "median gap ms*",
           "largest gap ms*", "steps at PrfaaS", "its computing s", "identical"]


@dataclass
class Told:
    """One answer as the client got it."""

    ttft_s: float
    last_s: float  # from its arrival
    before: int  # tokens that came before the handover
    handover_gap_s: float  # between the last of those and the next
    gaps_s: list[float]
    is_identical: bool


def ask(made, front, id: str, prompt: list[int], params: SamplingParams, wanted: list[int]) -> Told:
    """Answer one prompt, and note when each token comes."""
    journey, came_s, before = front.submit(id, prompt, params), [], None
    while not journey.is_finished:
        made.node.step()
        if before is None and journey.kv_bytes:
            before = len(came_s)  # this node draws its first token in the step in which it takes over
        came_s += [time.monotonic() for update in front.take_updates() if update.token_id is not None]
    if journey.error is not None or journey.route != "prfaas":
        raise UserError(f"{id} was not answered by way of the PrfaaS node: {journey.error or journey.reason}")
    gaps_s = [after - earlier for earlier, after in itertools.pairwise(came_s)]
    before = min(before, len(gaps_s))
    last_gap_s = gaps_s[before - 1] if before else 0.0
    return Told(journey.ttft_s, came_s[-1] - journey.arrived_at_s, before, last_gap_s, gaps_s,
                journey.output_ids == wanted)


def measure(args: argparse.Namespace, mbps: float, relay: bool, prompts: list[list[int]],
            wanted: list[list[int]]) -> dict:
    """Two processes, every document; what was told of each, and what the prefill node did."""
    topology, params = Topology(prfaas=1, pd=1), SamplingParams(max_tokens=args.answer, ignore_eos=True)
    places, results = topology.two_places(), Path(tempfile.mkdtemp()) / "relay.json"
    longest = max(map(len, prompts)) + args.answer
    options = ["--prompts", "asked from here", "--threshold", "512", *["--relay"] * relay,
               "--pool-blocks", str(len(prompts) * longest // 32 + 64)]
    arguments = two_datacenters.parser().parse_args(options)
    line = LineConfig(mbps / 1000, args.rtt_ms)
    run = Run(arguments, topology, LinkConfig(arguments.lanes), line, [], None, None)

    def drive(made, engine) -> int:
        front = made.front
        if not made.run_until(lambda: places[0].name in front.ready, 60.0):
            raise UserError("the PrfaaS node did not come within 60 s")
        ask(made, front, "warm-up", prompts[0][700:0:-1], SamplingParams(max_tokens=4, ignore_eos=True), [])
        told = [ask(made, front, f"doc-{number}", prompt, params, right)
                for number, (prompt, right) in enumerate(zip(prompts, wanted))]
        made.shut_down(30.0)
        figures = front.figures[places[0].name]
        results.write_text(json.dumps({"told": [asdict(one) for one in told], "steps": figures.decoded_tokens,
                                       "computed_s": figures.computed_s}))
        return 0

    def live(argv: list[str]) -> int:
        launch = Launch.from_environment(world_size=2)
        watch_parent()
        return play(run, Seat(places, places[launch.rank], launch.address, launch.local_rank), drive)

    if start_processes([place.name for place in places], places[-1].name, live, []):
        raise UserError(f"the run at {mbps:g} Mbit/s {'with' if relay else 'without'} relay decode has failed")
    return json.loads(results.read_text())


def row(mbps: float, relay: bool, found: dict) -> list[str]:
    """One line of the table."""
    told = [Told(**one) for one in found["told"]]
    gaps_s = [gap for one in told for gap in one.gaps_s]
    return [f"{mbps:g}", "yes" if relay else "no", f"{fmean(one.ttft_s for one in told):.2f}",
            f"{fmean(one.last_s for one in told):.2f}", f"{fmean(one.before for one in told):.0f}",
            f"{max(one.handover_gap_s for one in told) * 1e3:.0f}" if relay else "–", f"{median(gaps_s) * 1e3:.0f}",
            f"{max(gaps_s) * 1e3:.0f}", found["steps"], f"{found['computed_s']:.2f}",
            f"{sum(one.is_identical for one in told)} of {len(told)}"]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbps", type=above_zero, nargs="+", default=[20.0, 10.0, 6.0],
                        help="lines (emulated), Mbit/s")
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--documents", type=at_least_one, default=2)
    parser.add_argument("--length", type=at_least_one, default=2048, help="tokens of a document (2048)")
    parser.add_argument("--answer", type=at_least_one, default=160, help="tokens of an answer (160)")
    args = parser.parse_args(argv)
    model, tokenizer = load()
    prompts = []
    for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + args.documents):
        document = make_document(seed, args.length, tokenizer.encode)
        prompts.append(tokenizer.encode(document.prompt(document.questions[0])))
    params = SamplingParams(max_tokens=args.answer, ignore_eos=True)
    wanted = [output.token_ids for output in generate(model, tokenizer, prompts, params)]
    rows, seconds = [], {}
    for mbps, relay in itertools.product(args.mbps, (False, True)):
        found = measure(args, mbps, relay, prompts, wanted)
        rows.append(row(mbps, relay, found))
        seconds[mbps, relay] = found["computed_s"]
    print(f"{args.documents} documents of about {args.length:,} tokens, answers of {args.answer}, round trip "
          f"{args.rtt_ms:g} ms, float32, one PrfaaS and one PD node\n")
    print(table(HEADERS, rows))
    for mbps in args.mbps:
        more = seconds[mbps, True] / seconds[mbps, False] - 1
        print(f"at {mbps:g} Mbit/s relaying took {more:+.0%} of the PrfaaS node's computing time beside the prefills")
    print("* over an emulated line")
    return 0 if all(cells[-1].startswith(f"{args.documents} ") for cells in rows) else 1
