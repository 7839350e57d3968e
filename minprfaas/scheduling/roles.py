"""The long-term loop: convert PD nodes between prefill and decode, one at a time. Chapter 12 (paper 3.4.3)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minprfaas.config import Role
from minprfaas.scheduling.lengths import LengthDistribution
from minprfaas.scheduling.planner import Fleet, plan
from minprfaas.scheduling.router import NodeView
from minprfaas.scheduling.threshold import Observation

MIN_GAIN = 0.05  # a node is converted when another split would sustain this share of requests more,
BUSY = 0.8  # the stage that limits is this busy,
SUSTAIN_S = 60.0  # and both have been so for this long without a break (unless said otherwise)
COOLDOWN_S = 120.0  # from the end of one conversion to the next, so that roles cannot flap
INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class RoleChange:
    """Let `node` play `role`, PDP or PDD, once it has drained: no new work, and what it has is finished."""

    node: str
    role: Role
    reason: str


class RoleLoop:
    """Compares the producers, Theta_prfaas + Theta_pdp, with the consumer, Theta_pdd, as observed (eq. 8). What they
    ask for is done once they have asked for it for `sustain_s`."""

    def __init__(self, fleet: Fleet, sustain_s: float = SUSTAIN_S):
        self.fleet, self.sustain_s = fleet, sustain_s
        self._looked_at_s = self._settled_at_s = -math.inf  # settled: infinite while a node drains
        self._wanted_since: tuple[Role, float] | None = None

    def update(self, now: Observation, recent_lengths: Callable[[], LengthDistribution | None], output_tokens: float,
               pdp: Sequence[NodeView], pdd: Sequence[NodeView]) -> RoleChange | None:
        """The conversion to begin now, or None: the least-loaded node of the role with too many; each keeps one.
        `recent_lengths` is `ThresholdLoop.lengths`; `output_tokens`: of the mean answer."""
        if now.at_s - self._looked_at_s < INTERVAL_S:
            return None
        self._looked_at_s = now.at_s
        # Each role keeps one node, and while nobody decodes there is nothing to compare.
        lengths = recent_lengths() if now.n_d and max(len(pdp), len(pdd)) > 1 else None
        role, reason = self._wanted(now, lengths, output_tokens) if lengths else (None, "")
        donors = pdd if role is Role.PDP else pdp
        if role is None or len(donors) < 2:
            self._wanted_since = None
            return None
        if self._wanted_since is None or self._wanted_since[0] != role:
            self._wanted_since = (role, now.at_s)
        sustained = now.at_s - self._wanted_since[1] >= self.sustain_s
        if not sustained or now.at_s - self._settled_at_s < COOLDOWN_S:
            return None
        self._settled_at_s, self._wanted_since = math.inf, None
        return RoleChange(min(donors, key=lambda node: node.load).name, role, reason)

    def converted(self, at_s: float) -> None:
        """The node plays its new role (or died on the way): the cool-down begins."""
        self._settled_at_s = at_s

    def _wanted(self, now: Observation, lengths: LengthDistribution, output_tokens: float) -> tuple[Role | None, str]:
        fleet = replace(self.fleet, prfaas_instances=now.prfaas_instances, pd_instances=now.n_p + now.n_d,
                        link_gbps=now.egress_gbps, output_tokens=output_tokens)
        grid = [0.0, *lengths.values[::max(1, len(lengths.values) // 64)], lengths.values[-1]]
        here, best = plan(fleet, lengths, n_p=now.n_p, grid=grid), plan(fleet, lengths, grid=grid)
        if best.n_p == now.n_p or best.lambda_max < (1 + MIN_GAIN) * here.lambda_max:
            return None, ""
        role = Role.PDP if best.n_p > now.n_p else Role.PDD
        utilization = now.prefill_utilization if role is Role.PDP else now.decode_utilization
        if utilization < BUSY:
            return None, ""
        stage = "prefill" if role is Role.PDP else "decode"
        producers = here.theta_prfaas + here.theta_pdp
        reason = (f"{stage} {utilization:.0%} busy, producers {producers:.2f} and consumer {here.theta_pdd:.2f} req/s: "
                  f"N_p {now.n_p} sustains {here.lambda_max:.2f}, {best.n_p} would {best.lambda_max:.2f}")
        return role, reason
