"""Optional compilation: each module names its pieces, which are tensors in and tensors out. Chapters 04 and 15.

What lies between the pieces (pages, snapshots, attention kernels) stays as it is written, so that nothing has to be
traced which depends on a request, and a piece is compiled once for all layers that are alike.
"""

import enum
import os
from collections.abc import Callable, Collection
from functools import cache, partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

# On a GPU one new token makes a product a reduction over one weight, which a generated kernel reads at the speed of a
# copy; the option that lets it do so also tunes the kernels, for a quarter of a second a form. On a CPU a product and a
# sum may be one instruction.
OPTIONS = {"cuda": {"coordinate_descent_tuning": True}, "cpu": {"cpp.enable_floating_point_contract_flag": "fast"}}
# Kernels without a sum that do not wait for each other become one.
OPTIONS["cuda, combined"] = {**OPTIONS["cuda"], "combo_kernels": True, "combo_kernels_pointwise_only": True}
ROWS = 8  # of a decode step on a CPU, whose sums a core's registers hold


class Phase(enum.Enum):
    """What an engine's pieces are compiled for."""

    PREFILL = "prefill"
    DECODE = "decode"


class CompiledPiece:
    """`function` compiled. On a GPU only what has one token a request is tuned: a prefill of 8,192 tokens (H200,
    Qwen3-0.6B's shape) took 28.7 to 28.9 ms without and 28.9 to 29.8 with it.

    In a warm-up the first two extents of what it is given (requests, tokens, pages, a pool's blocks) are symbolic from
    the start: left to itself the compiler makes a graph for the first size that it meets, and another for a second."""

    phase: Phase | None = None  # of a warm-up

    def __init__(self, function: Callable, options: dict):
        self._function, self._tuned = function, torch.compile(function, options=options)
        untuned = {name: value for name, value in options.items() if name != "coordinate_descent_tuning"}
        self._untuned = self._tuned if untuned == options else torch.compile(function, options=untuned)

    def __call__(self, *arguments: object) -> object:
        if torch.compiler.is_compiling():  # a part of another piece
            return self._function(*arguments)
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        has_one_token = tensors[0].dim() > 2 and tensors[0].shape[1] == 1
        run = self._tuned if has_one_token else self._untuned
        if CompiledPiece.phase is Phase.PREFILL and has_one_token:
            run = self._function  # it is a pass's last layer, or a rare prompt
        elif CompiledPiece.phase is not None:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, list(range(min(tensor.dim(), 2))))
        return run(*arguments)


@cache
def compiled(function: Callable, device: str) -> CompiledPiece:
    """`function` as a piece, which all layers share."""
    return CompiledPiece(function, OPTIONS[device])


def compile_pieces(model: torch.nn.Module) -> None:
    """Put the compiled form of every piece in its place, in this model only. Harmless when repeated."""
    torch._dynamo.config.recompile_limit = 64  # a piece meets as many shapes as there are kinds of layer and phases
    device = next(model.parameters()).device.type
    if device == "cuda":
        choose_by_kernels()
    if device == "cpu":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.forward = MethodType(linear_of_a_step, layer)  # of a partial, each layer would have its own graph
    for module in list(model.modules()):
        of_device = getattr(type(module), "GPU_PIECES" if device == "cuda" else "CPU_PIECES", ())
        for name in getattr(type(module), "PIECES", ()) + of_device:
            if isinstance(part := getattr(module, name), torch.nn.Module):
                function = linear_of_a_step if isinstance(part, torch.nn.Linear) else type(part).forward
                part.forward = partial(compiled(function, device), part)
            else:
                setattr(module, name, partial(compiled(getattr(type(module), name), device), module))


def suit_products_to(phases: Collection[Phase], device: torch.device) -> None:
    """To be called before a process's first product on a GPU, and once: a CUDA stream on which products have begun
    without memory fails with it. What a user has set stays.

    With memory to work in, cuBLAS picks kernels that count their tiles there, and most begin with a memset: 840 of them
    in the delta rules of a hybrid's pass, which takes 3 to 4% longer. Without, a small model's decode step of 64
    requests takes 7% longer: so only a process that does nothing but prefill goes without (docs/measurements.md)."""
    if device.type == "cuda" and {*phases} == {Phase.PREFILL}:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")


def choose_by_kernels() -> None:
    """Let the forms of a kernel be compared by its own time. Before each timed launch inductor fills as much memory as
    the L2 cache has, on an H100 50 MB in 20 us: less than the host takes to launch, so that of short kernels the host
    was timed, and which form was chosen was luck. 256 MB keep the GPU busy until the launch is there."""
    from torch._inductor.runtime.benchmarking import benchmarker
    if hasattr(type(benchmarker), "L2_cache_size"):
        benchmarker.L2_cache_size = 2**28


def linear_of_a_step(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, for a compiler and a CPU. No product that PyTorch offers reads the weights of a step of 2 to 8 rows
    `[batch, 1, in]` as fast as memory gives them; a loop that adds up eight products at once takes half as long."""
    batch = x.shape[0]
    if not (torch.compiler.is_compiling() and x.dim() == 3 and x.shape[1] == 1 and 1 < batch <= ROWS
            and x.dtype == torch.float32):
        return F.linear(x, layer.weight, layer.bias)
    rows = F.pad(x[:, 0], (0, 0, 0, ROWS - batch))
    rows = rows.as_strided(rows.shape, rows.stride())  # memory: else each row of weights would compute them anew
    out = torch.stack([(layer.weight * row).sum(dim=-1) for row in rows.unbind()])[:batch, None]
    return out if layer.bias is None else out + layer.bias


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the pieces that the module names are compiled."""
    return any(name in vars(module) for name in module.PIECES)


def compiled_like(module: torch.nn.Module, function: Callable, combine: bool = False) -> Callable:
    """`function` compiled, if the pieces of `module` are; with `combine` a GPU gets fewer kernels."""
    device = next(module.parameters()).device.type
    if not is_compiled(module):
        return function
    return compiled(function, "cuda, combined" if combine and device == "cuda" else device)
