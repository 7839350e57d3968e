"""Do the tests notice? Break one line at a time in a copy of the tree, and run the tests that should fail.

    python scripts/mutate.py --named                  the features of scripts/mutations.py, each taken out by hand
    python scripts/mutate.py --count 60 --seed 7      lines drawn at random: comparisons flipped, statements deleted, …
    python scripts/mutate.py --count 60 --seed 7 --list     what would be broken, without a run

The tree itself is never touched. With --results FILE a run that was stopped goes on where it was. Texts for people
(docstrings, errors, logs) are left alone, and so is what only a GPU runs.
"""

import argparse
import ast
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from minprfaas.errors import UserError, exit_on_user_error

sys.path.insert(0, str(Path(__file__).parent))
from mutants import Mutant, compiles, mutants_of
from mutations import GUARDS, NAMED, NOT_ON_A_CPU, ROOMS

os.environ.setdefault("OMP_NUM_THREADS", "1")
tqdm.monitor_interval = 0  # its thread must not be there when this process forks
ROOT = Path(__file__).resolve().parent.parent
COPIED = ("minprfaas", "scripts", "tests", "pyproject.toml")


def drawn(count: int, seed: int, rooms: list[str]) -> list[Mutant]:
    """`count` mutants of these rooms that compile, at most one of a line, every line equally likely."""
    sources, by_line = {}, {}
    for room in rooms:
        for path in sorted((ROOT / "minprfaas" / room).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            sources[file] = path.read_text(encoding="utf-8")
            for mutant in mutants_of(file, sources[file]) if file not in NOT_ON_A_CPU else ():
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
    the ones that import it come first."""
    if file.removeprefix("minprfaas/") in GUARDS:
        return list(GUARDS[file.removeprefix("minprfaas/")])
    module, room = file.removesuffix(".py").replace("/", "."), ROOMS[file.split("/")[1]]
    importing = [test for test in room if module in _imports(ROOT / "tests" / test)]
    return list(dict.fromkeys([*importing, *room]))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# Running them


def import_once() -> None:
    """What takes longer to import than most test files take to run. The tests' own modules come after the fork."""
    for name in ("pytest", "safetensors.torch", "tokenizers", "torch.distributed", "torch._dynamo"):
        importlib.import_module(name)


class Bench:
    """A copy of the tree in which one thing at a time is broken."""

    def __init__(self, folder: Path, results: Path | None):
        import_once()
        self._folder, self._results = folder, results
        self.known: dict[str, dict] = {}
        if results is not None and results.exists():
            self.known = {one["id"]: one for one in map(json.loads, results.read_text().splitlines())}
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            options = {"ignore": shutil.ignore_patterns("__pycache__")} if source.is_dir() else {}
            copy(source, folder / name, **options)

    def judge(self, id: str, changes: dict[str, str], tests: list[str]) -> dict:
        """Run the test files one by one with these files changed, until one notices; remembered under `id`. Raises
        UserError when one fails as it is."""
        verdict, failed, seconds = "survived", "", 0.0
        for test in tests:
            limit_s = 60.0 + 5 * self._seconds_unbroken(test)  # what takes longer hangs, even on a busy machine
            originals = {file: (self._folder / file).read_text(encoding="utf-8") for file in changes}
            self._write(changes)
            began = time.monotonic()
            try:
                status, failed = self._run(test, limit_s)
            finally:
                self._write(originals)
            seconds += time.monotonic() - began
            if status != 0:
                verdict = "hung" if status is None else "caught"
                break
        return self._note({"id": id, "verdict": verdict, "by": failed or test, "seconds": round(seconds, 1)})

    def _seconds_unbroken(self, test: str) -> float:
        if f"unbroken {test}" not in self.known:
            for attempt in (1, 2):  # a busy machine gets a second one
                began = time.monotonic()
                status, failed = self._run(test, 600.0)
                if status == 0:
                    break
            else:
                raise UserError(f"tests/{test} fails without any mutation: {failed or 'it ran past 600 s'}")
            self._note({"id": f"unbroken {test}", "seconds": round(time.monotonic() - began, 1)})
        return self.known[f"unbroken {test}"]["seconds"]

    def _write(self, texts: dict[str, str]) -> None:
        for file, text in texts.items():
            path = self._folder / file
            path.write_text(text, encoding="utf-8")
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)  # it tells age by whole seconds

    def _run(self, test: str, limit_s: float) -> tuple[int | None, str]:
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
                time.sleep(0.05)
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
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for name in [name for name in sys.modules if name.split(".")[0] == "minprfaas"]:
            del sys.modules[name]  # what is imported from now on is the copy's
        os.chdir(self._folder)
        os.environ["PYTHONPATH"] = str(self._folder)
        sys.path.insert(0, str(self._folder))
        status = sys.modules["pytest"].main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"])
        sys.stdout.flush()
        os._exit(int(status))

    def _note(self, result: dict) -> dict:
        self.known[result["id"]] = result
        if self._results is not None:
            with open(self._results, "a") as file:
                file.write(json.dumps(result) + "\n")
        return result


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
        bench, survived, hung = Bench(Path(folder), args.results), 0, 0
        bar = tqdm(work, unit="mutant", disable=None)
        for id, changes, tests in bar:
            result = bench.known.get(id)
            if result is None or (args.again and result["verdict"] == "survived"):
                result = bench.judge(id, changes, tests)
            survived, hung = survived + (result["verdict"] == "survived"), hung + (result["verdict"] == "hung")
            by = f"  by {result['by']}" if result["verdict"] != "survived" else ""
            bar.write(f"{result['verdict']:8}  {id}{by}", file=sys.stdout)
    print(f"{len(work) - survived} of {len(work)} caught{f', {hung} of them by the time limit' if hung else ''}; "
          f"{survived} survived")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--named", action="store_true", help="the list in scripts/mutations.py instead of random lines")
    parser.add_argument("--count", type=int, default=60, help="how many lines to break (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which lines (default: %(default)s)")
    parser.add_argument("--rooms", nargs="+", choices=sorted(ROOMS), default=sorted(ROOMS), metavar="ROOM",
                        help=f"folders of minprfaas/ to break lines in (default: {' '.join(sorted(ROOMS))})")
    parser.add_argument("--results", type=Path, help="file to note verdicts in, and to go on from")
    parser.add_argument("--again", action="store_true", help="run those of --results that survived once more")
    parser.add_argument("--list", action="store_true", help="print the mutants without running a test")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count} is out of range; it must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
