"""Text to token ids and back: a thin coat over the `tokenizers` library. Chapter 01.

A tokenizer.json is a small program that somebody else wrote, and the library was not made for bad ones: it panics, or
works for hours. Here each of these is a `UserError`.
"""

import concurrent.futures
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError, require_unicode
from minprfaas.files import read_bytes

ENCODE_DEADLINE_S = 30.0

_nowhere = os.open(os.devnull, os.O_WRONLY)  # where there is no stderr, this takes its number


class Tokenizer:
    """`tokenizer.json` of a checkpoint directory, checked against the model's vocabulary."""

    def __init__(self, directory: Path, config: ModelConfig):
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; a checkpoint directory has one")
        with _mistakes_as_one_line(f"{path} is not a tokenizer"):
            content = read_bytes(path)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # Both are for batches of training data: one prompt needs no padding, and must not be cut without a word.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._has_own_regex = b'"Regex"' in content
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest < 0 or largest >= config.vocab_size:
            raise UserError(f"{path} does not match the vocabulary: its largest token id is {largest}, "
                            f"config.json's vocab_size is {config.vocab_size}")
        self.eos_token_ids = config.eos_token_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the file adds. UserError when it cannot be applied."""
        require_unicode("a text", text)
        with _mistakes_as_one_line("tokenizer.json cannot encode a text"):
            if self._has_own_regex:
                return self._encode_by_deadline(text, add_special_tokens)
            return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As a batch of one: unlike `encode`, that lets other threads run meanwhile."""
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def _encode_by_deadline(self, text: str, add_special_tokens: bool) -> list[int]:
        """The library bounds one match of a regular expression, but not their number: `a*a*b` takes hours for a page of
        letters, and cannot be stopped. So it works in a thread of its own, which is left behind when it is late."""
        ids: concurrent.futures.Future[list[int]] = concurrent.futures.Future()

        def work() -> None:
            try:
                ids.set_result(self._encode(text, add_special_tokens))
            except BaseException as error:  # a panic too belongs to who waits
                ids.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return ids.result(ENCODE_DEADLINE_S)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(f"{len(text):,} characters take its regular expressions over {ENCODE_DEADLINE_S:g} s")

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`; special tokens are left out."""
        with _mistakes_as_one_line("tokenizer.json cannot decode a token"):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def stream_step(self, decoder: tokenizers.decoders.DecodeStream, token_id: int) -> str | None:
        """The text that one more token makes certain (None in the middle of a character)."""
        with _mistakes_as_one_line(f"tokenizer.json cannot decode token {token_id}"):
            return decoder.step(self._tokenizer, token_id)


class _QuietStderr:
    """While anybody is inside, what is written to stderr goes nowhere: past Python, so the file descriptor itself is
    turned away. Threads enter side by side: a long text's encoding must not hold up who decodes a token."""

    def __init__(self) -> None:
        self._lock, self._inside, self._kept = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._kept = os.dup(2)
                os.dup2(_nowhere, 2)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                os.dup2(self._kept, 2)
                os.close(self._kept)


_quiet_stderr = _QuietStderr()


@contextmanager
def _mistakes_as_one_line(what: str) -> Iterator[None]:
    """Whatever the library raises becomes a UserError; the page that it writes to stderr in a panic goes nowhere."""
    try:
        with _quiet_stderr:
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a panic is none either
            raise  # Ctrl-C
        raise UserError(f"{what}: {' '.join(str(error).split())[:200]}") from None
