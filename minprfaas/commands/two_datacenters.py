"""Prefill in one datacenter process, decode in another, on real text: the main job. Chapter 13; paper 3 and 4."""

import argparse
import json
import queue
import sys
import time
from dataclasses import dataclass

import torch

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import Journey, Update
from minprfaas.cluster.launch import Launch, emulated_line, link_identity, start_processes, wait_for_the_front_end
from minprfaas.cluster.processes import (PRFAAS, UNTHROTTLED_GBPS, PDProcess, control_settings, pd_process,
                                         prfaas_process)
from minprfaas.cluster.upkeep import peak_memory_bytes
from minprfaas.commands import answers
from minprfaas.config import CacheConfig, LineConfig, LinkConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.generate import longest_prompts, pool_for
from minprfaas.engine.prompts import Prompt, read_prompts
from minprfaas.errors import ArgumentParser, UserError, require_number
from minprfaas.files import OutputFile
from minprfaas.kvcache.layout import Layout
from minprfaas.model.checkpoint import EMBEDDED, load
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.report import human_bytes
from minprfaas.observe.screen import Screen
from minprfaas.observe.timeline import Timeline, timeline_json
from minprfaas.scheduling.control import ControlPlane, NewThreshold
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.profiles import Profile
from minprfaas.transport.base import LinkDown
from minprfaas.transport.wan.line import load_weather
from minprfaas.transport.wan.link import Link

LINK_NAME = "prfaas-pd"
CONNECT_DEADLINE_S = 120.0  # until both processes have loaded the model and met
GOODBYE_DEADLINE_S = 30.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ArgumentParser(
        description="Process 0 is the PrfaaS datacenter, process 1 the local PD datacenter with the front end. Start "
                    "it with `torchrun --nproc-per-node 2`, or plainly: then it starts its two processes itself.")
    p.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    p.add_argument("--prompts", metavar="FILE.jsonl", required=True,
                   help='one {"id", "prompt", "max_tokens"} a line; {"after": id} continues that conversation')
    p.add_argument("--threshold", type=int, default=1024, metavar="T", help="offload above T uncached tokens (1024)")
    p.add_argument("--profile", metavar="P.json", help="of this machine (`python -m minprfaas profile`): the threshold "
                   "then follows the measured link")
    p.add_argument("--link-gbps", type=float, metavar="G", help="emulated bandwidth (default: as fast as it goes)")
    p.add_argument("--rtt-ms", type=float, default=0.0, metavar="MS", help="emulated round-trip time (0)")
    p.add_argument("--lanes", type=int, default=4, help="connections that one link stripes over (4)")
    p.add_argument("--weather", metavar="FILE.json", help="emulated schedule of bandwidth, delay and stalls")
    p.add_argument("--device", default="cpu", help="cpu or cuda; on cuda each process takes its own GPU (cpu)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--prefill-chunk", type=int, default=1024, metavar="TOKENS", help="tokens of a prefill chunk (1024)")
    p.add_argument("--block-tokens", type=int, default=64, metavar="TOKENS", help="tokens of a KVCache block (64)")
    p.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of each pool (default: room for the prompts)")
    p.add_argument("--deadline-s", type=float, default=300.0, help="seconds an offloaded prefill may take (300)")
    p.add_argument("--link-timeout-s", type=float, default=30.0, help="a link that is away for longer is lost (30)")
    p.add_argument("--ship-prefixes", action="store_true", help="ship a cached prefix to where a request will be "
                   "prefilled, while bandwidth is abundant and that is sooner than computing it")
    p.add_argument("--no-overlap", action="store_true", help="ship KVCache only after prefill, for comparison")
    p.add_argument("--check", action="store_true", help="recompute every answer in one process; exit 1 if one differs")
    p.add_argument("--json", metavar="OUT.jsonl", help="write one line a request")
    p.add_argument("--timeline", metavar="OUT.json", help="write Chrome trace events (opens in Perfetto)")
    return p


@dataclass(frozen=True)
class Run:
    """A command line whose parts have been checked as far as they can be without a model."""

    args: argparse.Namespace
    link: LinkConfig
    line: LineConfig
    prompts: list[Prompt]
    fleet: Fleet | None  # with a profile: what the threshold loop plans for


def main(argv: list[str]) -> int:
    """Play this process's part, or start both processes when there is no torchrun; returns the exit status."""
    run = checked(parser().parse_args(argv))
    launch = Launch.from_environment(world_size=2)
    if launch is None:
        for output in (run.args.json, run.args.timeline):
            if output is not None:
                OutputFile(output).discard()  # a path that cannot be written is said before anything is started
        return start_processes(2, [sys.argv[0], *argv])
    launch.watch_parent()
    if launch.rank == 0:
        return _serve_prefill(run, launch)
    return _serve_front_end(run, launch)


def checked(args: argparse.Namespace) -> Run:
    """UserError names the first option that is out of range."""
    require_number("threshold", args.threshold, least=0, whole=True)
    require_number("deadline", args.deadline_s, above=0)
    for option in ("prefill_chunk", "block_tokens", "pool_blocks"):
        value = getattr(args, option)
        if value is not None:
            require_number(f"--{option.replace('_', '-')}", value, least=1, whole=True)
    weather = load_weather(args.weather) if args.weather else ()
    # On GPUs each chunk costs a copy and a few launches at either end: fewer, larger ones.
    sizes = dict(chunk_bytes=4 * 2**20, max_inflight_bytes=256 * 2**20) if args.device.startswith("cuda") else {}
    link = LinkConfig(args.lanes, timeout_s=args.link_timeout_s, **sizes)
    prompts = read_prompts(args.prompts)
    fleet = None
    if args.profile is not None:  # the one PD node counts as an instance of either kind
        profile = Profile.read(args.profile)
        answer_tokens = sum(prompt.params.max_tokens for prompt in prompts) / len(prompts)
        fleet = Fleet(1, 2, args.link_gbps or UNTHROTTLED_GBPS, profile, profile, answer_tokens)
    return Run(args, link, LineConfig(args.link_gbps, args.rtt_ms, weather), prompts, fleet)


def _serve_prefill(run: Run, launch: Launch) -> int:
    """Process A."""
    try:
        model, tokenizer = load(run.args.model, getattr(torch, run.args.dtype), launch.device(run.args.device))
        (engine,) = _engines(run, model, tokenizer, ["A: PrfaaS"])
    except UserError:
        wait_for_the_front_end()  # it sees the same mistake and says it; once is enough
        raise
    events = queue.SimpleQueue()
    link = _connected(run, launch, model, engine, events)
    try:
        prfaas_process(engine, link, events, run.args.deadline_s, overlap=not run.args.no_overlap).serve()
        return 0
    finally:
        link.close()


def _serve_front_end(run: Run, launch: Launch) -> int:
    """Process B."""
    paths = {"json": run.args.json, "timeline": run.args.timeline}
    outputs = {name: OutputFile(path) for name, path in paths.items() if path is not None}
    try:
        model, tokenizer = load(run.args.model, getattr(torch, run.args.dtype), launch.device(run.args.device))
        prefill_engine, decode_engine = _engines(run, model, tokenizer, ["B: PD", "B: PD"])
        plane = ControlPlane(control_settings(run.args.threshold, run.args.link_gbps, decode_engine.layout,
                                              run.args.ship_prefixes, run.fleet))
        events = queue.SimpleQueue()
        link = _connected(run, launch, model, decode_engine, events)
        try:
            process = pd_process(prefill_engine, decode_engine, {PRFAAS: link}, events, plane, run.args.deadline_s)
            return Program(run, process, model, tokenizer, outputs).run()
        finally:
            link.close()
    finally:
        for output in outputs.values():
            output.discard()


def _engines(run: Run, model: Transformer, tokenizer: Tokenizer, names: list[str]) -> list[Engine]:
    """An engine for each name, in which every prompt fits. UserError names the first that does not. Engines of one
    process share its timeline."""
    args = run.args
    lengths = longest_prompts(run.prompts, tokenizer, model.config.max_context_tokens)
    timeline = Timeline(names[0]) if args.timeline else None
    engines = []
    for _ in names:
        cache = CacheConfig(args.pool_blocks, args.block_tokens) if args.pool_blocks else \
            pool_for(model, [lengths[one.id] + one.params.max_tokens for one in run.prompts], args.block_tokens)
        engines.append(Engine(model, tokenizer, cache, args.prefill_chunk, timeline=timeline))
    for prompt in run.prompts:
        engines[0].check_length(prompt.id, lengths[prompt.id])
    return engines


def _connected(run: Run, launch: Launch, model: Transformer, engine: Engine, events: queue.SimpleQueue) -> Link:
    store = launch.store()  # the link keeps it: where this process serves the store, the server lives as long
    here, there = ("prfaas", "pd") if launch.rank == 0 else ("pd", "prfaas")
    line = emulated_line(run.line, store, here, there)
    link = Link(LINK_NAME, store, launch.rank, run.link, link_identity(model, engine.layout), line=line, events=events,
                timeline=engine.timeline)
    try:
        link.connect(CONNECT_DEADLINE_S)
    except LinkDown as error:
        raise UserError(f"no link between the datacenters: {error}") from None
    return link


class Program:
    """Process B's screen: submits the prompts, shows what happens, prints the table, checks the answers."""

    def __init__(self, run: Run, process: PDProcess, model: Transformer, tokenizer: Tokenizer,
                 outputs: dict[str, OutputFile]):
        self.args, self.line, self.lanes = run.args, run.line, run.link.lanes
        self.prompts = {prompt.id: prompt for prompt in run.prompts}
        self.process, self.model, self.tokenizer, self.outputs = process, model, tokenizer, outputs
        self.front: FrontEnd = process.front
        self.layout: Layout = process.decode.engine.layout
        longest = longest_prompts(run.prompts, tokenizer, model.config.max_context_tokens)
        self.screen = Screen(sum(longest.values()), sum(prompt.params.max_tokens for prompt in run.prompts))

    def run(self) -> int:
        """Serve every prompt; 1 if one has no answer or `--check` finds one that is wrong, else 0."""
        self._wait_for_the_other_datacenter()
        self._say_what_is_loaded()
        started_s = time.monotonic()
        self._submit_after(None)
        while self.front.has_work:
            self.process.node.step()
            self._show(self.front.take_updates())
        elapsed_s = time.monotonic() - started_s
        journeys = [self.front.journeys[id] for id in self.prompts if id in self.front.journeys]  # in the file's order
        self.process.shut_down(GOODBYE_DEADLINE_S)
        self.screen.close()
        self._print_table(journeys, elapsed_s)
        self._write(journeys)
        if not self.args.check:
            return int(any(journey.error is not None for journey in journeys))
        lines, is_well = answers.check(journeys, [self.prompts[journey.id] for journey in journeys], self.model,
                                       self.tokenizer, self.args.prefill_chunk)
        print("\n".join(lines))
        return 0 if is_well else 1

    def _wait_for_the_other_datacenter(self) -> None:
        self.process.run_until(lambda: PRFAAS in self.front.ready, CONNECT_DEADLINE_S)

    def _submit_after(self, finished: Journey | None) -> None:
        """Submit the prompts that continue `finished` (None: those that begin a conversation)."""
        for prompt in self.prompts.values():
            if prompt.after == (finished.id if finished else None):
                history = finished.token_ids if finished else []
                self.front.submit(prompt.id, history + self.tokenizer.encode(prompt.text), prompt.params)

    def _say_what_is_loaded(self) -> None:
        config, say = self.model.config, self.screen.line
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        say(f"model         {self.args.model or EMBEDDED.name}: {config.family}, {len(config.layers)} layers, "
            f"{parameters / 1e6:.1f}M parameters, {self.args.dtype}")
        for name, ready in self.front.ready.items():
            where = "datacenter A  PrfaaS, " if name == PRFAAS else "datacenter B  local PD, "
            does = "decode" if name == self.process.decode.name else "prefill"
            say(f"{where}{does}: {ready.device}, pool of {ready.num_blocks:,} blocks of {self.layout.block_tokens} "
                f"tokens ({human_bytes(self.layout.block_bytes)})")
        gbps = self.line.gbps
        bandwidth = "unthrottled" if gbps is None else f"{gbps * 1000:g} Mbit/s (emulated)"
        say(f"link A → B    {bandwidth}, round trip {self.line.rtt_ms:g} ms (emulated), {self.lanes} lanes")
        say(f"routing       more than {self.args.threshold:,} uncached tokens → A, else B\n")

    def _show(self, updates: list[Update]) -> None:
        if self.screen.shown:
            journeys = self.front.journeys.values()
            self.screen.prefilled(sum(journey.prefilled_tokens for journey in journeys))
            self.screen.streamed(sum(j.received_bytes for j in journeys), sum(j.expected_bytes for j in journeys))
            drawn = sum(len(journey.token_ids) - journey.prompt_tokens for journey in journeys)
            self.screen.decoded(drawn, updates[-1].journey.text if updates else "")
        for action in self.front.take_actions():
            if isinstance(action, NewThreshold):
                self.screen.line(f"threshold     now {action.threshold:,.0f} tokens: {action.reason}")
        for update in updates:
            if update.journey.is_finished:
                self.screen.line(answers.answer_lines(update.journey, self.prompts[update.journey.id]))
                self._submit_after(update.journey)

    def _print_table(self, journeys: list[Journey], elapsed_s: float) -> None:
        print("\n" + answers.answer_table(journeys))
        print("  * over the emulated link; hidden = share of the transfer that ran while prefill still did")
        for line in answers.notes(journeys, self.layout):
            print(f"  {line}")
        peak_b = human_bytes(peak_memory_bytes(self.model.device))
        peak_a = human_bytes(self.front.goodbyes.get(PRFAAS, 0))
        print(f"\n{len(journeys)} answers in {elapsed_s:.1f} s. Peak memory: A {peak_a}, B {peak_b}.")
        known = [journey for journey in journeys if self.prompts[journey.id].expected is not None]
        if known:
            right = sum(journey.text.strip() == self.prompts[journey.id].expected for journey in known)
            print(f"{right} of {len(known)} answers are right.")

    def _write(self, journeys: list[Journey]) -> None:
        """The files that were asked for. One that cannot be written any more costs a line, not the answers."""
        link = "emulated" if self.line.gbps or self.line.rtt_ms else "unthrottled"
        texts = {"json": "".join(json.dumps(answers.json_row(j, self.layout, link)) + "\n" for j in journeys)}
        if "timeline" in self.outputs:
            own = self.process.decode.engine.timeline.events()
            texts["timeline"] = timeline_json(self.front.timeline_events, own)
        for name, output in self.outputs.items():
            output.write(texts[name])
