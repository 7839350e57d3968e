"""The planner: exhaustive search for threshold and prefill/decode split. Chapter 10, paper 3.4.2 (eq. 7, 8)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, inf, log10
from operator import itemgetter

from minprfaas.config import Role
from minprfaas.errors import UserError, require_number
from minprfaas.scheduling import throughput as model
from minprfaas.scheduling.lengths import MAX_TOKENS, LengthDistribution
from minprfaas.scheduling.profiles import Profile

GRID_THRESHOLDS = 1500  # at most so many thresholds on a grid of round numbers: 100 tokens apart up to 128K
MAX_INSTANCES = 2000  # of a cluster: 16,000 GPUs; every split is tried
MAX_GBPS = 1_000_000
BINDING_STAGES = ("prfaas compute", "prfaas egress", "pdp", "pdd")


@dataclass(frozen=True)
class Fleet:
    """What there is to plan with. `prfaas_instances` may be a fraction (the compute that is observed rather than
    installed), `link_gbps` 0 (a link that is down). With `relay`, PrfaaS instances decode while KVCache crosses. Raises
    UserError for what is out of range or cannot serve."""

    prfaas_instances: float
    pd_instances: int
    link_gbps: float
    prfaas_profile: Profile
    pd_profile: Profile
    output_tokens: float
    relay: bool = False

    def __post_init__(self) -> None:
        require_number("number of PrfaaS instances", self.prfaas_instances, least=0, most=MAX_INSTANCES)
        require_number("number of PD instances", self.pd_instances, least=1, most=MAX_INSTANCES, whole=True)
        require_number("link bandwidth in Gbps", self.link_gbps, least=0, most=MAX_GBPS)
        require_number("output tokens", self.output_tokens, above=0, most=MAX_TOKENS)
        if self.pd_instances == 1 and not self.prfaas_instances:
            raise UserError("a fleet of 0 PrfaaS and 1 PD instance cannot serve; prefill and decode need 1 each")

    def profile(self, role: Role) -> Profile:
        """The profile of an instance that plays `role`."""
        return self.prfaas_profile if role is Role.PRFAAS else self.pd_profile

    def theta_pdd(self, n_p: int) -> float:
        """Requests/s that the PD instances sustain which do not prefill (eq. 5)."""
        pd = self.pd_profile
        return model.theta_pdd(self.pd_instances - n_p, pd.bs_max, pd.t_decode_s, self.output_tokens)

    def prfaas_s(self, tokens: float) -> float:
        """Seconds that a request takes of a PrfaaS instance: its prefill and, with `relay`, what it decodes then while
        its KVCache crosses on the instance's share of the link."""
        profile, share_gbps = self.prfaas_profile, self.link_gbps / max(self.prfaas_instances, 1)
        prefill_s = profile.prefill_s(tokens)
        if not self.relay:
            return prefill_s
        transfer_s = profile.kv_bytes(tokens) * 8e-9 / share_gbps if share_gbps else inf
        return prefill_s + model.relay_s(transfer_s, prefill_s, profile.decode_step_s(1), self.output_tokens)


@dataclass(frozen=True)
class Plan:
    """A threshold, a split, and what they sustain, in requests/s. `threshold` is in uncached tokens: infinity offloads
    nothing, 0 everything, None routes by load. `bounds` holds, for each of `BINDING_STAGES`, the rate of the whole
    system at which that stage saturates: infinity for one that no request reaches."""

    threshold: float | None
    n_prfaas: float
    n_p: int
    n_d: int
    theta_prfaas: float
    theta_pdp: float
    theta_pdd: float
    offloaded_fraction: float
    mean_offloaded_tokens: float
    mean_offloaded_bytes: float
    bounds: dict[str, float]

    @property
    def lambda_max(self) -> float:
        """Requests/s of the whole system: Lambda_max (eq. 6)."""
        return min(self.bounds.values())

    @property
    def binding_stage(self) -> str:
        """The stage that saturates first, one of `BINDING_STAGES`."""
        return min(self.bounds, key=self.bounds.get)

    @property
    def egress_gbps(self) -> float:
        """What leaves the PrfaaS cluster at `lambda_max`."""
        return self.lambda_max * self.offloaded_fraction * self.mean_offloaded_bytes * 8 / 1e9


def plan(fleet: Fleet, lengths: LengthDistribution, n_p: int | None = None, threshold: float | None = None,
         grid: Iterable[float] | None = None) -> Plan:
    """The best plan over every threshold of `grid` (default: `round_thresholds`) and every `n_p`, but for what is fixed
    by an argument (eq. 7, 8). Of plans with equal rates the one whose second bound is higher wins, then the third:
    spare capacity goes where it is wanted next. Raises UserError for an `n_p` or a threshold out of range."""
    if threshold is None and not fleet.prfaas_instances:
        threshold = inf
    if threshold is not None:
        grid = [threshold]
    thresholds = round_thresholds(lengths) if grid is None else list(grid)
    if not thresholds or min(thresholds) < 0:
        raise UserError(f"threshold {min(thresholds, default='(none)')} is out of range; it must be at least 0 tokens")
    if n_p is not None:
        require_number("number of PD prefill instances", n_p, least=0, most=fleet.pd_instances - 1)
    splits = range(fleet.pd_instances) if n_p is None else [n_p]
    search = _Search(fleet, lengths)
    _, best_threshold, best_n_p = max(search.scores(thresholds, splits), key=itemgetter(0))
    return search.plan_at(best_threshold, best_n_p)


def sweep(fleet: Fleet, lengths: LengthDistribution, thresholds: Iterable[float], splits: Iterable[int]) -> list[Plan]:
    """The plan of each threshold with each N_p: one split is figure 5(b), one threshold is figure 5(a)."""
    search, splits = _Search(fleet, lengths), list(splits)
    return [search.plan_at(threshold, n_p) for threshold in thresholds for n_p in splits]


def plan_least_loaded(fleet: Fleet, lengths: LengthDistribution) -> Plan:
    """The best split for a router that sends each request, whatever its length, to the least loaded prefill instance.

    At saturation all of them are busy, so both kinds share the requests in proportion to their rates over *all*
    lengths, unless the link holds the remote ones back. The paper lacks this baseline, which tells selective offloading
    from merely having both kinds of hardware.
    """
    remote, local = fleet.prfaas_profile, fleet.pd_profile
    prfaas_s, kv_bytes, pdp_s = (lengths.mean(of) for of in (fleet.prfaas_s, remote.kv_bytes, local.prefill_s))
    theta_prfaas = model.theta_prfaas(fleet.prfaas_instances, prfaas_s, fleet.link_gbps, kv_bytes)
    plans = []
    for n_p in range(fleet.pd_instances):
        both = theta_prfaas + model.theta_pdp(n_p, pdp_s)
        share = theta_prfaas / both if both else 0.0
        loads = share * prfaas_s, share * kv_bytes, (1 - share) * pdp_s
        plans.append(_plan(fleet, None, n_p, share, lengths.mean(float), loads))
    return max(plans, key=lambda at: at.lambda_max)


def sensitivity(fleet: Fleet, lengths: LengthDistribution) -> list[tuple[str, Plan]]:
    """What more would buy: the best plan with one more instance of each kind, and with twice the link. What would go
    beyond the limits of a fleet is left out."""
    more = (("one more PrfaaS instance", "prfaas_instances", fleet.prfaas_instances + 1, MAX_INSTANCES),
            ("one more PD instance", "pd_instances", fleet.pd_instances + 1, MAX_INSTANCES),
            ("twice the link", "link_gbps", 2 * fleet.link_gbps, MAX_GBPS))
    return [(change, plan(replace(fleet, **{field: value}), lengths)) for change, field, value, most in more
            if value <= most]


def first_token_times(fleet: Fleet, lengths: LengthDistribution, of: Plan) -> tuple[float, float]:
    """Mean and 90th percentile of TTFT in seconds, for requests that never wait: prefill, one decode step, and for an
    offloaded one, unless its tokens are relayed, its KVCache's time on the whole link.

    Table 6's numbers come out within 6%. The paper does not say how it derived them; that its P90 is 3.51 s both for
    PrfaaS-PD and for naive PD, whose waiting could not be alike, suggests that it leaves waiting out too.
    """
    byte_s = 0.0 if fleet.relay else 8 / 1e9 / fleet.link_gbps if fleet.link_gbps else inf
    remote, local, times = fleet.prfaas_profile, fleet.pd_profile, []
    for length in lengths.values:
        share = of.offloaded_fraction if of.threshold is None else float(length > of.threshold)
        if share:
            times.append((remote.prefill_s(length) + remote.kv_bytes(length) * byte_s + local.t_decode_s, share))
        if share < 1:
            times.append((local.prefill_s(length) + local.t_decode_s, 1 - share))
    times.sort()
    total, covered = len(lengths.values), accumulate(share for _, share in times)
    p90_s = next(time for (time, _), share in zip(times, covered) if share >= 0.9 * total)
    return sum(time * share for time, share in times) / total, p90_s


def round_thresholds(lengths: LengthDistribution) -> list[float]:
    """Thresholds on a grid of round numbers, a power of ten apart, from 0 to beyond the longest length."""
    longest = max(lengths.values[-1], 1)
    step = 10 ** max(0, ceil(log10(longest / GRID_THRESHOLDS)))
    return [float(step * i) for i in range(int(longest // step) + 2)]


class _Search:
    """The throughput model of one fleet and one distribution, with the running sums that make every point cheap."""

    def __init__(self, fleet: Fleet, lengths: LengthDistribution):
        self.fleet, self.lengths = fleet, lengths
        self._prfaas_s = lengths.running_means(fleet.prfaas_s)
        self._kv_bytes = lengths.running_means(fleet.prfaas_profile.kv_bytes)
        self._pdp_s = lengths.running_means(fleet.pd_profile.prefill_s)

    def scores(self, thresholds: Iterable[float], splits: Iterable[int]) -> Iterator[tuple[tuple, float, int]]:
        """(bounds in rising order, threshold, N_p) of every point: a greater score is a better plan."""
        decode = [(n_p, self.fleet.theta_pdd(n_p)) for n_p in splits]
        for threshold in thresholds:
            prfaas_s, kv_bytes, pdp_s = self._loads(self.lengths.count_up_to(threshold))
            remote = model.theta_prfaas(self.fleet.prfaas_instances, prfaas_s, self.fleet.link_gbps, kv_bytes)
            for n_p, theta_pdd in decode:
                yield tuple(sorted((remote, model.theta_pdp(n_p, pdp_s), theta_pdd))), threshold, n_p

    def plan_at(self, threshold: float, n_p: int) -> Plan:
        """The plan of one point."""
        below = self.lengths.count_up_to(threshold)
        longer = self.lengths.values[below:]
        mean_tokens = sum(longer) / max(1, len(longer))
        return _plan(self.fleet, threshold, n_p, self.lengths.tail(threshold), mean_tokens, self._loads(below))

    def _loads(self, below: int) -> tuple[float, float, float]:
        """What `_plan` wants, where `below` of the lengths stay local."""
        return (self._prfaas_s[-1] - self._prfaas_s[below], self._kv_bytes[-1] - self._kv_bytes[below],
                self._pdp_s[below])


def _plan(fleet: Fleet, threshold: float | None, n_p: int, p: float, mean_tokens: float,
          loads: tuple[float, float, float]) -> Plan:
    """A plan from the share `p` of requests that go out, and from what a request costs on average: seconds of PrfaaS
    prefill, bytes of egress, seconds of PD prefill. These are shares of E[·], not means over those that reach the
    stage, so N / load is the rate of the whole system at which the stage saturates: Theta / p (eq. 3 to 6)."""
    prfaas_s, kv_bytes, pdp_s = loads
    compute = model.theta_prfaas_compute(fleet.prfaas_instances, prfaas_s)
    egress = model.theta_prfaas_egress(fleet.link_gbps, kv_bytes)
    pdp, pdd = model.theta_pdp(n_p, pdp_s), fleet.theta_pdd(n_p)
    return Plan(threshold, fleet.prfaas_instances, n_p, fleet.pd_instances - n_p,
                p * min(compute, egress) if p > 0 else inf, (1 - p) * pdp if p < 1 else inf, pdd, p, mean_tokens,
                kv_bytes / p if p > 0 else 0.0, dict(zip(BINDING_STAGES, (compute, egress, pdp, pdd))))
