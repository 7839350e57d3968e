"""The live case study's command line. Chapter 13; paper 4."""

from case_study.options import checked, parser


def main(argv: list[str]) -> int:
    """Run what is asked; see `study.run`."""
    args = checked(parser().parse_args(argv))
    from case_study.study import run  # here, because it waits for torch, and no mistake above is to wait with it
    return run(args)
