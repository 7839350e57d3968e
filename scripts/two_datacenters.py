"""Prefill in one datacenter, decode in another: `torchrun --nproc-per-node 2 scripts/two_datacenters.py --help`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C before `run_program` can answer it ends without a traceback

from minprfaas.errors import run_program  # noqa: E402

if __name__ == "__main__":
    run_program("minprfaas.commands.two_datacenters")
