"""The exercises of chapter 14. Fill in the functions, then: python tutorials/14_when_things_break.py --check 1"""

from exercises.checking import first_wrong

from minprfaas.config import CacheConfig, StateKind
from minprfaas.kvcache.layout import plan_layout
from minprfaas.kvcache.manager import KVCacheManager
from minprfaas.model.spec import StateSpec, TensorSpec
from minprfaas.transport.wan.frames import Frame, Header, Kind, Slot, StreamRecord
from minprfaas.transport.wan.send_queue import SendQueue

BLOCK_TOKENS = 64


def leaves_next(left: int, acknowledged: set[int], damaged: list[int], waiting: int) -> list[int]:
    """Numbers in the order in which they leave in a new epoch. Chunks 1 to `left` had left; those `acknowledged` need
    nothing more; those in `damaged` had arrived damaged and were asked for again, and had not left again. `waiting`
    further chunks have not left yet: they get the next numbers."""
    raise NotImplementedError


def resume_tokens(arrived: int, is_hybrid: bool, snapshot_at: int | None) -> int:
    """After how many tokens a node can begin to prefill a prompt, when the stream of its KVCache broke off. Rows of the
    first `arrived` tokens (fewer than the prompt has) are there, and a snapshot of the linear layers' state at
    `snapshot_at` tokens, a block boundary, or None. A dense model needs no state. Blocks have BLOCK_TOKENS tokens, and
    only full ones count."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's send queue."""

    def expected(left: int, acknowledged: set[int], damaged: list[int], waiting: int) -> list[int]:
        queue, record = SendQueue(2**20, now_s=0.0), StreamRecord(1)
        for _ in range(left + waiting):
            frame = Frame(Header(Kind.CHUNK, stream=1, nbytes=8), Slot(8), record)
            queue.monitor.queued(frame.nbytes, 0.0)
            queue.push_chunk(frame, 0.0)
        for _ in range(left):
            queue.pop(0.0)
        for number in sorted(acknowledged):
            queue.settle(number, True, 0.0)
        for number in damaged:
            queue.send_again(number, 0.0)
        queue.begin_epoch(0.0)
        numbers = []
        while (frame := queue.pop(0.0)) is not None:
            numbers.append(frame.header.seq)
        return numbers

    cases = [(6, {1, 2, 4}, [], 2), (6, {1, 2, 4}, [5], 0), (3, set(), [3, 1], 1), (2, {1, 2}, [], 3),
             (0, set(), [], 2)]
    return first_wrong(leaves_next, [(case, expected(*case)) for case in cases])


def check_2() -> str | None:
    """Against the package's KVCache manager."""
    rows = StateSpec(StateKind.TOKEN, (TensorSpec("rows", (16,), "float32"),))
    state = StateSpec(StateKind.REQUEST, (TensorSpec("state", (16,), "float32"),))

    def expected(arrived: int, is_hybrid: bool, snapshot_at: int | None) -> int:
        layout = plan_layout((state, rows) if is_hybrid else (rows, rows), BLOCK_TOKENS)
        kvcache, prompt = KVCacheManager(layout, CacheConfig(100, BLOCK_TOKENS), "cpu", b"exercise"), [*range(1000)]
        cache = kvcache.open(prompt, to_receive=True)
        kvcache.reserve(cache, len(prompt))
        kvcache.advance(cache, prompt[:arrived], has_state=False)
        if snapshot_at is not None:
            snapshot = kvcache.snapshots.expect(cache.keys, snapshot_at)
            if snapshot is not None:
                kvcache.snapshots.index_expected(snapshot)
        kvcache.close(cache)
        return kvcache.match(prompt)

    cases = [(640, False, None), (700, False, None), (63, False, None), (700, True, None), (700, True, 640),
             (700, True, 320), (600, True, 640), (640, True, 640)]
    return first_wrong(resume_tokens, [(case, expected(*case)) for case in cases])
