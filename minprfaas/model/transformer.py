"""The transformer: a stack of layers, each a mixer plus an MLP, laid out by `ModelConfig`. Chapter 01.

Modules carry the names of Hugging Face checkpoints, so a tensor's name says where it lives.
"""

import torch
from torch import Tensor, nn

from minprfaas.config import LayerConfig, ModelConfig
from minprfaas.model.layers import Positions, RMSNorm, join
from minprfaas.model.spec import ModelState, OnLayer


class Layer(nn.Module):
    """One layer's parts. The stack calls them, because a layer's KVCache is shipped between its mixer and its MLP."""

    PIECES = ("feed", "pass_on", "input_layernorm")  # what `engine/pieces.py` may compile

    def __init__(self, layer: LayerConfig, config: ModelConfig):
        super().__init__()
        self.self_attn = layer.mixer.build(config.hidden_size, config.norm_eps)
        self.mlp = layer.mlp.build(config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.config = layer

    def feed(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        """What follows the mixer, which made `mixed` of `normed`: both residual sums, and the MLP between them."""
        x = join(x, normed, mixed, self.config.mixer_residual)
        normed = self.post_attention_layernorm(x)
        return join(x, normed, self.mlp(normed), self.config.mlp_residual)

    def pass_on(self, x: Tensor, normed: Tensor, mixed: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """`feed`, and the `norm` of it that comes next: in one piece, and so by one kernel."""
        x = Layer.feed(self, x, normed, mixed)
        return x, RMSNorm.forward(norm, x)


class Stack(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(layer, config) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, token_ids: Tensor, state: ModelState | None, on_layer: OnLayer | None,
                last_only: bool) -> Tensor:
        """The last hidden states `[batch, new, hidden]`; see `Transformer.forward`."""
        start = token_ids.new_zeros(token_ids.shape[0]) if state is None else state.start
        positions = Positions(start, token_ids.shape[1], None if state is None else state.new)
        norms = [layer.input_layernorm for layer in self.layers] + [self.norm]
        x = self.embed_tokens(token_ids)
        normed = norms[0](x)
        for index, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layer(index)
            positions.only_last = last_only and index == len(self.layers) - 1  # no later layer mixes the others in
            mixed = layer.self_attn(normed, positions, layer_state)
            if on_layer is not None:
                on_layer(index)
            if positions.only_last:
                x, normed, mixed = (_last_tokens(of_all, state) for of_all in (x, normed, mixed))
            x, normed = layer.pass_on(x, normed, mixed, norms[index + 1])
        return normed


class Transformer(nn.Module):
    """A causal language model. The loader sets `weights`, a digest of the checkpoint, and `fingerprint`, a digest of
    that and of the number format, in which every block key is rooted."""

    CPU_PIECES = ("lm_head",)  # of a decode step; one on a GPU has it in a piece with the norm before it

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.fingerprint = self.weights = b""
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def forward(self, token_ids: Tensor, state: ModelState | None = None, on_layer: OnLayer | None = None,
                last_only: bool = False) -> Tensor:
        """`token_ids` `[batch, new]` int64 -> logits `[batch, new, vocab]` (`[batch, 1, vocab]` with `last_only`).

        Without `state` the tokens are the whole context. With it, they follow what it holds, and it holds them
        afterwards. `on_layer(i)` is called as soon as layer i's state holds the new tokens.
        """
        return self.lm_head(self.model(token_ids, state, on_layer, last_only))


def _last_tokens(rows: Tensor, state: ModelState | None) -> Tensor:
    """Of `rows` `[batch, new, hidden]` each request's last, `[batch, 1, hidden]`; what comes behind it is padding."""
    if state is None or state.new is None:
        return rows[:, -1:]
    return rows[torch.arange(len(rows), device=rows.device), state.new - 1][:, None]
