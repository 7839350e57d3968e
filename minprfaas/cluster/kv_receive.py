"""KVCache on its way in: one expected stream, written into the blocks reserved for it. Chapter 08; paper 3.3."""

from collections.abc import Sequence

import torch

from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.kvcache.pool_copies import WholeBlocks
from minprfaas.transport.base import KVTransport, StreamPlan
from minprfaas.transport.events import ArrivalReport
from minprfaas.transport.encoding import codecs

# Nothing arrives though its prefill is done: a thread stands still with a piece, here or there, or a slow line has too
# many other streams to carry. (A link that is away for so long is lost, unless its timeout is longer.)
STALL_S = 60.0


class KVReceive:
    """The receiving half of one stream. `tables` are block tables per group; the blocks must stay reserved until the
    stream has ended or `give_up` has returned.

    Raises LinkDown, and ValueError when the plan's stream id is expected already.
    """

    def __init__(self, kvcache: KVCacheManager, transport: KVTransport, plan: StreamPlan, tables: Sequence):
        self.plan = plan
        self.received_bytes = 0
        self.report: ArrivalReport | None = None  # once every byte of the plan is in its block
        self._pool, self._blocks = kvcache.pool, WholeBlocks(kvcache.pool, tables)
        self._transport = transport
        self._codecs = codecs(kvcache.layout.specs, plan)
        self._written: torch.cuda.Event | None = None
        if self._pool.device.type == "cuda":
            self._beside_model = torch.cuda.Stream(self._pool.device, priority=-1)
            self._reserved = torch.cuda.current_stream(self._pool.device).record_event()  # and zeroed
        transport.expect(plan, self._write, self._pool.device)

    @property
    def is_exact(self) -> bool:
        """Whether what is written is to the last bit what the sender read."""
        return all(codec.is_exact for codec in self._codecs.values())

    def _write(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """The sink: runs on the transport's thread while the model computes on other blocks."""
        if self._pool.device.type == "cuda":
            self._write_beside_model(layer, start, end, data)
        else:
            self._write_into_blocks(layer, start, end, data)
        self.received_bytes += data.numel()

    def _write_beside_model(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        """On the model's CUDA stream each copy would wait for the decode step that runs, so that KVCache would arrive
        no faster than a few pieces a step. What lies on a GPU comes in a stream of its transport's."""
        is_on_host = not data.is_cuda
        with torch.cuda.stream(self._beside_model if is_on_host else None):
            stream = torch.cuda.current_stream(self._pool.device)
            stream.wait_event(self._reserved)
            self._write_into_blocks(layer, start, end, data)
            self._written = stream.record_event()
        if is_on_host:
            self._written.synchronize()  # the transport fills this memory anew

    def _write_into_blocks(self, layer: int, start: int, end: int, data: torch.Tensor) -> None:
        codec = self._codecs.get(layer)
        rows = data if codec is None else codec.decode(data.to(self._pool.device))
        self._blocks.write(layer, start, end, rows)

    @property
    def has_arrived(self) -> bool:
        """Whether every byte of the plan is in its block."""
        return self.report is not None

    def arrived(self, report: ArrivalReport) -> None:
        """Every byte of the plan is in its block, for whatever the model's thread computes from here on."""
        if self._written is not None:
            torch.cuda.current_stream(self._pool.device).wait_event(self._written)
        self.received_bytes, self.report = report.bytes, report

    def give_up(self) -> int | None:
        """No byte is written after this. Returns the token up to which all rows are there; None if the stream had ended
        before."""
        return self._transport.forget(self.plan.stream_id)
