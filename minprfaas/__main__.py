"""The door: `python -m minprfaas COMMAND`. Each command is a module of `minprfaas.commands`."""

import importlib
import sys

from minprfaas.errors import ArgumentParser, exit_on_user_error

COMMANDS = {
    "generate": "answer prompts in one process (the reference for everything distributed)",
    "serve": "an OpenAI-compatible HTTP endpoint, prefill and decode in one process",
    "inspect": "what a checkpoint holds, and what its KVCache weighs",
    "profile": "measure prefill and decode of a model on this machine",
    "plan": "threshold, prefill and decode instances from the throughput model",
    "simulate": "run the scheduler against a simulated cluster",
    "report": "draw a run that was written with --json and --timeline as one page",
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog="python -m minprfaas", description="Prefill-as-a-Service in readable PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:  # only the chosen command is imported: `plan` must not wait for torch
            command = importlib.import_module(f"minprfaas.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
