"""Streamed text: certain pieces only, whole characters only, and nothing past a stop string. Chapter 05."""

import random

import pytest
from conftest import TINY, byte_tokenizer

from minprfaas.engine.text import StreamedText
from minprfaas.model.families import config_from_hf
from minprfaas.model.tokenizer import Tokenizer


@pytest.fixture
def stream(hybrid):
    """`stream(text, stop...)` pushes the tokens of `text` (one a byte); returns the pieces and the StreamedText."""

    def run(written: str, *stop: str) -> tuple[list[str], StreamedText]:
        text, pieces = StreamedText(hybrid[1], stop), []
        for token in hybrid[1].encode(written):
            pieces.append(text.push(token))
            if text.stopped:
                return pieces, text
        return [*pieces, text.finish()], text

    return run


def test_without_stop_strings_every_token_shows_at_once(stream):
    assert stream("abc")[0] == ["a", "b", "c", ""]


def test_a_character_of_several_tokens_shows_when_it_is_whole(stream):
    assert stream("é🙂!")[0] == ["", "é", "", "", "", "🙂", "!", ""]


def test_what_may_begin_a_stop_string_is_held_back(stream):
    pieces, text = stream("one END two", "END.")
    assert pieces == ["o", "n", "e", " ", "", "", "", "END ", "t", "w", "o", ""]
    assert not text.stopped and text.text == "one END two"


def test_what_is_still_held_back_at_the_end_is_text_after_all(stream):
    assert stream("so EN", "END")[0] == ["s", "o", " ", "", "", "EN"]


def test_a_stop_string_over_several_tokens_is_cut_and_never_shown(stream):
    pieces, text = stream("one END two", "END")
    assert "".join(pieces) == text.text == "one " and text.stopped


def test_a_stop_string_in_the_middle_of_a_token_cuts_it(tmp_path):
    long_tokens = byte_tokenizer()
    long_tokens.add_tokens(["Hello wor", "ld. Bye."])
    long_tokens.save(str(tmp_path / "tokenizer.json"))
    config = config_from_hf({**TINY["llama"], "vocab_size": 259})
    tokenizer = Tokenizer(tmp_path, config)
    first, second = tokenizer.encode("Hello world. Bye.")
    text = StreamedText(tokenizer, ("world.",))
    assert [text.push(first), text.push(second)] == ["Hello ", ""]
    assert text.stopped and text.text == "Hello "


def test_the_first_of_several_stop_strings_counts(stream):
    assert stream("a then b then c", "c", "b")[1].text == "a then "


def test_a_stop_string_that_begins_with_its_own_end(stream):
    pieces, text = stream("xaaab", "aab")
    assert "".join(pieces) == text.text == "xa" and text.stopped


def test_a_stop_string_at_the_very_beginning_leaves_nothing(stream):
    pieces, text = stream("END of it", "END")
    assert "".join(pieces) == text.text == "" and text.stopped


def test_streaming_shows_exactly_the_text_before_the_first_stop_string(stream):
    """Random texts over a small alphabet, where stop strings begin, fail and overlap all the time."""
    rng = random.Random(0)
    for _ in range(300):
        written = "".join(rng.choice("aab🙂") for _ in range(rng.randint(1, 20)))
        stops = ["".join(rng.choice("ab🙂") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 2))]
        pieces, text = stream(written, *stops)
        ends = [written.find(stop) + len(stop) for stop in stops if stop in written]
        expected = written
        if ends:  # the text up to the character that first completes a stop string, cut where the earliest begins
            seen = written[: min(ends)]
            expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
        assert "".join(pieces) == text.text == expected, (written, stops)
        assert text.stopped == bool(ends)
