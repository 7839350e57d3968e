"""From a chat's messages to a prompt, for the chat templates that are known by heart. Chapters 13 and 15.

A checkpoint's template is a program in Jinja, which takes a template engine to run. Here the whole text of a template
is recognised, or it is refused: one that is merely similar might put a token elsewhere, and the answers would be worse
without anybody seeing why. `--chat-template` names one for a checkpoint that has none.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from minprfaas.errors import UserError, require_unicode, shown
from minprfaas.files import read_bytes, read_json
from minprfaas.model.tokenizer import Tokenizer

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"), "qwen3": ("<|im_start|>", "<|im_end|>"),
         "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


@dataclass(frozen=True)
class ChatTemplate:
    """One of the known templates. `system` is said where the messages bring no system message of their own."""

    family: str
    system: str | None = None
    bos: str = ""  # the text of the token that a prompt begins with

    def text(self, messages: object) -> str:
        """The prompt for the assistant's next message. Raises UserError."""
        turns = _checked(messages)
        if self.family == "llama3":
            said = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
                    for role, content in turns]
            return self.bos + "".join(said) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
        if self.family == "qwen3":
            turns = _with_thoughts_of_the_last_answer_only(turns)
        elif self.system is not None and turns[0][0] != "system":
            turns = [("system", self.system), *turns]
        said = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns]
        return "".join(said) + "<|im_start|>assistant\n"


def find_template(directory: Path, tokenizer: Tokenizer, named: str | None = None) -> ChatTemplate | str:
    """The chat template of a checkpoint (`named`: this one, whatever the checkpoint says); else why there is none.
    UserError when a name was given that cannot be."""
    text, bos = _stored_template(directory)
    if named is None and text is None:
        return "this model has no chat template; use /v1/completions"
    template = ChatTemplate(named) if named is not None else recognised(text)
    if template is None:
        return (f"this model's chat template is not one of those that are known here ({', '.join(MARKS)}); "
                "use /v1/completions")
    for mark in MARKS[template.family]:
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            reason = f"chat template {template.family} needs {mark}, which is no token of this model"
            if named is not None:
                raise UserError(reason)
            return f"{reason}; use /v1/completions"
    return replace(template, bos=bos)


# By the SHA-256 of the template's text, its ends stripped and its line ends written as \\n: a file may spell those in
# its string literals either way.
KNOWN = {
    "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e": ChatTemplate("chatml"),
    "d7b5b8c7b58f7a6bf868aa46a5f73ee976d7292f40fcb9c3e7a1defd8d235cfb": ChatTemplate("chatml"),  # asks what is defined
    "de9cde7d1b0ca0cc87459a6673e0d12fb89c070bdb24e4a30b6e4d187b226221":  # SmolLM2
        ChatTemplate("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "f0206845c9ebc3abb4735d44f286eb81ce99238ad2accc710c6fc60e6cb8ccc8":  # Qwen1.5
        ChatTemplate("chatml", "You are a helpful assistant."),
    "4f46ecd43418f216df8c26936c60e5d04bcc81db47db5d86fbe889f64212dd4c": ChatTemplate("llama3"),
    "b75e17085cfc511ead6d4fab84b86ab3c168ec7a332568a91d0889cdcba94394": ChatTemplate("llama3"),  # its first release
    "a731952a9b959bd2c1c97dedae3912a9174edafaf73cc07c1c35775732eb7cef": ChatTemplate("qwen3"),
}


def recognised(text: str) -> ChatTemplate | None:
    """The template whose text this is, or None."""
    return KNOWN.get(hashlib.sha256(text.strip().replace("\n", "\\n").encode()).hexdigest())


def _stored_template(directory: Path) -> tuple[str | None, str]:
    """The template's text, and the text of the token with which a prompt begins."""
    config_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json(config_file) if config_file.is_file() else {}
    bos, template = config.get("bos_token"), config.get("chat_template")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if isinstance(template, list):  # several, by name
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template_file.is_file():
        try:
            template = read_bytes(template_file).decode("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{template_file} cannot be read: {error}") from None
    return template if isinstance(template, str) else None, bos if isinstance(bos, str) else ""


def _checked(messages: object) -> list[tuple[str, str]]:
    """Role and text of each message."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {shown(messages)}; it must be a list of at least one message")
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"message {number} is {shown(message)}; it must have a role: {', '.join(ROLES)}")
        unknown = {key for key, value in message.items() if value is not None} - {"role", "content", "name"}
        if unknown:
            raise UserError(f"message {number} has {shown(min(unknown))}; this server knows role and content")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                             and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise UserError(f"the content of message {number} is {shown(content)}; it must be text")
        require_unicode(f"message {number}", content)
        turns.append((ROLES[role], content))
    if turns[-1][0] == "assistant":
        raise UserError("the last message is the assistant's; there must be one to answer")
    return turns


def _with_thoughts_of_the_last_answer_only(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Qwen3: what an assistant thought before the last question is left out. A tool's answer is no question."""
    questions = [number for number, (role, content) in enumerate(turns) if role == "user"
                 and not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))]
    last_question = questions[-1] if questions else len(turns)
    shortened = []
    for number, (role, content) in enumerate(turns):
        if role == "assistant" and "</think>" in content:
            before, _, _ = content.partition("</think>")
            thought = before.rstrip("\n").split("<think>")[-1].strip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
            if number > last_question and thought:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
        shortened.append((role, content))
    return shortened
