"""Digests of sixteen bytes: without the keys nobody can make one, and changed data does not fit it. Chapter 07.

They are a keyed BLAKE2b. That does half a GB/s a core and a link should carry twenty times as much, so long data is
first shrunk by a universal hash, and BLAKE2b vouches for the sums (Carter and Wegman 1979). Two forms, both exact:

- *By bytes*, where both ends have instructions for it: a row of bytes x_j becomes sixteen sums sum_j k_jc x_j, with
  secret k_jc of seven bits. A change of one byte is hidden by one k_jc of 128 at most, whatever else was changed, and
  by all sixteen with a probability of at most 2^-112.
- *By words* everywhere else: a row of words w_j becomes sum_j k_j w_j mod 2^64 (Lemire and Kaser 2014). A change by
  2^t times an odd number is hidden by one k_j in 2^(64-t): good for low bits, worthless for the topmost. So rows are
  summed twice, under two sets of keys, the second time in words that begin four bytes later. Each byte is in the lower
  half of one of its two words, t is at most 31, and a change passes with a probability of at most 2^-33.

That is a try; an enemy on the line hears of it only that it failed, because BLAKE2b hides the sums. So the keys of the
sums need not change: they come from the link's secret, once, and whoever holds the bytes can sum them, be it a GPU, and
before it is known on which lane they leave (`gpu_sums`). BLAKE2b's key is another for each lane, direction and epoch,
and no digest fits anywhere else. A fresh try is worth no more than the first; but a change that has passed would pass
again while the secret lives. Without a secret all keys are known: then this finds accidents and stops nobody.
"""

import ctypes
import hashlib
from functools import lru_cache

import torch

DIGEST_BYTES = 16
ROW_BYTES = 16384
_COLUMNS = 16


def multiplies_bytes() -> bool:
    """Whether this processor is quick by bytes; without such instructions torch takes 200 times as long."""
    return torch.cpu._is_vnni_supported()


class RowSums:
    """The universal hash with `keys` of `secret`: int8 [ROW_BYTES, 16] by bytes, int64 [2, ROW_BYTES / 8] by words."""

    def __init__(self, secret: bytes | None, by_bytes: bool):
        self.by_bytes = by_bytes
        nbytes = ROW_BYTES * (_COLUMNS if by_bytes else 2)
        keys = bytearray(hashlib.shake_256(b"keys of the sums: " + (secret or b"")).digest(nbytes))
        if by_bytes:
            self.keys = (torch.frombuffer(keys, dtype=torch.int8) >> 1).view(ROW_BYTES, _COLUMNS)
        else:
            self.keys = torch.frombuffer(keys, dtype=torch.int64).view(2, -1)

    def rows_of(self, nbytes: int) -> int:
        """How many rows of so much data are summed; what is behind them is not."""
        return max(0, nbytes - (0 if self.by_bytes else 4)) // ROW_BYTES

    def of(self, data: memoryview, rows: int) -> torch.Tensor:
        """The sums of the first `rows` rows: int32 [rows, 16] or int64 [2, rows]."""
        if self.by_bytes:
            return self.of_matrix(torch.frombuffer(data, dtype=torch.int8, count=rows * ROW_BYTES).view(rows, -1))
        sums, words = torch.empty(2, rows, dtype=torch.int64), rows * ROW_BYTES // 8
        for offset, keys, into in zip((0, 4), self.keys, sums):
            matrix = torch.frombuffer(data, dtype=torch.int64, count=words, offset=offset).view(rows, -1)
            torch.mv(matrix, keys, out=into)
        return sums

    def of_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """By bytes, of int8 [rows, ROW_BYTES] in CPU memory."""
        return torch._int_mm(matrix, self.keys)


row_sums = lru_cache(maxsize=16)(RowSums)  # all lanes of a link have one


class Digest:
    """Of one key, of at most 64 bytes. Little data is done without letting go of the interpreter lock: on a busy link a
    thread waits longer to have it back than its sixteen bytes take."""

    def __init__(self, key: bytes | None, row_sums: RowSums):
        self._key, self._row_sums = key or b"", row_sums

    def of(self, data: bytes | memoryview, sums: torch.Tensor | None = None) -> bytes:
        """DIGEST_BYTES for `data`, of any length; only what is shorter than a row may be read-only. `sums`: its rows'
        by bytes, in CPU memory, if they are known; a peer that needs them by words gets others."""
        rows = self._row_sums.rows_of(len(data))
        if rows:
            sums = sums if sums is not None and self._row_sums.by_bytes else self._row_sums.of(data, rows)
            data = ctypes.string_at(sums.data_ptr(), sums.nbytes) + data[rows * ROW_BYTES:]
        return hashlib.blake2b(data, key=self._key, digest_size=DIGEST_BYTES).digest()
