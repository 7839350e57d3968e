"""How long requests are: the (uncached) prompt lengths that a plan is made for. Chapter 10, paper 4.1.

Every distribution is kept as equally likely lengths in rising order: observed ones, or midpoints of equally likely
slices of a formula. So a mean over the longer part is a difference of two running sums, and an exhaustive search cheap.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from math import exp, inf, log
from statistics import NormalDist

from minprfaas.errors import UserError, require_number

MAX_TOKENS = 1_000_000_000  # of a prompt or an answer
SLICES = 4096  # of a formula: an error of about 0.01% in the means of the paper's case


class LengthDistribution:
    """Equally likely lengths in tokens, observed in recent requests or a trace; `values` are in rising order. Raises
    UserError when there are none, or one is no length."""

    def __init__(self, lengths: Iterable[float]):
        self.values = tuple(sorted(lengths))
        if not self.values:
            raise UserError("the list of request lengths is empty; a distribution needs at least 1")
        for length in (self.values[0], self.values[-1]):
            require_number("a request length", length, least=0, most=MAX_TOKENS)

    def count_up_to(self, threshold: float) -> int:
        """How many of `values` are not above `threshold`."""
        return bisect_right(self.values, threshold)

    def tail(self, threshold: float) -> float:
        """P(L > t)."""
        return 1 - self.count_up_to(threshold) / len(self.values)

    def mean(self, of: Callable[[float], float], up_to: float = inf) -> float:
        """E[f(L) | L <= up_to], or 0 where every length is above."""
        values = self.values[:self.count_up_to(up_to)]
        return sum(map(of, values)) / max(1, len(values))

    def running_means(self, of: Callable[[float], float]) -> list[float]:
        """Entry k is the k shortest requests' share of E[f(L)]; the last entry is E[f(L)] itself."""
        return [total / len(self.values) for total in accumulate(map(of, self.values), initial=0.0)]

    def quantile(self, fraction: float) -> float:
        """The length that `fraction` of the requests do not exceed."""
        return self.values[min(int(fraction * len(self.values)), len(self.values) - 1)]


class TruncatedLogNormal(LengthDistribution):
    """`log L` is normal with mean `mu` and deviation `sigma`, given that `low <= L <= high` tokens (paper 4.1)."""

    def __init__(self, mu: float, sigma: float, low: float, high: float):
        require_number("log-normal mu", mu, least=0)
        require_number("log-normal sigma", sigma, above=0)
        require_number("shortest request", low, above=0)
        require_number("longest request", high, above=low, most=MAX_TOKENS)
        normal = NormalDist(mu, sigma)
        first, last = normal.cdf(log(low)), normal.cdf(log(high))
        if last - first < 1e-6:
            raise UserError(f"log-normal mu={mu} sigma={sigma} has no mass between {low} and {high} tokens")
        cuts = (first + (last - first) * (i + 0.5) / SLICES for i in range(SLICES))
        super().__init__(min(max(exp(normal.inv_cdf(cut)), low), high) for cut in cuts)
