"""OpenAI's request and answer bodies, to and from prompts and pieces of answers. Chapters 13 and 15.

What a client asks for is either done or refused by name: an option that would be ignored in silence gives an answer to
another question. Those that change no answer (`user`, `metadata`, …) are read over.
"""

import json
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path

from minprfaas.config import MAX_OUTPUT_TOKENS, ModelConfig, SamplingParams
from minprfaas.engine.engine import token_ids_of
from minprfaas.errors import RequestError, UserError, shown
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.serving.chat import ChatTemplate, find_template
from minprfaas.serving.door import AnswerPiece

MAX_PROMPTS = 128  # of one request
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000  # each is searched for at every token
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat answer may be as long as the context
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
ONLY = {  # options that are understood as far as they ask for nothing; null always does
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],)}
SAMPLING = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"}
COMMON = {"model", "stream", "stream_options", *SAMPLING, *ONLY, *WITHOUT_EFFECT}


@dataclass(frozen=True)
class Ask:
    """What a request's body asks for: an answer to each prompt."""

    is_chat: bool
    prompts: list[list[int]]
    params: list[SamplingParams]  # one for each
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class Served:
    """The model behind the door, as far as requests are checked against it."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    context_tokens: int
    chat: ChatTemplate | str  # or why there is none

    @staticmethod
    def of(directory: str | Path, config: ModelConfig, tokenizer: Tokenizer, chat_template: str | None) -> "Served":
        """A checkpoint, under its directory's name. UserError when `chat_template`, if given, cannot be."""
        directory = Path(directory).resolve()
        return Served(directory.name, tokenizer, config.vocab_size, config.max_context_tokens,
                      find_template(directory, tokenizer, chat_template))

    def read(self, body: bytes, is_chat: bool) -> Ask:
        """What a body asks for. Raises UserError or RequestError. Takes as long as the tokenizer does for its text."""
        raw = parse_json(body)
        keys = COMMON | ({"messages", "max_completion_tokens"} if is_chat else {"prompt"})
        self._check_options(raw, keys)
        stream = _flag("stream", raw.get("stream"))
        stream_options = raw.get("stream_options") or {}
        if not isinstance(stream_options, dict) or set(stream_options) - {"include_usage"}:
            raise UserError(f'stream_options is {shown(stream_options)}; it may hold "include_usage"')
        prompts = [self._chat_prompt(raw)] if is_chat else self._completion_prompts(raw)
        for number, token_ids in enumerate(prompts):
            if not 0 < len(token_ids) < self.context_tokens:
                raise UserError(f"prompt {number} has {len(token_ids)} tokens; it must have 1 to "
                                f"{self.context_tokens - 1}: the model's context holds {self.context_tokens}, one of "
                                "them for the answer")
        params = _sampling(raw, MAX_OUTPUT_TOKENS if is_chat else COMPLETION_TOKENS)
        each = [params] * len(prompts)
        if raw.get("seed") is None:  # as OpenAI does: another answer each time
            each = [replace(params, seed=secrets.randbits(62)) for _ in prompts]
        return Ask(is_chat, prompts, each, stream, _flag("include_usage", stream_options.get("include_usage")))

    def _check_options(self, raw: dict, keys: set[str]) -> None:
        for key in raw:
            if key not in keys:
                raise UserError(f"{shown(key)} is no option here; known: {', '.join(sorted(keys))}")
        for key, accepted in ONLY.items():
            value = raw.get(key)
            if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                                             for one in accepted):
                raise UserError(f"{key} is {shown(value)}; this server knows only {json.dumps(accepted[0])}")
        if raw.get("model", self.name) != self.name:
            raise RequestError("model_not_found", f"model {shown(raw['model'])} is not served here; {self.name!r} is")

    def _completion_prompts(self, raw: dict) -> list[list[int]]:
        """A text, a list of texts, a list of token ids, or a list of such lists."""
        prompt = raw.get("prompt")
        prompts = prompt if isinstance(prompt, list) and not _is_token_ids(prompt) else [prompt]
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise UserError(f"prompt holds {len(prompts)} prompts; it must be 1 to {MAX_PROMPTS}")
        for one in prompts:
            if not isinstance(one, str) and not _is_token_ids(one):
                raise UserError(f"prompt is {shown(one)}; it must be a string, a list of token ids, or a list of these")
            if isinstance(one, list) and not all(0 <= token < self.vocab_size for token in one):
                raise UserError(f"prompt has a token id outside the vocabulary of {self.vocab_size}")
        return [token_ids_of(one, self.tokenizer) for one in prompts]

    def _chat_prompt(self, raw: dict) -> list[int]:
        if isinstance(self.chat, str):
            raise UserError(self.chat)
        return self.tokenizer.encode(self.chat.text(raw.get("messages")), add_special_tokens=False)


def parse_json(body: bytes) -> dict:
    """A JSON object. Raises UserError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        raw = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5,000 digits, brackets in brackets
        raise UserError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"the body is a JSON {type(raw).__name__}; it must be an object")
    return raw


def _sampling(raw: dict, max_tokens: int) -> SamplingParams:
    values = {"max_tokens": max_tokens, "temperature": 1.0}  # OpenAI's defaults
    values |= {key: raw[key] for key in SAMPLING if raw.get(key) is not None}
    if raw.get("max_completion_tokens") is not None:
        values["max_tokens"] = raw["max_completion_tokens"]
    stop = values.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    is_short = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_short or any(len(str(one)) > MAX_STOP_CHARACTERS for one in stops):
        raise UserError(f"stop is {shown(stop)}; it must be at most {MAX_STOPS} strings of at most "
                        f"{MAX_STOP_CHARACTERS} characters")
    return SamplingParams(**{**values, "stop": tuple(stops)})


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it must be true or false")
    return bool(value)


class AnswerBody:
    """Spells the answer to one `Ask`: whole, or as chunks of a stream."""

    def __init__(self, ask: Ask, id: str, model: str):
        self._ask = ask
        self._texts = [""] * len(ask.prompts)
        self._finish_reasons: list[str | None] = [None] * len(ask.prompts)
        self._tokens = self._cached_tokens = 0
        kind = "chat.completion" if ask.is_chat else "text_completion"
        chunk_kind = "chat.completion.chunk" if ask.is_chat else kind
        self._frame = {"id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{id}",
                       "object": chunk_kind if ask.stream else kind, "created": int(time.time()), "model": model}

    def take(self, piece: AnswerPiece) -> None:
        """Note a piece."""
        self._texts[piece.index] += piece.text
        self._finish_reasons[piece.index] = piece.finish_reason
        self._tokens += piece.tokens
        self._cached_tokens += piece.cached_tokens if piece.finish_reason is not None else 0

    @property
    def is_complete(self) -> bool:
        """Whether each prompt has its last piece."""
        return all(self._finish_reasons)

    def whole(self) -> str:
        """The answer in one piece."""
        choices = []
        for index, (text, finish_reason) in enumerate(zip(self._texts, self._finish_reasons)):
            said = {"message": {"role": "assistant", "content": text}} if self._ask.is_chat else {"text": text}
            choices.append(self._choice(index, said, finish_reason))
        return json.dumps({**self._frame, "choices": choices, "usage": self._usage()})

    def begun(self) -> list[str]:
        """The chunks before any text: whose words a chat's will be."""
        if not self._ask.is_chat:
            return []
        return [self._chunk([self._choice(0, {"delta": {"role": "assistant", "content": ""}}, None)])]

    def chunk(self, piece: AnswerPiece) -> str:
        """More text of an answer, or its end, or both."""
        said = {"delta": {"content": piece.text} if piece.text else {}} if self._ask.is_chat else {"text": piece.text}
        return self._chunk([self._choice(piece.index, said, piece.finish_reason)])

    def usage(self) -> str:
        """The chunk after the last text, for who asked for it."""
        return json.dumps({**self._frame, "choices": [], "usage": self._usage()})

    def _chunk(self, choices: list[dict]) -> str:
        usage = {"usage": None} if self._ask.include_usage else {}
        return json.dumps({**self._frame, "choices": choices, **usage})

    @staticmethod
    def _choice(index: int, said: dict, finish_reason: str | None) -> dict:
        reason = "stop" if finish_reason == "eos" else finish_reason
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _usage(self) -> dict:
        prompt_tokens = sum(map(len, self._ask.prompts))
        return {"prompt_tokens": prompt_tokens, "completion_tokens": self._tokens,
                "total_tokens": prompt_tokens + self._tokens,
                "prompt_tokens_details": {"cached_tokens": self._cached_tokens}}
