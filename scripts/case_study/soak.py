"""A soak: hours of a cluster's life in minutes. The weather changes, a node is killed each minute, roles change, and
nothing may be lost, wrong, leaked or growing. Chapter 14; the paper does not discuss it.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from case_study.probe import Answer, ask, wrong_answers
from case_study.results import Results
from case_study.runs import Emulated, judged
from case_study.side_by_side import BAR, Job, run_all
from minprfaas import load
from minprfaas.cluster.journey import Journey
from minprfaas.cluster.processes import Process
from minprfaas.engine.engine import Engine
from minprfaas.observe.cores import Cores
from minprfaas.observe.tables import table
from minprfaas.scheduling.control import NewThreshold
from minprfaas.scheduling.profiles import Scale
from minprfaas.scheduling.roles import RoleChange
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.simulation import Setup

LOAD = 0.9  # of the measured rate
KILL_EVERY_S = 60.0
WEATHER_EVERY_S, WEATHER = 40.0, (1.0, 0.5, 0.2, 0.1)  # shares of the line, in a random order
LOOK_EVERY_S = 5.0  # at memory, threads and descriptors
WRITE_EVERY_S = 60.0  # what was seen last, for who cannot wait for the end
ANSWERS = "answers.jsonl"  # of those that have ended
CHECK_S = 0.06  # of one answer, about: a prefill and eight steps
CHECKED_AT_ONCE = 256  # in one pool, which has room for all of them
MOST_WINDOW_S = 300.0  # at the beginning and at the end; of a short soak a sixth
MOST_GROWTH = 0.1
PATIENCE_S, ANSWER_S = 60.0, 240.0  # of the run until nodes are back; of the machines until the last token
POOL_BLOCKS = 400  # few: a pool is resident once every block was used, and then stays as it is


@dataclass(frozen=True)
class Vitals:
    """What a process holds (Linux)."""

    memory_mib: float  # resident
    threads: float
    descriptors: float

    @staticmethod
    def of(pid: int) -> "Vitals | None":
        """None when it is gone."""
        process = Path("/proc") / str(pid)
        try:
            pages = int((process / "statm").read_text().split()[1])
            return Vitals(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(process / "task")),
                          len(os.listdir(process / "fd")))
        except (OSError, IndexError):
            return None


@dataclass
class Watch:
    """Kills nodes by turns, every second one of them so that the others live through it all, and looks at everybody.
    `scratch` holds each process's id under its name."""

    scratch: Path
    victims: Sequence[str]
    seconds: float  # in which it kills
    passed_s: float = 0.0
    kills: int = 0
    seen: dict[str, list[tuple[float, Vitals]]] = field(default_factory=dict)  # by name
    _looked_at_s: float = 0.0

    def __call__(self, seconds: float) -> None:
        """So many have passed."""
        self.passed_s += seconds
        if self.passed_s - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = self.passed_s
            for path in self.scratch.iterdir():
                if (vitals := Vitals.of(int(path.read_text() or 0))) is not None:
                    self.seen.setdefault(path.name, []).append((self.passed_s, vitals))
        if self.kills < int((min(self.passed_s, self.seconds) + KILL_EVERY_S / 2) / KILL_EVERY_S):
            victim = self.victims[self.kills % len(self.victims)]
            os.kill(int((self.scratch / victim).read_text()), signal.SIGKILL)
            self.kills += 1

    def windows(self) -> dict[str, tuple[Vitals, Vitals]]:
        """The least that each process held in a window at the beginning (after as long a warm-up) and in one at the
        end: what load adds for a while is in neither, what is never given back is in the last. Of who was not killed;
        zeros for one that was not there."""
        window_s = min(MOST_WINDOW_S, self.seconds / 6)
        return {name: (_least([one for at_s, one in seen if window_s <= at_s < 2 * window_s]),
                       _least([one for at_s, one in seen if self.seconds - window_s <= at_s < self.seconds]))
                for name, seen in sorted(self.seen.items()) if name not in self.victims}


def growing(windows: Mapping[str, tuple[Vitals, Vitals]]) -> list[str]:
    """What is not flat, in words: its least in the last window is more than MOST_GROWTH above that in the first."""
    gone = [f"{name}: not there at the end" for name, (_, last) in windows.items() if not last.threads]
    return gone + [f"{name}: {what}" for name, (first, last) in windows.items() for what in asdict(first)
            if getattr(last, what) > (1 + MOST_GROWTH) * getattr(first, what)]


def soak(setup: Setup, scale: Scale, requests: Sequence[SimRequest], results: Results, seed: int,
         at_once: int) -> bool:
    """Run it, unless it was, then check every answer, `at_once` processes at a time, and print; True if all is well.
    Without the weather, `setup` is the cluster."""
    asked_s = requests[-1].arrived_at_s * scale.time
    name = f"{asked_s / 60:.0f} minutes"
    if results.last(name, "soak") is None:
        rng, every_s = random.Random(seed), WEATHER_EVERY_S / scale.time
        weather = tuple((number * every_s, setup.fleet.link_gbps * rng.choice(WEATHER))
                        for number in range(1, int(requests[-1].arrived_at_s / every_s)))
        weather += ((requests[-1].arrived_at_s, setup.fleet.link_gbps),)
        cluster = Emulated("the soak", replace(setup, adaptive=True, convert_roles=True, weather=weather), scale,
                           pool_blocks=POOL_BLOCKS)
        with tempfile.TemporaryDirectory() as scratch:
            ids = Path(scratch) / "ids"
            ids.mkdir()
            watch = Watch(ids, [place.name for place in cluster.topology.places()[1::2]], asked_s)
            used = cluster.start(lambda made, engine: _drive(name, cluster, watch, requests, results, made, engine),
                                 lambda name: _write_id(ids / name), restarts=True)
            print(f"the soak: {used}", flush=True)
            said = json.loads((Path(scratch) / "said.json").read_text())
            began_s, said["checked"] = time.monotonic(), len((Path(scratch) / ANSWERS).read_text().splitlines())
            said["differ"] = _wrong(Path(scratch), said["checked"], at_once)
            said["wrong"] = len(said["differ"])
        said["words"] += f"; {said['checked']} answers checked in {time.monotonic() - began_s:.0f} s"
        results.add(name, "soak", said)
    return _print(results.again().last(name, "soak"))


def _write_id(path: Path) -> None:
    partial = path.parent.parent / f"{path.parent.name}.{path.name}"  # not in it: nobody may see half a number
    partial.write_text(str(os.getpid()))
    os.replace(partial, path)


def _drive(name: str, cluster: Emulated, watch: Watch, real: Sequence[SimRequest], results: Results, made: Process,
           engine: Engine) -> int:
    cluster.wait_for_nodes(made)
    cores, actions, requests, scratch = Cores(), [], cluster.requests(real), watch.scratch.parent
    with open(scratch / ANSWERS, "w") as answers, tqdm(total=round(watch.seconds), desc="soak", bar_format=BAR) as bar:

        def on_progress(seconds: float) -> None:
            minute = watch.passed_s // WRITE_EVERY_S
            watch(seconds)
            bar.update(min(seconds, bar.total - bar.n))  # what is late has no end that is known
            if watch.passed_s // WRITE_EVERY_S > minute:
                results.add(name, "minute", {"seconds": watch.passed_s, "waiting": len(made.front.journeys),
                                             "kills": watch.kills, "nodes": len(made.front.ready),
                                             "seen": {who: asdict(seen[-1][1]) for who, seen in watch.seen.items()}})

        def on_end(journey: Journey) -> None:
            """Write it down, and let go of it: what this process remembers must not look as if the cluster grew."""
            answer = Answer(journey.token_ids[:journey.prompt_tokens], journey.output_ids)
            answers.write(json.dumps(asdict(answer)) + "\n")
            journey.token_ids, journey.keys, journey.text = [], [], ""

        _, journeys = ask(made, "soak", requests, engine.model.config.vocab_size,
                          PATIENCE_S + ANSWER_S * cluster.scale.time, until_done=True,
                          on_progress=on_progress, on_action=actions.append, on_end=on_end)
    made.run_until(lambda: len(made.front.ready) == len(cluster.topology.places()) - 1, PATIENCE_S)
    words, is_valid = judged(made, cores)
    lost = [one for one in journeys if one.error is not None or one.finish_reason in (None, "aborted")]
    (scratch / "said.json").write_text(json.dumps({
        "minutes": watch.seconds / 60, "requests": len(journeys), "lost": len(lost),
        "recovered": sum(one.attempts > 1 for one in journeys), "kills": watch.kills,
        "moves": sum(isinstance(action, NewThreshold) for action in actions),
        "conversions": sum(isinstance(action, RoleChange) for action in actions),
        "leaked": {name: said.wrong for name, said in made.front.goodbyes.items() if said.wrong},
        "goodbyes": len(made.front.goodbyes), "is_valid": is_valid, "words": words,
        "windows": {name: [asdict(first), asdict(last)] for name, (first, last) in watch.windows().items()}}))
    return 0


def _wrong(scratch: Path, count: int, at_once: int) -> list[dict]:
    """The answers in `scratch` that differ from the reference, which as many processes compute."""
    jobs = [Job(f"check {number}", partial(_check, scratch, number, at_once), CHECK_S * count / at_once)
            for number in range(at_once)]
    run_all(jobs, at_once)
    return [one for number in range(at_once) for one in json.loads((scratch / f"wrong.{number}").read_text())]


def _check(scratch: Path, number: int, of: int) -> None:
    lines, reference, wrong = (scratch / ANSWERS).read_text().splitlines()[number::of], load(), []
    for first in range(0, len(lines), CHECKED_AT_ONCE):
        answers = [Answer(**json.loads(line)) for line in lines[first:first + CHECKED_AT_ONCE]]
        wrong += wrong_answers(answers, *reference)
    (scratch / f"wrong.{number}").write_text(json.dumps([asdict(one) for one in wrong]))


def _print(said: dict) -> bool:
    windows = {name: (Vitals(**first), Vitals(**last)) for name, (first, last) in said["windows"].items()}
    rows = [[name, *(f"{getattr(one, what):.0f}" for what in asdict(first) for one in (first, last))]
            for name, (first, last) in windows.items()]
    columns = [f"{what}, {when}" for what in ("MiB", "threads", "descriptors") for when in ("first", "last")]
    print(table(["who was never killed", *columns], rows))
    grown = growing(windows)
    window_s = min(MOST_WINDOW_S, said["minutes"] * 10)
    print(f"""
  first, last: the least in {window_s:.0f} s, after as long a warm-up and at the end.
  {'GROWING: ' + '; '.join(grown) if grown else f'flat: no least has grown by more than {MOST_GROWTH:.0%}'}
  {said['minutes']:.1f} minutes, {said['requests']} requests: {said['lost']} lost, {said['wrong']} of \
{said['checked']} wrong, {len(said['leaked'])} of {said['goodbyes']} nodes with wrong books {said['leaked'] or ''}
  {said['kills']} nodes killed, {said['recovered']} requests begun again, threshold moved {said['moves']} times, \
{said['conversions']} roles changed
  {said['words']}""")
    for one in said["differ"]:
        print(f"  {one['answer']['output']} instead of {one['expected']} after {len(one['answer']['prompt'])} tokens; "
              f"the logits of the two are {one['logit_gap']} apart")
    return not (said["lost"] or said["wrong"] or said["leaked"] or grown)


def _least(seen: Sequence[Vitals]) -> Vitals:
    return Vitals(*(min((getattr(one, what) for one in seen), default=0.0) for what in Vitals.__dataclass_fields__))
