"""The throughput model: equations 1 to 6 of the paper, over plain numbers. Chapters 00 and 10, paper 2.1 and 3.4.1.

The slowest stage for its share of the traffic bounds the whole. Times and sizes of a stage are means over the requests
that reach it, `E[T(L) | L > t]`: `T(E[L])` would understate a curve that bends upwards.
"""

from math import inf


def kv_throughput_gbps(kv_bytes: float, prefill_s: float) -> float:
    """KVCache emitted per second of prefill, in gigabits per second: Phi_kv = S_kv / T_prefill (eq. 1).

    >>> round(kv_throughput_gbps(kv_bytes=701.3 * 2**20, prefill_s=1.84), 2)   # table 5, 32K tokens: 3.19
    3.2
    """
    return kv_bytes * 8 / prefill_s / 1e9


def egress_needed_gbps(gpus: int, gpus_per_instance: int, instance_gbps: float) -> float:
    """What must leave a prefill cluster that never waits for its link: B_out = (N / P) Phi_kv (eq. 2)."""
    return gpus / gpus_per_instance * instance_gbps


def theta_prfaas_compute(n_prfaas: float, prefill_s: float) -> float:
    """Requests/s that `n_prfaas` instances can prefill: N_prfaas / T_prefill, the first half of eq. 3."""
    return n_prfaas / prefill_s if prefill_s else inf


def relay_s(transfer_s: float, prefill_s: float, step_s: float, output_tokens: float) -> float:
    """Seconds that relay decode takes of a PrfaaS instance for one request: steps of `step_s` for as long as its
    KVCache crosses after the prefill, and no more than its answer has. They are added to `prefill_s`: an instance that
    relays one request at a time prefills none meanwhile, which is the worst case. Not in the paper.

    >>> relay_s(transfer_s=5.0, prefill_s=2.0, step_s=0.025, output_tokens=1024), relay_s(1.0, 2.0, 0.025, 1024)
    (3.0, 0.0)
    """
    return min(max(transfer_s - prefill_s, 0.0), step_s * output_tokens)


def theta_prfaas_egress(link_gbps: float, kv_bytes: float) -> float:
    """Requests/s whose KVCache fits through the link: B_out / S_kv, the second half of eq. 3."""
    return link_gbps * 1e9 / 8 / kv_bytes if kv_bytes else inf


def theta_prfaas(n_prfaas: float, prefill_s: float, link_gbps: float, kv_bytes: float) -> float:
    """Requests/s of the PrfaaS cluster: prefill and egress are pipelined, so the slower one decides (eq. 3)."""
    return min(theta_prfaas_compute(n_prfaas, prefill_s), theta_prfaas_egress(link_gbps, kv_bytes))


def theta_pdp(n_p: float, prefill_s: float) -> float:
    """Requests/s that the PD cluster's prefill instances sustain: N_p / T_prefill (eq. 4)."""
    return n_p / prefill_s if prefill_s else inf


def theta_pdd(n_d: float, bs_max: int, t_decode_s: float, output_tokens: float) -> float:
    """Requests/s that the decode instances sustain: N_d BS_max / (T_decode L_out) (eq. 5).

    >>> round(theta_pdd(n_d=5, bs_max=20, t_decode_s=0.025, output_tokens=1024), 2)   # table 6: 3.91
    3.91
    """
    return n_d * bs_max / (t_decode_s * output_tokens)


def lambda_max(theta_prfaas: float, theta_pdp: float, theta_pdd: float, offloaded_fraction: float) -> float:
    """Requests/s of the whole system: min(Theta_prfaas / p, Theta_pdp / (1 - p), Theta_pdd) (eq. 6)."""
    p = offloaded_fraction
    return min(theta_prfaas / p if p > 0 else inf, theta_pdp / (1 - p) if p < 1 else inf, theta_pdd)
