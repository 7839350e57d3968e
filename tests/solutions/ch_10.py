"""Chapter 10's exercises, solved; and wrong answers that look right."""


def system_rate(share, theta_prfaas, theta_pdp, theta_pdd):
    bounds = [theta_pdd]
    if share > 0:
        bounds.append(theta_prfaas / share)
    if share < 1:
        bounds.append(theta_pdp / (1 - share))
    return min(bounds)


def balanced_share(theta_prfaas, theta_pdp):
    return theta_prfaas / (theta_prfaas + theta_pdp)


def prefill_nodes(pd_nodes, share, theta_prfaas, pdp_each, pdd_each):
    def rate(n_p):
        return system_rate(share, theta_prfaas, n_p * pdp_each, (pd_nodes - n_p) * pdd_each)

    return max(range(1, pd_nodes), key=rate)


WRONG = {
    "system_rate": lambda share, remote, local, decode: min(remote, local, decode),  # stages see a share only
    "balanced_share": lambda remote, local: local / (remote + local),  # the other side's
    "prefill_nodes": lambda nodes, share, remote, pdp, pdd: round(nodes * pdd / (pdp + pdd)),  # without the PrfaaS ones
}
