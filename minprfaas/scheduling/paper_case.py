"""The paper's case study as objects, and every number of its own that a run is held against. Chapter 10, paper 4.

A 1T hybrid model (Kimi Linear architecture) on 32 H200s that only prefill and 64 H20s that do both, 100 Gbps apart.
Published: table 5, the fleets, the lengths, the SLO. Read out of published results, because the paper prints no more:

- `BS_max` = 20 and `T_decode` = 25 ms (40 tokens/s): table 6's Theta_pdd for 5, 3 and 8 decode instances follows.
- H20 prefill is *calibrated*: an affine map of the H200 curve through two rates of table 6, 3 instances at 1.64 req/s
  below the threshold and 9 at 2.11 over all lengths. Those two rates therefore agree by construction.
- Table 5's K is 1024, and t = 19.4K is 19,400 tokens: then P(L > t) = 0.496, as printed.
"""

from minprfaas.scheduling.lengths import TruncatedLogNormal
from minprfaas.scheduling.planner import Fleet, Plan, plan, plan_least_loaded
from minprfaas.scheduling.profiles import Profile, ProfilePoint

PUBLISHED_THRESHOLD = 19_400
OUTPUT_TOKENS = 1024
LINK_GBPS = 100.0

TABLE_6 = {
    "prfaas_pd": {"threshold": 19_400, "n_prfaas": 4, "n_p": 3, "n_d": 5, "theta_prfaas": 1.61, "theta_pdp": 1.64,
                  "theta_pdd": 3.91, "lambda_max": 3.24, "ratio": 1.54, "ttft_mean_s": 2.22, "ttft_p90_s": 3.51,
                  "offloaded_fraction": 0.496, "mean_offloaded_tokens": 44_000, "egress_gbps": 13.0},
    "homogeneous": {"n_p": 9, "n_d": 3, "theta_pdp": 2.11, "theta_pdd": 2.35, "lambda_max": 2.11, "ratio": 1.00,
                    "ttft_mean_s": 4.44, "ttft_p90_s": 9.73},
    "naive": {"n_prfaas": 4, "n_d": 8, "theta_prfaas": 2.45, "theta_pdd": 6.25, "lambda_max": 2.45, "ratio": 1.16,
              "ttft_mean_s": 1.74, "ttft_p90_s": 3.51},
}
CALIBRATED = {("prfaas_pd", "theta_pdp"), ("homogeneous", "theta_pdp"), ("homogeneous", "lambda_max")}

TABLE_3_TOKENS = (1024, 8192, 32_768, 131_072)
TABLE_3_GBPS = {  # KV throughput of one instance of 8 H200
    "Kimi Linear": (1.19, 2.29, 3.87, 4.88),
    "MiMo-V2-Flash": (0.82, 2.85, 4.66, 4.71),
    "Qwen3.5-397B": (4.13, 6.28, 8.25, 7.47),
    "Ring-2.5-1T": (7.27, 4.47, 2.59, 1.46),
    "MiniMax-M2.5": (4.94, 32.87, 59.93, 47.82),
    "Qwen3-235B": (4.12, 22.42, 33.35, 21.50),
}
TABLE_3_DENSE = ("MiniMax-M2.5", "Qwen3-235B")  # the others are hybrids
EGRESS_CASES = (  # (model, tokens, GPUs, what the paper says): equation 2 worked at 8 GPUs an instance (2.3)
    ("MiniMax-M2.5", 32_768, 512, "3.8 Tbps"),
    ("Qwen3-235B", 32_768, 512, "2.1 Tbps"),
    ("Ring-2.5-1T", 32_768, 512, "about 170 Gbps"),
    ("Ring-2.5-1T", 131_072, 512, "under 100 Gbps"),
    ("Ring-2.5-1T", 131_072, 10_000, "about 1.8 Tbps"),
)
GPUS_PER_INSTANCE = 8


def paper_lengths() -> TruncatedLogNormal:
    """Input lengths: log-normal with mu = 9.90 and sigma = 1.00, truncated to 128 tokens and 128K (paper 4.1)."""
    return TruncatedLogNormal(9.90, 1.00, 128, 128 * 1024)


def h200_profile() -> Profile:
    """Table 5: one instance of 8 H200. It only ever prefills here, so its decode numbers are the H20's."""
    table_5 = ((1, 190.8, 0.44), (8, 308.9, 0.72), (32, 701.3, 1.84), (128, 2316.3, 7.40))
    points = tuple(ProfilePoint(kilo * 1024, mebi * 2**20, seconds) for kilo, mebi, seconds in table_5)
    return Profile("8xH200", points, t_decode_s=1 / 40, bs_max=20)


def h20_profile() -> Profile:
    """One instance of 8 H20, calibrated: `scale * T + offset` of the H200's times gives both published rates. (Least
    squares commutes with an affine map, so mapping the points maps the whole fitted curve.)"""
    fast, lengths = h200_profile(), paper_lengths()
    fast_short_s, fast_mean_s = lengths.mean(fast.prefill_s, PUBLISHED_THRESHOLD), lengths.mean(fast.prefill_s)
    short_s = TABLE_6["prfaas_pd"]["n_p"] / TABLE_6["prfaas_pd"]["theta_pdp"]
    mean_s = TABLE_6["homogeneous"]["n_p"] / TABLE_6["homogeneous"]["theta_pdp"]
    scale = (mean_s - short_s) / (fast_mean_s - fast_short_s)
    offset_s = mean_s - scale * fast_mean_s
    points = tuple(ProfilePoint(p.tokens, p.kv_bytes, scale * p.prefill_s + offset_s) for p in fast.points)
    return Profile("8xH20 (calibrated)", points, fast.t_decode_s, fast.bs_max)


def paper_fleet(prfaas_instances: int = 4, pd_instances: int = 8) -> Fleet:
    """The case study's fleet: 4 instances of H200 and 8 of H20; the homogeneous baseline has 0 and 12."""
    return Fleet(prfaas_instances, pd_instances, LINK_GBPS, h200_profile(), h20_profile(), OUTPUT_TOKENS)


def paper_plans() -> dict[str, tuple[Fleet, Plan]]:
    """Table 6's three deployments, each searched for its best plan, and the baseline that the paper lacks."""
    lengths, both, local = paper_lengths(), paper_fleet(), paper_fleet(0, 12)
    return {"prfaas_pd": (both, plan(both, lengths)),
            "homogeneous": (local, plan(local, lengths)),
            "naive": (both, plan(both, lengths, n_p=0, threshold=0)),
            "least_loaded": (both, plan_least_loaded(both, lengths))}
