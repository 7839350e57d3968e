"""The simplest state there is: whole tensors that grow. The reference that the paged KVCache is held against. Chapter 01."""

import torch
from torch import Tensor

from minprfaas.config import ModelConfig, StateKind
from minprfaas.model.spec import StateSpec, model_state_specs


class ContiguousLayerState:
    """One layer's state in tensors of its own (see `LayerState`)."""

    def __init__(self, spec: StateSpec, batch: int, device: torch.device):
        shapes = [(batch, 0, *tensor.shape) if spec.kind is StateKind.TOKEN else (batch, *tensor.shape) for tensor in spec.tensors]
        self.tensors = tuple(torch.zeros(shape, dtype=tensor.torch_dtype, device=device)
                             for shape, tensor in zip(shapes, spec.tensors))

    def append(self, rows: Tensor) -> Tensor:
        self.tensors = (torch.cat([self.tensors[0], rows], dim=1),)
        return self.tensors[0]

    def load(self) -> tuple[Tensor, ...]:
        return self.tensors

    def store(self, *tensors: Tensor) -> None:
        self.tensors = tensors


class ContiguousState:
    """The state of `batch` requests of one length (see `ModelState`); call `advance` after each forward pass."""

    def __init__(self, config: ModelConfig, dtype: str, batch: int = 1, device: str | torch.device = "cpu"):
        self.layers = [ContiguousLayerState(spec, batch, device) for spec in model_state_specs(config, dtype)]
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)

    def layer(self, index: int) -> ContiguousLayerState:
        """The state of layer `index`."""
        return self.layers[index]

    def advance(self, new_tokens: int) -> None:
        """Count the tokens that the last forward pass added."""
        self.start = self.start + new_tokens
