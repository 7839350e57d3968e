"""Emulated machines: the work is real, the time is the profile's, and who cannot keep it knows. Chapter 13."""

import pytest

from minprfaas import SamplingParams
from minprfaas.config import CacheConfig
from minprfaas.engine.engine import Engine
from minprfaas.engine.paced import Pace, PacedRunner
from minprfaas.scheduling.paper_case import h200_profile
from minprfaas.scheduling.profiles import Scale


class FakeTime:
    """A clock that moves when it is waited for, and by `work_s` each time it is looked at."""

    def __init__(self, work_s=0.0):
        self.now_s, self.work_s, self.waits = 0.0, work_s, []

    def __call__(self):
        self.now_s += self.work_s
        return self.now_s

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now_s += seconds


def paced_engine(model_and_tokenizer, time, pace):
    model, tokenizer = model_and_tokenizer
    engine = Engine(model, tokenizer, CacheConfig(64), prefill_chunk=64, clock=time)
    engine.runner = PacedRunner(engine.runner, pace, len(model.config.layers), time, time.wait)
    return engine


def run(engine, prompt, max_tokens):
    seen = []
    request = engine.add(engine.request("one", prompt, SamplingParams(max_tokens, ignore_eos=True)))
    while engine.has_work:
        engine.step(on_kv=lambda request, layer, start, end: seen.append((engine.clock.now_s, layer, end)))
    return request, seen


@pytest.fixture(scope="module")
def embedded():
    from minprfaas import load
    return load()


def test_a_prompt_and_its_answer_take_the_profiles_time_and_layers_leave_evenly(embedded):
    time, pace = FakeTime(), Pace(lambda tokens: 1.0 + tokens / 100, lambda requests: 0.25 * requests)
    engine = paced_engine(embedded, time, pace)
    prompt = list(range(2, 152))  # three chunks of 64, 64 and 22 tokens
    request, seen = run(engine, prompt, 5)
    assert request.first_token_at_s == pytest.approx(2.5)  # 1 + 150 / 100
    assert request.finished_at_s == pytest.approx(2.5 + 4 * 0.25)
    layers = len(engine.model.config.layers)
    assert [at_s for at_s, _, end in seen if end == 64] == pytest.approx(
        [1.64 * (layer + 1) / layers for layer in range(layers)])
    assert pace.allowed_s == pytest.approx(3.5) and pace.late_s == 0 and pace.needed_s == pytest.approx(0)
    # Its first two full blocks are cached now: the profile is asked for what is computed, not for the whole prompt.
    again, _ = run(engine, prompt, 1)
    assert again.cache is None and again.cached_tokens == 128
    assert again.first_token_at_s - again.arrived_at_s == pytest.approx(1.0 + 22 / 100)


def test_a_machine_too_slow_for_its_profile_says_by_how_much(embedded):
    time, pace = FakeTime(work_s=0.01), Pace(lambda tokens: 1e-6 * tokens, lambda requests: 1e-6)
    request, _ = run(paced_engine(embedded, time, pace), list(range(2, 52)), 3)
    assert not time.waits and pace.late_s > 100 * pace.allowed_s
    assert pace.needed_s == pytest.approx(pace.late_s, rel=0.3)
    assert len(request.output_ids) == 3


def test_a_scaled_profile_is_the_same_machine_in_other_units():
    full = h200_profile()
    small = Scale(time=8, length=64, size=1 / 1000).profile(full)
    for tokens in (1024, 20_000, 128 * 1024):
        assert small.prefill_s(tokens / 64) == pytest.approx(8 * full.prefill_s(tokens), rel=1e-6)
        assert small.kv_bytes(tokens / 64) == pytest.approx(full.kv_bytes(tokens) / 1000, rel=1e-6)
    assert small.t_decode_s == pytest.approx(full.t_decode_s * 64 * 8) and small.bs_max == full.bs_max
