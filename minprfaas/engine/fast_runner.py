"""The runner for a GPU: decode steps, passes of a prefill, and the delta rules of other passes are replayed from
captured graphs. Chapter 05.

The eager `Runner` is what this is held against; the rest of prefill is its own.
"""

from collections.abc import Callable

import torch

from minprfaas.engine.cpu_runner import CPURunner
from minprfaas.engine.decode_graphs import DecodeStep, bucket_of
from minprfaas.engine.decode_state import LiveState
from minprfaas.engine.pass_graphs import CHUNK_TOKENS, PassGraphs
from minprfaas.engine.prefill_graphs import graph_delta_rules
from minprfaas.engine.request import Request
from minprfaas.engine.runner import Runner
from minprfaas.engine.scheduler import PrefillChunk
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.gdn import GDN
from minprfaas.model.gqa import GQA
from minprfaas.model.kda import KDA
from minprfaas.model.layers import MLP, Projecting
from minprfaas.model.lightning import Lightning
from minprfaas.model.mla import MLA
from minprfaas.model.moe import MoE
from minprfaas.model.spec import OnLayer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.timeline import Timeline


def runner_for(model: Transformer, kvcache: KVCacheManager, clock: Callable[[], float], timeline: Timeline | None,
               fast: bool | None, max_batch: int) -> Runner:
    """The fast runner or the eager one; `fast` None takes the quickest for the device that can run every layer."""
    if fast is None and model.device.type == "cpu":
        return CPURunner(model, kvcache, clock, timeline)
    if fast is None:
        fast = not what_must_run_eagerly(model)
    return FastRunner(model, kvcache, clock, timeline, max_batch) if fast else Runner(model, kvcache, clock, timeline)


def chunk_for(device: torch.device, wanted: int | None) -> int:
    """Tokens of a prefill chunk where nothing else is `wanted`. On an H100 chunks of 1,024 take four times as long as
    one of 8,192, whose kernels fill the chip. On a CPU core a 30M hybrid takes for 2,048 tokens in chunks
    of 128 / 256 / 512 / 1,024 / 2,048 1.25 / 1.07 / 1.01 / 1 / 0.98 of the time, a dense model 1.02 / 1 / 1.01 from
    512 on."""
    if wanted is not None:
        return wanted
    return CHUNK_TOKENS if device.type == "cuda" else 1024


def shared_tokens_for(device: torch.device) -> int:
    """Tokens of a prefill pass, padding included, up to which short prompts share one: while weights and calls cost
    more than arithmetic does. One by one, eight prompts of 32 tokens take 2.2 to 2.5 times as long on a CPU, and eight
    of 512 take 5 to 7 times as long on an H100."""
    return 4096 if device.type == "cuda" else 128


def what_must_run_eagerly(model: Transformer) -> set[str]:
    """The kinds of module in the model of which it is not known that a step can be captured (a device's answer that
    the host waits for, a shape that depends on the tokens). A MoE that goes expert by expert is of both kinds."""
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return {type(part).__name__ for part in parts if type(part) not in (GQA, MLA, KDA, GDN, Lightning, MLP, MoE)
            or type(part) is MoE and not part.experts.can_go_at_once}


class FastRunner(Runner):
    """`Runner` with decode steps of fixed shape, one for each bucket that was met so far, and `PassGraphs` on a GPU."""

    def __init__(self, model: Transformer, kvcache: KVCacheManager, clock: Callable[[], float],
                 timeline: Timeline | None, max_batch: int):
        super().__init__(model, kvcache, clock, timeline)
        self.max_batch = max_batch
        if model.device.type == "cuda" and model.dtype != torch.float32:
            # What such a model keeps in float32 (a linear mixer's sums) is multiplied in TF32: its inputs have no more
            # digits than that. A float32 model's products stay exact.
            torch.set_float32_matmul_precision("high")
        of_prefill = None
        if model.device.type == "cuda":
            of_prefill = graph_delta_rules(model)
            for module in model.modules():
                if isinstance(module, Projecting):
                    module.join()
        self._live: LiveState | None = None  # where nothing is decoded it takes no memory
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._passes: PassGraphs | None = None
        if model.device.type == "cuda" and timeline is None:  # which would see graphs launched, not layers
            # Not of the steps' memory: if the only graph of one cannot be captured, it takes no other.
            self._passes = PassGraphs(model, kvcache, of_prefill)

    def _forward(self, chunks: list[PrefillChunk], on_layer: OnLayer | None) -> torch.Tensor:
        """As the eager runner's."""
        if self._passes is None or (room := self._passes.room(chunks)) is None:
            return super()._forward(chunks, on_layer)
        graph = self._passes.of(chunks[0], room)
        return super()._forward(chunks, on_layer, room) if graph is None else graph(chunks[0], on_layer)

    @torch.inference_mode()
    def settle(self) -> None:
        """Bring the blocks of decoding requests up to date, for one who reads them between two steps."""
        if self._live is not None:
            self._live.hold([])

    @torch.inference_mode()
    def decode(self, batch: list[Request]) -> list[int]:
        """As the eager runner's."""
        began_at_s = self.clock()
        bucket = bucket_of(len(batch), max(request.cache.num_blocks for request in batch))
        if self._live is None:
            self._live = LiveState(self.kvcache.pool, bucket_of(self.max_batch, 1)[0])
        if bucket not in self._steps:
            self._live.hold([])
            self._steps[bucket] = DecodeStep(self.model, self.kvcache.pool, self._live, *bucket, self._memory)
        step, rows = self._steps[bucket], self._live.arranged(batch)
        self._live.hold([request.cache for request in rows])
        step.run(rows)
        block_tokens = self.kvcache.layout.block_tokens  # at a block's end the manager copies a state from its blocks
        self._live.settle([row for row, request in enumerate(rows) if len(request.token_ids) % block_tokens == 0])
        drawn = dict(zip(rows, self._finish_step(rows, step.logits[:len(rows)], step.greedy[:len(rows)])))
        if self.timeline is not None:
            self.timeline.span("decode", f"step of {len(batch)}", began_at_s, self.clock())
        return [drawn[request] for request in batch]
