"""What `bench.py gpu` and `bench.py cpu` say of a case: ours, the floor that the machine sets, and the peers."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from minprfaas.files import write_whole
from minprfaas.model.spec import StateSpec, kv_bytes
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import table

HEADERS = ["case", "ours ms", "floor ms", "ours / floor", "peer", "peer ms", "peer / ours"]


@dataclass
class Reading:
    """One case in milliseconds: ours, the floor, and those peers that could be timed."""

    case: str
    ours_ms: float
    floor_ms: float
    peers_ms: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[list[str]]:
        """A line of the table for each peer; ours stands in the first."""
        ours = [self.case, f"{self.ours_ms:.2f}", f"{self.floor_ms:.2f}", f"{self.ours_ms / self.floor_ms:.2f}"]
        lines = []
        for name, ms in self.peers_ms.items():
            lines.append([*(["", "", "", ""] if lines else ours), name, f"{ms:.2f}", f"{ms / self.ours_ms:.2f}"])
        return lines or [[*ours, "–", "–", "–"]]


@dataclass
class Machine:
    """What a device could do: bytes copied (read and written both counted) and operations of a matrix product."""

    name: str
    copy_bytes_per_s: float
    flops_per_s: float
    torch: str = torch.__version__
    python: str = platform.python_version()
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    def __str__(self) -> str:
        return (f"{self.name}, torch {self.torch}, Python {self.python}, {self.date}\n"
                f"copy {self.copy_bytes_per_s / 1e9:,.1f} GB/s (read and written), matrix product "
                f"{self.flops_per_s / 1e12:,.2f} TFLOP/s\n")

    def decode_floor_ms(self, model: Transformer, specs: tuple[StateSpec, ...], batch: int, context: int) -> float:
        """The weights that a step needs and all KVCache, each read once at the speed of a copy."""
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        if not model.config.tie_embeddings:  # of the embeddings a step reads a few rows
            nbytes -= model.model.embed_tokens.weight.nbytes
        return (nbytes + batch * kv_bytes(specs, context)) / self.copy_bytes_per_s * 1e3

    def prefill_floor_ms(self, model: Transformer, tokens: int) -> float:
        """Products with the weights, and causal attention; what a linear mixer's core needs beside them is left out."""
        weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
        attention = 0
        for layer in model.model.layers:
            config = layer.self_attn.config
            if hasattr(config, "num_kv_heads"):
                attention += 2 * config.num_heads * config.head_dim
            elif hasattr(config, "kv_lora_rank"):
                attention += config.num_heads * (config.qk_nope_dim + config.qk_shared_dim + config.v_dim)
        return (2.0 * weights * tokens + attention * tokens**2) / self.flops_per_s * 1e3


def measure_machine(name: str, device: str) -> Machine:
    """The ceilings: a copy far larger than any cache, and a product of square matrices in the models' number format."""
    elements, width, dtype = (2**30, 8192, torch.bfloat16) if device == "cuda" else (2**26, 2048, torch.float32)
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    square = torch.randn(width, width, device=device, dtype=dtype)
    return Machine(name, 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), device),
                   2e3 * width**3 / median_ms(lambda: square @ square, device))


def median_ms(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Median milliseconds of `work` until the device is done with it, warmed up."""
    times = []
    for _ in range(repeats + 2):
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def settle(device: str) -> None:
    """Wait for what the device was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def print_readings(readings: list[Reading]) -> None:
    """All cases as one table."""
    print("\n" + table(HEADERS, [line for reading in readings for line in reading.rows()]))
    print("  peer / ours: above 1, ours is the faster one")


def write_readings(path: str, machine: Machine, readings: list[Reading]) -> None:
    """The same for a program. Raises UserError."""
    found = [asdict(reading) for reading in readings]
    write_whole(path, json.dumps({"machine": asdict(machine), "readings": found}, indent=2) + "\n")
