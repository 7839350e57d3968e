"""Do the tests notice? Break one line at a time in a copy of the tree, and run the tests that should fail.

    python scripts/mutate.py --named                  the features of scripts/mutations.py, each taken out by hand
    python scripts/mutate.py --count 60 --seed 7      lines drawn at random: comparisons flipped, statements deleted, …
    python scripts/mutate.py --count 60 --seed 7 --jobs 14 --results FILE     14 lines at once, on as many cores
    python scripts/mutate.py --count 60 --seed 7 --list     what would be broken, without a run

The tree itself is never touched. First the test files run with nothing broken: one that fails then is left out. With
--results FILE a run that was stopped goes on where it was. Texts for people (docstrings, errors, logs) are left alone,
and so is what only a GPU runs.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error, require_number

sys.path.insert(0, str(Path(__file__).parent))
from mutants import Mutant, compiles, mutants_of
from mutations import GUARDS, NAMED, NOT_ON_A_CPU, ROOMS

os.environ.setdefault("OMP_NUM_THREADS", "1")
tqdm.monitor_interval = 0  # its thread must not be there when this process forks
ROOT = Path(__file__).resolve().parent.parent
# What takes longer to import than most test files take to run. The tests' own modules come after the fork.
IMPORTED_ONCE = ("pytest", "safetensors.torch", "tokenizers", "torch.distributed", "torch._dynamo")
UNBROKEN_LIMIT_S = 600.0
COPIED = ("minprfaas", "scripts", "tests", "pyproject.toml")


def drawn(count: int, seed: int, rooms: list[str]) -> list[Mutant]:
    """`count` mutants of these rooms that compile, at most one of a line, every line equally likely."""
    sources, by_line = {}, {}
    for room in rooms:
        for path in sorted((ROOT / "minprfaas" / room).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            sources[file] = path.read_text(encoding="utf-8")
            for mutant in mutants_of(file, sources[file], NOT_ON_A_CPU.get(file, ())):
                by_line.setdefault((file, mutant.line), []).append(mutant)
    draw, found = random.Random(seed), []
    for line in draw.sample(sorted(by_line), len(by_line)):
        able = [mutant for mutant in by_line[line] if compiles(mutant.applied(sources[mutant.file]))]
        if able:
            found.append(draw.choice(able))
        if len(found) == count:
            break
    return found


# Which tests should notice


def tests_for(file: str) -> list[str]:
    """Test files, most telling first: those that `GUARDS` names for this file, or else those of its room, of which
    the ones that import it come first; then every other test file that imports it."""
    module, room = file.removesuffix(".py").replace("/", "."), ROOMS[file.split("/")[1]]
    importing = [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if module in _imports(path)]
    of_room = [*(test for test in room if test in importing), *room]
    first = GUARDS.get(file.removeprefix("minprfaas/"), of_room)
    return list(dict.fromkeys([*first, *importing]))


@cache
def _imports(path: Path) -> set[str]:
    found = set()
    for module, names in re.findall(r"^ *from (\S+) import (\([^)]*\)|.*)", path.read_text("utf-8"), re.MULTILINE):
        found |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))}
    return found


# Running them


@dataclass(frozen=True)
class Task:
    """Something that is broken (or nothing), and the test files that are run then, one by one until one notices."""

    id: str
    changes: dict[str, str]  # file -> its text while it is broken
    tests: list[str]
    limits_s: list[float]  # of each test file: what takes longer hangs


class Tree:
    """A copy of the tree in which one thing at a time is broken."""

    def __init__(self, folder: Path):
        self._folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)

    def judge(self, task: Task) -> Generator[None, None, dict]:
        """What the tests say of this task. It yields while a test file runs, so that one loop can look after many
        trees."""
        result = {"id": task.id, "verdict": "survived", "by": ""}
        began = time.monotonic()
        originals = {file: (self._folder / file).read_text(encoding="utf-8") for file in task.changes}
        self._write(task.changes)
        try:
            for test, limit_s in zip(task.tests, task.limits_s, strict=True):
                status, failed = yield from self._run(test, limit_s)
                if status != 0:
                    result |= {"verdict": "hung" if status is None else "caught", "by": failed or test}
                    break
        finally:
            self._write(originals)
        return result | {"seconds": round(time.monotonic() - began, 1)}

    def _write(self, texts: dict[str, str]) -> None:
        for file, text in texts.items():
            path = self._folder / file
            path.write_text(text, encoding="utf-8")
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)  # it tells age by whole seconds

    def _run(self, test: str, limit_s: float) -> Generator[None, None, tuple[int | None, str]]:
        """Exit status (None: it ran past its limit), and the first test that failed."""
        output = self._folder / "output"
        pid = os.fork()  # with torch imported already, which takes longer than most test files
        if pid == 0:
            try:
                os.setsid()
                self._become_pytest(test, output)
            finally:
                os._exit(70)
        until, done, status = time.monotonic() + limit_s, 0, 0
        try:
            while not done and time.monotonic() < until:
                yield
                done, status = os.waitpid(pid, os.WNOHANG)
        finally:
            try:
                os.killpg(pid, signal.SIGKILL)  # it, or whatever processes a broken test has left
            except ProcessLookupError:
                pass
            if not done:
                os.waitpid(pid, 0)
        if not done:
            return None, ""
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output.read_text(errors="replace"), re.MULTILINE)
        return os.waitstatus_to_exitcode(status), failed[1] if failed else ""

    def _become_pytest(self, test: str, output: Path) -> None:
        sys.stdout = sys.stderr = open(output, "w")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        for name in [name for name in sys.modules if name.split(".")[0] == "minprfaas"]:
            del sys.modules[name]  # what is imported from now on is the copy's
        os.chdir(self._folder)
        os.environ["PYTHONPATH"] = str(self._folder)
        sys.path.insert(0, str(self._folder))
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={self._folder / 'basetemp'}"]
        status = sys.modules["pytest"].main([*options, f"tests/{test}"])
        sys.stdout.flush()
        os._exit(int(status))


def judge_all(tasks: list[Task], trees: list[Tree]) -> Iterator[dict]:
    """The result of each task, in the order in which they are done, as many at once as there are trees."""
    waiting, at_work = deque(tasks), {}
    try:
        while waiting or at_work:
            for tree in trees:
                if waiting and tree not in at_work:
                    at_work[tree] = tree.judge(waiting.popleft())
            for tree, judging in list(at_work.items()):
                try:
                    next(judging)
                except StopIteration as done:
                    del at_work[tree]
                    yield done.value
            time.sleep(0.05)
    finally:
        for judging in at_work.values():
            judging.close()  # ends its tests


class Bench:
    """Trees to judge in, and what is known already. With a file it is noted there, and read again the next time."""

    def __init__(self, folder: Path, jobs: int, results: Path | None = None):
        for name in IMPORTED_ONCE:
            importlib.import_module(name)
        self._results, self.known = results, {}
        if results is not None and results.exists():
            self.known = {one["id"]: one for one in map(json.loads, results.read_text().splitlines())}
        self._trees = [Tree(folder / str(number)) for number in range(jobs)]

    def seconds_unbroken(self, tests: Iterable[str]) -> dict[str, float]:
        """How long each test file takes in a tree where nothing is broken. A file that fails there could say nothing
        about mutants, so it is missing."""
        tests = dict.fromkeys(tests)
        for _ in range(2):  # a busy machine gets a second try
            again = [f"unbroken {test}" for test in tests if not self._passes(test)]
            tasks = [Task(id, {}, [id.removeprefix("unbroken ")], [UNBROKEN_LIMIT_S]) for id in again]
            for _ in self._judge(tasks, "test file"):
                pass
        return {test: self.known[f"unbroken {test}"]["seconds"] for test in tests if self._passes(test)}

    def judge(self, mutations: list[tuple[str, dict[str, str], list[str]]]) -> Iterator[dict]:
        """The verdict on each (id, changes, test files): survived, caught or hung. Files that fail without any
        mutation are named and left out."""
        tests = dict.fromkeys(test for _, _, tests in mutations for test in tests)
        seconds = self.seconds_unbroken(tests)
        for test in tests:
            if test not in seconds:
                print(f"left out: tests/{test} fails without any mutation: {self.known[f'unbroken {test}']['by']}")
        tasks = []
        for id, changes, tests in mutations:
            able = [test for test in tests if test in seconds]
            tasks.append(Task(id, changes, able, [60.0 + 5 * seconds[test] for test in able]))
        yield from self._judge(tasks, "mutant")

    def _passes(self, test: str) -> bool:
        return self.known.get(f"unbroken {test}", {"verdict": "unknown"})["verdict"] == "survived"

    def _judge(self, tasks: list[Task], unit: str) -> Iterator[dict]:
        for result in tqdm(judge_all(tasks, self._trees), total=len(tasks), unit=unit, disable=None):
            self.known[result["id"]] = result
            if self._results is not None:
                with open(self._results, "a") as file:
                    file.write(json.dumps(result) + "\n")
            yield result


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    work = named_work() if args.named else [
        (mutant.id, {mutant.file: mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))},
         tests_for(mutant.file)) for mutant in drawn(args.count, args.seed, args.rooms)]
    if args.list:
        for id, _, tests in work:
            print(f"{id}    [{' '.join(tests[:2])} …]")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.jobs, args.results)
        known = [bench.known[id] for id, _, _ in work if id in bench.known]
        if args.again:
            known = [result for result in known if result["verdict"] != "survived"]
        kept = {result["id"] for result in known}
        verdicts = Counter()
        for result in itertools.chain(known, bench.judge([one for one in work if one[0] not in kept])):
            verdicts[result["verdict"]] += 1
            by = f"  by {result['by']}" if result["verdict"] != "survived" else ""
            tqdm.write(f"{result['verdict']:8}  {result['id']}{by}", file=sys.stdout)
    survived, hung = verdicts["survived"], verdicts["hung"]
    by_time = f", {hung} of them by the time limit" if hung else ""
    print(f"{len(work) - survived} of {len(work)} caught{by_time}; {survived} survived")
    return 1 if survived else 0


def named_work() -> list[tuple[str, dict[str, str], list[str]]]:
    """The mutations by hand. Raises UserError when one fits the code no more."""
    work = []
    for one in NAMED:
        texts: dict[str, str] = {}
        for file, old, new in one.changes:
            text = texts.get(file) or (ROOT / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise UserError(f"mutation {one.name!r} fits no more: {file} holds {old!r} {text.count(old)} times")
            texts[file] = text.replace(old, new)
        work.append((one.name, texts, list(one.tests)))
    return work


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--named", action="store_true", help="the list in scripts/mutations.py instead of random lines")
    parser.add_argument("--count", type=int, default=60, help="how many lines to break (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which lines (default: %(default)s)")
    parser.add_argument("--rooms", nargs="+", choices=sorted(ROOMS), default=sorted(ROOMS), metavar="ROOM",
                        help=f"folders of minprfaas/ to break lines in (default: {' '.join(sorted(ROOMS))})")
    parser.add_argument("--jobs", type=int, default=1, help="how many copies of the tree to break at once, each in "
                        "processes of its own (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="file to note verdicts in, and to go on from")
    parser.add_argument("--again", action="store_true", help="run those of --results that survived once more")
    parser.add_argument("--list", action="store_true", help="print the mutants without running a test")
    args = parser.parse_args()
    for name in ("count", "jobs"):
        require_number(f"--{name}", getattr(args, name), least=1)
    return args


if __name__ == "__main__":
    sys.exit(main())
