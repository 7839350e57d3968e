"""A few numbers that all threads and processes of one machine share, one at a time. Chapter 07.

They live in a small mmapped file. `flock` guards it; the kernel lets go of a lock when its holder dies, however it
dies. Everyone who uses the file holds a shared lock on a second one, `PATH.users`, so that the last user can remove
both, and the first one knows that what it finds was left by somebody who was killed.
"""

import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
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
            return
        users = _join(path, count)
        self._file = open(path, "r+b")
        self._values = memoryview(mmap.mmap(self._file.fileno(), count * WORD_BYTES)).cast("d")
        # Called by the owner, by the garbage collector, or when Python exits: whichever is first.
        self._leave = weakref.finalize(self, _leave, path, users, self._file)

    def close(self) -> None:
        """Use the file no more. Harmless twice."""
        if self._file is not None:
            self._leave()

    def __enter__(self) -> list[float] | memoryview:
        self._lock.acquire()
        self._flock(fcntl.LOCK_EX)
        return self._values

    def __exit__(self, *_: object) -> None:
        self._flock(fcntl.LOCK_UN)
        self._lock.release()

    def _flock(self, operation: int) -> None:
        if self._file is not None and self._leave.alive:
            fcntl.flock(self._file, operation)


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those of `paths` whose users were all killed, and so could not."""
    for path in paths:
        try:
            users_path = path.with_name(path.name + ".users")
            with open(users_path, "r+b") as users:
                if _lock_alone(users) and os.path.samestat(os.stat(users_path), os.fstat(users.fileno())):
                    _unlink(path)
        except OSError:
            pass  # another one's, or removed at this moment


def _join(path: Path, count: int) -> BinaryIO:
    """Become a user of `path`; the first one writes it. Returns the file whose shared lock says so."""
    users_path = path.with_name(path.name + ".users")
    while True:
        users = open(users_path, "ab")
        if _lock_alone(users):
            path.write_bytes(bytes(count * WORD_BYTES))
        fcntl.flock(users, fcntl.LOCK_SH)  # waits for one who is writing, or removing, at this moment
        try:
            if os.path.samestat(os.stat(users_path), os.fstat(users.fileno())):
                return users
        except FileNotFoundError:
            pass
        users.close()  # its last user removed it before we had the lock; begin again


def _leave(path: Path, users: BinaryIO, file: BinaryIO) -> None:
    if _lock_alone(users):
        _unlink(path)
    users.close()
    file.close()


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".users").unlink(missing_ok=True)


def _lock_alone(users: BinaryIO) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
