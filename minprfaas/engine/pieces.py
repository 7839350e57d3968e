"""Optional compilation: each module names its pieces, which are tensors in and tensors out. Chapters 04 and 15.

What lies between the pieces (pages, snapshots, attention kernels) stays as it is written, so that nothing has to be
traced which depends on a request, and a piece is compiled once for all layers that are alike.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

# One new token makes a product a reduction over one weight, which a generated kernel reads at the speed of a copy; the
# option that lets it do so also tunes the kernels.
OPTIONS = {"coordinate_descent_tuning": True}


@cache
def compiled(function: Callable, tune: bool) -> Callable:
    """`function` compiled; shapes that vary become symbolic as soon as a second one is seen."""
    return torch.compile(function, options=OPTIONS if tune else None)


def compile_pieces(model: torch.nn.Module) -> None:
    """Put the compiled form of every piece in its place, in this model only. Harmless when repeated."""
    torch._dynamo.config.recompile_limit = 64  # a piece meets as many shapes as there are kinds of layer and phases
    tune = next(model.parameters()).is_cuda
    for module in list(model.modules()):
        for name in getattr(type(module), "PIECES", ()) + (getattr(type(module), "GPU_PIECES", ()) if tune else ()):
            if isinstance(part := getattr(module, name), torch.nn.Module):
                part.compile(options=OPTIONS if tune else None)
            else:
                setattr(module, name, partial(compiled(getattr(type(module), name), tune), module))


def compiled_like(module: torch.nn.Module, function: Callable) -> Callable:
    """`function` compiled, if the pieces of `module` are."""
    if any(name in vars(module) for name in module.PIECES):
        return compiled(function, next(module.parameters()).is_cuda)
    return function
