"""Chats: a known template puts one as its Jinja text does, and what is no chat is refused.

Chapter 13.
"""

import json

import pytest
from conftest import byte_tokenizer, write_checkpoint
from serving_support import CHAT, call, house, reference, streamed_text

from minprfaas.errors import UserError
from minprfaas.model.checkpoint import load
from minprfaas.serving.chat import ChatTemplate, find_template, recognised


CHATML = ("{% for message in messages %}"
          "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": " Hi\n"}]},
         {"role": "assistant", "content": "<think>\nA guest.\n</think>\n\nYes?"},
         {"role": "user", "content": "Who are you?"}]


@pytest.fixture
def chat_house(tmp_path):
    """A checkpoint whose tokenizer has ChatML's marks, and whose configuration has its template."""
    write_checkpoint(tmp_path, "kimi_linear", vocab_size=259)
    marked = byte_tokenizer()
    marked.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    marked.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    model, tokenizer = load(tmp_path)
    with house(model, tokenizer, tmp_path) as one, one.running():
        yield one, (model, tokenizer)


def test_a_chat_is_answered_as_its_template_puts_it(chat_house):
    one, loaded = chat_house
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    token_ids = loaded[1].encode(prompt)
    assert token_ids[0] == 257 and len(token_ids) == len(prompt) - 11 - 9 - 11
    expected = reference(loaded, [token_ids], max_tokens=12, ignore_eos=True)[0]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 12, "temperature": 0,
            "ignore_eos": True}
    answer = call(one.port, CHAT, body).json
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["usage"]["prompt_tokens"] == len(token_ids) and answer["object"] == "chat.completion"
    first, *events = call(one.port, CHAT, {**body, "stream": True}).events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed_text(events) == (expected.text, "length") and first["object"] == "chat.completion.chunk"


def test_a_chat_that_is_none_is_refused_by_name(chat_house):
    user = {"role": "user", "content": "Hi"}
    for messages, said in [
            ([], "messages is []"), ("Hi", "messages is 'Hi'"), ([{"content": "Hi"}], "must have a role"),
            ([{"role": "tool", "content": "Hi"}], "must have a role"),
            ([{"role": ["user"], "content": "Hi"}], "must have a role"),
            ([{"role": {}, "content": "Hi"}], "must have a role"),
            ([{"role": "user"}], "content of message 0 is None"),
            ([user, {"role": "user", "content": [{"type": "image_url"}]}], "content of message 1"),
            ([{**user, "tool_calls": [1]}], "'tool_calls'"),
            ([user, {"role": "assistant", "content": "Yes?"}], "the last message"),
            ([{"role": "user", "content": "\ud800"}], "message 0 has '\\ud800'")]:
        response = call(chat_house[0].port, CHAT, {"messages": messages})
        assert response.status == 400 and said in response.json["error"]["message"], messages


@pytest.mark.parametrize("template, expected", [
    (ChatTemplate("chatml"),
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
     "<|im_start|>assistant\n<think>\nA guest.\n</think>\n\nYes?<|im_end|>\n"
     "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
    (ChatTemplate("qwen3"),
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
     "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
    (ChatTemplate("llama3", bos="<|begin_of_text|>"),
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nA guest.\n</think>\n\nYes?<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
])
def test_each_known_template_puts_a_chat_as_its_jinja_text_does(template, expected):
    assert template.text(TURNS) == expected


def test_a_system_message_that_the_template_brings_stands_back_for_one_of_the_chat():
    template = ChatTemplate("chatml", system="Help.")
    assert template.text(TURNS[3:]).startswith("<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nWho")
    assert template.text(TURNS).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_a_template_is_recognised_by_its_whole_text_however_it_spells_line_ends():
    assert recognised(CHATML) == recognised(CHATML.replace("\\n", "\n") + "\n") == ChatTemplate("chatml")
    assert recognised(CHATML.replace("user", "human")) == recognised(CHATML)  # which says neither
    assert recognised(CHATML.replace("<|im_end|>' + '\\n'", "<|im_end|>'")) is None


def test_a_template_can_be_named_where_the_tokenizer_has_its_marks(chat_house, checkpoints, hybrid, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tokenizer = chat_house[1][1]
    assert "not one of those that are known here" in find_template(tmp_path, tokenizer)
    assert find_template(tmp_path, tokenizer, "qwen3") == ChatTemplate("qwen3")
    with pytest.raises(UserError, match=r"llama3 needs <\|start_header_id\|>, which is no token of this model"):
        find_template(tmp_path, tokenizer, "llama3")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert find_template(tmp_path, tokenizer) == ChatTemplate("chatml")
    assert "is no token of this model" in find_template(tmp_path, hybrid[1])
