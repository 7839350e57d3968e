"""The prompts file: one JSON object a line, checked before anything runs. Chapter 04."""

import json
from dataclasses import dataclass
from pathlib import Path

from minprfaas.engine.sampling import SamplingParams
from minprfaas.errors import UserError

TEXT_KEYS = ("id", "prompt", "after", "expected")
SAMPLING_KEYS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file. `expected` is the right answer, if the line knows it (shown beside the one given);
    `after` names an earlier line whose conversation this one continues: its prompt, its answer, then `text`."""

    id: str
    text: str
    params: SamplingParams
    expected: str | None = None
    after: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts in file order. UserError names the file and line of the first one that is malformed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would cut a prompt at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts file {path} cannot be read: {error}") from None
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, default_id=f"line-{number}")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if prompt.id in prompts:
            raise UserError(f"{path}, line {number}: id {prompt.id!r} was used by an earlier line")
        if prompt.after is not None and prompt.after not in prompts:
            raise UserError(f"{path}, line {number}: after names {prompt.after!r}, which is no earlier line's id")
        prompts[prompt.id] = prompt
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; it needs at least one line")
    return list(prompts.values())


def _parse(line: str, default_id: str) -> Prompt:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(raw, dict):
        raise UserError(f"a JSON {type(raw).__name__}, not an object")
    unknown = sorted(set(raw) - {*TEXT_KEYS, *SAMPLING_KEYS})
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}; known: {', '.join(TEXT_KEYS + SAMPLING_KEYS)}")
    if not isinstance(raw.get("prompt"), str) or not raw["prompt"]:
        raise UserError(f"prompt is {raw.get('prompt')!r}; it must be a non-empty string")
    if not isinstance(raw.get("stop", []), (str, list)):
        raise UserError(f"stop is {raw['stop']!r}; it must be a string or a list of strings")
    for key in ("expected", "after"):
        if not isinstance(raw.get(key), (str, type(None))):
            raise UserError(f"{key} is {raw[key]!r}; it must be a string")
    params = SamplingParams(**{key: raw[key] for key in SAMPLING_KEYS if key in raw})
    return Prompt(str(raw.get("id", default_id)), raw["prompt"], params, raw.get("expected"), raw.get("after"))
