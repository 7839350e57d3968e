"""Prefill-as-a-Service in readable PyTorch: prefill in one datacenter, decode in another (arXiv:2604.15039).

`load`, `generate` and `SamplingParams` are all that a first program needs; they are imported when first used, so that
the pure-Python rooms (`scheduling`, `simulator`) start without torch.
"""

import os
import warnings
from importlib import import_module

# What torch's C++ parts log of a lost connection ends up between our lines, 20 frames long; what matters reaches us as
# exceptions. It is read when torch is imported, so it must stand here.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch works without it, and so do we

_HOMES = {
    "load": "minprfaas.model.checkpoint",
    "generate": "minprfaas.engine.reference",
    "SamplingParams": "minprfaas.config",
    "RequestOutput": "minprfaas.engine.reference",
    "UserError": "minprfaas.errors",
    "RequestError": "minprfaas.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'minprfaas' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
