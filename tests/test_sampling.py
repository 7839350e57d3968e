"""From logits to tokens: the right distribution, and the same draw everywhere. Chapter 05."""

from collections import Counter

import pytest
import torch

from minprfaas.config import SamplingParams
from minprfaas.engine.sampling import sample
from minprfaas.errors import UserError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
DRAWS = 4000


def shares(logits=LOGITS, draws=DRAWS, **params) -> torch.Tensor:
    """How often each token is drawn over `draws` seeds."""
    counts = Counter(sample(logits, SamplingParams(seed=seed, **params), 0) for seed in range(draws))
    return torch.tensor([counts[token] / draws for token in range(len(logits))])


def test_temperature_zero_takes_the_likeliest_whatever_the_seed():
    assert {sample(LOGITS, SamplingParams(seed=seed), seed) for seed in range(20)} == {1}


def test_a_seed_draws_tomorrow_what_it_draws_today():
    drawn = [sample(torch.zeros(1000), SamplingParams(temperature=1.0, seed=7), position) for position in range(6)]
    assert drawn == [155, 285, 904, 171, 771, 933]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    torch.testing.assert_close(shares(temperature=temperature), (LOGITS / temperature).softmax(0), atol=0.03, rtol=0)


def test_positions_of_one_request_are_independent_draws():
    params = SamplingParams(temperature=1.0, seed=5)
    counts = Counter(sample(LOGITS, params, position) for position in range(DRAWS))
    observed = torch.tensor([counts[token] / DRAWS for token in range(5)])
    torch.testing.assert_close(observed, LOGITS.softmax(0), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest_in_proportion():
    expected = torch.tensor([0.0, *torch.tensor([3.0, 2.5]).softmax(0)])
    torch.testing.assert_close(shares(temperature=1.0, top_k=2)[[0, 1, 4]], expected, atol=0.03, rtol=0)
    assert shares(temperature=1.0, top_k=2, draws=500)[[0, 2, 3]].sum() == 0


def test_top_k_beyond_the_vocabulary_keeps_everything():
    params = dict(temperature=1.0, seed=3)
    assert sample(LOGITS, SamplingParams(top_k=99, **params), 0) == sample(LOGITS, SamplingParams(**params), 0)


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    """Probabilities 0.47, 0.28, 0.17, ...: 0.7 needs the first two, 0.8 the first three, 0.01 the first alone."""
    drawn = lambda top_p: set(shares(temperature=1.0, top_p=top_p, draws=500).nonzero().flatten().tolist())
    assert drawn(0.01) == {1} and drawn(0.7) == {1, 4} and drawn(0.8) == {1, 2, 4} and drawn(1.0) >= {0, 1, 2, 4}


def test_top_p_looks_at_what_top_k_left():
    params = dict(temperature=1.0, top_k=2, top_p=0.6)  # of two tokens with 0.62 and 0.38, the first reaches 0.6
    assert shares(draws=300, **params)[1] == 1.0


def test_the_same_seed_and_position_draw_the_same_and_others_differ():
    flat = torch.zeros(1000)
    draw = lambda seed, position: sample(flat, SamplingParams(temperature=1.0, seed=seed), position)
    assert draw(1, 0) == draw(1, 0)
    assert len({draw(1, position) for position in range(50)}) > 40
    assert len({draw(seed, 0) for seed in range(50)}) > 40
    assert draw(1, 11) != draw(11, 1)


def test_the_draw_hardly_moves_with_the_logits():
    """Two nodes' logits differ in their last digits: the draw must not depend on those, as a running sum would."""
    torch.manual_seed(0)
    logits = torch.randn(1000)
    nearly = logits + 1e-6 * torch.randn(1000)
    for seed in range(50):
        params = SamplingParams(temperature=1.0, seed=seed)
        assert sample(logits, params, 0) == sample(nearly, params, 0)


def test_sampling_leaves_torchs_own_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample(LOGITS, SamplingParams(temperature=1.0), 0)
    assert torch.equal(torch.rand(1), expected)


def test_half_precision_logits_are_sampled_in_float32():
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=2)
    assert sample(LOGITS.bfloat16(), params, 0) == sample(LOGITS, params, 0)


@pytest.mark.parametrize("name, value", [
    ("max_tokens", 0), ("max_tokens", -3), ("max_tokens", 2.5), ("max_tokens", "9"), ("max_tokens", True),
    ("temperature", -0.1), ("temperature", 101), ("temperature", float("nan")), ("temperature", float("inf")),
    ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
    ("seed", 2**63), ("seed", "x"), ("stop", ("",)), ("stop", (3,)), ("ignore_eos", "yes")])
def test_a_value_out_of_range_is_named_with_its_limit(name, value):
    with pytest.raises(UserError, match=f"^{name} is .*; it must be ") as caught:
        SamplingParams(**{name: value})
    assert repr(value) in str(caught.value)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="END").stop == ("END",) and SamplingParams(stop=["a", "b"]).stop == ("a", "b")
