"""Programs as a user runs them, without the seconds that each of them would take to import torch.

They are forked from a process that has imported it, with arguments, environment, output and exit status of their own.
What is about the interpreter's own start or end is tested with `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

PRELOADED = ["pytest", "minprfaas.commands.two_datacenters", "minprfaas.commands.cluster", "torch.distributed",
             "minprfaas.cluster.processes", "minprfaas.commands.live_program", "transport_support", "fault_support"]


def process_starter() -> multiprocessing.context.BaseContext:
    """Processes that start fast, because what they need is imported already. There is one such server for all tests of
    this process, so it has what each of them needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _become(command, environment, *outputs) -> None:
    os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
        output.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Program:
    """A script of this project that runs, in a session of its own: as much of `subprocess.Popen` as is needed."""

    def __init__(self, script, *arguments, **environment):
        context, pipes = process_starter(), [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        self._process = context.Process(target=_become, args=(
            [str(script), *map(str, arguments)], {**os.environ, **environment}, *(write for _, write in pipes)))
        self._process.start()
        for _, write in pipes:
            write.close()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(read.fileno())) for read, _ in pipes)

    @property
    def returncode(self):
        """None as long as it runs."""
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("program", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it still says on stdout and stderr, once it has ended."""
        with ThreadPoolExecutor(2) as readers:
            said = [readers.submit(output.read) for output in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)  # else the readers would wait for it
                raise
            return tuple(one.result() for one in said)


def run(script, *arguments, timeout, **environment) -> subprocess.CompletedProcess:
    """Run it to its end."""
    running = Program(script, *arguments, **environment)
    try:
        said, errors = running.communicate(timeout)
    finally:
        running.kill()
    return subprocess.CompletedProcess([script, *arguments], running.returncode, said, errors)
