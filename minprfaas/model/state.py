"""The simplest state there is: whole tensors that grow; the paged KVCache is held against it. Chapter 01."""

import torch
from torch import Tensor

from minprfaas.config import ModelConfig, StateKind
from minprfaas.model.spec import Pages, StateSpec, TokenContext, model_state_specs


class ContiguousLayerState:
    """One layer's state (see `LayerState`). Set `snapshot_offsets` before a pass; it leaves `snapshots` by offset."""

    def __init__(self, spec: StateSpec, batch: int, device: torch.device | str):
        self.tensors: tuple[Tensor, ...] = ()
        for tensor in spec.tensors:
            shape = (batch, 0, *tensor.shape) if spec.kind is StateKind.TOKEN else (batch, *tensor.shape)
            self.tensors += (torch.zeros(shape, dtype=tensor.torch_dtype, device=device),)
        self.snapshot_offsets: tuple[int, ...] = ()
        self.snapshots: dict[int, tuple[Tensor, ...]] = {}

    def append(self, rows: Tensor) -> TokenContext:
        """Store `rows` `[batch, new, width]`; returns the whole context, as one block a request."""
        context = torch.cat([self.tensors[0], rows], dim=1)
        self.tensors = (context,)
        block_table = torch.arange(len(context), device=context.device)[:, None]
        lengths = torch.full_like(block_table[:, 0], context.shape[1])
        return TokenContext(Pages(context, block_table, lengths), context.shape[1])

    def load(self) -> tuple[Tensor, ...]:
        """The tensors, each `[batch, *shape]`."""
        return self.tensors

    def store(self, *tensors: Tensor) -> None:
        """Replace the tensors."""
        self.tensors = tensors

    def store_snapshot(self, offset: int, *tensors: Tensor) -> None:
        """Keep a copy: what is handed over may be a view of something much larger."""
        self.snapshots[offset] = tuple(tensor.clone() for tensor in tensors)


class ContiguousState:
    """The state of `batch` requests of one length (see `ModelState`); call `advance` after each forward pass."""

    new = None

    def __init__(self, config: ModelConfig, dtype: str, batch: int = 1, device: str | torch.device = "cpu"):
        self.layers = [ContiguousLayerState(spec, batch, device) for spec in model_state_specs(config, dtype)]
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)

    def layer(self, index: int) -> ContiguousLayerState:
        """The state of layer `index`."""
        return self.layers[index]

    def advance(self, new_tokens: int) -> None:
        """Count the tokens that the last forward pass added."""
        self.start = self.start + new_tokens
