"""Prefill in one datacenter process, decode in another, on real text: the main job. Chapter 13; paper 3 and 4."""

import argparse

from minprfaas.cluster.topology import Topology
from minprfaas.commands.live_options import add_options, checked
from minprfaas.errors import ArgumentParser, long_import


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ArgumentParser(
        description="Process 0 is the PrfaaS datacenter, process 1 the local PD datacenter with the front end. Start "
                    "it with `torchrun --nproc-per-node 2`, or plainly: then it starts its two processes itself.",
        epilog="example: python scripts/two_datacenters.py --prompts out/demo_prompts.jsonl --link-gbps 0.02 --check")
    add_options(p)
    return p


def main(argv: list[str]) -> int:
    """Play this process's part, or start both processes when there is no torchrun; returns the exit status."""
    topology = Topology(prfaas=1, pd=1)
    run, places = checked(parser().parse_args(argv), topology), topology.two_places()
    with long_import():  # neither --help nor a mistake above is to wait for it
        from minprfaas.cluster.launch import Launch, watch_parent
        from minprfaas.commands.live_run import Seat, play, start
    launch = Launch.from_environment(world_size=2)
    if launch is None:
        return start(run, places, main, argv)
    watch_parent()
    return play(run, Seat(places, places[launch.rank], launch.address, launch.local_rank))
