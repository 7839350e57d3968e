"""Chunked prefill and continuous-batching decode of many requests in one process. Chapters 04 and 05; paper 2.1.

A step prefills one chunk of the oldest admitted prompt and decodes one token of every running request. When the pool
has no room, new requests queue; when a running one needs a block, the youngest is preempted: its blocks are freed and
it is prefilled again later, with the tokens that it had already drawn as part of its prompt.
"""

import time
from collections import deque
from collections.abc import Callable

import torch

from minprfaas.config import CacheConfig
from minprfaas.engine.request import Request, Status, TokenUpdate
from minprfaas.engine.sampling import SamplingParams, sample
from minprfaas.engine.text import StreamedText
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.spec import OnLayer, model_state_specs
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.timeline import Timeline


class Engine:
    """One model and its KVCache pool. `add` requests, then `step` until `has_work` is false."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, cache: CacheConfig, prefill_chunk: int = 1024,
                 max_batch: int = 64, clock: Callable[[], float] = time.monotonic, timeline: Timeline | None = None):
        if prefill_chunk < 1:
            raise UserError(f"prefill chunk of {prefill_chunk} tokens is out of range; it must be at least 1")
        self.model, self.tokenizer, self.clock, self.timeline = model, tokenizer, clock, timeline
        self.prefill_chunk, self.max_batch = prefill_chunk, max_batch
        self.layout = plan_layout(model_state_specs(model.config, str(model.dtype).removeprefix("torch.")), cache.block_tokens)
        self.kvcache = KVCacheManager(self.layout, cache, model.device, root=model.fingerprint)
        self.max_tokens = min(model.config.max_context_tokens, self.kvcache.max_tokens)
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self._no_room = False  # whether the oldest waiting request did not fit the last time
        self._texts: dict[Request, StreamedText] = {}

    # What callers use

    def add(self, request: Request) -> Request:
        """Queue a request. UserError when its prompt can never fit."""
        self.check_fits(request)
        request.arrived_s = request.arrived_s or self.clock()
        self.waiting.append(request)
        return request

    def request(self, id: str, prompt: str | list[int], params: SamplingParams, **options) -> Request:
        """Make a request out of text or token ids (not queued yet)."""
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Request(id, token_ids, params, **options)

    def check_fits(self, request: Request) -> None:
        """UserError with both numbers when the prompt is longer than the context or than the whole pool."""
        if not request.token_ids:
            raise UserError(f"request {request.id!r} has an empty prompt; it needs at least 1 token")
        needed, context = request.prompt_tokens + 1, self.model.config.max_context_tokens
        if needed > context:
            raise UserError(f"request {request.id!r} has {request.prompt_tokens} prompt tokens; "
                            f"the model's context holds {context}, one of them for the answer")
        if needed > self.max_tokens:
            raise UserError(f"request {request.id!r} has {request.prompt_tokens} prompt tokens; the KVCache pool "
                            f"holds {self.max_tokens} tokens of one request, one of them for the answer")
        bad = next((token for token in request.token_ids if not 0 <= token < self.model.config.vocab_size), None)
        if bad is not None:
            raise UserError(f"request {request.id!r} has token id {bad}; the vocabulary holds {self.model.config.vocab_size}")

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything (requests that another node prefills do not count)."""
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def is_ready(self) -> bool:
        """Whether the next step will compute something; false while everything waits for room in the pool."""
        return bool(self.prefilling or self.running or (self.waiting and not self._no_room))

    def step(self) -> list[TokenUpdate]:
        """One prefill chunk and one decode step; returns the tokens that they drew."""
        with torch.inference_mode():
            return self._prefill_step() + self._decode_step()

    def abort(self, request: Request) -> None:
        """Forget a request wherever it stands, and free what it holds. Harmless for one that has ended."""
        if request.status is Status.FINISHED:
            return
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)
        self._finish(request, "aborted")

    # Prefill on one node, decode on another

    def release(self, request: Request) -> None:
        """A `prefill_only` request's KVCache has been transferred: let go of it."""
        self._close_cache(request)
        request.status = Status.FINISHED

    def reserve_remote(self, request: Request) -> bool:
        """Blocks for a prompt that another node will prefill; False (and nothing taken) when there is no room now."""
        self.check_fits(request)
        request.cache = self.kvcache.open(request.token_ids)
        if not self.kvcache.reserve(request.cache, len(request.token_ids)):
            self._close_cache(request)
            return False
        request.cached_tokens, request.status = request.cache.cached_tokens, Status.REMOTE
        return True

    def admit_remote(self, request: Request, first_token: int) -> TokenUpdate:
        """The prompt's whole KVCache has arrived in the reserved blocks: decode from its first token on."""
        self.kvcache.advance(request.cache, request.token_ids)
        return self._accept_first_token(request, first_token)

    def prefill_here_instead(self, request: Request) -> None:
        """The other node failed: give the reserved blocks back and queue the prompt here, ahead of the others."""
        self._close_cache(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)

    # Prefill

    def _prefill_step(self) -> list[TokenUpdate]:
        self._admit()
        if not self.prefilling:
            return []
        request = self.prefilling[0]
        tokens, cache = request.token_ids, request.cache
        start = cache.num_tokens
        request.prefill_started_s = request.prefill_started_s or self.clock()
        end = self.kvcache.chunk_end(cache, len(tokens), self.prefill_chunk)
        logits = self.model(
            torch.tensor([tokens[start:end]], device=self.model.device), self.kvcache.state([cache]), last_only=True,
            on_layer=self._layer_listener(request, start, end))
        self.kvcache.advance(cache, tokens[:end])
        if end < len(tokens):
            return []
        self.prefilling.popleft()
        request.prefill_ended_s = self.clock()
        first_token = sample(logits[0, -1], request.params, len(tokens) - request.prompt_tokens)
        return [self._accept_first_token(request, first_token)]

    def _layer_listener(self, request: Request, start: int, end: int) -> OnLayer | None:
        """What to do when a layer's state holds a chunk: ship it, and mark it on the timeline (the host's clock)."""
        if self.timeline is None:
            return None if request.on_kv is None else lambda layer: request.on_kv(layer, start, end)
        since_s = time.monotonic()

        def on_layer(layer: int) -> None:
            nonlocal since_s
            now_s = time.monotonic()
            self.timeline.span("prefill", f"layer {layer}", since_s, now_s, request=request.id, tokens=f"{start}-{end}")
            if request.on_kv is not None:
                request.on_kv(layer, start, end)
            since_s = time.monotonic()

        return on_layer

    def _admit(self) -> None:
        """Move waiting requests to prefill, oldest first, while the pool has room for their whole prompts."""
        self._no_room = False
        while self.waiting and len(self.prefilling) + len(self.running) < self.max_batch:
            request = self.waiting[0]
            request.cache = self.kvcache.open(request.token_ids)
            if not self.kvcache.reserve(request.cache, len(request.token_ids)):
                self._close_cache(request)
                self._no_room = True
                return
            self.waiting.popleft()
            if not request.preemptions:
                request.cached_tokens = request.cache.cached_tokens
            request.status = Status.PREFILL
            self.prefilling.append(request)

    # Decode

    def _decode_step(self) -> list[TokenUpdate]:
        batch = self._reserve_next_tokens()
        if not batch:
            return []
        began_s = time.monotonic()
        last_tokens = torch.tensor([[request.token_ids[-1]] for request in batch], device=self.model.device)
        logits = self.model(last_tokens, self.kvcache.state([request.cache for request in batch]))[:, -1]
        greedy = logits.argmax(dim=-1).tolist()
        updates = []
        for row, request in enumerate(batch):
            self.kvcache.advance(request.cache, request.token_ids)
            position = len(request.token_ids) - request.prompt_tokens
            token = greedy[row] if request.params.temperature == 0 else sample(logits[row], request.params, position)
            updates.append(self._accept_token(request, token))
        if self.timeline is not None:
            self.timeline.span("decode", f"step of {len(batch)}", began_s, time.monotonic())
        return updates

    def _reserve_next_tokens(self) -> list[Request]:
        """The running requests, each with room for one more token; the youngest are preempted until that holds."""
        for request in list(self.running):
            while request in self.running and not self.kvcache.reserve(request.cache, len(request.token_ids)):
                self._preempt(self._youngest())
        return list(self.running)

    def _youngest(self) -> Request:
        return self.prefilling[-1] if self.prefilling else self.running[-1]

    def _preempt(self, request: Request) -> None:
        (self.prefilling if request in self.prefilling else self.running).remove(request)
        self._close_cache(request)
        request.preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)

    # Tokens

    def _accept_first_token(self, request: Request, token: int) -> TokenUpdate:
        request.first_token_s = request.first_token_s or self.clock()
        if request.prefill_only:
            request.token_ids.append(token)
            request.status = Status.HELD
            return TokenUpdate(request, token, "")
        self.running.append(request)
        request.status = Status.DECODE
        return self._accept_token(request, token)

    def _accept_token(self, request: Request, token: int) -> TokenUpdate:
        if request not in self._texts:
            self._texts[request] = StreamedText(self.tokenizer, request.params.stop)
        text = self._texts[request]
        request.token_ids.append(token)
        is_eos = token in self.model.config.eos_token_ids and not request.params.ignore_eos
        new_text = "" if is_eos else text.push(token)
        reason = "eos" if is_eos else self._finish_reason(request, text)
        if reason is not None:
            new_text += "" if text.stopped else text.finish()
            self.running.remove(request)
        request.text = text.text
        if reason is not None:
            self._finish(request, reason)
        return TokenUpdate(request, token, new_text)

    def _finish_reason(self, request: Request, text: StreamedText) -> str | None:
        if text.stopped:
            return "stop"
        outputs = len(request.token_ids) - request.prompt_tokens
        if outputs >= request.params.max_tokens or len(request.token_ids) >= self.max_tokens:
            return "length"
        return None

    def _finish(self, request: Request, reason: str) -> None:
        self._texts.pop(request, None)
        self._close_cache(request)
        request.finish_reason, request.finished_s, request.status = reason, self.clock(), Status.FINISHED

    def _close_cache(self, request: Request) -> None:
        if request.cache is not None:
            self.kvcache.close(request.cache)
            request.cache = None
