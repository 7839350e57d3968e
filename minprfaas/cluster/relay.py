"""Relay decode: the PrfaaS node draws the first tokens while the KVCache still crosses.

Chapters 13 and 15; not in the paper.

Here are both roles as they are with `--relay`. The prefill node answers the request for itself, as any engine would:
its prompt is in its own cache, all but the last block. What it draws goes to the decode node, which hands it on to the
client. Only the decode node decides when it takes over, and every token of the client comes through it, in order: none
is there twice, and none is missing. Rows of relayed tokens do not cross; the decode node computes them again, in a few
passes. Meanwhile the prefill node goes on relaying, so that the client does not wait for those passes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from minprfaas.cluster import messages
from minprfaas.cluster.decode_role import DecodeRole, Serving
from minprfaas.cluster.node import Happening, PeerLost
from minprfaas.cluster.prefill_role import Prefill, PrefillRole
from minprfaas.engine.request import Request, Status, TokenUpdate
from minprfaas.engine.scheduler import PrefillChunk

SHORT_PASS = 8  # tokens: a pass over no more takes about as long as a step, so that it may be the last
MOST_PASSES = 4  # after these the decode node takes over, even if tokens come faster than it computes their rows


class RelayingPrefillRole(PrefillRole):
    """Goes on decoding what it has prefilled until the decode node takes over. Nobody depends on that: where the pool
    has no room, it stops."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._relays: dict[Request, Prefill] = {}  # requests of this node's own, for those of others

    def step(self) -> None:
        """See `PrefillRole.step`; then the relayed tokens leave."""
        for request, prefill in list(self._relays.items()):
            # First: to make room for one, the engine would preempt a prompt.
            has_room = self._kvcache.reserve(request.cache, len(request.token_ids) + 1)
            if not has_room or self._clock() > prefill.deadline_at_s:
                self._end_relay(request)
        super().step()
        for update in self.drawn:
            prefill, request = self._relays.get(update.request), update.request
            if prefill is None:
                continue
            if update.finish_reason is not None:
                self._end_relay(request)
            if request.length_limit != "pool":  # else it is this node that can hold no more; the other one goes on
                self._tell(prefill, messages.TokenDrawn(prefill.order.id, update.token_id, update.new_text,
                                                        update.finish_reason or "", request.length_limit or ""))

    def hear(self, sender: str, message: messages.Message) -> None:
        super().hear(sender, message)
        if isinstance(message, messages.RelayOver | messages.Abort):
            self._end_relays(lambda prefill: (prefill.order.id, prefill.decode_node) == (message.id, sender))

    def notice(self, happening: Happening) -> None:
        super().notice(happening)
        if isinstance(happening, PeerLost):
            self._end_relays(lambda prefill: prefill.decode_node == happening.name)

    def _ship(self, request: Request, layer: int, start: int, end: int) -> None:
        if request not in self._relays:
            super()._ship(request, layer, start, end)

    def _prefilled(self, prefill: Prefill) -> None:
        super()._prefilled(prefill)
        order, size = prefill.order, self.engine.layout.block_tokens
        if self._mail.is_here(prefill.decode_node):  # where nothing has to cross
            return
        request = Request(order.id, list(order.token_ids), prefill.request.params,
                          answered_tokens=order.answered_tokens, keys=prefill.request.keys)
        if not self.engine.scheduler.open_cache(request):
            return
        lacking = len(order.token_ids) - request.cache.cached_tokens
        if lacking > size or not self._kvcache.reserve(request.cache, len(order.token_ids) + 1):
            return self.engine.scheduler.close_cache(request)  # its prefix is not here any more, or there is no room
        self._relays[request] = prefill
        request.status = Status.PREFILL
        self.engine.prefilling.appendleft(request)  # a block at most, before the next chunk of a prompt

    def _drop(self, prefill: Prefill) -> None:
        super()._drop(prefill)
        self._end_relays(lambda other: other is prefill)

    def _end_relays(self, of: Callable[[Prefill], bool]) -> None:
        for request in [request for request, prefill in self._relays.items() if of(prefill)]:
            self._end_relay(request)

    def _end_relay(self, request: Request) -> None:
        del self._relays[request]
        self.engine.abort(request)


class RelayedDecodeRole(DecodeRole):
    """Hands relayed tokens on until the KVCache is here, and computes their rows then. All but the last of them are
    part of the request's tokens; the last is `done.first_token`, with which decoding will begin here."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._relayed: dict[Request, Serving] = {}  # of which at least one token was handed on
        self._passes: Counter[Request] = Counter()  # over relayed tokens

    @property
    def is_ready(self) -> bool:
        return super().is_ready or any(serving.kv.has_arrived for serving in self._relayed.values())

    def hear(self, sender: str, message: messages.Message) -> None:
        """See `DecodeRole.hear`. A token that comes after this node has taken over is one that it draws itself."""
        if not isinstance(message, messages.TokenDrawn):
            return super().hear(sender, message)
        serving = self.servings.get(message.id)
        if serving is not None and serving.done is not None and serving.kv is not None \
                and serving.serve.prefill_node == sender:
            self._hand_on(serving, message)

    def notice(self, happening: Happening) -> None:
        """See `DecodeRole.notice`. Of what is here to its last byte nothing is lost with the node that sent it."""
        if isinstance(happening, PeerLost):
            for serving in list(self._relayed.values()):
                while serving.request in self._relayed and serving.kv.has_arrived and not serving.ready_at_s:
                    self._catch_up(serving)
        super().notice(happening)

    def step(self) -> None:
        """See `DecodeRole.step`; first it catches up with what was relayed."""
        for serving in list(self._relayed.values()):
            if serving.kv.has_arrived:
                self._catch_up(serving)
        super().step()

    def _hand_on(self, serving: Serving, drawn: messages.TokenDrawn) -> None:
        request, done = serving.request, serving.done
        if not 0 <= drawn.token_id < self.engine.model.config.vocab_size:
            return self._lose_prefill(serving, f"relayed token {drawn.token_id} is outside the vocabulary")
        if request in self._relayed:
            request.token_ids.append(done.first_token)
        else:
            # The front end takes the time until the first token from the first of these, and adds up their bytes.
            self._relayed[request] = serving
            self._tell_started(serving, 0, self._clock())
        serving.done = replace(done, first_token=drawn.token_id)
        if not drawn.finish_reason and len(request.token_ids) + 1 >= self._kvcache.max_tokens:
            drawn = replace(drawn, finish_reason="length", length_limit="pool")  # this node could not go on
        if drawn.finish_reason:  # before the KVCache came, which nobody needs now
            kv_bytes = serving.kv.received_bytes + self._snapshots.received_bytes(request)
            self._tell_started(serving, kv_bytes, self._clock())
        self._tell(drawn)
        if drawn.finish_reason:
            self._forget(serving)

    def _admit_if_complete(self, serving: Serving) -> None:
        if serving.request not in self._relayed:
            super()._admit_if_complete(serving)

    def _catch_up(self, serving: Serving) -> None:
        """One pass over relayed tokens that have no rows here. With none left, or after a short pass, this node takes
        over: what was relayed meanwhile it draws itself."""
        request, cache, plan = serving.request, serving.request.cache, serving.kv.plan
        known = len(request.token_ids)
        if cache.num_tokens < plan.end:
            self._kvcache.advance(cache, request.token_ids[:plan.end])
        if cache.num_tokens == known:
            super()._admit_if_complete(serving)
        elif not self._kvcache.reserve(cache, known + 1):
            self._lose_prefill(serving, "no room in the KVCache pool for what was relayed", plan.end)
        else:
            start = cache.num_tokens
            end = min(known, start + self.engine.scheduler.prefill_chunk)
            self.engine.runner.prefill([PrefillChunk(request, start, end)], None)
            self._passes[request] += 1
            if end == known and (end - start <= SHORT_PASS or self._passes[request] >= MOST_PASSES):
                super()._admit_if_complete(serving)

    def _tell_token(self, update: TokenUpdate) -> None:
        serving = self._relayed.pop(update.request, None)
        if serving is None:
            return super()._tell_token(update)
        del self._passes[update.request]  # it takes over with the last token that was relayed, which is told
        self._mail.send(self.name, serving.serve.prefill_node, messages.RelayOver(update.request.id))

    def _forget(self, serving: Serving, arrived_end: int = 0) -> None:
        self._relayed.pop(serving.request, None)
        del self._passes[serving.request]  # of a Counter: harmless where there is none
        super()._forget(serving, arrived_end)
