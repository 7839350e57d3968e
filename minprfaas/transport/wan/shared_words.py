"""A few numbers that all threads and processes of one machine share, one at a time. Chapter 07.

An emulated line belongs to two datacenters, not to one link, so its state lives outside every process: in a small
mmapped file. `flock` guards it; the kernel lets go of a lock when its holder dies, however it dies. A second file,
`PATH.users`, is locked (shared) by everyone who uses the first, so that the last one can remove both, and the first
one knows that what it finds was left by somebody who was killed.
"""

import fcntl
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

WORD_BYTES = 8


class SharedWords:
    """`count` float64 words, 0 at first: `with words as values:` has them for itself. No path: this process alone."""

    def __init__(self, count: int, path: Path | None):
        self._lock = threading.Lock()  # a file lock knows files, not threads
        self._file: BinaryIO | None = None
        self._values: list[float] | memoryview = [0.0] * count
        if path is None:
            self.close = weakref.finalize(self, _nothing)
            return
        users = _join(path, count)
        self._file = open(path, "r+b")
        memory = mmap.mmap(self._file.fileno(), count * WORD_BYTES)
        self._values = memoryview(memory).cast("d")
        # Called by the owner, by the garbage collector, or when Python exits: whichever is first.
        self.close = weakref.finalize(self, _leave, path, users, self._file)

    def __enter__(self) -> list[float] | memoryview:
        self._lock.acquire()
        if self._file is not None and self.close.alive:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._values

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self.close.alive:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._lock.release()


def _join(path: Path, count: int) -> BinaryIO:
    """Become a user of `path`; the first one writes it. Returns the file whose shared lock says so."""
    users_path = _users_path(path)
    while True:
        users = open(users_path, "ab")
        if _lock_alone(users):
            path.write_bytes(bytes(count * WORD_BYTES))
        fcntl.flock(users, fcntl.LOCK_SH)  # waits for one who is writing, or removing, at this moment
        if _is_at(users_path, users):
            return users
        users.close()  # its last user removed it before we had the lock; begin again


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _leave(path: Path, users: BinaryIO, file: BinaryIO) -> None:
    if _lock_alone(users):
        path.unlink(missing_ok=True)
        _users_path(path).unlink(missing_ok=True)
    users.close()
    file.close()


def _lock_alone(users: BinaryIO) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _users_path(path: Path) -> Path:
    return path.with_name(path.name + ".users")


def _nothing() -> None:
    """What there is to close of words that are in no file."""
