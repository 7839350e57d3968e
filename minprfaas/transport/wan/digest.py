"""Digests of sixteen bytes: without the key nobody can make one, and changed data does not fit it. Chapter 07.

They are a keyed BLAKE2b. That does half a GB/s a core and a link should carry twenty times as much, so long data is
first shrunk by a universal hash, and BLAKE2b vouches for the sums (Carter and Wegman 1979). Two forms, both exact:

- *By bytes*, where both ends have instructions for it: a row of bytes x_j becomes sixteen sums sum_j k_jc x_j, with
  secret k_jc of seven bits. A change of one byte is hidden by one k_jc of 128 at most, whatever else was changed, and
  by all sixteen with a probability of at most 2^-112.
- *By words* everywhere else: a row of words w_j becomes sum_j k_j w_j mod 2^64 (Lemire and Kaser 2014). A change by
  2^t times an odd number is hidden by one k_j in 2^(64-t): good for low bits, worthless for the topmost. So rows are
  summed twice, under two sets of keys, the second time in words that begin four bytes later. Each byte is in the lower
  half of one of its two words, t is at most 31, and a change passes with a probability of at most 2^-33.

That is a try; an enemy on the line hears of it only that it failed, because BLAKE2b hides the sums. Without a secret
the keys are known to all: then this finds accidents and stops nobody.
"""

import hashlib

import torch

DIGEST_BYTES = 16
_ROW_BYTES = 16384
_COLUMNS = 16


def multiplies_bytes() -> bool:
    """Whether this processor is quick by bytes; without such instructions torch takes 200 times as long."""
    return torch.cpu._is_vnni_supported()


class Digest:
    """Of one key, of at most 64 bytes. Little data is done without letting go of the interpreter lock: on a busy link a
    thread waits longer to have it back than its sixteen bytes take."""

    def __init__(self, key: bytes | None, by_bytes: bool = False):
        self._key, self._by_bytes = key or b"", by_bytes
        nbytes = _ROW_BYTES * (_COLUMNS if by_bytes else 2)
        secret = bytearray(hashlib.shake_256(b"keys of the sums: " + self._key).digest(nbytes))
        if by_bytes:
            self._keys = (torch.frombuffer(secret, dtype=torch.int8) >> 1).view(_ROW_BYTES, _COLUMNS)
        else:
            self._keys = torch.frombuffer(secret, dtype=torch.int64).view(2, -1)

    def of(self, data: bytes | memoryview) -> bytes:
        """DIGEST_BYTES for `data`, of any length; only what is shorter than a row may be read-only."""
        rows = max(0, len(data) - (0 if self._by_bytes else 4)) // _ROW_BYTES
        if rows:
            sums = self._sums_by_bytes(data, rows) if self._by_bytes else self._sums_by_words(data, rows)
            data = sums + data[rows * _ROW_BYTES:]
        return hashlib.blake2b(data, key=self._key, digest_size=DIGEST_BYTES).digest()

    def _sums_by_bytes(self, data: memoryview, rows: int) -> bytearray:
        memory = bytearray(rows * _COLUMNS * 4)
        sums = torch.frombuffer(memory, dtype=torch.int32).view(rows, _COLUMNS)
        matrix = torch.frombuffer(data, dtype=torch.int8, count=rows * _ROW_BYTES).view(rows, -1)
        torch._int_mm(matrix, self._keys, out=sums)
        return memory

    def _sums_by_words(self, data: memoryview, rows: int) -> bytearray:
        memory = bytearray(rows * 2 * 8)
        sums, words = torch.frombuffer(memory, dtype=torch.int64).view(2, rows), rows * _ROW_BYTES // 8
        for offset, keys, into in zip((0, 4), self._keys, sums):
            matrix = torch.frombuffer(data, dtype=torch.int64, count=words, offset=offset).view(rows, -1)
            torch.mv(matrix, keys, out=into)
        return memory
