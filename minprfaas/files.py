"""Files that a person names: read with one line when they are wrong, written whole or not at all. Chapter 08."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minprfaas.errors import UserError

MAX_BYTES = 2**27  # several times the largest tokenizer or index there is; a sparse file may claim more than the memory


def read_json(path: str | Path, hint: str = "") -> dict:
    """A JSON object from a file; UserError when it is missing, unreadable or no object. `hint` says what to do."""
    value = read_json_value(path, hint)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_json_value(path: str | Path, hint: str = "") -> object:
    """Any JSON value from a file; UserError when it is missing or unreadable."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing{'; ' + hint if hint else ''}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # ValueError: no UTF-8, no JSON, a huge number
        raise UserError(f"{path} cannot be read as JSON: {_reason(error)}") from None


def read_bytes(path: str | Path) -> bytes:
    """A file that is read in one piece. UserError when it is larger than any such file is; OSError as usual."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is too large: it must have at most {MAX_BYTES:,} bytes")
    return content


def read_lines(what: str, path: str | Path) -> list[str]:
    """The lines of a text file, which is `what`. UserError when it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8").split("\n")  # splitlines would cut a prompt at U+2028 too
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that is none
        raise UserError(f"{what} {path} cannot be read: {_reason(error)}") from None


class OutputFile:
    """A file to be written at the end of a run, opened before it: a folder that is missing, read-only or full is then
    a mistake of the first second. The text takes the target's place only when it is whole; a device or a pipe, which
    cannot be replaced, is written as it is. Raises UserError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if os.path.isdir(self.path):
            raise UserError(f"{self.path} cannot be written: it is a directory")
        # By os.path, for which a folder that may not be looked into is no error: `open` says it.
        self._replaces = os.path.isfile(self.path) or not os.path.exists(self.path)
        try:
            self._partial = _beside(self.path) if self._replaces else self.path
            self._file = open(self._partial, "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None

    def write(self, text: str) -> None:
        """Write everything and put the file in its place. UserError when the disk refuses; then there is no file."""
        try:
            with self._file:
                self._file.write(text)
            if self._replaces:
                os.replace(self._partial, self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None
        finally:
            self.close()  # whatever broke it off: half a file is left nowhere

    def close(self) -> None:
        """Leave nothing behind: the run ended before there was anything to write. Harmless after `write`."""
        try:
            self._file.close()
        except OSError:
            pass  # the flush of a full disk; the file goes anyway
        if self._replaces:
            self._partial.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all. UserError when it cannot be written."""
    OutputFile(path).write(text)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """For what a library writes: a path beside `path`, whose file takes its place when the block ends well; otherwise
    nothing is left. UserError when the system refuses."""
    path, partial = Path(path), _beside(Path(path))
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {_reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: str | Path) -> None:
    """Make a folder, and those above it. UserError when it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{path} cannot be made: {_reason(error)}") from None


def _beside(path: Path) -> Path:
    """In the same folder, so that it can take the place of `path` at once; another process has another."""
    return path.with_name(f"{path.name}.partial{os.getpid()}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
