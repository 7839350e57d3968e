"""A checkpoint's tokenizer: text to ids and back, whole characters, and one line about a file that is none.

Chapter 01.
"""

import json
import os
import shutil
import threading

import pytest
from conftest import END_OF_TEXT
from programs import run

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


def test_a_regular_expression_without_end_is_given_up(checkpoints, tmp_path, capfd):
    """Below the library's own limit on one match, at each of many places: hours. Everything else goes on meanwhile."""
    directory = shutil.copytree(checkpoints["kimi_linear"], tmp_path / "checkpoint")
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"a*a*\d\d"}, "behavior": "Isolated", "invert": False}
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    program = ("import sys; from pathlib import Path\n"
               "from minprfaas.model import families, tokenizer\n"
               "directory = Path(sys.argv[1])\n"
               "words = tokenizer.Tokenizer(directory, families.read_config(directory))\n"
               "print(len(words.encode('a1')))\n"
               "tokenizer.ENCODE_DEADLINE_S = 0.5\n"
               "words.encode('a' * 4000 + '1')\n")
    (tmp_path / "program.py").write_text(program)
    done = run(tmp_path / "program.py", directory, timeout=60)
    assert done.stdout == "2\n"
    assert done.stderr.endswith("cannot encode a text: 4,001 characters take its regular expressions over 0.5 s\n")


def test_a_panic_while_decoding_is_one_line_and_leaves_stderr_as_it_was(checkpoints, tmp_path, capfd):
    directory = shutil.copytree(checkpoints["kimi_linear"], tmp_path / "checkpoint")
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load(directory)[1]
    ids = tokenizer.encode("aa")
    with pytest.raises(UserError, match="cannot decode a token: index out of bounds"):
        tokenizer.decode(ids)
    with pytest.raises(UserError, match=f"cannot decode token {ids[0]}: index out of bounds"):
        StreamedText(tokenizer, ()).push(ids[0])
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_text_that_is_no_unicode_is_refused_by_its_character(hybrid):
    with pytest.raises(UserError) as caught:
        hybrid[1].encode("two \ud800 halves")
    assert "surrogate" in str(caught.value) and str(caught.value).isascii() and "TextInput" not in str(caught.value)


def test_what_others_write_to_stderr_outside_a_call_is_kept(hybrid, capfd):
    os.write(2, b"before ")
    hybrid[1].decode(hybrid[1].encode("words"))
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_a_token_id_without_a_token_has_no_text(hybrid):
    """Models pad their vocabulary, so an untrained one may draw an id that the tokenizer does not know."""
    tokenizer = hybrid[1]
    (known,) = tokenizer.encode("a")
    assert tokenizer.decode([known, 5000, known]) == "aa"
    text = StreamedText(tokenizer, ())
    assert "".join(text.push(token) for token in (known, 5000, known)) + text.finish() == "aa"


def test_a_long_text_holds_up_nobody_who_decodes_a_token(hybrid, capfd):
    tokenizer, decoded_meanwhile = hybrid[1], 0
    known = tokenizer.encode("a")
    for _ in range(20):  # on a busy machine this thread may not get to run beside the other one
        encoded = []
        thread = threading.Thread(target=lambda: encoded.append(tokenizer.encode("a long text " * 20_000)))
        thread.start()
        while thread.is_alive():
            assert tokenizer.decode(known) == "a"
            decoded_meanwhile += thread.is_alive()
        assert len(encoded[0]) == 12 * 20_000
        if decoded_meanwhile > 2:
            break
        decoded_meanwhile = 0
    assert decoded_meanwhile > 2
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
