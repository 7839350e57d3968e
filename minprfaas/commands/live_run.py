"""A process's part in a run of the live cluster; the front end's has the screen. Chapter 13; paper 3 and 4."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minprfaas.cluster.launch import (StoreAddress, emulated_line, link_identity, own_device, require_open_files,
                                      share_arenas, start_processes, threads_of)
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.neighbours import Neighbours
from minprfaas.cluster.processes import Process, control_settings, front_end, process, worker
from minprfaas.cluster.topology import PD_SITE, Place
from minprfaas.commands.answers import wire_between, wire_share
from minprfaas.commands.live_options import Run
from minprfaas.commands.live_program import Program
from minprfaas.commands.machines import machine_at
from minprfaas.commands.options import FULL_CONTEXTS
from minprfaas.config import UNTHROTTLED_GBPS, CacheConfig, LinkConfig, Role
from minprfaas.engine.engine import Engine
from minprfaas.engine.paced import Pace, PacedEngine
from minprfaas.engine.pieces import Phase, suit_products_to
from minprfaas.engine.reference import longest_prompts, pool_for
from minprfaas.engine.warm_up import compile_and_warm_up
from minprfaas.errors import UserError
from minprfaas.files import OutputFile
from minprfaas.model.checkpoint import load
from minprfaas.observe.timeline import Timeline
from minprfaas.scheduling.sites import SitesControlPlane
from minprfaas.serving.service import listen, most_connections
from minprfaas.transport.events import EventQueue
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.wan.link import Link

Drive = Callable[[Process, Engine], int]
MEET_ALL_S = 5.0  # until all processes of a run are there, for a node that is
FRONT_END_GRACE_S = 15.0  # then what only this process has seen is said after all
OWN_FILES, LINK_FILES, LANE_FILES = 32, 4, 5  # that a process opens at most; read from /proc/PID/fd
FABRIC_TIMEOUT_S = 2.0  # inside a datacenter there is no weather: a connection that breaks is a process that died


@dataclass(frozen=True)
class Seat:
    """Which of a run's processes this one is, and where the others are met."""

    places: list[Place]
    here: Place
    address: StoreAddress
    local_rank: int = 0
    is_apart: bool = False  # was started by itself: it waits for the front end to return, if that goes away


def outputs_of(run: Run) -> dict[str, OutputFile]:
    """The files that were asked for, by kind. UserError when one cannot be written."""
    paths = {"json": run.args.json, "timeline": run.args.timeline}
    return {name: OutputFile(path) for name, path in paths.items() if path is not None}


def start(run: Run, chosen: list[Place], main: Callable[[list[str]], int], argv: list[str], **options) -> int:
    """Start a process for each of `chosen`; see `start_processes`. A path that cannot be written is said before."""
    for output in outputs_of(run).values():
        output.close()
    front = next((place.name for place in chosen if place.has_front), None)
    return start_processes([place.name for place in chosen], front, main, argv, **options)


def play(run: Run, seat: Seat, drive: Drive | None = None) -> int:
    """Live this process's life; returns the exit status. `drive` is what the front end's process does once its peers
    can be met, instead of asking the prompts."""
    share_arenas()
    outputs = outputs_of(run) if seat.here.has_front else {}
    try:
        return _play(run, seat, outputs, drive)
    except UserError:
        if not seat.here.has_front and not seat.is_apart:
            # The front end's process sees the same mistake and says it, and the launcher ends this one: once is enough.
            time.sleep(FRONT_END_GRACE_S)
        raise
    finally:
        for output in outputs.values():
            output.close()


def _play(run: Run, seat: Seat, outputs: dict[str, OutputFile], drive: Drive | None) -> int:
    args, here = run.args, seat.here
    lanes = [link_config(run.link, here, peer).lanes for peer in seat.places if peer is not here]
    require_open_files(OWN_FILES + LINK_FILES * len(lanes) + LANE_FILES * sum(lanes)
                       + (most_connections(args.max_requests) if args.serve is not None else 0))
    timeline = Timeline(here.name) if args.timeline else None
    listener = listen(args.host, args.serve) if here.has_front and args.serve is not None else None
    # Before the model: others wait for it. Kept: where this process serves it, it lives as long.
    store = seat.address.open(here.has_front, run.wait_s)
    engines = engines_of(run, seat, timeline)
    engine = engines[0]  # to ask for what all of them share
    wire = wire_between(args)
    mail = Mail(EventQueue(), wire)
    front = None
    if here.has_front:
        fleet = run.fleet
        if fleet is not None:
            share = wire_share(engine.layout, wire)
            fleet = replace(fleet, prfaas_profile=fleet.prfaas_profile.encoded(share))
        gbps = {site: line.gbps or UNTHROTTLED_GBPS for site, line in run.lines.items()}
        settings = control_settings(args.threshold, sum(gbps.values()), engine.layout,
                                    ship_prefixes=args.ship_prefixes, fleet=fleet, **run.policy)
        plane = run.plane(settings) if len(gbps) < 2 else SitesControlPlane(settings, gbps)
        front = front_end(plane, mail, engine, args.deadline_s)
    workers = [worker(name, role, each, mail, args.deadline_s, overlap=not args.no_overlap, relay=args.relay)
               for (name, role), each in zip(here.roles.items(), engines)]
    made = process(mail, front, workers)
    lines = {site: emulated_line(run.line_between(here.site, site), store, here.site, site)
             for site in {place.site for place in seat.places} - {here.site}}
    identity = link_identity(engine.model, engine.layout)
    across = link_identity(engine.model, engine.layout, wire)

    def make_link(peer: Place) -> Link | Fabric:
        first, second = sorted((here, peer), key=seat.places.index)
        name, store, rank = f"{first.name}:{second.name}", seat.address.open(), int(here is second)
        config = link_config(run.link, here, peer)
        if peer.site != here.site:
            return Link(name, store, rank, config, across, lines[peer.site], mail.events, timeline)
        if here.roles and peer.roles:
            return Fabric(name, store, rank, config, identity, engine.model.device, mail.events)
        return Link(name, store, rank, config, identity, events=mail.events, timeline=timeline)

    neighbours = Neighbours(here, [place for place in seat.places if place is not here], make_link, mail)
    try:
        if front is not None and drive is not None:
            return drive(made, engine)
        if front is not None:
            program = Program(run, here, seat.places, made, neighbours, engine, outputs)
            return program.run() if listener is None else program.serve(listener)
        _wait_for_front(run, seat, made, neighbours)
        made.serve(run.wait_s if seat.is_apart else 0.0)
        return 0
    finally:
        neighbours.close()
        for line in filter(None, lines.values()):
            line.close()


def link_config(link: LinkConfig, here: Place, peer: Place) -> LinkConfig:
    """What two processes of a run must both say of their link; `link` is of those that carry KVCache between
    datacenters. The front end has none: one lane carries its messages."""
    if peer.site == here.site:
        return replace(link, lanes=1, timeout_s=FABRIC_TIMEOUT_S)
    return link if here.roles and peer.roles else replace(link, lanes=1)


def _wait_for_front(run: Run, seat: Seat, made: Process, neighbours: Neighbours) -> None:
    neighbours.wait_for_all(MEET_ALL_S)  # first: once it has said that it is there, this node is sent work at once
    front = next(place.name for place in seat.places if place.has_front)
    made.run_until(lambda: front in neighbours.met or front in neighbours.refused, run.wait_s)
    if front not in neighbours.met:
        reason = neighbours.refused.get(front, f"it did not come within {run.wait_s:g} s")
        raise UserError(f"no link from {seat.here.name} to the front end: {reason}")


def engines_of(run: Run, seat: Seat, timeline: Timeline | None) -> list[Engine]:
    """An engine for each role of the process, over one model and one timeline. In each every prompt fits: UserError
    names the first that does not, or what is wrong with the model. One for the front end alone only knows lengths and
    keys: nobody touches its pool, so that it takes no memory."""
    args, machine = run.args, machine_at(run.args, seat.here.site)
    device = own_device(machine.device, seat.local_rank) if seat.here.roles or args.check else torch.device("cpu")
    suit_products_to(phases_of(run, seat.here), device)
    model, tokenizer = load(args.model, getattr(torch, machine.dtype), device)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # for what names no device of its own, such as an event
    context_tokens = model.config.max_context_tokens
    lengths = longest_prompts(run.prompts, tokenizer, context_tokens)
    needed = [lengths[one.id] + one.params.max_tokens for one in run.prompts] or [context_tokens] * FULL_CONTEXTS
    cache = CacheConfig(args.pool_blocks, machine.block_tokens) if args.pool_blocks else \
        pool_for(model, needed, machine.block_tokens)
    kind = Engine if run.emulation is None else PacedEngine
    engines = [kind(model, tokenizer, cache, args.prefill_chunk, timeline=timeline) for _ in seat.here.roles or [None]]
    if run.emulation is not None:
        profile = run.emulation.profile_at(seat.here.site)
        for engine in engines:
            engine.emulate(Pace(profile.prefill_s, profile.decode_step_s), profile.bs_max)
    for prompt in run.prompts:
        engines[0].check_length(prompt.id, lengths[prompt.id])
    if seat.here.roles:
        _set_threads(run, seat, device)
        if args.compile:
            compile_and_warm_up(model, tokenizer, cache.block_tokens, phases=phases_of(run, seat.here))
    return engines


def phases_of(run: Run, here: Place) -> set[Phase]:
    """What the process will compute. With --convert-roles PD nodes change their role; with a relay both roles have a
    part in either phase. A decode node that was short of room prefills, too: too rarely to compile for it."""
    if run.args.relay or (run.policy.get("convert_roles") and here.site == PD_SITE):
        return {*Phase}
    return {Phase.DECODE if role is Role.PDD else Phase.PREFILL for role in here.roles.values()}


def _set_threads(run: Run, seat: Seat, device: torch.device) -> None:
    """Share the host's cores out to the nodes that compute on them; says so if this one gets more than one."""
    is_told = "OMP_NUM_THREADS" in os.environ or seat.is_apart  # a person or torchrun did it; or nobody knows
    if device.type != "cpu" or is_told or run.emulation is not None:
        return
    threads = threads_of(seat.places, os.cpu_count() or 1)[seat.here.name]
    torch.set_num_threads(threads)
    if threads > 1:
        print(f"{seat.here.name} computes with {threads} threads of {os.cpu_count()} cores", file=sys.stderr)
