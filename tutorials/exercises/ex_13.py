"""The exercises of chapter 13. Fill in the functions, then: python tutorials/13_prefill_as_a_service.py --check 1"""

from exercises.checking import first_wrong

from minprfaas.cluster.journey import Journey
from minprfaas.cluster.stream_plans import stream_plan
from minprfaas.config import SamplingParams
from minprfaas.kvcache.layout import plan_layout
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig
from minprfaas.model.spec import kv_bytes


def bytes_that_cross(prompt_tokens: int, held_tokens: int, token_bytes: int, state_bytes: int) -> int:
    """Bytes of KVCache that cross for a prompt of which the decode node holds the rows of the first `held_tokens`
    tokens. A token has `token_bytes` in all full-attention layers together; the linear layers' state `state_bytes`."""
    raise NotImplementedError


def largest_part(ttft_s: float, queue_s: float, prefill_s: float, exposed_s: float,
                 admit_s: float) -> tuple[str, float]:
    """Which of the five parts of a time to the first token is the largest ("route", "queue", "prefill", "exposed" or
    "admit"), and its share of the whole, from 0 to 1. What no other part claims is "route"."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the plan that both ends of a stream make."""
    kda = KDAConfig(num_heads=2, head_dim=16).state_spec("float32")
    mla = MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_dim=8, qk_shared_dim=8, v_dim=8).state_spec("float32")
    layout = plan_layout((kda, kda, kda, mla), block_tokens=16)
    state = kv_bytes((kda,) * 3, 1)
    cases = [(1000, 0), (1000, 640), (1000, 999), (17, 16)]
    return first_wrong(bytes_that_cross, [((prompt, held, mla.nbytes, state),
                                           stream_plan(layout, 1, held, prompt).total_bytes) for prompt, held in cases])


def check_2() -> str | None:
    """Against the front end's record of a request."""
    cases = []
    for ttft_s, *parts in [(1.0, 0.1, 0.5, 0.2, 0.1), (2.0, 0.1, 0.2, 0.1, 0.1), (0.5, 0.3, 0.1, 0.0, 0.05),
                           (4.0, 0.5, 1.0, 2.0, 0.25)]:
        journey = Journey("exercise", [1], SamplingParams(), [], arrived_at_s=10.0)
        journey.first_token_at_s = 10.0 + ttft_s
        journey.queue_s, journey.prefill_s, journey.transfer_exposed_s, journey.admit_s = parts
        by_name = dict(zip(("queue", "prefill", "exposed", "admit"), parts), route=journey.route_s)
        largest = max(by_name, key=by_name.get)
        cases.append(((ttft_s, *parts), (largest, by_name[largest] / ttft_s)))
    return first_wrong(largest_part, cases)
