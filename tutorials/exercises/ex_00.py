"""The exercises of chapter 00. Fill in the functions, then: python tutorials/00_the_bandwidth_wall.py --check 1"""

from exercises.checking import first_wrong

from minprfaas.config import LayerConfig, ModelConfig, RopeConfig
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.scheduling.throughput import egress_needed_gbps, kv_throughput_gbps


def gqa_kv_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of KVCache of a request of `tokens` tokens in a model of `layers` GQA layers, in bfloat16 (2 bytes a
    number): each layer keeps, for each token and KV head, a key and a value of `head_dim` numbers."""
    raise NotImplementedError


def lighter_from(dense_token_bytes: int, hybrid_token_bytes: int, hybrid_fixed_bytes: int) -> int:
    """The least number of tokens at which a hybrid's KVCache is lighter than a dense model's. The dense one's weighs
    `dense_token_bytes` a token; the hybrid's `hybrid_token_bytes` a token (fewer), and `hybrid_fixed_bytes` besides."""
    raise NotImplementedError


def instances_that_fit(link_gbps: float, kvcache_bytes: int, prefill_s: float) -> int:
    """How many instances can prefill side by side, so that a link of `link_gbps` (10^9 bits/s) still carries all that
    they make. Each makes `kvcache_bytes` in `prefill_s` seconds, again and again (equations 1 and 2)."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's own S_kv of such a model."""

    def expected(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
        mixer = GQAConfig(num_heads=2 * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, rope=RopeConfig())
        config = ModelConfig("example", 16, 16, (LayerConfig(mixer, DenseConfig(16)),) * layers, norm_eps=1e-6,
                             tie_embeddings=True, max_context_tokens=2**20)
        return kv_bytes(model_state_specs(config, "bfloat16"), tokens)

    cases = [(1, 1, 64, 1), (62, 8, 128, 32_768), (36, 8, 128, 1000), (4, 2, 80, 17)]
    return first_wrong(gqa_kv_bytes, [(case, expected(*case)) for case in cases])


def check_2() -> str | None:
    """Against a search from one token upwards."""

    def expected(dense: int, hybrid: int, fixed: int) -> int:
        tokens = 1
        while hybrid * tokens + fixed >= dense * tokens:
            tokens += 1
        return tokens

    cases = [(10, 1, 90), (10, 1, 91), (10, 1, 89), (4096, 1152, 2_097_152), (253_952, 8064, 45_000_000)]
    return first_wrong(lighter_from, [(case, expected(*case)) for case in cases])


def check_3() -> str | None:
    """Against the package's equations 1 and 2: so many fit, and one more does not."""
    cases = [(100.0, 735_366_349, 1.84), (10.0, 2**30, 1.0), (400.0, 8 * 2**30, 2.5)]
    for link_gbps, kvcache_bytes, prefill_s in cases:
        count = instances_that_fit(link_gbps, kvcache_bytes, prefill_s)
        each_gbps = kv_throughput_gbps(kvcache_bytes, prefill_s)
        most = 0
        while egress_needed_gbps(most + 1, 1, each_gbps) <= link_gbps:
            most += 1
        if count != most:
            return (f"instances_that_fit({link_gbps:g}, {kvcache_bytes:,}, {prefill_s:g}): expected {most} (each emits "
                    f"{each_gbps:.2f} Gbps), got {count}")
    return None
