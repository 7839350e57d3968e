"""The live cluster: PrfaaS nodes, PD nodes and a front end, each a process, in two datacenters.

Chapter 13; paper 3.1.
"""

import argparse
from dataclasses import replace

from minprfaas.cluster.topology import Place, Topology
from minprfaas.commands.live_options import Run, add_options, checked, weather
from minprfaas.config import UNTHROTTLED_GBPS, LineConfig
from minprfaas.errors import ArgumentParser, UserError, long_import, require_number, shown
from minprfaas.scheduling.roles import SUSTAIN_S

EPILOG = """
the processes are the front end (rank 0), prfaas-0 …, pd-0 …: with
prfaas=2,pd=3 there are six. Examples:

  python scripts/cluster.py --topology prfaas=2,pd=3 --split 1 \\
      --prompts P.jsonl --check
    starts them all. One that dies is not missed for long: its requests are
    done by others, and it is used again when it returns (--node NAME
    --store HOST:PORT, with the other options as before).
  python scripts/cluster.py --topology prfaas=2,pd=3 --serve 8000
    answers HTTP clients until Ctrl-C.
  torchrun --nproc-per-node 6 scripts/cluster.py --topology prfaas=2,pd=3 …
    the same under torchrun, on several machines with --nnodes. torchrun ends
    all when one dies.
  torchrun --standalone --nproc-per-node 4 scripts/cluster.py … \\
      --datacenter pd --store 10.0.0.1:29600
  torchrun --standalone --nproc-per-node 2 scripts/cluster.py … \\
      --datacenter prfaas --store 10.0.0.1:29600
    one torchrun a datacenter: each lives its own life. The front end serves
    the store, at an address of its machine. Processes share an emulated line
    as far as they share a machine.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ArgumentParser(description="PrfaaS nodes, PD nodes and a front end in two datacenters, each a process.",
                       epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--topology", default="prfaas=2,pd=3", metavar="prfaas=N,pd=M", help="nodes of each datacenter "
                   "(prfaas=2,pd=3)")
    p.add_argument("--split", type=int, metavar="N", help="PD nodes that begin as PD-P (half of them; a single PD node "
                   "plays both roles)")
    p.add_argument("--convert-roles", action="store_true", help="let PD nodes change their role with the load, by what "
                   "--profile says (or --emulate)")
    p.add_argument("--sustain-s", type=float, default=SUSTAIN_S, metavar="S", help="seconds that the load must have "
                   f"asked for another split before it is made ({SUSTAIN_S:g})")
    p.add_argument("--restart", action="store_true", help="without torchrun: start a node again that was killed")
    p.add_argument("--store", metavar="HOST:PORT", help="where processes that are started apart meet")
    p.add_argument("--datacenter", metavar="NAME", help="only the processes of one datacenter")
    p.add_argument("--node", metavar="NAME", help="only this process, such as pd-1")
    p.add_argument("--site-line", action="append", default=[], metavar="SITE=GBPS[:FILE.json]", help="bandwidth and "
                   "weather of one PrfaaS datacenter's line, instead of --link-gbps and --weather: with --topology "
                   "prfaas-a=1,prfaas-b=1,pd=2 each may have its own")
    add_options(p, may_serve=True)
    return p


def main(argv: list[str]) -> int:
    """Play this process's part, or start the processes when there is no torchrun; returns the exit status."""
    args = parser().parse_args(argv)
    topology = Topology.parse(args.topology, args.split)
    run, places = checked(args, topology), topology.places()
    require_number("--sustain-s", args.sustain_s, least=0)
    if args.convert_roles:
        if run.fleet is None:
            raise UserError("--convert-roles compares what the nodes could do; --profile (or --emulate) says it")
        run = replace(run, policy={**run.policy, "convert_roles": True, "sustain_s": args.sustain_s})
    run = with_site_lines(run, args.site_line)
    apart = args.node is not None or args.datacenter is not None
    if apart != (args.store is not None):
        raise UserError("--store says where processes meet that are started apart, by --node or --datacenter; "
                        f"{'it is missing' if apart else 'neither is given'}")
    chosen = _chosen(args, places)
    with long_import():  # neither --help nor a mistake above is to wait for it
        from minprfaas.cluster.launch import Launch, StoreAddress, watch_parent
        from minprfaas.commands.live_run import Seat, play, start
    store = StoreAddress.parse(args.store) if apart else None
    launch = Launch.from_environment(world_size=len(chosen)) if args.node is None else None
    if launch is None and args.node is None:
        restart = f"--node {{name}} --store {args.store or '127.0.0.1:{port}'}"
        return start(run, chosen, main, argv, restart=restart, front_ends_all=args.serve is not None,
                     restarts=args.restart)
    if launch is not None:
        watch_parent()
    here = chosen[launch.rank if launch is not None else 0]
    local_rank = launch.local_rank if launch is not None else places.index(here)
    gpu_rank = max(0, local_rank - chosen[0].has_front)  # the front end's process needs no GPU of its own
    return play(run, Seat(places, here, store or launch.address, gpu_rank, is_apart=apart))


def with_site_lines(run: Run, texts: list[str]) -> Run:
    """The run with the lines that `--site-line` says. UserError names what is no line of one of its datacenters."""
    lines = {}
    for text in texts:
        site, _, rest = text.partition("=")
        gbps, _, path = rest.partition(":")
        if site not in run.topology.prfaas_sites or site in lines:
            sites = ", ".join(run.topology.prfaas_sites)
            raise UserError(f"--site-line is {shown(text)}; it must be about one of {sites}, and once")
        try:
            rate = float(gbps)
        except ValueError:
            raise UserError(f"--site-line is {shown(text)}; it must be like prfaas-a=0.02:WEATHER.json") from None
        rate = run.emulation.scale.run_gbps(rate) if run.emulation is not None else rate
        lines[site] = LineConfig(rate, run.line.rtt_ms, weather(path))
    run = replace(run, site_lines=lines)
    if run.fleet is None:
        return run
    together = sum(line.gbps or UNTHROTTLED_GBPS for line in run.lines.values())
    return replace(run, fleet=replace(run.fleet, link_gbps=together))


def _chosen(args: argparse.Namespace, places: list[Place]) -> list[Place]:
    """The processes that this command line is about."""
    if args.node is not None and args.datacenter is not None:
        raise UserError("--node and --datacenter exclude each other")
    if args.node is not None:
        chosen = [place for place in places if place.name == args.node]
    else:
        chosen = [place for place in places if args.datacenter in (None, place.site)]
    if not chosen:
        what = f"node {args.node!r:.80}" if args.node is not None else f"datacenter {args.datacenter}"
        raise UserError(f"{what} has no process in topology {args.topology}, which has "
                        f"{', '.join(place.name for place in places)}")
    return chosen
