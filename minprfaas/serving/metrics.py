"""What the house has done and is doing, in Prometheus' text format (version 0.0.4). Chapters 13 and 15; paper 3.4.3.

The node's loop counts requests as they end and says once a second how things stand; the HTTP thread counts its
responses and writes the text. A lock keeps the two apart for the moment that either takes.
"""

import math
import threading
from collections import defaultdict

from minprfaas.cluster.front_end import FrontEnd
from minprfaas.cluster.journey import TTFT_PARTS, Journey
from minprfaas.cluster.messages import NodeFigures
from minprfaas.config import Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HELP = {
    "requests_total": ("counter", "Requests that have ended, by how they ended and where they were prefilled."),
    "prompt_tokens_total": ("counter", "Tokens of the prompts of requests that have ended."),
    "cached_tokens_total": ("counter", "Of these, tokens that the prefill node had in its cache."),
    "output_tokens_total": ("counter", "Tokens of the answers of requests that have ended."),
    "kv_bytes_total": ("counter", "KVCache that crossed from the PrfaaS cluster, in bytes."),
    "ttft_seconds": ("histogram", "Time to first token, in seconds, and its parts, which add up to the part ttft."),
    "http_responses_total": ("counter", "HTTP responses, by path and status."),
    "requests_waiting": ("gauge", "Requests without a first token."),
    "requests_decoding": ("gauge", "Requests with a first token and without their last."),
    "node_blocks": ("gauge", "Blocks of a node's KVCache pool."),
    "node_blocks_by_state": ("gauge", "Of these, free ones, cached ones and ones in use."),
    "node_up_seconds": ("gauge", "Seconds since a node's process began."),
    "node_computed_seconds": ("gauge", "Of these, seconds in which it computed."),
    "node_tokens": ("gauge", "Tokens that it has prefilled and decoded since."),
    "node_load": ("gauge", "Of a prefill node, uncached tokens that wait or are in work; of a decode node, requests."),
    "threshold_tokens": ("gauge", "Requests with more uncached tokens than this go to the PrfaaS cluster."),
    "link_gbps": ("gauge", "Capacity of the line out of the PrfaaS cluster, as its senders see it."),
    "link_utilization": ("gauge", "Share of it that is in use, smoothed."),
    "link_queued_bytes": ("gauge", "KVCache that waits to leave over it, in bytes."),
    "link_scarce": ("gauge", "1 while bandwidth out of the PrfaaS cluster is scarce, else 0."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, a histogram and gauges, each a value by labels under its name."""

    def __init__(self) -> None:
        self.sampled_at_s: float | None = None  # when the loop last said how things stand
        self.roles: frozenset[str] = frozenset()  # that some node takes work in
        self._lock = threading.Lock()
        self._counted: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._gauges: dict[str, dict[Labels, float]] = {}

    def ended(self, journey: Journey, state: str) -> None:
        """A request has ended: `state` is its finish reason, the kind of its error, or `aborted`."""
        with self._lock:
            self._counted["requests_total"][("state", state), ("route", journey.route or "none")] += 1
            self._counted["prompt_tokens_total"][()] += journey.prompt_tokens
            self._counted["cached_tokens_total"][()] += journey.cached_tokens
            self._counted["output_tokens_total"][()] += len(journey.output_ids)
            self._counted["kv_bytes_total"][()] += journey.kv_bytes
            if journey.first_token_at_s:
                for part in TTFT_PARTS:
                    self._observe_ttft(("part", part.removesuffix("_s")), max(0.0, getattr(journey, part)))

    def _observe_ttft(self, part: tuple[str, str], seconds: float) -> None:
        for limit in (*BUCKETS_S, math.inf):
            label = "+Inf" if limit == math.inf else f"{limit:g}"
            self._counted["ttft_seconds_bucket"][part, ("le", label)] += seconds <= limit
        self._counted["ttft_seconds_sum"][(part,)] += seconds
        self._counted["ttft_seconds_count"][(part,)] += 1

    def responded(self, path: str, status: int) -> None:
        """An HTTP response was begun."""
        with self._lock:
            self._counted["http_responses_total"][("path", path), ("status", str(status))] += 1

    def sample(self, front: FrontEnd, now_s: float) -> None:
        """How things stand: the queue, and what the front end and its control plane know of nodes and line."""
        is_decoding = [journey.first_token_at_s > 0 for journey in front.journeys.values()]
        plane, ready = front.plane, front.ready
        gauges = {
            "requests_waiting": {(): is_decoding.count(False)}, "requests_decoding": {(): is_decoding.count(True)},
            "node_blocks": {(("node", name), ("role", node.role), ("device", node.device)): node.num_blocks
                            for name, node in ready.items()},
            **_node_gauges({name: front.figures[name] for name in ready if name in front.figures}),
            "node_load": {(("node", name),): load for name, load in plane.loads().items()},
        }
        if plane.nodes(Role.PRFAAS):
            gauges |= {"threshold_tokens": {(): plane.threshold}, "link_scarce": {(): plane.regime(now_s) == "scarce"},
                       "link_gbps": {(): plane.egress.gbps}, "link_utilization": {(): plane.egress.utilization},
                       "link_queued_bytes": {(): plane.egress.queued_bytes}}
        with self._lock:
            self._gauges, self.sampled_at_s = gauges, now_s
            self.roles = frozenset(node.role for node in ready.values())

    def text(self) -> str:
        """Everything, as a scrape reads it."""
        lines = []
        with self._lock:
            values = {**self._counted, **self._gauges}
            for name, (kind, help_text) in HELP.items():
                lines += [f"# HELP minprfaas_{name} {help_text}", f"# TYPE minprfaas_{name} {kind}"]
                for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
                    for labels, value in values.get(name + suffix, {}).items():
                        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
                        braces = f"{{{shown}}}" if shown else ""
                        lines.append(f"minprfaas_{name}{suffix}{braces} {float(value)!r}")
        return "\n".join(lines) + "\n"


def _node_gauges(figures: dict[str, NodeFigures]) -> dict[str, dict[Labels, float]]:
    """What the nodes have told, by gauge."""
    gauges: dict[str, dict[Labels, float]] = {
        "node_up_seconds": {}, "node_computed_seconds": {}, "node_blocks_by_state": {}, "node_tokens": {}}
    for name, node in figures.items():
        here = ("node", name)
        gauges["node_up_seconds"][(here,)] = node.up_s
        gauges["node_computed_seconds"][(here,)] = node.computed_s
        gauges["node_blocks_by_state"][here, ("state", "free")] = node.free_blocks
        gauges["node_blocks_by_state"][here, ("state", "cached")] = node.cached_blocks
        gauges["node_blocks_by_state"][here, ("state", "in_use")] = node.in_use_blocks
        gauges["node_tokens"][here, ("work", "prefilled")] = node.prefilled_tokens
        gauges["node_tokens"][here, ("work", "decoded")] = node.decoded_tokens
    return gauges


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
