"""Sixteen bytes that vouch for others: who has no key cannot make them, and what has changed does not match. Chapter 07.

They are a keyed BLAKE2b. That does half a GB/s a core and a link should carry twenty times as much, so long data is first
shrunk by a universal hash, at a multiplication for four bytes, and BLAKE2b vouches for the sums (Carter and Wegman
1979; this hash: Lemire and Kaser 2014). A row of words w_j becomes sum_j k_j w_j mod 2^64, where the k_j are secret.

If a word was changed by 2^t times an odd number, one in 2^(64-t) of its keys hides that, whatever else was changed: good
for low bits, worthless for the topmost. So rows are summed twice, under two sets of keys, the second time in words that
begin four bytes later. Each byte is in the lower half of one of its two words, t is at most 31, and a change passes with
a probability of at most 2^-33 a try. An enemy on the line hears nothing of a try but that it failed: BLAKE2b hides the sums.
Without a secret the keys are known to all; then this finds accidents and stops nobody.
"""

import hashlib

import torch

DIGEST_BYTES = 16
ROW_BYTES = 16384


class Digest:
    """Of one key, of at most 64 bytes. What is short is done without letting go of the interpreter lock: on a busy link a
    thread that lets go of it waits longer to have it back than the sixteen bytes take."""

    def __init__(self, key: bytes | None):
        self._key = key or b""
        words = bytearray(hashlib.shake_256(b"keys of the sums: " + self._key).digest(2 * ROW_BYTES))
        self._word_keys = torch.frombuffer(words, dtype=torch.int64).view(2, -1)

    def of(self, data: bytes | memoryview) -> bytes:
        """DIGEST_BYTES for `data`, of any length; only what is shorter than a row may be read-only."""
        rows = max(0, len(data) - 4) // ROW_BYTES
        digest = hashlib.blake2b(data[rows * ROW_BYTES:], key=self._key, digest_size=DIGEST_BYTES)
        if rows:
            memory = bytearray(2 * rows * 8)
            sums, words = torch.frombuffer(memory, dtype=torch.int64).view(2, rows), rows * ROW_BYTES // 8
            for offset, keys, into in zip((0, 4), self._word_keys, sums):
                matrix = torch.frombuffer(data, dtype=torch.int64, count=words, offset=offset).view(rows, -1)
                torch.mv(matrix, keys, out=into)
            digest.update(memory)
        return digest.digest()
