"""Prefill in one datacenter process, decode in another, on real text: the main job. Chapter 13; paper 3 and 4."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from minprfaas.cluster.launch import Launch, link_identity, start_processes
from minprfaas.cluster.local_node import Journey, LocalNode
from minprfaas.cluster.prefill_node import PrefillNode, peak_memory_bytes
from minprfaas.config import CacheConfig, LinkConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.generate import generate, pool_for
from minprfaas.engine.prompts import Prompt, read_prompts
from minprfaas.engine.request import Request, TokenUpdate
from minprfaas.errors import ArgumentParser, UserError
from minprfaas.model.checkpoint import EMBEDDED, load
from minprfaas.model.spec import kv_bytes
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.observe.report import human_bytes, table
from minprfaas.observe.screen import Screen
from minprfaas.observe.timeline import Timeline, write_timeline
from minprfaas.transport.events import LinkDown
from minprfaas.transport.link import Link
from minprfaas.transport.throttle import WeatherChange, load_weather

LINK_NAME = "prfaas-pd"
CONNECT_DEADLINE_S = 120.0  # until both processes have loaded the model and met


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ArgumentParser(
        description="Process 0 is the PrfaaS datacenter, process 1 the local PD datacenter with the front end. Start it "
                    "with `torchrun --nproc-per-node 2`, or plainly: then it starts its two processes itself.")
    p.add_argument("--model", metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    p.add_argument("--prompts", metavar="FILE.jsonl", required=True,
                   help='one {"id", "prompt", "max_tokens"} a line; {"after": id} continues that conversation')
    p.add_argument("--threshold", type=int, default=1024, metavar="T", help="offload above T uncached tokens (1024)")
    p.add_argument("--link-gbps", type=float, metavar="G", help="emulated bandwidth (default: as fast as it goes)")
    p.add_argument("--rtt-ms", type=float, default=0.0, metavar="MS", help="emulated round-trip time (0)")
    p.add_argument("--lanes", type=int, default=4, help="connections that one link stripes over (4)")
    p.add_argument("--weather", metavar="FILE.json", help="emulated schedule of bandwidth, delay and stalls")
    p.add_argument("--device", default="cpu", help="cpu or cuda; on cuda each process takes its own GPU (cpu)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--prefill-chunk", type=int, default=1024, metavar="TOKENS", help="tokens of a prefill chunk (1024)")
    p.add_argument("--block-tokens", type=int, default=64, metavar="TOKENS", help="tokens of a KVCache block (64)")
    p.add_argument("--pool-blocks", type=int, metavar="N", help="blocks of each pool (default: room for the prompts)")
    p.add_argument("--deadline-s", type=float, default=300.0, help="seconds an offloaded prefill may take (300)")
    p.add_argument("--link-timeout-s", type=float, default=30.0, help="a link that is away for longer is lost (30)")
    p.add_argument("--ship-prefixes", action="store_true", help="ship a cached prefix to where a request will be prefilled, "
                   "while bandwidth is abundant and that is sooner than computing it")
    p.add_argument("--no-overlap", action="store_true", help="ship KVCache only after prefill, for comparison")
    p.add_argument("--check", action="store_true", help="recompute every answer in one process; exit 1 if a token differs")
    p.add_argument("--json", metavar="OUT.jsonl", help="write one line a request")
    p.add_argument("--timeline", metavar="OUT.json", help="write Chrome trace events (opens in Perfetto)")
    return p


def main(argv: list[str]) -> int:
    """Play this process's part, or start both processes when there is no torchrun; returns the exit status."""
    args = parser().parse_args(argv)
    launch = Launch.from_environment(world_size=2)
    if launch is None:
        _checked(args)
        return start_processes(2, [sys.argv[0], *argv])
    try:
        link_config, weather, prompts = _checked(args)
        device = launch.device(args.device)
        model, tokenizer = load(args.model, getattr(torch, args.dtype), device)
        lengths = _longest_they_can_get(prompts, tokenizer)
        cache = CacheConfig(args.pool_blocks, args.block_tokens) if args.pool_blocks else \
            pool_for(model, list(lengths.values()), args.block_tokens)
        timeline = Timeline("A: PrfaaS" if launch.rank == 0 else "B: PD") if args.timeline else None
        engine = Engine(model, tokenizer, cache, args.prefill_chunk, timeline=timeline)
        for prompt in prompts:
            engine.check_fits(Request(prompt.id, [0] * (lengths[prompt.id] - prompt.params.max_tokens), prompt.params))
    except UserError:
        if launch.rank == 0:  # the front end sees the same mistake and says it; once is enough
            return 2
        raise
    store = launch.store()  # kept: where this process serves the store, the server lives as long as this object
    link = Link(LINK_NAME, store, launch.rank, link_config, link_identity(model, engine.layout),
                timeline, weather)
    try:
        link.connect(CONNECT_DEADLINE_S)
    except LinkDown as error:
        raise UserError(f"no link between the datacenters: {error}") from None
    try:
        if launch.rank == 0:
            PrefillNode(engine, link, args.deadline_s, overlap=not args.no_overlap).serve()
            return 0
        return FrontEnd(args, engine, link, prompts, link_config).run()
    finally:
        link.close()


def _checked(args: argparse.Namespace) -> tuple[LinkConfig, tuple[WeatherChange, ...], list[Prompt]]:
    """The parts of the command line that need no model. UserError names the first that is out of range."""
    if args.threshold < 0:
        raise UserError(f"threshold {args.threshold} is out of range; it must be at least 0 tokens")
    if not args.deadline_s > 0:
        raise UserError(f"deadline {args.deadline_s} s is out of range; it must be above 0")
    for option in ("prefill_chunk", "block_tokens", "pool_blocks"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value} is out of range; it must be at least 1")
    for path in filter(None, (args.json, args.timeline)):
        if not Path(path).resolve().parent.is_dir():
            raise UserError(f"{path} cannot be written: {Path(path).resolve().parent} is not a directory")
    weather = load_weather(args.weather) if args.weather else ()
    # On GPUs each chunk costs a copy and a few launches at either end: fewer, larger ones.
    sizes = dict(chunk_bytes=4 * 2**20, max_inflight_bytes=256 * 2**20) if args.device.startswith("cuda") else {}
    config = LinkConfig(args.link_gbps, args.rtt_ms, args.lanes, timeout_s=args.link_timeout_s, **sizes)
    return config, weather, read_prompts(args.prompts)


def _longest_they_can_get(prompts: list[Prompt], tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of each prompt with its answer, and with all that it comes after."""
    lengths: dict[str, int] = {}
    for prompt in prompts:
        own = len(tokenizer.encode(prompt.text)) + prompt.params.max_tokens
        lengths[prompt.id] = own + (lengths[prompt.after] if prompt.after is not None else 0)
    return lengths


class FrontEnd:
    """The PD process's screen: submits the prompts, shows what happens, prints the table, checks the answers."""

    def __init__(self, args: argparse.Namespace, engine: Engine, link: Link, prompts: list[Prompt],
                 link_config: LinkConfig):
        self.args, self.engine, self.link, self.link_config = args, engine, link, link_config
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.node = LocalNode(engine, link, args.threshold, args.deadline_s, self._on_update, args.ship_prefixes)
        self.journeys: list[Journey] = []

    def run(self) -> int:
        """Serve every prompt; 1 if `--check` finds a token that differs, else 0."""
        prompts = self.prompts.values()
        self.screen = Screen(sum(_longest_they_can_get(list(prompts), self.engine.tokenizer).values()),
                             sum(prompt.params.max_tokens for prompt in prompts))
        self._say_what_is_loaded()
        started_s = time.monotonic()
        self._submit_after(None)
        self.node.run()
        finished = {journey.request.id: journey for journey in self.journeys}
        self.journeys = [finished[id] for id in self.prompts]  # in the file's order
        self.node.shutdown(deadline_s=30)
        self.screen.close()
        elapsed_s = time.monotonic() - started_s
        self._print_table(elapsed_s)
        if self.args.json:
            _write_whole(Path(self.args.json), "".join(json.dumps(self._row(j)) + "\n" for j in self.journeys))
        if self.args.timeline:
            write_timeline(self.args.timeline, self.node.peer_timeline, self.engine.timeline.events())
        return self._check() if self.args.check else 0

    def _submit_after(self, finished: Request | None) -> None:
        """Submit the prompts that continue `finished` (None: those that begin a conversation)."""
        for prompt in self.prompts.values():
            if prompt.after == (finished.id if finished else None):
                history = finished.token_ids if finished else []
                token_ids = history + self.engine.tokenizer.encode(prompt.text)
                self.journeys.append(self.node.submit(Request(prompt.id, token_ids, prompt.params)))

    def _say_what_is_loaded(self) -> None:
        until = time.monotonic() + CONNECT_DEADLINE_S
        while self.node.peer is None and self.node.desk.link_up and time.monotonic() < until:
            self.node.step()
        model, config = self.engine.model, self.link_config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say = self.screen.line
        say(f"model         {self.args.model or EMBEDDED.name}: {model.config.family}, {len(model.config.layers)} layers, "
            f"{parameters / 1e6:.1f}M parameters, {self.args.dtype}")
        if self.node.peer is not None:
            say(f"datacenter A  PrfaaS, prefill only: {self.node.peer.device}, pool of {self.node.peer.num_blocks:,} blocks")
        say(f"datacenter B  local PD, prefill and decode: {model.device}, pool of {self.engine.kvcache.config.num_blocks:,} "
            f"blocks of {self.engine.layout.block_tokens} tokens ({human_bytes(self.engine.layout.block_bytes)})")
        bandwidth = "unthrottled" if config.gbps is None else f"{config.gbps * 1000:g} Mbit/s (emulated)"
        say(f"link A → B    {bandwidth}, round trip {config.rtt_ms:g} ms (emulated), {config.lanes} lanes")
        say(f"routing       more than {self.args.threshold:,} uncached tokens → A, else B\n")

    def _on_update(self, journey: Journey, update: TokenUpdate | None) -> None:
        if self.screen.shown:
            journeys = self.journeys
            self.screen.prefilled(sum(self._prefilled_tokens(j) for j in journeys))
            self.screen.streamed(sum(j.received_bytes for j in journeys), sum(j.expected_bytes for j in journeys))
            drawn = sum(len(j.request.token_ids) - j.request.prompt_tokens for j in journeys)
            self.screen.decoded(drawn, update.request.text if update else "")
        if update is not None and update.request.finish_reason is not None:
            self._print_answer(journey)
            self._submit_after(update.request)

    @staticmethod
    def _prefilled_tokens(journey: Journey) -> int:
        request = journey.request
        if len(request.token_ids) > request.prompt_tokens:
            return request.prompt_tokens
        return journey.done_tokens if request.cache is None or journey.route == "prfaas" else request.cache.num_tokens

    def _print_answer(self, journey: Journey) -> None:
        request, prompt = journey.request, self.prompts[journey.request.id]
        mark = ""
        if prompt.expected is not None:
            mark = "  ✓" if request.text.strip() == prompt.expected else f"  ✗ expected {prompt.expected}"
        question = prompt.text.rstrip().splitlines()
        asked = next((line for line in reversed(question) if line.startswith("Question:")), question[-1])
        self.screen.line(f"[{request.id}] {asked[:90]}\n    {request.text.strip()}{mark}")

    def _print_table(self, elapsed_s: float) -> None:
        rows = []
        for journey in self.journeys:
            row = self._row(journey)
            away = journey.route == "prfaas"
            rows.append([journey.request.id, row["prompt_tokens"], row["cached_tokens"], journey.route,
                         human_bytes(journey.kv_bytes) if away else "–", f"{journey.prefill_s:.2f}",
                         f"{journey.transfer_s:.2f}" if away else "–",
                         f"{journey.hidden:.0%}" if away else "–", f"{row['ttft_s']:.2f}", f"{row['tokens_per_s']:.1f}"])
        headers = ["request", "tokens", "cached", "route", "KV crossed", "prefill s", "transfer s*", "hidden*", "TTFT s*",
                   "tokens/s"]
        print("\n" + table(headers, rows))
        print("  * over the emulated link; hidden = share of the transfer that ran while prefill still did")
        for journey in self.journeys:
            if journey.fallback is not None:
                print(f"  {journey.request.id} was offloaded and came back: {journey.fallback}")
            if journey.route == "prfaas" and journey.request.cached_tokens:
                print(f"  {journey.request.id}: B held {journey.request.cached_tokens:,} of its tokens, so "
                      f"{human_bytes(journey.kv_bytes)} crossed instead of {human_bytes(self._row(journey)['kv_bytes_without_cache'])}")
            if journey.prefix_bytes:
                print(f"  {journey.request.id} began with {journey.prefix.end:,} cached tokens shipped from "
                      f"{journey.prefix.source} ({human_bytes(journey.prefix_bytes)})")
        print(f"\n{len(rows)} answers in {elapsed_s:.1f} s. Peak memory: A {human_bytes(self.node.peer_peak_bytes)}, "
              f"B {human_bytes(peak_memory_bytes(self.engine.model.device))}.")
        known = [j for j in self.journeys if self.prompts[j.request.id].expected is not None]
        if known:
            right = sum(j.request.text.strip() == self.prompts[j.request.id].expected for j in known)
            print(f"{right} of {len(known)} answers are right.")

    def _row(self, journey: Journey) -> dict:
        request = journey.request
        decode_s = request.finished_s - request.first_token_s
        return {
            "id": request.id, "token_ids": request.output_ids, "text": request.text, "route": journey.route,
            "reason": journey.reason, "fallback": journey.fallback, "finish_reason": request.finish_reason,
            "prompt_tokens": request.prompt_tokens, "cached_tokens": request.cached_tokens, "kv_bytes": journey.kv_bytes,
            "prefix_bytes": journey.prefix_bytes,
            "kv_bytes_without_cache": kv_bytes(self.engine.layout.specs, request.prompt_tokens),
            "prefill_s": journey.prefill_s, "transfer_s": journey.transfer_s, "transfer_exposed_s": journey.exposed_s,
            "ttft_s": request.first_token_s - request.arrived_s,
            "tokens_per_s": (len(request.output_ids) - 1) / decode_s if decode_s > 0 else 0.0,
            "link": "emulated" if self.link_config.gbps or self.link_config.rtt_ms else "unthrottled"}

    def _check(self) -> int:
        """Recompute every answer in this process alone (`minprfaas.generate`) and compare token by token."""
        reference: dict[str, list[int]] = {}  # prompt and answer
        for wave in self._waves():
            histories = [reference[prompt.after] if prompt.after is not None else [] for prompt in wave]
            token_ids = [history + self.engine.tokenizer.encode(p.text) for history, p in zip(histories, wave)]
            outputs = generate(self.engine.model, self.engine.tokenizer, token_ids, [p.params for p in wave],
                               prefill_chunk=self.args.prefill_chunk, progress=True)
            reference |= {p.id: ids + output.token_ids for p, ids, output in zip(wave, token_ids, outputs)}
        differing = [j.request.id for j in self.journeys if j.request.token_ids != reference[j.request.id]]
        print(f"{len(reference) - len(differing)} of {len(reference)} answers are identical, token by token, "
              f"to the single-process reference." + (f" Different: {', '.join(differing)}" if differing else ""))
        return 1 if differing else 0

    def _waves(self) -> Iterator[list[Prompt]]:
        """The prompts in groups, each of which comes after the ones before."""
        done: set[str | None] = {None}
        while wave := [p for p in self.prompts.values() if p.after in done and p.id not in done]:
            yield wave
            done |= {prompt.id for prompt in wave}


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
