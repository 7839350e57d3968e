"""The prompts file: read whole, or refused with its name and the line. Chapter 05."""

import pytest

from minprfaas.config import SamplingParams
from minprfaas.engine.prompts import read_prompts
from minprfaas.errors import UserError


def test_a_file_is_read_in_order_with_everything_it_says(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "One", "max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, '
                    '"seed": 7, "stop": ["."], "ignore_eos": true, "expected": "x"}\n\n'
                    '{"prompt": "Zwölf\\n"}\n{"id": 5, "prompt": "Three"}', encoding="utf-8")
    first, second, third = read_prompts(path)
    assert (first.id, first.text, first.expected) == ("a", "One", "x")
    assert first.params == SamplingParams(3, 0.5, 4, 0.9, 7, (".",), True)
    assert (second.id, second.text, second.params, second.expected) == ("line-3", "Zwölf\n", SamplingParams(), None)
    assert third.id == "5"


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"),
    ("prompt", "not JSON"),
    ("[1]", "a JSON list"),
    ('"text"', "a JSON str"),
    ('{"id": "x"}', "prompt is None"),
    ('{"prompt": ""}', "prompt is ''"),
    ('{"prompt": 5}', "prompt is 5"),
    ('{"prompt": "x", "max_token": 3}', "unknown key 'max_token'"),
    ('{"prompt": "x", "e": 3, "d": 3, "c": 3, "b": 3, "f": 3, "g": 3, "h": 3, "a": 3}', "unknown key 'a'"),
    ('{"prompt": "x", "max_tokens": 0}', "max_tokens is 0"),
    ('{"prompt": "x", "max_tokens": null}', "max_tokens is None"),
    ('{"prompt": "x", "temperature": -1}', "temperature is -1"),
    ('{"prompt": "x", "temperature": NaN}', "temperature is nan"),
    ('{"prompt": "x", "stop": 3}', "stop is 3"),
    ('{"prompt": "x", "stop": [""]}', "stop is"),
    ('{"prompt": "x", "expected": 3}', "expected is 3"),
    ('{"id": "first", "prompt": "x"}', "id 'first' was used"),
    ('{"id": "%s", "prompt": "x"}' % ("a" * 5_000_000), "it must be 1 to 200 printable characters"),
    ('{"id": "", "prompt": "x"}', "it must be 1 to 200 printable characters"),
    ('{"id": "two\\nlines", "prompt": "x"}', r"id is 'two\nlines'"),
    ('{"id": ["a"], "prompt": "x"}', "id is ['a']; it must be a string or a whole number"),
    ('{"id": true, "prompt": "x"}', "id is True"),
    ('{"id": "\\ud800", "prompt": "x"}', r"id is '\ud800'"),
    ('{"prompt": "two \\ud800 halves"}', r"prompt has '\ud800' at character 5, half of a surrogate pair"),
    ('{"prompt": "x", "expected": "\\udfff"}', r"expected has '\udfff' at character 1"),
    ('{"prompt": "x", "after": "\\udfff"}', r"after has '\udfff' at character 1"),
    ('{"prompt": "x", "stop": ["END", "\\udfff"]}', r"stop has '\udfff' at character 1"),
    ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ('{"prompt": "x", "seed": ' + "[" * 400 + "]" * 400 + "}", "seed is [[["),
    ('{"prompt": "x", "max_tokens": 1048577}',
     "max_tokens is 1048577; it must be a whole number of at least 1 and of at most 1,048,576"),
    ('{"prompt": "x", "max_tokens": 1%s}' % ("0" * 15), "of at most 1,048,576"),
    ('{"prompt": "x", "max_tokens": 1%s}' % ("0" * 5000), "a number is too long"),
])
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "first", "prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert f"{path}, line 3: " in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and str(caught.value).encode("utf-8")


def test_a_line_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028twothree"}\n{"prompt": "next\x85"}\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["one\u2028twothree", "next\x85"]


def test_a_file_without_prompts_or_without_text_is_named(tmp_path):
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in ((empty, "holds no prompt"), (binary, "cannot be read"), (tmp_path / "none", "cannot be read"),
                        (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words) as caught:
            read_prompts(path)
        assert str(path) in str(caught.value)


def test_a_line_may_continue_an_earlier_one_and_no_other(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y", "after": "a"}')
    assert [prompt.after for prompt in read_prompts(path)] == [None, "a"]
    path.write_text('{"id": "b", "prompt": "y", "after": "a"}\n{"id": "a", "prompt": "x"}')
    with pytest.raises(UserError, match="line 1: after names 'a', which is no earlier line's id"):
        read_prompts(path)
