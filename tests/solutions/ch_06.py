"""Chapter 06's exercises, solved; and wrong answers that look right."""

import hashlib


def chain_keys(root, token_ids, block_tokens):
    keys, previous = [], root
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        block = token_ids[start:start + block_tokens]
        data = b"".join(token.to_bytes(8, "little", signed=True) for token in block)
        previous = hashlib.blake2b(previous + data, digest_size=32).digest()
        keys.append(previous)
    return keys


def reusable_blocks(keys, blocks, snapshots):
    longest = 0
    for count, key in enumerate(keys, 1):
        if key not in blocks:
            break
        if key in snapshots:
            longest = count
    return longest


def still_cached(prompts, capacity):
    oldest_first = []
    for prompt in prompts:
        for key in prompt:
            if key in oldest_first:
                continue
            if len(oldest_first) == capacity:
                oldest_first.remove(next(old for old in oldest_first if old not in prompt))
            oldest_first.append(key)
        for key in reversed(prompt):
            oldest_first.remove(key)
            oldest_first.append(key)
    return set(oldest_first)


def _without_the_key_before(root, token_ids, block_tokens):
    full = len(token_ids) // block_tokens * block_tokens
    return [key for start in range(0, full, block_tokens)
            for key in chain_keys(root, token_ids[start:start + block_tokens], block_tokens)]


def _from_the_head(prompts, capacity):
    """Lets go of a prompt's first block first, so that a prefix loses its head."""
    oldest_first = []
    for prompt in prompts:
        for key in prompt:
            if key in oldest_first:
                oldest_first.remove(key)
            elif len(oldest_first) == capacity:
                oldest_first.pop(0)
            oldest_first.append(key)
    return set(oldest_first)


WRONG = {
    "chain_keys": _without_the_key_before,
    "reusable_blocks": lambda keys, blocks, snapshots: max(
        (count for count, key in enumerate(keys, 1) if key in blocks and key in snapshots), default=0),  # a gap before
    "still_cached": _from_the_head,
}
