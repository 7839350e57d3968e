"""A process's part in a run of the live cluster; the front end's has the screen. Chapter 13; paper 3 and 4."""

import json
import socket
import time
from dataclasses import dataclass, replace

import torch

from minprfaas.cluster.journey import Journey, Update
from minprfaas.cluster.launch import (StoreAddress, emulated_line, link_identity, own_device,
                                      wait_for_the_front_end)
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.processes import Process, control_settings, front_end, process, roles_of
from minprfaas.cluster.topology import PRFAAS_SITE, Place
from minprfaas.cluster.upkeep import peak_memory_bytes
from minprfaas.commands import answers
from minprfaas.commands.live_options import Run
from minprfaas.commands.serve import FULL_CONTEXTS, serve_until_signal
from minprfaas.config import CacheConfig, Role
from minprfaas.engine.engine import Engine
from minprfaas.engine.generate import longest_prompts, pool_for
from minprfaas.errors import UserError
from minprfaas.files import OutputFile
from minprfaas.model.checkpoint import EMBEDDED, load
from minprfaas.observe.report import human_bytes
from minprfaas.observe.screen import Screen
from minprfaas.observe.timeline import Timeline, timeline_json
from minprfaas.scheduling.control import ControlPlane, NewThreshold
from minprfaas.serving.openai import Served
from minprfaas.serving.service import listen
from minprfaas.transport.base import EventQueue
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.wan.link import Link

GOODBYE_DEADLINE_S = 30.0
FABRIC_TIMEOUT_S = 2.0  # inside a datacenter there is no weather: a connection that breaks is a process that died


@dataclass(frozen=True)
class Seat:
    """Which of a run's processes this one is, and where the others are met."""

    places: list[Place]
    here: Place
    address: StoreAddress
    local_rank: int = 0
    is_apart: bool = False  # was started by itself: it waits for the front end to return, if that goes away


def outputs_of(run: Run) -> dict[str, OutputFile]:
    """The files that were asked for, by kind. UserError when one cannot be written."""
    paths = {"json": run.args.json, "timeline": run.args.timeline}
    return {name: OutputFile(path) for name, path in paths.items() if path is not None}


def check_outputs(run: Run) -> None:
    """A path that cannot be written is said before anything is started."""
    for output in outputs_of(run).values():
        output.discard()


def play(run: Run, seat: Seat) -> int:
    """Live this process's life; returns the exit status."""
    outputs = outputs_of(run) if seat.here.has_front else {}
    try:
        return _play(run, seat, outputs)
    except UserError:
        if not seat.here.has_front and not seat.is_apart:
            wait_for_the_front_end()  # it sees the same mistake and says it; once is enough
        raise
    finally:
        for output in outputs.values():
            output.discard()


def _play(run: Run, seat: Seat, outputs: dict[str, OutputFile]) -> int:
    args, here = run.args, seat.here
    timeline = Timeline(here.name) if args.timeline else None
    listener = listen(args.host, args.serve) if here.has_front and args.serve is not None else None
    engines = Engines(run, seat, timeline)
    engine = engines.first
    store = seat.address.open(serves=here.has_front)  # kept: where this process serves it, it lives as long
    mail = Mail(EventQueue())
    front = None
    if here.has_front:
        plane = ControlPlane(control_settings(args.threshold, args.link_gbps, engine.layout, args.ship_prefixes,
                                              run.fleet))
        front = front_end(plane, mail, engine, args.deadline_s)
    roles = roles_of(here, engines.new, mail, args.deadline_s, overlap=not args.no_overlap)
    made = process(mail, front, roles)
    other = {place.site for place in seat.places} - {here.site}
    line = emulated_line(run.line, store, here.site, other.pop()) if other else None
    identity = link_identity(engine.model, engine.layout)

    def make_link(peer: Place) -> Link | Fabric:
        first, second = sorted((here, peer), key=seat.places.index)
        name, store, rank = f"{first.name}:{second.name}", seat.address.open(), int(here is second)
        if peer.site != here.site:
            return Link(name, store, rank, run.link, identity, line, mail.events, timeline)
        config = replace(run.link, lanes=1, timeout_s=FABRIC_TIMEOUT_S)
        if here.roles and peer.roles:
            return Fabric(name, store, rank, config, identity, engine.model.device, mail.events)
        return Link(name, store, rank, config, identity, events=mail.events, timeline=timeline)

    neighbours = Neighbours(here, [place for place in seat.places if place is not here], make_link, mail)
    try:
        if front is not None:
            program = Program(run, seat, made, neighbours, engine, outputs)
            return program.run() if listener is None else program.serve(listener)
        _wait_for_front(run, seat, made, neighbours)
        made.serve(args.wait_s if seat.is_apart else 0.0)
        return 0
    finally:
        neighbours.close()
        if line is not None:
            line.close()


def _wait_for_front(run: Run, seat: Seat, made: Process, neighbours: Neighbours) -> None:
    front = next(place.name for place in seat.places if place.has_front)
    made.run_until(lambda: front in neighbours.met or front in neighbours.refused, run.args.wait_s)
    if front not in neighbours.met:
        reason = neighbours.refused.get(front, f"it did not come within {run.args.wait_s:g} s")
        raise UserError(f"no link from {seat.here.name} to the front end: {reason}")


class Engines:
    """The engines of one process over one model and one timeline. In each every prompt fits: UserError names the first
    that does not, or what is wrong with the model. One for the front end alone only knows lengths and keys: nobody
    touches its pool, so that it takes no memory."""

    def __init__(self, run: Run, seat: Seat, timeline: Timeline | None):
        args = run.args
        device = own_device(args.device, seat.local_rank) if seat.here.roles or args.check else torch.device("cpu")
        self.model, self.tokenizer = load(args.model, getattr(torch, args.dtype), device)
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)  # for what names no device of its own, such as an event
        lengths = longest_prompts(run.prompts, self.tokenizer, self.model.config.max_context_tokens)
        self._timeline, self._prefill_chunk = timeline, args.prefill_chunk
        self._cache = CacheConfig(args.pool_blocks, args.block_tokens) if args.pool_blocks else pool_for(
            self.model, [lengths[one.id] + one.params.max_tokens for one in run.prompts]
            or [self.model.config.max_context_tokens] * FULL_CONTEXTS, args.block_tokens)
        self._made = [self._make() for _ in seat.here.roles or [None]]
        self._fresh = iter(self._made)
        for prompt in run.prompts:
            self.first.check_length(prompt.id, lengths[prompt.id])

    @property
    def first(self) -> Engine:
        """To ask for what all of them share."""
        return self._made[0]

    def new(self) -> Engine:
        """The next one that no role has yet."""
        return next(self._fresh)

    def _make(self) -> Engine:
        return Engine(self.model, self.tokenizer, self._cache, self._prefill_chunk, timeline=self._timeline)


class Program:
    """The front end's screen: submits the prompts, shows what happens, prints the table, checks the answers."""

    def __init__(self, run: Run, seat: Seat, made: Process, neighbours: Neighbours, engine: Engine,
                 outputs: dict[str, OutputFile]):
        self.args, self.line, self.lanes, self.outputs = run.args, run.line, run.link.lanes, outputs
        self.prompts = {prompt.id: prompt for prompt in run.prompts}
        self.journeys: dict[str, Journey] = {}
        self.seat, self.process, self.front, self.neighbours = seat, made, made.front, neighbours
        self.model, self.tokenizer, self.layout, self.timeline = (engine.model, engine.tokenizer, engine.layout,
                                                                  engine.timeline)
        longest = longest_prompts(run.prompts, engine.tokenizer, engine.model.config.max_context_tokens)
        self.screen = Screen(sum(longest.values()), sum(prompt.params.max_tokens for prompt in run.prompts))

    def run(self) -> int:
        """Serve every prompt; 1 if one has no answer or `--check` finds one that is wrong, else 0."""
        self._wait_for_nodes()
        self._say_what_is_there()
        self.there = {*self.front.ready}
        started_s = time.monotonic()
        self._submit_after(None)
        while self.front.has_work:
            self.process.node.step()
            self._show(self.front.take_updates())
        elapsed_s = time.monotonic() - started_s
        journeys = [self.journeys[id] for id in self.prompts if id in self.journeys]  # in the file's order
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

    def serve(self, listener: socket.socket) -> int:
        """Answer HTTP clients until a signal; 1 if one of their requests was cut short, else 0."""
        args = self.args
        served = Served.of(args.model or EMBEDDED, self.model.config, self.tokenizer, args.chat_template)
        self._wait_for_nodes()
        self._say_what_is_there()
        self.there = {*self.front.ready}
        self.screen.close()

        def step() -> list[Update]:
            self.process.node.step()
            self._show([])
            return self.front.take_updates()

        return serve_until_signal(args, listener, served, self.process, step)

    def _wait_for_nodes(self) -> None:
        """For all of them, or until time is up; then those that are there must be able to answer."""
        parts = {part for place in self.seat.places for part in place.roles}
        refused = self.neighbours.refused
        self.process.run_until(lambda: parts <= {*self.front.ready} or bool(refused), self.args.wait_s)
        for name, reason in refused.items():
            raise UserError(f"no link to {name}: {reason}")
        roles = {ready.role for ready in self.front.ready.values()}
        if Role.PDD.value not in roles or len(roles) == 1:
            raise UserError(f"no {'prefill' if Role.PDD.value in roles else 'decode'} node came within "
                            f"{self.args.wait_s:g} s; of {', '.join(sorted(parts))} there are "
                            f"{', '.join(sorted(self.front.ready)) or 'none'}")

    def _submit_after(self, finished: Journey | None) -> None:
        """Submit the prompts that continue `finished` (None: those that begin a conversation)."""
        for prompt in self.prompts.values():
            if prompt.after == (finished.id if finished else None):
                history = finished.token_ids if finished else []
                token_ids = history + self.tokenizer.encode(prompt.text)
                self.journeys[prompt.id] = self.front.submit(prompt.id, token_ids, prompt.params)

    def _say_what_is_there(self) -> None:
        config, say = self.model.config, self.screen.line
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        say(f"model         {self.args.model or EMBEDDED.name}: {config.family}, {len(config.layers)} layers, "
            f"{parameters / 1e6:.1f}M parameters, {self.args.dtype}")
        sites = {part: place.site for place in self.seat.places for part in place.roles}
        for name in [name for name in sites if name in self.front.ready]:
            ready = self.front.ready[name]
            where = "datacenter A  PrfaaS" if sites[name] == PRFAAS_SITE else "datacenter B  local PD"
            does = "decode" if ready.role == Role.PDD.value else "prefill"
            say(f"{where}, {does}: {name} on {ready.device}, pool of {ready.num_blocks:,} blocks of "
                f"{self.layout.block_tokens} tokens ({human_bytes(self.layout.block_bytes)})")
        for name in [name for name in sites if name not in self.front.ready]:
            say(f"{name} is not there; it may join later")
        gbps = self.line.gbps
        bandwidth = "unthrottled" if gbps is None else f"{gbps * 1000:g} Mbit/s (emulated)"
        say(f"link A → B    {bandwidth}, round trip {self.line.rtt_ms:g} ms (emulated), {self.lanes} lanes")
        say(f"routing       more than {self.args.threshold:,} uncached tokens → A, else B\n")

    def _show(self, updates: list[Update]) -> None:
        if self.screen.shown:
            journeys = self.journeys.values()
            self.screen.prefilled(sum(journey.prefilled_tokens for journey in journeys))
            self.screen.streamed(sum(j.received_bytes for j in journeys), sum(j.expected_bytes for j in journeys))
            drawn = sum(len(journey.token_ids) - journey.prompt_tokens for journey in journeys)
            self.screen.decoded(drawn, updates[-1].journey.text if updates else "")
        for action in self.front.take_actions():
            if isinstance(action, NewThreshold):
                self.screen.line(f"threshold     now {action.threshold:,.0f} tokens: {action.reason}")
        self._show_who_came_and_went()
        for update in updates:
            if update.journey.is_finished:
                self.screen.line(answers.answer_lines(update.journey, self.prompts[update.journey.id]))
                self._submit_after(update.journey)

    def _show_who_came_and_went(self) -> None:
        ready = self.front.ready
        for name in sorted(self.there - {*ready}):
            self.screen.line(f"{name} is gone")
        for name in sorted({*ready} - self.there):
            self.screen.line(f"{name} has joined as {ready[name].role}")
        self.there = {*ready}

    def _print_table(self, journeys: list[Journey], elapsed_s: float) -> None:
        print("\n" + answers.answer_table(journeys))
        print("  * over the emulated link; hidden = share of the transfer that ran while prefill still did")
        for line in answers.notes(journeys, self.layout):
            print(f"  {line}")
        peaks = {self.seat.here.name: peak_memory_bytes(self.model.device), **self.front.goodbyes}
        memory = ", ".join(f"{place.name} {human_bytes(peaks[part])}" for place in self.seat.places
                           for part in [place.name if place is self.seat.here else place.parts[0]] if part in peaks)
        print(f"\n{len(journeys)} answers in {elapsed_s:.1f} s. Peak memory: {memory}.")
        known = [journey for journey in journeys if self.prompts[journey.id].expected is not None]
        if known:
            right = sum(journey.text.strip() == self.prompts[journey.id].expected for journey in known)
            print(f"{right} of {len(known)} answers are right.")

    def _write(self, journeys: list[Journey]) -> None:
        """The files that were asked for. One that cannot be written any more costs a line, not the answers."""
        link = "emulated" if self.line.gbps or self.line.rtt_ms else "unthrottled"
        texts = {"json": "".join(json.dumps(answers.json_row(j, self.layout, link)) + "\n" for j in journeys)}
        if self.timeline is not None:
            texts["timeline"] = timeline_json(self.front.timeline_events, self.timeline.events())
        for name, output in self.outputs.items():
            output.write(texts[name])
