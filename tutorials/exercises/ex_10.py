"""The exercises of chapter 10. Fill in the functions, then: python tutorials/10_the_throughput_model.py --check 1"""

from exercises.checking import first_wrong

from minprfaas.scheduling import paper_case
from minprfaas.scheduling import throughput as model
from minprfaas.scheduling.planner import sweep


def system_rate(share: float, theta_prfaas: float, theta_pdp: float, theta_pdd: float) -> float:
    """Λ_max in requests/s (equation 6), for a `share` of the requests that is offloaded. Where no request reaches a
    stage (`share` 0 or 1), that stage does not bind."""
    raise NotImplementedError


def balanced_share(theta_prfaas: float, theta_pdp: float) -> float:
    """The share p of the requests to offload so that both prefill stages saturate together (equation 7), if neither
    rate depended on p."""
    raise NotImplementedError


def prefill_nodes(pd_nodes: int, share: float, theta_prfaas: float, pdp_each: float, pdd_each: float) -> int:
    """How many of `pd_nodes` should prefill, so that Λ_max is highest: try them all, from 1 to `pd_nodes - 1`. One
    that prefills sustains `pdp_each` of the requests that stay, one that decodes `pdd_each` requests/s; `share` of all
    requests is offloaded, at most `theta_prfaas` of them a second. Of two equal splits the smaller N_p."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's equation 6."""
    cases = [(0.5, 1.61, 1.64, 3.91), (0.25, 1.61, 1.64, 3.91), (0.9, 1.61, 4.0, 3.91), (0.5, 9.0, 9.0, 3.91),
             (0.0, 1.61, 1.64, 3.91), (1.0, 2.45, 0.0, 6.25)]
    return first_wrong(system_rate, [(case, model.lambda_max(*case[1:], case[0])) for case in cases])


def check_2() -> str | None:
    """Against a search over p."""

    def expected(remote: float, local: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            if p == 0 or remote / p > local / (1 - p):
                low = p
            else:
                high = p
        return p

    cases = [(1.61, 1.64), (1.0, 1.0), (3.0, 1.0), (1.0, 9.0)]
    return first_wrong(balanced_share, [(case, expected(*case)) for case in cases])


def check_3() -> str | None:
    """Against the package's plans of the paper's case and of others, and where PrfaaS binds whatever the split."""
    lengths, cases = paper_case.paper_lengths(), [((8, 0.5, 1.0, 100.0, 100.0), 1)]
    for pd_nodes, threshold in ((8, 19_400), (8, 35_000), (16, 19_400), (3, 5000)):
        plans = sweep(paper_case.paper_fleet(4, pd_nodes), lengths, [threshold], range(1, pd_nodes))
        best, one = max(plans, key=lambda found: found.lambda_max), plans[0]
        each = (one.theta_pdp / one.n_p, one.theta_pdd / one.n_d)
        cases.append(((pd_nodes, one.offloaded_fraction, one.theta_prfaas, *each), best.n_p))
    return first_wrong(prefill_nodes, cases)
