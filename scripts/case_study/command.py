"""The live case study's command line. Chapter 13; paper 4."""

from case_study.options import checked, parser
from minprfaas.errors import long_import


def main(argv: list[str]) -> int:
    """Run what is asked; see `study.run`."""
    args = checked(parser().parse_args(argv))
    with long_import():  # no mistake above is to wait for it
        from case_study.study import run
    return run(args)
