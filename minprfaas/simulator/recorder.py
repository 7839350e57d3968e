"""What a simulation says: throughput, latencies, utilization per stage and link, what the loops did. Chapter 12.

Everything is *simulated*: service times come from the profiles, not from a machine.
"""

from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import isfinite
from statistics import fmean, quantiles
from typing import NamedTuple

from minprfaas.config import Role
from minprfaas.simulator.nodes import SimRequest

TTFT_OBJECTIVE_S = 10.0


class Tick(NamedTuple):
    """The cluster at one moment. Shares: of nodes that compute, of decode places in use; `waiting`: requests without a
    first token."""

    at_s: float
    egress_gbps: float
    egress_utilization: float
    queued_bytes: float
    prfaas_busy: float
    pdp_busy: float
    pdd_busy: float
    waiting: int
    threshold: float
    n_p: int


@dataclass(frozen=True)
class Report:
    """A first token counts as drawn when its request joins a decode batch. Goodput counts requests whose first token
    came within `TTFT_OBJECTIVE_S`, per second of arrivals; utilizations are means."""

    requests: int
    failed: int
    routed_again: int
    duration_s: float
    throughput_rps: float
    goodput_rps: float
    ttft_s: dict[str, float]
    inter_token_s: dict[str, float]
    offloaded_fraction: float
    cached_fraction: float
    egress_gbps: float
    shipped_cache_bytes: float
    fetched_cache_bytes: float
    utilization: dict[str, float]
    peak_waiting: int
    final_threshold: float
    threshold_moves: int
    role_changes: list[tuple]
    prefilled_at: dict[str, int]  # requests, by node
    series: list[Tick] = field(repr=False)

    def to_json(self) -> dict:
        """A JSON object, without the series; a threshold that offloads nothing is null."""
        values = {name: value for name, value in asdict(self).items() if name != "series"}
        return {**values, "final_threshold": self.final_threshold if isfinite(self.final_threshold) else None}


class Recorder:
    """Counts while the simulation runs."""

    def __init__(self):
        self.arrived = self.failed = self.routed_again = self.offloaded = self.threshold_moves = 0
        self.shipped_cache_bytes = self.fetched_cache_bytes = 0.0
        self.prefilled_at: Counter[str] = Counter()  # requests, by node
        self.role_changes: list[tuple[float, str, str, str]] = []
        self.series: list[Tick] = []
        self._good, self._last_arrived_at_s, self._ended_at_s = 0, 0.0, 0.0
        self._ttft, self._inter_token = array("d"), array("d")
        self._prompt_tokens = self._cached_tokens = 0

    def ended(self, request: SimRequest, failed: bool) -> None:
        """A request has drawn its last token, or found no node."""
        self._last_arrived_at_s = max(self._last_arrived_at_s, request.arrived_at_s)
        if failed:
            self.failed += 1
            return
        ttft_s = request.first_token_at_s - request.arrived_at_s
        self._ttft.append(ttft_s)
        self._good += ttft_s <= TTFT_OBJECTIVE_S
        self._ended_at_s = max(self._ended_at_s, request.finished_at_s)
        if request.output_tokens > 1:
            self._inter_token.append((request.finished_at_s - request.first_token_at_s) / (request.output_tokens - 1))
        self.offloaded += request.decision.route is Role.PRFAAS
        self.prefilled_at[request.decision.node] += 1
        self._prompt_tokens += request.input_tokens
        self._cached_tokens += request.cached_tokens

    def report(self, bytes_sent: float) -> Report:
        """The whole run in figures."""
        duration_s = max(self._ended_at_s, self._last_arrived_at_s) or 1.0
        completed, columns = len(self._ttft), Tick(*zip(*self.series))
        arrivals_s = self._last_arrived_at_s or 1.0
        shares = {"egress": columns.egress_utilization, "prfaas": columns.prfaas_busy, "pdp": columns.pdp_busy,
                  "pdd": columns.pdd_busy}
        utilization = {name: sum(share) / len(share) for name, share in shares.items()}
        return Report(
            completed, self.failed, self.routed_again, duration_s, completed / duration_s, self._good / arrivals_s,
            of_all(self._ttft), of_all(self._inter_token), self.offloaded / max(completed, 1),
            self._cached_tokens / max(self._prompt_tokens, 1), bytes_sent * 8e-9 / duration_s, self.shipped_cache_bytes,
            self.fetched_cache_bytes, utilization, max(columns.waiting), columns.threshold[-1], self.threshold_moves,
            self.role_changes, dict(self.prefilled_at), self.series)


def of_all(values: array) -> dict[str, float]:
    """Mean and percentiles, between the two nearest values where there is none at their place; nothing of none."""
    if not values:
        return {}
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    return {"mean": fmean(values), **{f"p{percent}": cuts[percent - 1] for percent in (50, 90, 99)}}
