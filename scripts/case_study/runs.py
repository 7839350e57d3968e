"""A cluster of emulated machines that a simulation's `Setup` describes, run live: one process for each. Chapter 13.

A `Setup` and its requests are in real units; here they get into the run's. Each run is of its own processes.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from case_study.plane import EmulatedPlane
from minprfaas.cluster.emulation import Emulation, verdict
from minprfaas.cluster.launch import Launch, start_processes, watch_parent
from minprfaas.cluster.processes import Process
from minprfaas.cluster.topology import Topology
from minprfaas.commands import cluster
from minprfaas.commands.live_options import Run
from minprfaas.commands.live_program import GOODBYE_DEADLINE_S
from minprfaas.commands.live_run import Drive, Seat, play
from minprfaas.config import LineConfig, LinkConfig, WeatherChange
from minprfaas.errors import UserError
from minprfaas.observe.cores import Cores
from minprfaas.scheduling.profiles import Scale
from minprfaas.simulator.nodes import SimRequest
from minprfaas.simulator.simulation import RTT_S, Setup

LANES = 1  # of a line of 56 Mbit/s in the run; every lane more is 36 connections that beat, on two cores
TRANSFER_DEADLINE_S = 600.0
NODES_DEADLINE_S = 120.0
MOST_BUSY = 0.7  # of the cores: beyond it a node may wait for one, and how long it takes is no longer its profile's
LEAD_S = 12.0  # of the run, from when its line is up until its weather begins: the nodes must be there by then


@dataclass(frozen=True)
class Emulated:
    """A cluster and the scale in which it is run; pools are those of each process, in the run's tokens."""

    name: str
    setup: Setup
    scale: Scale
    block_tokens: int = 64
    pool_blocks: int = 1200

    @property
    def topology(self) -> Topology:
        """The processes."""
        fleet = self.setup.fleet
        return Topology(int(fleet.prfaas_instances), fleet.pd_instances, self.setup.n_p)

    def start(self, drive: Drive, on_start: Callable[[str], None] = lambda name: None, restarts: bool = False) -> str:
        """Run it until `drive` has ended in the front end's process; returns how busy its processes were, in words.
        `on_start` is called in each. UserError when it ends with another status than 0."""
        run, places = self._run(), self.topology.places()
        started_s, before = time.monotonic(), os.times()

        def live(argv: list[str]) -> int:
            launch = Launch.from_environment(world_size=len(places))
            watch_parent()
            here = places[launch.rank]
            on_start(here.name)
            return play(run, Seat(places, here, launch.address, 0), drive)

        status = start_processes([place.name for place in places], places[0].name, live, [], restarts=restarts)
        after, elapsed_s = os.times(), time.monotonic() - started_s
        used_s = after.children_user + after.children_system - before.children_user - before.children_system
        if status:
            raise UserError(f"the run of {self.name} ended with status {status}")
        return (f"{len(places)} processes for {elapsed_s:.0f} s took {used_s:.0f} s of CPU, "
                f"{used_s / elapsed_s / (os.cpu_count() or 1):.0%} of the cores")

    def wait_for_nodes(self, made: Process) -> None:
        """Until all are there. UserError when one does not come in time."""
        nodes = len(self.topology.places()) - 1
        if not made.run_until(lambda: len(made.front.ready) == nodes, NODES_DEADLINE_S):
            raise UserError(f"{len(made.front.ready)} of {nodes} nodes came within {NODES_DEADLINE_S:g} s")

    def wait_for_weather(self, made: Process) -> None:
        """Until the weather begins, if there will be any. UserError when it has."""
        if not self.setup.weather:
            return
        line = next(link.line for link in made.node.mail.links.values() if getattr(link, "line", None) is not None)
        if line.age_s(time.monotonic()) > LEAD_S:
            raise UserError(f"the nodes took more than {LEAD_S:g} s to come, and the weather has begun; this machine "
                            "is too busy")
        made.run_until(lambda: line.age_s(time.monotonic()) >= LEAD_S, LEAD_S)

    def requests(self, real: Sequence[SimRequest]) -> list[SimRequest]:
        """In the run's units; the first token of an answer comes from its prefill."""
        scale = self.scale
        return [SimRequest(one.arrived_at_s * scale.time, max(2, round(one.input_tokens / scale.length)),
                           1 + max(1, round(one.output_tokens / scale.length)), one.keys) for one in real]

    def _run(self) -> Run:
        setup, scale, fleet = self.setup, self.scale, self.setup.fleet
        args = cluster.parser().parse_args([
            "--pool-blocks", str(self.pool_blocks), "--block-tokens", str(self.block_tokens), "--lanes", str(LANES),
            "--deadline-s", str(TRANSFER_DEADLINE_S), "--ship-prefixes"])
        args.threshold = round(min(setup.threshold, 1e9) / scale.length)
        weather = tuple(WeatherChange(LEAD_S + at_s * scale.time, scale.run_gbps(gbps)) for at_s, gbps in setup.weather)
        line = LineConfig(scale.run_gbps(fleet.link_gbps), 1000 * RTT_S * scale.time, weather)
        # What the control plane plans with: tokens and bytes of the run, seconds of the emulated machines.
        units = Scale(1.0, scale.length, scale.size)
        planned = replace(fleet, link_gbps=units.run_gbps(fleet.link_gbps),
                          output_tokens=fleet.output_tokens / scale.length,
                          prfaas_profile=units.profile(fleet.prfaas_profile),
                          pd_profile=units.profile(fleet.pd_profile))
        emulation = Emulation(fleet.prfaas_profile, fleet.pd_profile, scale)
        return Run(args, self.topology, LinkConfig(args.lanes), line, [], None, planned, emulation,
                   dict(convert_roles=setup.convert_roles, adaptive=setup.adaptive, selective=setup.selective),
                   plane=lambda settings: EmulatedPlane(settings, scale.time, setup.cache_aware))


def judged(made: Process, cores: Cores) -> tuple[str, bool]:
    """End the run's nodes; whether it says something about the emulated machines, in words and as a truth."""
    busy = cores.busy_share
    made.shut_down(GOODBYE_DEADLINE_S)
    words, is_valid = verdict(made.front.goodbyes)
    if busy is None:
        return f"{words}; {cores}", is_valid
    words += f"; cores {busy:.0%} busy (limit {MOST_BUSY:.0%}"
    if busy <= MOST_BUSY:
        return f"{words})", is_valid
    return f"{words}: NOT VALID; give --scale a TIME that is {busy / MOST_BUSY:.1f} times as long)", False
