"""Every tensor of the engine: the forward pass of a prefill chunk or of a decode batch, and the draw. Chapter 04.

This is the eager path, the reference; the faster one of `fast_runner.py` takes its place behind the same two methods
and is held against it.
"""

import struct
from collections.abc import Callable

import torch

from minprfaas.engine.request import KVListener, Request
from minprfaas.engine.sampling import sample, sample_batch
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.spec import ModelState, OnLayer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.timeline import Timeline


class Runner:
    """Runs one model over the blocks of one pool. `clock` and `timeline` are the engine's."""

    def __init__(self, model: Transformer, kvcache: KVCacheManager, clock: Callable[[], float],
                 timeline: Timeline | None):
        self.model, self.kvcache, self.clock, self.timeline = model, kvcache, clock, timeline

    @torch.inference_mode()
    def prefill(self, chunks: list[PrefillChunk], on_kv: KVListener | None) -> list[int | None]:
        """Compute chunks of as many requests; for each the token drawn after it if it completes the prompt, else None.
        `on_kv` is called between the layers of the pass, so what it does delays the pass."""
        logits = self._forward(chunks, self._layer_listener(chunks, on_kv))[:, -1]
        for chunk in chunks:
            self.kvcache.advance(chunk.request.cache, chunk.request.token_ids[:chunk.end])
        return [sample(row, chunk.request.params, len(chunk.request.output_ids))
                if chunk.end == len(chunk.request.token_ids) else None for chunk, row in zip(chunks, logits)]

    def _forward(self, chunks: list[PrefillChunk], on_layer: OnLayer | None, width: int = 0) -> torch.Tensor:
        """The logits of each chunk's last token, `[batch, 1, vocab]`, of a pass of `width` tokens, padding included (0:
        as many as the longest has)."""
        rows = [chunk.request.token_ids[chunk.start:chunk.end] for chunk in chunks]
        new = [len(row) for row in rows]
        width = width or max(new)
        # Of 8,192 numbers in a list a tensor is made ten times as slowly as of packed ones.
        numbers = bytearray().join(struct.pack(f"{width}q", *row, *bytes(width - len(row))) for row in rows)
        token_ids = torch.frombuffer(numbers, dtype=torch.int64).view(len(rows), -1)
        token_ids = token_ids.to(self.model.device, non_blocking=True)
        state = self.kvcache.state([chunk.request.cache for chunk in chunks], new, width)
        return self.model(token_ids, state, on_layer, last_only=True)

    @torch.inference_mode()
    def decode(self, batch: list[Request]) -> list[int]:
        """One forward pass over the last token of every request; the next token of each."""
        began_at_s = self.clock()
        last_tokens = torch.tensor([[request.token_ids[-1]] for request in batch], device=self.model.device)
        logits = self.model(last_tokens, self._decode_state(batch))[:, -1]
        tokens = self._finish_step(batch, logits, logits.argmax(dim=-1))
        if self.timeline is not None:
            self.timeline.span("decode", f"step of {len(batch)}", began_at_s, self.clock())
        return tokens

    def _decode_state(self, batch: list[Request]) -> ModelState:
        """What the model reads and writes in a decode step."""
        return self.kvcache.state([request.cache for request in batch])

    def _finish_step(self, batch: list[Request], logits: torch.Tensor, greedy: torch.Tensor) -> list[int]:
        """Keep the books while the device still computes, then wait for the tokens."""
        for request in batch:
            self.kvcache.advance(request.cache, request.token_ids)
        return sample_batch(logits, greedy, [(request.params, len(request.output_ids)) for request in batch])

    def _layer_listener(self, chunks: list[PrefillChunk], on_kv: KVListener | None) -> OnLayer | None:
        """What happens when a layer's state holds the chunks: marks on the timeline, and word to `on_kv`."""
        if self.timeline is None and on_kv is None:
            return None
        began_at_s = self.clock()

        def on_layer(layer: int) -> None:
            nonlocal began_at_s
            ended_at_s = self.clock()
            for chunk in chunks:
                if self.timeline is not None:
                    self.timeline.span("prefill", f"layer {layer}", began_at_s, ended_at_s, request=chunk.request.id,
                                       tokens=f"{chunk.start}-{chunk.end}")
                if on_kv is not None:
                    on_kv(chunk.request, layer, chunk.start, chunk.end)
            began_at_s = self.clock()  # a span is the layer's own time, without the listener's

        return on_layer
