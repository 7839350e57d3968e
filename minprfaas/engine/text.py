"""Text as it streams: pieces that are certain, and the stop strings that end it. Chapter 05."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from minprfaas.model.tokenizer import Tokenizer


class StreamedText:
    """Turns one request's tokens into text, holding back what may yet turn out to be a stop string. What `known` tokens
    made certain was shown before, by another process."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], known: Sequence[int] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._shown = 0  # characters
        for token_id in known:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text that is certain. Sets `stopped` and cuts `text` at a stop string."""
        piece = self._tokenizer.stream_step(self._decoder, token_id)
        searched = len(self.text)
        self.text += piece or ""
        # A stop string may have begun in text that was searched before, but not have ended there.
        places = [self.text.find(stop, max(0, searched - len(stop))) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if not found:
            return self._show(len(self.text) - self._held_back())
        self.stopped = True
        self.text = self.text[:min(found)]
        return self._show(len(self.text))

    def finish(self) -> str:
        """No more tokens: what was held back is text after all."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown:self._shown]

    def _held_back(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1  # a whole one would have been found
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0
