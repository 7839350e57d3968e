"""The tokenizer of a checkpoint directory."""

import json
import shutil

import pytest
from conftest import END_OF_TEXT

from minprfaas import load
from minprfaas.engine.text import StreamedText
from minprfaas.errors import UserError
from minprfaas.model.families import config_from_hf
from minprfaas.model.tokenizer import Tokenizer

TEXTS = ["plain words", "  two spaces, a tab\t and\n\nlines", "Zoë says 你好 🙂", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_way_there_and_back(hybrid, text):
    tokenizer = hybrid[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_ids_but_no_text(hybrid):
    tokenizer = hybrid[1]
    ids = tokenizer.encode(f"before{END_OF_TEXT}after")
    assert ids.count(0) == 1 and tokenizer.decode(ids) == "beforeafter"


def test_a_tokenizer_that_does_not_match_the_vocabulary_says_both_numbers(checkpoints):
    directory = checkpoints["kimi_linear"]
    raw = {**json.loads((directory / "config.json").read_text()), "vocab_size": 200}
    with pytest.raises(UserError, match="largest token id is 256, config.json's vocab_size is 200"):
        Tokenizer(directory, config_from_hf(raw))


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_a_file_that_is_no_tokenizer_is_one_line(checkpoints, tmp_path, content):
    directory = shutil.copytree(checkpoints["kimi_linear"], tmp_path / "checkpoint")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_a_token_id_without_a_token_has_no_text(hybrid):
    """Models pad their vocabulary, so an untrained one may draw an id that the tokenizer does not know."""
    tokenizer = hybrid[1]
    (known,) = tokenizer.encode("a")
    assert tokenizer.decode([known, 5000, known]) == "aa"
    text = StreamedText(tokenizer, ())
    assert "".join(text.push(token) for token in (known, 5000, known)) + text.finish() == "aa"
