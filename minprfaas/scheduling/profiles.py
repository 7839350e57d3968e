"""What one instance of a kind of hardware does with one model: measured points, and the curves through them.

Chapters 10 and 15; paper 2.1 (S_kv, T_prefill), 3.4.1 (T_decode, BS_max) and table 5.
"""

from bisect import bisect_right
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from operator import attrgetter
from pathlib import Path

from minprfaas.errors import UserError, require_number, shown
from minprfaas.files import read_json
from minprfaas.scheduling.lengths import MAX_TOKENS

# Modelled: the share of a full batch's decode step that a batch of one would take too (weights are read once a step,
# the KVCache once a request). A full batch takes the profile's t_decode_s whatever this is.
STEP_FIXED_SHARE = 0.5
SMALLEST, LARGEST = 1e-12, 1e18  # of a profile's numbers: far beyond every machine's, and nothing overflows
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "profiles"  # measured by others; each says by whom


@dataclass(frozen=True)
class ProfilePoint:
    """One measurement: a request of `tokens` leaves `kv_bytes` of KVCache after `prefill_s` of prefill."""

    tokens: int
    kv_bytes: float
    prefill_s: float


@dataclass(frozen=True)
class Profile:
    """Prefill and decode of one model on one instance; `t_decode_s` is one decode step with `bs_max` requests in the
    batch (T_decode and BS_max). Two curves go through `points`, and continue beyond the first and the last of them:

    - `prefill_s` is the least-squares `c0 + c1 l + c2 l²` without negative coefficients: a fixed cost, the layers that
      are linear in the length, and full attention. Such a curve is positive and increasing wherever it is asked.
    - `kv_bytes` is linear between neighbouring points: state of fixed size plus state that grows with each token.

    `source` says who measured it, where that was not this project. Raises UserError for fewer than two points, for
    numbers that no machine has, and for points that do not increase.
    """

    name: str
    points: tuple[ProfilePoint, ...]
    t_decode_s: float
    bs_max: int
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.source, str):
            raise UserError(f"profile name {self.name!r} or source {self.source!r} is no text; a name has characters")
        require_number(f"profile {self.name!r}: t_decode_s", self.t_decode_s, least=SMALLEST, most=LARGEST)
        require_number(f"profile {self.name!r}: bs_max", self.bs_max, least=1, most=10**6, whole=True)
        if len(self.points) < 2:
            raise UserError(f"profile {self.name!r} has {len(self.points)} point(s); a curve needs at least 2")
        for number, point in enumerate(self.points, start=1):
            for field, value in asdict(point).items():
                most = MAX_TOKENS if field == "tokens" else LARGEST
                require_number(f"profile {self.name!r}, point {number}: {field}", value, least=SMALLEST, most=most)
        for before, after in zip(self.points, self.points[1:]):
            for field in asdict(before):
                if getattr(after, field) <= getattr(before, field):
                    raise UserError(f"profile {self.name!r}: {field} does not increase from {getattr(before, field)} "
                                    f"at {before.tokens} tokens to {getattr(after, field)} at {after.tokens}")

    @staticmethod
    def read(path: str | Path) -> "Profile":
        """Read what `to_json` gives from a file, or a profile that is shipped, by its name. Raises UserError."""
        shipped = {file.stem: file for file in SHIPPED.glob("*.json")}
        hint = f"`python -m minprfaas profile` writes one, and these are shipped: {', '.join(sorted(shipped))}"
        return Profile.from_json(read_json(shipped.get(str(path), Path(path)), hint))

    @staticmethod
    def from_json(raw: dict) -> "Profile":
        """Build from what `to_json` gives. Raises UserError naming an unknown or a missing key."""
        _require_keys("profile", raw, Profile)
        if not isinstance(raw["points"], list):
            raise UserError(f"profile key 'points' holds a {type(raw['points']).__name__}, not a list")
        for number, point in enumerate(raw["points"], start=1):
            _require_keys(f"profile point {number}", point, ProfilePoint)
        return Profile(**{**raw, "points": tuple(ProfilePoint(**point) for point in raw["points"])})

    def to_json(self) -> dict:
        """A JSON object with the fields as keys."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}

    def kv_bytes(self, tokens: float) -> float:
        """KVCache of a request of `tokens` tokens, in bytes: S_kv(l)."""
        # The outer two lines have no outer end.
        right_end = bisect_right(self.points, tokens, 1, len(self.points) - 1, key=attrgetter("tokens"))
        left, right = self.points[right_end - 1], self.points[right_end]
        slope = (right.kv_bytes - left.kv_bytes) / (right.tokens - left.tokens)
        return max(0.0, left.kv_bytes + slope * (tokens - left.tokens))

    def crossing_bytes(self, tokens: float, held: float) -> float:
        """What crosses to a node that holds the rows of the first `held` tokens: the others, and state of one size."""
        return self.kv_bytes(tokens) - self.kv_bytes(held) + self.kv_bytes(0)

    def prefill_s(self, tokens: float) -> float:
        """Prefill of `tokens` uncached tokens, in seconds: T_prefill(l)."""
        c0, c1, c2 = self._prefill_coefficients
        return c0 + (c1 + c2 * tokens) * tokens

    def decode_step_s(self, requests: int) -> float:
        """One decode step with so many requests in the batch, in seconds."""
        return self.t_decode_s * (STEP_FIXED_SHARE + (1 - STEP_FIXED_SHARE) * requests / self.bs_max)

    @cached_property
    def overhead_tokens(self) -> int:
        """What any request costs beside its tokens, in tokens: by it short requests count in a node's load too."""
        first, last = self.points[0], self.points[-1]
        s_per_token = (last.prefill_s - first.prefill_s) / (last.tokens - first.tokens)
        return round(self.prefill_s(0) / s_per_token)

    def encoded(self, share: float) -> "Profile":
        """The same machine behind a wire on which rows of attention state cross in `share` of their bytes. What grows
        with each token is rows; the intercept is state of one size, which crosses exactly. Where the points are no
        line, the least slope between two of them counts as rows, so that no saving is claimed that is not there."""
        pairs = zip(self.points, self.points[1:])
        slope = min((right.kv_bytes - left.kv_bytes) / (right.tokens - left.tokens) for left, right in pairs)
        slope = min(slope, self.points[0].kv_bytes / self.points[0].tokens)
        points = tuple(replace(point, kv_bytes=point.kv_bytes - (1 - share) * slope * point.tokens)
                       for point in self.points)
        return replace(self, points=points)

    @property
    def fit_error(self) -> float:
        """How far the prefill curve passes from the worst of its points, as a fraction of that point."""
        return max(abs(self.prefill_s(point.tokens) / point.prefill_s - 1) for point in self.points)

    @cached_property
    def _prefill_coefficients(self) -> tuple[float, float, float]:
        """Non-negative least squares: of the fits that leave powers out, the best without a negative coefficient."""
        scale = self.points[-1].tokens  # to 1, so that the normal equations stay well conditioned at any length
        lengths = [point.tokens / scale for point in self.points]
        seconds = [point.prefill_s for point in self.points]
        best = (float("inf"), (0.0, 0.0, 0.0))
        for count in range(1, min(3, len(lengths)) + 1):
            for powers in combinations(range(3), count):
                gram = [[sum(x ** (i + j) for x in lengths) for j in powers] for i in powers]
                moments = [sum(y * x ** i for x, y in zip(lengths, seconds)) for i in powers]
                fit = dict(zip(powers, _solve(gram, moments)))
                error = sum((sum(c * x ** i for i, c in fit.items()) - y) ** 2 for x, y in zip(lengths, seconds))
                if min(fit.values()) >= 0:
                    best = min(best, (error, tuple(fit.get(i, 0.0) / scale ** i for i in range(3))))
        return best[1]


@dataclass(frozen=True)
class Scale:
    """The units of an emulated run: a second takes `time` seconds, one token stands for `length`, and a byte becomes
    `size` bytes. A small model on a few cores cannot take the paper's lengths at the paper's pace; what is planned,
    simulated and run in such units gives real figures once they are undone. Raises UserError."""

    time: float = 1.0
    length: float = 1.0
    size: float = 1.0

    def __post_init__(self) -> None:
        for name in ("time", "length", "size"):
            require_number(f"the scale of {name}", getattr(self, name), above=0, most=10**9)

    @staticmethod
    def parse(text: str) -> "Scale":
        """`TIME,LENGTH,BYTES`. UserError when it is anything else."""
        try:
            time, length, size = map(float, text.split(","))
        except ValueError:
            raise UserError(f"--emulate-scale is {shown(text)}; it must be three numbers: TIME,LENGTH,BYTES") from None
        return Scale(time, length, size)

    def __str__(self) -> str:
        return (f"seconds times {self.time:g}, one token for {self.length:g}, bytes times {self.size:.4g}; "
                "undone in every figure")

    # Into the run

    def profile(self, full: Profile) -> Profile:
        """The same machine in the run's units."""
        points = tuple(ProfilePoint(max(1, round(point.tokens / self.length)), point.kv_bytes * self.size,
                                    point.prefill_s * self.time) for point in full.points)
        return replace(full, points=points, t_decode_s=full.t_decode_s * self.length * self.time)

    def run_gbps(self, gbps: float) -> float:
        """The line's bandwidth in the run."""
        return gbps * self.size / self.time

    # Out of it

    def seconds(self, run_s: float) -> float:
        """What a time in the run stands for."""
        return run_s / self.time

    def rate_rps(self, run_rps: float) -> float:
        """What a rate of requests in the run stands for."""
        return run_rps * self.time

    def tokens(self, run_tokens: float) -> float:
        """What a length in the run stands for."""
        return run_tokens * self.length

    def gbps(self, run_gbps: float) -> float:
        """What a bandwidth in the run stands for."""
        return run_gbps / self.size * self.time


def _require_keys(what: str, raw: dict, target: type) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{what} is a {type(raw).__name__}, not a JSON object")
    expected = [field.name for field in fields(target)]
    required = {field.name for field in fields(target) if field.default is MISSING}
    for problem, keys in (("unknown", set(raw) - set(expected)), ("missing", required - set(raw))):
        if keys:
            raise UserError(f"{what}: {problem} key {sorted(keys)[0]!r}; the keys are {', '.join(expected)}")


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss-Jordan elimination of a small positive definite system (no pivoting needed)."""
    rows = [[*row, value] for row, value in zip(matrix, right)]
    for i, pivot_row in enumerate(rows):
        pivot_row[:] = [value / pivot_row[i] for value in pivot_row]
        for j, row in enumerate(rows):
            if j != i:
                row[:] = [value - row[i] * pivot for value, pivot in zip(row, pivot_row)]
    return [row[-1] for row in rows]
