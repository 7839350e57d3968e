"""The paper's table 6, planned, simulated and run: `python scripts/live_case_study.py --help`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C before `run_program` can answer it ends without a traceback

from minprfaas.errors import run_program  # noqa: E402

if __name__ == "__main__":
    run_program("case_study.command")
