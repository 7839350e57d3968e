"""The front end's part in a run: it submits what is asked, shows what happens, prints the tables, checks the answers.

Chapter 13; paper 3 and 4.
"""

import json
import random
import socket
from collections import deque
from collections.abc import Collection
from statistics import fmean

from minprfaas.cluster.emulation import verdict
from minprfaas.cluster.journey import Journey, Update
from minprfaas.cluster.load import Arrival
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.processes import Process
from minprfaas.cluster.topology import PD_SITE, Place
from minprfaas.cluster.upkeep import peak_memory_bytes
from minprfaas.commands import answers
from minprfaas.commands.live_options import Run
from minprfaas.commands.live_status import Watch
from minprfaas.commands.machines import machine_at
from minprfaas.commands.serve import serve_until_signal
from minprfaas.config import Role
from minprfaas.engine.engine import Engine, token_ids_of
from minprfaas.engine.prompts import Prompt
from minprfaas.engine.reference import longest_prompts
from minprfaas.errors import UserError
from minprfaas.files import OutputFile
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.spec import model_state_specs
from minprfaas.observe.board import Board
from minprfaas.observe.cores import Cores
from minprfaas.observe.tables import human_bytes
from minprfaas.observe.timeline import timeline_json
from minprfaas.serving.openai import Served

GOODBYE_DEADLINE_S = 30.0


class Program:
    """A run as its user sees it. `here` is one of `places`, the processes of the run."""

    def __init__(self, run: Run, here: Place, places: list[Place], made: Process, neighbours: Neighbours,
                 engine: Engine, outputs: dict[str, OutputFile]):
        self.args, self.lines, self.lanes, self.load = run.args, run.lines, run.link.lanes, run.load
        self.emulation, self.wait_s = run.emulation, run.wait_s
        self.outputs, self.here, self.places, self.neighbours = outputs, here, places, neighbours
        self.process, self.front, self.engine = made, made.front, engine
        self.lossy = answers.lossy_wire(engine.layout, answers.wire_between(run.args))
        self.journeys: dict[str, Journey] = {}
        self.prompts, self.due = self._asked(run)
        self.board = Board()
        longest = longest_prompts(run.prompts, engine.tokenizer, engine.model.config.max_context_tokens)
        self.to_do = sum(longest.values()), sum(prompt.params.max_tokens for prompt in run.prompts)  # tokens

    def _asked(self, run: Run) -> tuple[dict[str, Prompt], deque[Arrival]]:
        """All prompts by id, and those that come by themselves with their times; the others continue one of them."""
        if run.load is None:
            prompts = run.prompts
            due = [Arrival(0.0, prompt) for prompt in prompts if prompt.after is None]
        else:
            due = list(run.load.arrivals(self.engine.tokenizer, self.engine.model.config.max_context_tokens))
            prompts = [arrival.prompt for arrival in due]
            for prompt in prompts:
                self.engine.check_length(prompt.id, len(prompt.text))
        return {prompt.id: prompt for prompt in prompts}, deque(due)

    def run(self) -> int:
        """Serve every prompt; 1 if one has no answer, a node's books are wrong, an emulated machine came late or
        `--check` finds a wrong answer, else 0."""
        self._begin(self.journeys.values())
        started_at_s, cores = self.engine.clock(), Cores()
        while self.due or self.front.has_work:
            self._submit_due(started_at_s)
            self.process.node.step()
            self._show(self.front.take_updates())
        elapsed_s = self.engine.clock() - started_at_s
        journeys = [self.journeys[id] for id in self.prompts if id in self.journeys]  # in the file's order
        self.watch.end()
        self.process.shut_down(GOODBYE_DEADLINE_S)
        self.board.close()
        self._print_tables(journeys, elapsed_s)
        self._write(journeys)
        is_well = self._emulation_is_valid(journeys, cores) and self._books_are_right()
        is_well = is_well and all(journey.error is None for journey in journeys)
        if not self.args.check and self.args.check_sample is None:
            return 0 if is_well else 1
        if self.args.check_sample is not None:
            journeys = random.Random(self.args.seed).sample(journeys, min(self.args.check_sample, len(journeys)))
        lines, is_right = answers.check(journeys, [self.prompts[journey.id] for journey in journeys], self.engine.model,
                                        self.engine.tokenizer, self.args.prefill_chunk, self.lossy is not None)
        print("\n".join(lines))
        return 0 if is_well and is_right else 1

    def _emulation_is_valid(self, journeys: list[Journey], cores: Cores) -> bool:
        """Say what the run stands for, and whether the machines kept their pace; True where none is emulated."""
        if self.emulation is None:
            return True
        scale, (words, is_valid) = self.emulation.scale, verdict(self.front.goodbyes)
        times = [scale.seconds(journey.ttft_s) for journey in journeys if journey.error is None]
        print(f"{self.emulation.prfaas.name} and {self.emulation.pd.name} emulated: {scale}")
        if times:
            print(f"TTFT {fmean(times):.2f} s in the mean, {max(times):.2f} s at most, at the emulated machines' pace")
        print(f"{words}; {cores}")
        return is_valid

    def serve(self, listener: socket.socket) -> int:
        """Answer HTTP clients until a signal; 1 if one of their requests was cut short, else 0."""
        args, model = self.args, self.engine.model
        served = Served.of(args.model or EMBEDDED, model.config, self.engine.tokenizer, args.chat_template)
        self._begin(self.front.journeys.values())
        return serve_until_signal(args, listener, served, self.process, look=lambda: self._show([]))

    def _begin(self, journeys: Collection[Journey]) -> None:
        """Wait for the nodes, and say what there is. `journeys` are those that the status counts."""
        self._wait_for_nodes()
        self._say_what_is_there()
        self.there = {*self.front.ready}
        self.watch = Watch(self.front, journeys, self.engine.clock())

    def _wait_for_nodes(self) -> None:
        """For all of them, or until time is up; then those that are there must be able to answer."""
        parts = {part for place in self.places for part in place.roles}
        refused = self.neighbours.refused
        self.process.run_until(lambda: parts <= {*self.front.ready} or bool(refused), self.wait_s)
        for name, reason in refused.items():
            raise UserError(f"no link to {name}: {reason}")
        roles = {ready.role for ready in self.front.ready.values()}
        if Role.PDD.value not in roles or len(roles) == 1:
            raise UserError(f"no {'prefill' if Role.PDD.value in roles else 'decode'} node came within "
                            f"{self.wait_s:g} s; of {', '.join(sorted(parts))} there are "
                            f"{', '.join(sorted(self.front.ready)) or 'none'}")

    def _submit_due(self, started_at_s: float) -> None:
        """Submit what is due. It counts from that moment, however late this loop comes to it."""
        while self.due and self.due[0].due_s <= self.engine.clock() - started_at_s:
            arrival = self.due.popleft()
            self._submit(arrival.prompt, []).arrived_at_s = started_at_s + arrival.due_s

    def _submit_after(self, finished: Journey) -> None:
        """Submit the prompts that continue `finished`."""
        for prompt in self.prompts.values():
            if prompt.after == finished.id:
                self._submit(prompt, finished.token_ids)

    def _submit(self, prompt: Prompt, history: list[int]) -> Journey:
        token_ids = history + token_ids_of(prompt.text, self.engine.tokenizer)
        self.journeys[prompt.id] = self.front.submit(prompt.id, token_ids, prompt.params)
        return self.journeys[prompt.id]

    def _say_what_is_there(self) -> None:
        model, say = self.engine.model, self.board.line
        config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
        say(f"model         {self.args.model or EMBEDDED.name}: {config.family}, {len(config.layers)} layers, "
            f"{parameters / 1e6:.1f}M parameters, {model.dtype}".replace("torch.", ""))
        sites = {part: place.site for place in self.places for part in place.roles}
        for name in [name for name in sites if name in self.front.ready]:
            ready = self.front.ready[name]
            where = f"datacenter {self._letter(sites[name])}  {'local PD' if sites[name] == PD_SITE else 'PrfaaS'}"
            machine = machine_at(self.args, sites[name])
            layout = plan_layout(model_state_specs(config, machine.dtype), machine.block_tokens)
            does = "decode" if ready.role == Role.PDD.value else "prefill"
            say(f"{where}, {does}: {name} on {ready.device}, pool of {ready.num_blocks:,} blocks of "
                f"{layout.block_tokens} tokens ({human_bytes(layout.block_bytes)})")
        for name in [name for name in sites if name not in self.front.ready]:
            say(f"{name} is not there; it may join later")
        for site, line in self.lines.items():
            bandwidth = "unthrottled" if line.gbps is None else f"{line.gbps * 1000:g} Mbit/s (emulated)"
            weather = ", with weather" if line.weather else ""
            say(f"{f'link {self._letter(site)} → B':13} {bandwidth}, round trip {line.rtt_ms:g} ms (emulated)"
                f"{weather}, {self.lanes} lanes")
        if self.lossy is not None:
            say(f"wire          {self.lossy}")
        if self.load is not None:
            say(f"load          {self.load}")
        say(f"routing       more than {self.args.threshold:,} uncached tokens → A, else B\n")

    def _letter(self, site: str) -> str:
        """What a datacenter is called: A and B, where there are two."""
        return "B" if site == PD_SITE else "A" if len(self.lines) == 1 else site

    def _show(self, updates: list[Update]) -> None:
        now_s = self.engine.clock()
        if self.args.prompts is not None:
            self.board.draw(now_s, lambda: self.watch.bars(now_s, *self.to_do))
        else:
            self.board.draw(now_s, lambda: self.watch.screenful(now_s), lambda: self.watch.plain(now_s))
        for line in self.watch.take(self.front.take_actions(), now_s):
            self.board.line(line)
        self._show_who_came_and_went()
        for journey in {update.journey: None for update in updates if update.journey.is_finished}:  # each once
            if self.load is None or journey.error is not None:
                self.board.line(answers.answer_lines(journey, self.prompts[journey.id]))
            self._submit_after(journey)

    def _show_who_came_and_went(self) -> None:
        ready = self.front.ready
        for name in sorted(self.there - {*ready}):
            self.board.line(f"{name} is gone")
        for name in sorted({*ready} - self.there):
            self.board.line(f"{name} has joined as {ready[name].role}")
        self.there = {*ready}

    def _print_tables(self, journeys: list[Journey], elapsed_s: float) -> None:
        if self.load is None:
            print("\n" + answers.answer_table(journeys))
            print("  * over the emulated link; hidden = share of the transfer that ran while prefill still did")
            for line in answers.notes(journeys, self.engine.layout):
                print(f"  {line}")
        print("\n" + self.watch.tables(elapsed_s))
        peaks = {name: goodbye.peak_bytes for name, goodbye in self.front.goodbyes.items()}
        peaks[self.here.name] = peak_memory_bytes(self.engine.model.device)
        memory = ", ".join(f"{place.name} {human_bytes(peaks[part])}" for place in self.places
                           for part in [place.name if place is self.here else place.parts[0]] if part in peaks)
        print(f"\n{len(journeys)} answers in {elapsed_s:.1f} s. Peak memory: {memory}.")
        known = [journey for journey in journeys if self.prompts[journey.id].expected is not None]
        if known:
            right = sum(answers.is_right(journey, self.prompts[journey.id]) for journey in known)
            print(f"{right} of {len(known)} answers are right.")

    def _books_are_right(self) -> bool:
        """Whether every node that said goodbye had each of its blocks accounted for; says which had not."""
        wrong = {name: goodbye.wrong for name, goodbye in self.front.goodbyes.items() if goodbye.wrong}
        for name, what in wrong.items():
            print(f"{name}'s pool: {what}")
        return not wrong

    def _write(self, journeys: list[Journey]) -> None:
        """The files that were asked for. One that cannot be written any more costs a line, not the answers."""
        link = "emulated" if any(line.gbps or line.rtt_ms for line in self.lines.values()) else "unthrottled"
        rows = [answers.json_row(journey, self.engine.layout, link) for journey in journeys]
        texts = {"json": "".join(json.dumps(row) + "\n" for row in rows)}
        if self.engine.timeline is not None:
            texts["timeline"] = timeline_json(self.front.timeline_events, self.engine.timeline.events())
        for name, output in self.outputs.items():
            output.write(texts[name])
