"""The door: `python -m minprfaas COMMAND`. Each command is a module of `minprfaas.commands`."""

import argparse
import importlib
import sys
from types import ModuleType

from minprfaas.commands import options
from minprfaas.errors import ArgumentParser, exit_on_user_error, long_import

COMMANDS = {  # what each does, and an example of what it may be given
    "generate": ("answer prompts in one process: the reference for everything distributed",
                 '"The harbour master of Velmora is" --max-tokens 8'),
    "serve": ("an OpenAI-compatible HTTP endpoint, prefill and decode in one process", "--port 8000"),
    "inspect": ("what a checkpoint holds, and what its KVCache weighs", "--config kimi-linear-48b"),
    "profile": ("measure prefill and decode of a model on this machine", "--out profile.json"),
    "plan": ("threshold, prefill and decode instances from the throughput model", "--case paper"),
    "simulate": ("run the scheduler against a simulated cluster", "--requests 2000 --load 0.8"),
    "report": ("draw a run that was written with --json and --timeline as one page",
               "--json run.jsonl --timeline run.json"),
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog="python -m minprfaas", description="Prefill-as-a-Service in readable PyTorch.",
                            epilog="example: python -m minprfaas plan --case paper     (options: COMMAND --help)")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (summary, example) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {parser.prog} {name} {example}", formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:  # neither `plan` nor any --help must wait for torch
            add_arguments = getattr(options, name, None) or _module_of(name).add_arguments
            add_arguments(subparser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # a command's, and argparse would name the --help that does not list them
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return _module_of(args.command).run(args) or 0


def _module_of(command: str) -> ModuleType:
    with long_import():
        return importlib.import_module(f"minprfaas.commands.{command}")


if __name__ == "__main__":
    sys.exit(main())
