"""Scale factors of an emulated run, and how they are undone. Chapters 13 and 15; paper 4.

A small model on a few cores cannot take the paper's lengths at the paper's pace: seconds are stretched, tokens stand
for many, bytes are fewer. What is planned, simulated and run in such units gives real figures once that is undone.
"""

from dataclasses import dataclass

from minprfaas.errors import UserError, require_number, shown
from minprfaas.scheduling.profiles import Profile


@dataclass(frozen=True)
class Scale:
    """A second takes `time` seconds, one token stands for `length`, and a byte becomes `size` bytes."""

    time: float = 1.0
    length: float = 1.0
    size: float = 1.0

    def __post_init__(self) -> None:
        for name in ("time", "length", "size"):
            require_number(f"the scale of {name}", getattr(self, name), above=0, most=1e9)

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
        """The machine in the run's units."""
        return full.scaled(self.time, self.length, self.size)

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
