"""Memory of a long KV stream over a line that is ten times too slow: neither side may pile it up. Chapter 08.

    python scripts/bench.py memory                     two processes on this machine

Pools, block tables, layer-wise export, link and sink are the real ones, in the layout of a 28-layer hybrid (`hybrid-1b`
of `scripts/random_checkpoint.py`, bfloat16). The prefill is synthetic: it emits each layer of each chunk at a steady
rate, because a prefill of 32K tokens takes minutes on a small CPU. The line's rate is emulated.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from benches import above_zero, at_least_one
from benches.figure_1 import checksums
from benches.link import DEADLINE_S, IDENTITY, PeakMemory, in_two_processes
from random_checkpoint import SHAPES

from minprfaas.cluster.kv_receive import KVReceive
from minprfaas.cluster.kv_send import KVSend
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import CacheConfig, LineConfig, LinkConfig, SamplingParams, StateKind
from minprfaas.engine.request import Request
from minprfaas.errors import ArgumentParser
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.families import config_from_hf
from minprfaas.model.spec import model_state_specs
from minprfaas.observe.tables import human_bytes, table
from minprfaas.transport.events import StreamDone
from minprfaas.transport.wan.line import EmulatedLine
from minprfaas.transport.wan.link import Link

LIMIT_MIB = 64
CHUNK_TOKENS = 1024


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=at_least_one, default=32 * 1024, help="of the prompt (32768)")
    parser.add_argument("--natural-gbps", type=above_zero, default=2.0, help="rate at which prefill emits KVCache (2)")
    args = parser.parse_args(argv)
    line, config = LineConfig(args.natural_gbps / 10, rtt_ms=20), LinkConfig(lanes=2)
    found = in_two_processes(_node, line, config, args.tokens, args.natural_gbps, steps=2)
    sender, receiver = sorted(found, key=lambda row: row["rank"])
    print(f"{args.tokens:,} tokens, {human_bytes(sender['bytes'])} of KVCache, emitted at {args.natural_gbps:g} Gbps "
          f"(synthetic prefill), over a line of {line.gbps:g} Gbps (emulated)\n")
    growth_mib = [(row["peak"] - row["before"]) / 2**20 for row in (sender, receiver)]
    print(table(["process", "of it pool", "before", "peak", "after", "growth"],
                [[name, *(human_bytes(row[when]) for when in ("pool", "before", "peak", "after")), f"{growth:+.1f} MiB"]
                 for name, row, growth in zip(("sender", "receiver"), (sender, receiver), growth_mib)]))
    print(f"\n  Resident memory, with every page of the pool touched beforehand. At most "
          f"{human_bytes(config.max_inflight_bytes)} are queued or in flight;\n  the sender was held back for "
          f"{sender['stalled_s']:.1f} of {sender['took_s']:.1f} s.")
    identical, within = sender["digest"] == receiver["digest"], max(growth_mib) <= LIMIT_MIB
    print(f"\nThe bytes {'are identical' if identical else 'DIFFER'}; the larger growth is {max(growth_mib):.1f} MiB, "
          f"{'within' if within else 'ABOVE'} the limit of {LIMIT_MIB} MiB.")
    return int(not (identical and within))


def _node(rank, store, report, line, config, tokens, natural_gbps):
    model = config_from_hf(SHAPES["hybrid-1b"])
    layout = plan_layout(model_state_specs(model, "bfloat16"), block_tokens=64)
    kvcache = KVCacheManager(layout, CacheConfig(layout.blocks_for(tokens)), "cpu", IDENTITY.fingerprint)
    prompt = Request("memory", [1] * tokens, SamplingParams())
    prompt.cache = kvcache.open(prompt.token_ids)
    kvcache.reserve(prompt.cache, tokens)
    kvcache.pool.bytes.random_(0, 256) if rank == 0 else kvcache.pool.bytes.fill_(1)
    link = Link("memory", store, rank, config, IDENTITY, EmulatedLine(line))
    link.connect(DEADLINE_S)
    with Watch() as memory:
        seen = (_send if rank == 0 else _receive)(link, kvcache, prompt, natural_gbps)
    report({"rank": rank, "pool": kvcache.pool.bytes.numel(), "before": memory.start, "peak": memory.peak,
            "after": memory.now(), "digest": checksums(kvcache.pool, prompt.cache.block_tables, tokens), **seen})
    link.close()


def _send(link: Link, kvcache: KVCacheManager, prompt: Request, natural_gbps: float) -> dict:
    plan = stream_plan(kvcache.layout, 1, 0, prompt.prompt_tokens)
    link.receive(DEADLINE_S)  # "ready"
    with ThreadPoolExecutor(1) as threads:
        stream = KVSend(kvcache, link, plan, prompt.cache.block_tables, threads, DEADLINE_S)
        began = due = time.monotonic()
        for start in range(0, plan.end, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, plan.end)
            for layer, spec in enumerate(kvcache.layout.specs):
                due += (spec.nbytes * (end - start) if spec.kind is StateKind.TOKEN else 0) * 8e-9 / natural_gbps
                time.sleep(max(0.0, due - time.monotonic()))  # the layer computes
                stream.ready(layer, end)
        stream.finish()
        done = stream.outcome.result()
    return {"bytes": done.bytes, "stalled_s": done.stalled_s, "took_s": time.monotonic() - began}


def _receive(link: Link, kvcache: KVCacheManager, prompt: Request, _) -> dict:
    plan = stream_plan(kvcache.layout, 1, 0, prompt.prompt_tokens)
    KVReceive(kvcache, link, plan, prompt.cache.block_tables)
    link.send_message({"ready": True})
    while not isinstance(link.receive(DEADLINE_S), StreamDone):
        pass
    return {}


class Watch(PeakMemory):
    """Looks at this process's resident memory every 20 ms."""

    def __enter__(self):
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        while not self._done.wait(0.02):
            self.look()

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def now(self) -> int:
        return self._resident()
