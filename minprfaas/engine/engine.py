"""Chunked prefill and continuous-batching decode of many requests in one process. Chapters 04 and 05; paper 2.1.

The scheduler says what runs next, the runner runs it, and the engine turns the tokens that come out into answers. A
step prefills one chunk of the oldest admitted prompt, or some short ones together, and decodes one token of every
running request, so a long prompt delays the others' next token by one chunk at most.
"""

import time
from collections.abc import Callable

from minprfaas.config import CacheConfig, SamplingParams
from minprfaas.engine.fast_runner import chunk_for, runner_for, shared_tokens_for
from minprfaas.engine.request import KVListener, Request, Status, TokenUpdate
from minprfaas.engine.scheduler import PrefillChunk, Scheduler
from minprfaas.engine.text import StreamedText
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import Layout, plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.spec import model_state_specs
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer
from minprfaas.observe.timeline import Timeline


def model_layout(model: Transformer, block_tokens: int) -> Layout:
    """How the state of a model, in the number format that it runs in, lies in blocks of so many tokens."""
    return plan_layout(model_state_specs(model.config, str(model.dtype).removeprefix("torch.")), block_tokens)


def token_ids_of(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt that is a text, or is tokens already."""
    return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


class Engine:
    """One model and its KVCache pool. `add` requests, then `step` until `has_work` is false. Moments of requests and
    spans of the timeline are `clock()` seconds."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, cache: CacheConfig, prefill_chunk: int | None = None,
                 max_batch: int = 64, clock: Callable[[], float] = time.monotonic, timeline: Timeline | None = None,
                 fast: bool | None = None):
        self.model, self.tokenizer, self.clock, self.timeline = model, tokenizer, clock, timeline
        self.layout = model_layout(model, cache.block_tokens)
        self.kvcache = KVCacheManager(self.layout, cache, model.device, root=model.fingerprint)
        chunk = chunk_for(model.device, prefill_chunk)
        self.scheduler = Scheduler(self.kvcache, chunk, max_batch, min(chunk, shared_tokens_for(model.device)))
        self.waiting, self.prefilling = self.scheduler.waiting, self.scheduler.prefilling
        self.running = self.scheduler.running
        self.runner = runner_for(model, self.kvcache, clock, timeline, fast, max_batch)
        self.computed_s, self.prefilled_tokens, self.decoded_tokens = 0.0, 0, 0  # so far
        self._texts: dict[Request, StreamedText] = {}

    # What callers use

    def request(self, id: str, prompt: str | list[int], params: SamplingParams, prefill_only: bool = False) -> Request:
        """Make a request out of text or token ids (not queued yet)."""
        return Request(id, token_ids_of(prompt, self.tokenizer), params, prefill_only)

    def add(self, request: Request) -> Request:
        """Queue a request. UserError when its prompt can never fit."""
        self.check_fits(request)
        if request.arrived_at_s is None:  # the front end may have noted it already
            request.arrived_at_s = self.clock()
        self.waiting.append(request)
        return request

    def check_fits(self, request: Request) -> None:
        """UserError when the prompt is longer than the context or than the whole pool, or holds what is no token."""
        self.check_length(request.id, len(request.token_ids))
        vocab_size = self.model.config.vocab_size
        for token in request.token_ids:
            if not 0 <= token < vocab_size:
                raise UserError(f"request {request.id!r} has token id {token}; the vocabulary holds {vocab_size}")

    def check_length(self, id: str, prompt_tokens: int) -> None:
        """UserError with both numbers when a prompt of so many tokens can never be answered."""
        if prompt_tokens == 0:
            raise UserError(f"request {id!r} has an empty prompt; it needs at least 1 token")
        limits = (("model's context", self.model.config.max_context_tokens, ""),
                  ("KVCache pool", self.kvcache.max_tokens, " tokens of one request"))
        for holder, limit, unit in limits:
            if prompt_tokens >= limit:
                raise UserError(f"request {id!r} has {prompt_tokens} prompt tokens; the {holder} "
                                f"holds {limit}{unit}, one of them for the answer")

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything (requests that another node prefills do not count)."""
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def is_ready(self) -> bool:
        """Whether the next step will compute something; false while everything waits for room in the pool."""
        return bool(self.prefilling or self.running or (self.waiting and not self.scheduler.has_no_room))

    def step(self, on_kv: KVListener | None = None) -> list[TokenUpdate]:
        """One prefill pass and one decode step; returns the tokens that they drew. `on_kv` hears between the layers
        of the prefill pass what a layer's state now holds: it can be shipped while the next layer computes."""
        updates, began_at_s = [], self.clock()
        chunks = self.scheduler.next_chunks()
        if chunks:
            self.prefilled_tokens += sum(chunk.end - chunk.start for chunk in chunks)
            updates += self._prefill(chunks, on_kv)
        batch = self.scheduler.next_batch()  # who was prefilled just now is in it: it draws its second token
        if batch:
            for request, token in zip(batch, self.runner.decode(batch)):
                updates.append(self._accept_token(request, token))
        self.decoded_tokens += len(batch)
        self.computed_s += self.clock() - began_at_s
        return updates

    def abort(self, request: Request) -> None:
        """Forget a request wherever it stands, and free what it holds. Harmless for one that has ended."""
        if request.status is not Status.FINISHED:
            self._finish(request, "aborted")

    # Prefill on one node, decode on another

    def release(self, request: Request) -> None:
        """A `prefill_only` request's KVCache has been transferred: let go of it."""
        self.scheduler.close_cache(request)
        request.status = Status.FINISHED

    def reserve_remote(self, request: Request) -> bool:
        """Blocks for a prompt that `check_fits` and another node will prefill; False (and nothing taken) when there is
        no room now. Rows of the first `request.cached_tokens` tokens are here already and need not cross."""
        if not self.scheduler.open_cache(request, to_receive=True):
            return False
        request.cached_tokens, request.status = request.cache.cached_tokens, Status.REMOTE
        return True

    def admit_remote(self, request: Request, first_token: int) -> TokenUpdate:
        """The prompt's whole KVCache has arrived in the reserved blocks: decode from its first token on."""
        self.kvcache.advance(request.cache, request.token_ids)
        return self._accept_first_token(request, first_token)

    # A step

    def _prefill(self, chunks: list[PrefillChunk], on_kv: KVListener | None) -> list[TokenUpdate]:
        """Compute chunks in one pass; the first token of each request whose prompt that completed."""
        for chunk in chunks:
            if chunk.request.prefill_started_at_s is None:
                chunk.request.prefill_started_at_s = self.clock()
        tokens, updates = self.runner.prefill(chunks, on_kv), []
        for request, token in zip((chunk.request for chunk in chunks), tokens):
            if token is not None:
                self.scheduler.remove(request)
                request.prefill_ended_at_s = self.clock()
                updates.append(self._accept_first_token(request, token))
        return updates

    def _accept_first_token(self, request: Request, token: int) -> TokenUpdate:
        if request.first_token_at_s is None:  # not so when a preempted request was prefilled again
            request.first_token_at_s = self.clock()
        if request.prefill_only:
            request.token_ids.append(token)
            request.status = Status.HELD
            return TokenUpdate(request, token, "")
        self.running.append(request)
        request.status = Status.DECODE
        return self._accept_token(request, token)

    def _accept_token(self, request: Request, token: int) -> TokenUpdate:
        """Append a token to the answer, and end it if that was its last."""
        if request not in self._texts:  # here the first one; others may have been drawn before, on a node that was lost
            self._texts[request] = StreamedText(self.tokenizer, request.params.stop, request.output_ids)
        text = self._texts[request]
        request.token_ids.append(token)
        is_eos = token in self.model.config.eos_token_ids and not request.params.ignore_eos
        new_text = "" if is_eos else text.push(token)
        reason = "eos" if is_eos else self._end_of(request, text)
        request.text = text.text
        if reason is not None:
            if not text.stopped:
                new_text += text.finish()
            self._finish(request, reason)
        return TokenUpdate(request, token, new_text, reason)

    def _end_of(self, request: Request, text: StreamedText) -> str | None:
        """Why the answer ends here, if it does; notes which limit it was."""
        if text.stopped:
            return "stop"
        # "pool" comes last: this node could hold no more, but one with a larger pool, or the reference, would go on.
        limits = {"max_tokens": request.prompt_tokens + request.params.max_tokens,
                  "context": self.model.config.max_context_tokens, "pool": self.kvcache.max_tokens}
        for name, limit in limits.items():
            if len(request.token_ids) >= limit:
                request.length_limit = name
                return "length"
        return None

    def _finish(self, request: Request, reason: str) -> None:
        self._texts.pop(request, None)
        self.scheduler.remove(request)
        self.scheduler.close_cache(request)
        request.finish_reason, request.finished_at_s, request.status = reason, self.clock(), Status.FINISHED
