"""What the blocks of a request must hold: the state that one process computes for the same tokens, row by row.

A few greedy tokens of a small model can be right although most rows of its KVCache are missing. So whenever a request
lets go of its blocks (it ended, was preempted, given up, or lost), these are compared with a forward pass over its
tokens. Where the rows came from does not matter: prefilled or decoded here, shared, received, or computed again.
"""

import torch

from minprfaas.config import StateKind
from minprfaas.model.state import ContiguousState

# By the model that computes. In bfloat16 either way is up to 0.15 of a row from float32 (the toy hybrid, 12 requests),
# and two that round otherwise are so far from float32 each.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-1}


class KVOracle:
    """Watches KVCache managers. `wrong` has a line for each layer that held something else; `compared` counts the
    requests that were looked at."""

    def __init__(self, model):
        self.model, self.wrong, self.compared = model, [], 0

    def watch(self, kvcache, settle=lambda: None):
        """Compare what each request of this manager holds before its blocks are given back. `settle`: of a runner that
        keeps state elsewhere while it decodes."""
        advance, close, known = kvcache.advance, kvcache.close, {}

        def remember(cache, token_ids, has_state=True):
            advance(cache, token_ids, has_state)
            known[cache] = list(token_ids), has_state

        def compare_and_close(cache):
            token_ids, has_state = known.pop(cache, ((), False))
            settle()
            if token_ids and cache.is_exact:  # else its rows were rounded on the wire
                self.compare(kvcache, cache, token_ids, has_state)
            close(cache)

        kvcache.advance, kvcache.close = remember, compare_and_close

    @torch.inference_mode()
    def compare(self, kvcache, cache, token_ids, has_state=True):
        """Hold a request's blocks against a forward pass over its tokens; `has_state`: its request-level state too."""
        self.compared += 1
        device = self.model.device
        expected = ContiguousState(self.model.config, str(self.model.dtype).removeprefix("torch."), device=device)
        tokens = torch.tensor([token_ids], device=device)
        self.model.forward(tokens, expected, last_only=True)  # past the hooks that count passes
        for layer, spec in enumerate(kvcache.layout.specs):
            group = kvcache.layout.group_of_layer[layer]
            table = cache.block_tables[group.index]
            if spec.kind is StateKind.TOKEN:
                held = (kvcache.pool.read_tokens(layer, table, 0, len(token_ids)),)
            elif has_state:
                state_rows = kvcache.pool.state_rows(group, torch.tensor([table], device=device))
                held = kvcache.pool.read_state(layer, state_rows)
            else:
                continue
            for ours, theirs in zip(held, expected.layer(layer).load()):
                self._compare(f"layer {layer} ({spec.kind.value}) of {len(token_ids)} tokens", ours, theirs)

    def _compare(self, where, ours, theirs):
        """Rows differ that are further apart than `TOLERANCE` of their length."""
        ours, theirs = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
        lengths = theirs.norm(dim=1)
        apart = (ours - theirs).norm(dim=1) / lengths.clamp(min=1e-2 * lengths.max().item() + 1e-9)
        is_close = apart <= TOLERANCE[self.model.dtype]  # False also where something is no number
        rows = (~is_close).nonzero().flatten().tolist()
        if rows:
            self.wrong.append(f"{where}: {len(rows)} of {len(ours)} rows differ, the first is row {rows[0]}")
