"""The prompts file: one JSON object a line, checked before anything runs. Chapter 05."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType

from minprfaas.config import SamplingParams
from minprfaas.errors import UserError, require_unicode, shown
from minprfaas.files import read_lines

SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
KINDS = {  # types of the values that are no numbers, and what to say of another
    "id": ((str, int), "a string or a whole number"), "prompt": ((str,), "a non-empty string"),
    "after": ((str, NoneType), "a string"), "expected": ((str, NoneType), "a string"),
    "stop": ((str, list), "a string or a list of strings")}
MAX_ID = 200  # characters: an id is printed beside every answer, and crosses in every message about its request


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file. `expected` is the right answer, if the line knows it (shown beside the one given);
    `after` names an earlier line whose conversation this one continues: its prompt, its answer, then `text`."""

    id: str
    text: str | list[int]  # token ids only where a program made the prompt
    params: SamplingParams
    expected: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.id) <= MAX_ID or not self.id.isprintable():
            raise UserError(f"id is {shown(self.id)}; it must be 1 to {MAX_ID} printable characters")
        for name, text in (("prompt", self.text), ("expected", self.expected), ("after", self.after)):
            if isinstance(text, str):
                require_unicode(name, text)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts in file order. UserError names the file and line of the first one that is malformed."""
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(read_lines("prompts file", path), start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, default_id=f"line-{number}")
            if prompt.id in prompts:
                raise UserError(f"id {prompt.id!r} was used by an earlier line")
            if prompt.after is not None and prompt.after not in prompts:
                raise UserError(f"after names {shown(prompt.after)}, which is no earlier line's id")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        prompts[prompt.id] = prompt
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; it needs at least one line")
    return list(prompts.values())


def _parse(line: str, default_id: str) -> Prompt:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets in brackets
        raise UserError("not JSON that can be read: a number is too long, or it is nested too deep") from None
    if not isinstance(raw, dict):
        raise UserError(f"a JSON {type(raw).__name__}, not an object")
    known = list(dict.fromkeys((*KINDS, *SAMPLING_KEYS)))
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise UserError(f"unknown key {shown(unknown[0])}; known: {', '.join(known)}")
    values = {"id": default_id, "prompt": None, "after": None, "expected": None, "stop": [], **raw}
    for key, (kinds, rule) in KINDS.items():
        if type(values[key]) not in kinds or (key == "prompt" and not values[key]):  # `type`: true is no whole number
            raise UserError(f"{key} is {shown(values[key])}; it must be {rule}")
    params = SamplingParams(**{key: raw[key] for key in SAMPLING_KEYS if key in raw})
    return Prompt(str(values["id"]), values["prompt"], params, values["expected"], values["after"])
