"""Chapter 14's exercises, solved; and wrong answers that look right."""

BLOCK_TOKENS = 64


def leaves_next(left, acknowledged, damaged, waiting):
    again = [number for number in range(1, left + 1) if number not in acknowledged]
    return again + [*range(left + 1, left + waiting + 1)]


def resume_tokens(arrived, is_hybrid, snapshot_at):
    full = arrived // BLOCK_TOKENS * BLOCK_TOKENS
    if not is_hybrid:
        return full
    return snapshot_at if snapshot_at is not None and snapshot_at <= full else 0


WRONG = {
    "leaves_next": lambda left, acknowledged, damaged, waiting: [  # what was damaged first, as if no epoch had begun
        *damaged, *(number for number in range(1, left + waiting + 1) if number not in acknowledged | {*damaged})],
    "resume_tokens": lambda arrived, is_hybrid, snapshot_at: arrived // BLOCK_TOKENS * BLOCK_TOKENS,  # rows alone
}
