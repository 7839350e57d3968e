"""The options of every program that runs the live cluster, and what can be checked of them without a model.

Chapter 13.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from minprfaas.cluster.emulation import Emulation
from minprfaas.cluster.load import LENGTH_SCALE, REQUESTS, Load
from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE, Topology
from minprfaas.commands.machines import add_machine_options, machine_at
from minprfaas.commands.options import FULL_CONTEXTS, add_http_arguments, check_counts, check_http_arguments
from minprfaas.config import UNTHROTTLED_GBPS, Encoding, LineConfig, LinkConfig, SamplingParams, WeatherChange
from minprfaas.engine.prompts import Prompt, read_prompts
from minprfaas.errors import UserError, require_number
from minprfaas.scheduling.control import ControlPlane, ControlSettings
from minprfaas.scheduling.planner import Fleet
from minprfaas.scheduling.profiles import Profile, Scale
from minprfaas.transport.wan.line import load_weather
from minprfaas.transport.wan.monitor import largest_chunk_bytes


def add_options(p: argparse.ArgumentParser, may_serve: bool = False) -> None:
    """What is asked, of which model, over which line, on what machines, and where the results go."""
    p.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    p.add_argument("--prompts", metavar="FILE.jsonl", required=not may_serve,
                   help='one {"id", "prompt", "max_tokens"} a line; {"after": id} continues that conversation')
    p.add_argument("--threshold", type=int, default=1024, metavar="T", help="offload above T uncached tokens (1024)")
    p.add_argument("--profile", metavar="P.json", help="of this machine (`python -m minprfaas profile`): the threshold "
                   "then follows the measured link")
    p.add_argument("--emulate", metavar="PROFILE", help="PrfaaS nodes take the time of this profile (file, or a name "
                   "that is shipped) for their real work; the threshold follows it as with --profile")
    p.add_argument("--emulate-pd", metavar="PROFILE", help="and PD nodes that of this one (the same)")
    p.add_argument("--emulate-scale", metavar="TIME,LENGTH,BYTES", help="seconds times TIME, one token for LENGTH, "
                   "bytes times BYTES (1,1,1); --link-gbps is scaled with them")
    p.add_argument("--link-gbps", type=float, metavar="G", help="emulated bandwidth (default: as fast as it goes)")
    p.add_argument("--rtt-ms", type=float, default=0.0, metavar="MS", help="emulated round-trip time (0)")
    p.add_argument("--lanes", type=int, default=4, metavar="N", help="connections that one link stripes over (4)")
    p.add_argument("--weather", metavar="FILE.json", help="emulated schedule of bandwidth, delay and stalls")
    p.add_argument("--wire", default=Encoding.EXACT.value, choices=[encoding.value for encoding in Encoding],
                   help="how rows of attention state cross between the datacenters; all but exact suspend the promise "
                   "that answers are token-identical (exact)")
    p.add_argument("--wire-state", default=Encoding.EXACT.value, choices=[Encoding.EXACT.value, Encoding.BF16.value],
                   help="and request-level state, whose error stays in all that follows (exact)")
    add_machine_options(p)
    p.add_argument("--prefill-chunk", type=int, metavar="TOKENS", help="tokens a prefill chunk (1024; on a GPU 8192)")
    p.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of each pool (default: room for the "
                   f"prompts; of a load or of clients, for {FULL_CONTEXTS} contexts)")
    p.add_argument("--compile", action="store_true", help="every node compiles what its roles compute first: for "
                   "a minute at most on a GPU, for minutes on two cores; the next time it is found in a cache")
    p.add_argument("--deadline-s", type=float, default=300.0, metavar="S",
                   help="seconds an offloaded prefill may take (300)")
    p.add_argument("--link-timeout-s", type=float, default=30.0, metavar="S",
                   help="a link that is away for longer is lost (30)")
    p.add_argument("--wait-s", type=float, metavar="S",
                   help="seconds that the front end waits for all nodes before it begins with those that are there, "
                   "and a node for the front end (120; with --compile 900)")
    p.add_argument("--ship-prefixes", action="store_true", help="ship a cached prefix to where a request will be "
                   "prefilled, while bandwidth is abundant and that is sooner than computing it")
    p.add_argument("--relay", action="store_true", help="PrfaaS nodes draw the first tokens while the KVCache crosses; "
                   "the decode node takes over when it is there")
    p.add_argument("--no-overlap", action="store_true", help="ship KVCache only after prefill, for comparison")
    p.add_argument("--check", action="store_true", help="recompute every answer in one process; exit 1 if one differs")
    p.add_argument("--json", metavar="OUT.jsonl", help="write one line a request")
    p.add_argument("--timeline", metavar="OUT.json", help="write Chrome trace events (opens in Perfetto)")
    p.set_defaults(serve=None, load=None, requests=None, length_scale=None, check_sample=None)
    if may_serve:
        _add_load_options(p)
        p.add_argument("--serve", type=int, metavar="PORT", help="instead of --prompts: answer HTTP clients, as "
                       "`python -m minprfaas serve` does, until a signal")
        add_http_arguments(p)


def _add_load_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--load", metavar="KIND", help="instead of --prompts: poisson:RATE or bursty:RATE requests a "
                   "second, or trace:FILE[:SPEED] (Mooncake format); requests come when they are due, answered or not")
    p.add_argument("--requests", type=int, metavar="N", help=f"of the load ({REQUESTS}; of a trace, all)")
    p.add_argument("--seed", type=int, default=0, metavar="N",
                   help="of the load: another one, other times, lengths and texts (0)")
    p.add_argument("--length-scale", type=float, metavar="X", help="the paper's or the trace's lengths are multiplied "
                   f"by X ({LENGTH_SCALE:g}; for a trace so that a block of it is a block here)")
    p.add_argument("--check-sample", type=int, metavar="N", help="--check, of N answers of a load chosen at random")


@dataclass(frozen=True)
class Run:
    """A command line whose parts have been checked as far as they can be without a model."""

    args: argparse.Namespace
    topology: Topology
    link: LinkConfig
    line: LineConfig
    prompts: list[Prompt]
    load: Load | None  # instead of the prompts
    fleet: Fleet | None  # with a profile: what the threshold loop plans for
    emulation: Emulation | None = None
    policy: Mapping[str, bool | float] = field(default_factory=dict)  # fields of `ControlSettings`
    plane: Callable[[ControlSettings], ControlPlane] = ControlPlane  # of one PrfaaS datacenter
    site_lines: Mapping[str, LineConfig] = field(default_factory=dict)  # of PrfaaS datacenters with a line of their own

    def line_between(self, one: str, other: str) -> LineConfig:
        """Between two datacenters. Nothing but messages crosses between two that prefill only."""
        away = [site for site in (one, other) if site != PD_SITE]
        return self.site_lines.get(away[0], self.line) if len(away) == 1 else LineConfig()

    @property
    def wait_s(self) -> float:
        """How long nodes and front end wait for each other."""
        return self.args.wait_s or (900.0 if self.args.compile else 120.0)

    @property
    def lines(self) -> dict[str, LineConfig]:
        """To the PD datacenter, by PrfaaS datacenter."""
        return {site: self.line_between(site, PD_SITE) for site in self.topology.prfaas_sites}


def checked(args: argparse.Namespace, topology: Topology) -> Run:
    """UserError names the first option that is out of range."""
    require_number("threshold", args.threshold, least=0, whole=True)
    require_number("deadline", args.deadline_s, above=0)
    if args.wait_s is not None:
        require_number("--wait-s", args.wait_s, above=0)
    machine_at(args, PRFAAS_SITE)  # a mistake is said now, not when a model has been loaded
    block_tokens = machine_at(args, PD_SITE).block_tokens
    check_counts(args, "prefill_chunk", "pool_blocks", "check_sample")
    # On GPUs each chunk costs a copy and a few launches at either end, under one interpreter lock: fewer, larger ones.
    is_fast = "cuda" in args.device
    sizes = dict(chunk_bytes=largest_chunk_bytes(args.lanes), max_inflight_bytes=512 * 2**20) if is_fast else {}
    link = LinkConfig(args.lanes, timeout_s=args.link_timeout_s, **sizes)
    prompts = _checked_prompts(args)
    load = None
    if args.load is not None:
        load = Load.parse(args.load, args.requests, args.seed, args.length_scale, block_tokens)
    for option in ("requests", "length_scale", "check_sample"):
        if load is None and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is about a --load, and none is given")
    fleet = None
    emulation = _checked_emulation(args)
    line_gbps = args.link_gbps
    if emulation is not None and line_gbps is not None:
        line_gbps = emulation.scale.run_gbps(line_gbps)
    profiles = _planned_profiles(args, emulation)
    if profiles is not None:  # a single PD node counts as an instance of either kind
        otherwise = load.answer_tokens if load is not None else SamplingParams().max_tokens
        answer_tokens = fmean([prompt.params.max_tokens for prompt in prompts] or [otherwise])
        fleet = Fleet(topology.prfaas, max(topology.pd, 2), line_gbps or UNTHROTTLED_GBPS, *profiles, answer_tokens,
                      args.relay)
    line = LineConfig(line_gbps, args.rtt_ms, weather(args.weather))
    policy = dict(adaptive=fleet is not None)  # the threshold follows the link
    return Run(args, topology, link, line, prompts, load, fleet, emulation, policy)


def weather(path: str | None) -> tuple[WeatherChange, ...]:
    """An emulated line's, from its file. UserError when that is no schedule."""
    return load_weather(path) if path else ()


def _checked_emulation(args: argparse.Namespace) -> Emulation | None:
    if args.emulate is None:
        for option in ("emulate_pd", "emulate_scale"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} goes with --emulate PROFILE, which is missing")
        return None
    if args.profile is not None:
        raise UserError("--profile and --emulate exclude each other: an emulated machine is planned with its profile")
    prfaas = Profile.read(args.emulate)
    pd = Profile.read(args.emulate_pd) if args.emulate_pd is not None else prfaas
    return Emulation(prfaas, pd, Scale.parse(args.emulate_scale or "1,1,1"))


def _planned_profiles(args: argparse.Namespace, emulation: Emulation | None) -> tuple[Profile, Profile] | None:
    """Of a PrfaaS and of a PD node, in the run's units."""
    if emulation is not None:
        return emulation.profile_at(PRFAAS_SITE), emulation.profile_at(PD_SITE)
    return (Profile.read(args.profile),) * 2 if args.profile is not None else None


def _checked_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of the file; none where clients bring them."""
    given = [option for option in ("prompts", "load", "serve") if getattr(args, option) is not None]
    if not given:
        raise UserError("nothing is asked; give --prompts FILE.jsonl, --load KIND, or --serve PORT for clients "
                        "that ask")
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other")
    if args.load is not None:
        return []
    if args.serve is None:
        return read_prompts(args.prompts)
    check_http_arguments(args, "--serve", args.serve)
    for option in ("check", "json", "timeline"):
        if getattr(args, option):
            raise UserError(f"--{option} is about a file of prompts, and --serve takes them from clients")
    return []
