"""The exercises of chapter 04. Fill in the functions, then: python tutorials/04_prefill_and_decode.py --check 1"""

from exercises.checking import first_wrong

from minprfaas.config import CacheConfig, LayerConfig, ModelConfig, RopeConfig, SamplingParams
from minprfaas.engine.engine import model_layout
from minprfaas.engine.request import Request
from minprfaas.engine.scheduler import Scheduler
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.gqa import GQAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.model.transformer import Transformer


def least_seconds(weights: int, tokens: int, weight_bytes: int, flops_per_s: float, bytes_per_s: float) -> float:
    """The least time of a forward pass over `tokens` tokens: it does 2 FLOP for each weight and token, and reads every
    weight (`weight_bytes` each) once. Whichever takes longer, arithmetic or reading, is the time."""
    raise NotImplementedError


def requests_that_fit(memory_bytes: int, weights_bytes: int, token_bytes: int, state_bytes: int, tokens: int) -> int:
    """How many requests of `tokens` tokens a machine with `memory_bytes` can decode at once. The weights take
    `weights_bytes`; a request has `token_bytes` of KVCache for each token, and `state_bytes` of state besides."""
    raise NotImplementedError


def prefill_chunks(tokens: int, cached_tokens: int, chunk: int) -> list[tuple[int, int]]:
    """The chunks (start, end) in which a prompt of `tokens` tokens is read: each of at most `chunk` tokens, in order,
    without the first `cached_tokens`, which are known already. The last one may be shorter."""
    raise NotImplementedError


def check_1() -> str | None:
    """By hand, for both limits."""
    return first_wrong(least_seconds, [
        ((1_000_000, 1, 4, 1e9, 1e9), 0.004),  # memory: 4 MB at 1 GB/s, and 2 MFLOP
        ((1_000_000, 100, 4, 1e9, 1e9), 0.2),  # arithmetic: 200 MFLOP
        ((1_000_000, 2, 4, 1e9, 1e9), 0.004),  # both alike
        ((48_000_000_000, 1, 2, 990e12, 3.35e12), 96 / 3350)])


def check_2() -> str | None:
    """Against the package's S_kv of a small model, counted up request by request."""
    mixer = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig())
    config = ModelConfig("example", 64, 64, (LayerConfig(mixer, DenseConfig(64)),) * 3, norm_eps=1e-6,
                         tie_embeddings=True, max_context_tokens=4096)
    specs, cases = model_state_specs(config, "float32"), []
    for memory, weights, state, tokens in [(10**8, 10**6, 0, 1000), (10**7, 9 * 10**6, 12_345, 100),
                                           (10**6, 10**6, 5, 10), (10**6, 2 * 10**6, 5, 10)]:
        each, count = kv_bytes(specs, tokens) + state, 0
        while weights + (count + 1) * each <= memory:
            count += 1
        cases.append(((memory, weights, kv_bytes(specs, 1), state, tokens), count))
    return first_wrong(requests_that_fit, cases)


def check_3() -> str | None:
    """Against the chunks that the package's scheduler plans."""
    mixer = GQAConfig(num_heads=1, num_kv_heads=1, head_dim=4, rope=RopeConfig())
    config = ModelConfig("example", 64, 8, (LayerConfig(mixer, DenseConfig(8)),), norm_eps=1e-6, tie_embeddings=True,
                         max_context_tokens=4096)
    layout, cases = model_layout(Transformer(config), block_tokens=16), []
    for tokens, cached, chunk in [(100, 0, 32), (96, 0, 32), (100, 48, 40), (10, 0, 64)]:
        kvcache = KVCacheManager(layout, CacheConfig(64, block_tokens=16), "cpu", root=b"exercise")
        prompt = list(range(tokens))
        if cached:
            earlier = kvcache.open(prompt[:cached])
            kvcache.reserve(earlier, cached)
            kvcache.advance(earlier, prompt[:cached])
            kvcache.close(earlier)
        scheduler, chunks = Scheduler(kvcache, chunk, max_batch=1, shared_tokens=0), []
        request = Request("exercise", prompt, SamplingParams())
        scheduler.waiting.append(request)
        while not chunks or chunks[-1][1] < tokens:
            (planned,) = scheduler.next_chunks()
            chunks.append((planned.start, planned.end))
            kvcache.advance(request.cache, prompt[:planned.end])
        cases.append(((tokens, cached, chunk), chunks))
    return first_wrong(prefill_chunks, cases)
