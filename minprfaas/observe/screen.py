"""What a person watches while two datacenters work: a bar a phase, and the answers as they come. Chapter 13."""

import sys

from tqdm import tqdm


class Screen:
    """Three bars on a terminal (none where the output is a file) and lines that stay. Totals may grow."""

    def __init__(self, prefill_tokens: int, answer_tokens: int, stream=sys.stderr):
        self.shown = stream.isatty()
        options = dict(file=stream, disable=not self.shown, leave=False, dynamic_ncols=True, mininterval=0.05)
        in_bytes = dict(unit="B", unit_scale=True, unit_divisor=1024)
        self._prefill = tqdm(total=prefill_tokens, desc="prefill   ", unit="tok", position=0, **options)
        self._link = tqdm(total=0, desc="KV stream ", position=1, **in_bytes, **options)
        self._decode = tqdm(total=answer_tokens, desc="decode    ", unit="tok", position=2, **options)

    def prefilled(self, tokens: int) -> None:
        """Prompt tokens prefilled so far, in both datacenters."""
        self._move(self._prefill, tokens)

    def streamed(self, count_bytes: int, total_bytes: int) -> None:
        """KVCache bytes that have crossed the link, of those known to be coming."""
        self._link.total = total_bytes
        self._move(self._link, count_bytes)

    def decoded(self, tokens: int, text: str) -> None:
        """Answer tokens drawn so far, and the end of the text that is being written."""
        self._decode.set_postfix_str(text[-40:].replace("\n", " "), refresh=False)
        self._move(self._decode, tokens)

    def line(self, text: str) -> None:
        """A line that stays on the screen."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Clear the bars."""
        for bar in (self._decode, self._link, self._prefill):
            bar.close()

    @staticmethod
    def _move(bar: tqdm, to: int) -> None:
        bar.update(to - bar.n)
