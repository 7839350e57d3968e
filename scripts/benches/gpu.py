"""How fast one GPU runs what is here, beside what the card could do and beside other libraries. Chapters 04, 05.

    python scripts/bench.py gpu                        all cases, the models' pieces compiled
    python scripts/bench.py gpu --cases decode --no-compile

First the card's ceilings: a copy and a matrix product. A decode step's floor is its weights and KVCache, each read once
at the copy's speed; a prefill's is its products at the matrix product's. The models have random weights and real
shapes; the KVCache that a decode step reads is random. Peers that are installed are timed in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benches import gpu_cases
from minprfaas.errors import UserError, exit_on_user_error
from minprfaas.observe.report import table


@dataclass
class Reading:
    """One row: milliseconds of ours, of the floor, and of a peer (None: none is installed)."""

    case: str
    ours_ms: float
    floor_ms: float
    peer: str = "–"
    peer_ms: float | None = None

    @property
    def cells(self) -> list[str]:
        beside = "–" if self.peer_ms is None else f"{self.peer_ms:.2f} ({self.peer_ms / self.ours_ms:.2f}x)"
        return [self.case, f"{self.ours_ms:.2f}", f"{self.floor_ms:.2f}", f"{self.ours_ms / self.floor_ms:.2f}",
                self.peer, beside]


@exit_on_user_error
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/bench.py gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=sorted(gpu_cases.CASES), choices=sorted(gpu_cases.CASES))
    parser.add_argument("--no-compile", action="store_true", help="leave the models' pieces as they are")
    parser.add_argument("--json", metavar="FILE", help="write the readings")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench.py gpu needs CUDA, and there is none here")
    card = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{time.strftime('%Y-%m-%d')}\ncopy {card['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), 8192³ "
          f"bf16 product {card['flops_per_s'] / 1e12:.0f} TFLOP/s\n", flush=True)
    readings = []
    for name in args.cases:
        for reading in gpu_cases.CASES[name](card, not args.no_compile):
            readings.append(Reading(*reading))
            print("  " + "  ".join(readings[-1].cells), flush=True)
        torch.cuda.empty_cache()
    print("\n" + table(["case", "ours ms", "floor ms", "ours / floor", "peer", "peer ms"],
                       [reading.cells for reading in readings]))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as out:
            json.dump({"card": card, "readings": [asdict(reading) for reading in readings]}, out, indent=2)
    return 0


def ceilings() -> dict[str, float]:
    """Bytes (read plus written) and floating-point operations a second."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"copy_bytes_per_s": 2e3 * source.nbytes / median_ms(lambda: target.copy_(source)),
            "flops_per_s": 2e3 * 8192**3 / median_ms(lambda: square @ square)}


def median_ms(work: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds of `work` by device events, warmed up."""
    times = []
    for run in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if run >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)
