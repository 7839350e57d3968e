"""Length distributions: formula and observations alike are equally likely lengths. Chapter 10."""

import random
from math import erf, exp, log, sqrt

import pytest

from minprfaas.errors import UserError
from minprfaas.scheduling.lengths import LengthDistribution, TruncatedLogNormal
from minprfaas.scheduling.paper_case import h200_profile, paper_lengths

MU, SIGMA, LOW, HIGH = 9.9, 1.0, 128, 128 * 1024


def normal_cdf(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2


def mass(low: float, high: float, shift: float = 0.0) -> float:
    return normal_cdf((log(high) - MU) / SIGMA - shift) - normal_cdf((log(low) - MU) / SIGMA - shift)


def mean_above(lengths: LengthDistribution, of, threshold: float) -> float:
    """E[f(L) | L > t], or 0 where no length is above."""
    above = [of(length) for length in lengths.values if length > threshold]
    return sum(above) / max(1, len(above))


def test_the_lognormal_agrees_with_its_closed_forms():
    lengths = paper_lengths()
    for threshold in (500, 5000, 19_400, 60_000, 120_000):
        tail = mass(threshold, HIGH) / mass(LOW, HIGH)
        expected = exp(MU + SIGMA**2 / 2) * mass(threshold, HIGH, SIGMA) / mass(threshold, HIGH)
        assert lengths.tail(threshold) == pytest.approx(tail, abs=2 / 4096)
        assert mean_above(lengths, float, threshold) == pytest.approx(expected, rel=2e-3)
    mean = exp(MU + SIGMA**2 / 2) * mass(LOW, HIGH, SIGMA) / mass(LOW, HIGH)
    assert lengths.mean(float) == pytest.approx(mean, rel=1e-4)


def test_the_papers_lengths_have_the_papers_mean_and_share_above_the_threshold():
    lengths = paper_lengths()
    assert lengths.mean(float) == pytest.approx(27_000, rel=0.03)
    assert lengths.tail(19_400) == pytest.approx(0.496, abs=0.005)


def test_no_length_leaves_the_truncation():
    lengths = TruncatedLogNormal(9.9, 3.0, 1000, 20_000)
    assert 1000 <= lengths.values[0] < 1010 and 19_900 < lengths.values[-1] <= 20_000
    assert lengths.tail(999) == 1 and lengths.tail(20_000) == 0


def test_the_two_sides_of_a_threshold_add_up_to_the_whole():
    lengths, cost = paper_lengths(), h200_profile().prefill_s
    for threshold in (0, 128, 7000, 19_400, 200_000):
        tail = lengths.tail(threshold)
        total = tail * mean_above(lengths, cost, threshold) + (1 - tail) * lengths.mean(cost, threshold)
        assert total == pytest.approx(lengths.mean(cost))
        below = lengths.running_means(cost)[lengths.count_up_to(threshold)]
        assert below == pytest.approx((1 - tail) * lengths.mean(cost, threshold))


def test_observed_lengths_are_counted_strictly_above_the_threshold():
    lengths = LengthDistribution([300, 100, 200, 200])
    assert [lengths.tail(t) for t in (0, 100, 199, 200, 300)] == [1, 0.75, 0.75, 0.25, 0]
    assert mean_above(lengths, float, 150) == pytest.approx(700 / 3) and lengths.mean(float, 150) == 100
    assert mean_above(lengths, float, 300) == 0 and lengths.mean(float, 99) == 0
    assert [lengths.quantile(q) for q in (0, 0.25, 0.5, 0.99, 1)] == [100, 200, 200, 300, 300]


def test_observations_of_a_formula_come_back_to_it():
    formula, rng = paper_lengths(), random.Random(5)
    observed = LengthDistribution(formula.quantile(rng.random()) for _ in range(20_000))
    assert observed.mean(float) == pytest.approx(formula.mean(float), rel=0.03)
    assert observed.tail(19_400) == pytest.approx(formula.tail(19_400), abs=0.015)


@pytest.mark.parametrize("build, named", [
    (lambda: LengthDistribution([]), "empty"),
    (lambda: LengthDistribution([100, -5]), "-5"),
    (lambda: LengthDistribution([100, float("inf")]), "inf"),
    (lambda: LengthDistribution(["100"]), "'100'"),
    (lambda: TruncatedLogNormal(9.9, 0, 128, 1000), "sigma is 0"),
    (lambda: TruncatedLogNormal(9.9, 1, -1, 1000), "-1"),
    (lambda: TruncatedLogNormal(9.9, 1, 1000, 128), "longest request is 128"),
    (lambda: TruncatedLogNormal(-9.9, 9, 128, 1000), "mu is -9.9"),
    (lambda: TruncatedLogNormal(2.0, 0.1, 10_000, 20_000), "no mass"),
])
def test_bad_lengths_are_refused_by_name(build, named):
    with pytest.raises(UserError) as refusal:
        build()
    assert named in str(refusal.value) and "\n" not in str(refusal.value)
