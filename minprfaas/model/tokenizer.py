"""Text to token ids and back: a thin coat over the `tokenizers` library. Chapter 01."""

from pathlib import Path

import tokenizers

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError


class Tokenizer:
    """`tokenizer.json` of a checkpoint directory, checked against the model's vocabulary."""

    def __init__(self, directory: Path, config: ModelConfig):
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; a checkpoint directory has one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise UserError(f"{path} is not a tokenizer: {error}") from None
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest < 0 or largest >= config.vocab_size:
            raise UserError(f"{path} does not match the vocabulary: its largest token id is {largest}, "
                            f"config.json's vocab_size is {config.vocab_size}")
        self.eos_token_ids = config.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the checkpoint's tokenizer adds to a prompt."""
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`; special tokens are left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def stream_step(self, decoder: tokenizers.decoders.DecodeStream, token_id: int) -> str | None:
        """The text that one more token makes certain (None in the middle of a character)."""
        return decoder.step(self._tokenizer, token_id)
