"""Chronicles of invented towns, and questions about the people in them: what the embedded model reads. Chapter 01.

A document is filler prose with facts scattered through it: one person holds one office in one town. Every town and
person is invented for that document, so a right answer can only come out of the context, that is, out of the KVCache.
The distractors are in the text: the same office in other towns, other offices in the same town, and strangers.
Training, evaluation, the demo and the tests all draw their documents and write their prompts here.
"""

import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minprfaas.errors import UserError, require_number

END_OF_TEXT = "<|end|>"
MIN_TOKENS, MAX_FACTS, TOKENS_A_FACT = 128, 64, 96
EVALUATION_SEEDS = 1_000_000_000  # seeds from here on are never trained on
_TAIL_TOKENS = 36  # room that a document leaves for its question and the answer

# The words and sentences. A name is a beginning and an ending, one token each: 512 words of each kind, and a quarter of
# a million people. The embedded model was trained on their order too: a seed draws from it.
MATERIAL = json.loads((Path(__file__).parent / "assets" / "documents.json").read_text("utf-8"))

Respell = Callable[[random.Random, list[str]], list[str]]  # other names and offices in place of these, all different


@dataclass(frozen=True)
class Question:
    """A question about one fact of a document, and its one right answer (a person's name).

    `cue` asks the same as the beginning of a sentence ("The harbour master of Velmora is"): training starts with it.
    """

    text: str
    answer: str
    cue: str

    @property
    def prompt_tail(self) -> str:
        """What follows the document in a prompt; a space, the answer and the end-of-text token follow it."""
        return f"\n\nQuestion: {self.text}\nAnswer:"


@dataclass(frozen=True)
class Document:
    """Prose, and one question for each fact in it."""

    text: str
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> str:
        """The whole prompt of one question: the text, then the question."""
        return self.text + question.prompt_tail


def make_document(seed: int, tokens: int, encode: Callable[[str], list], facts: int | None = None,
                  forms: int | None = None, respell: Respell | None = None) -> Document:
    """Draw the document of `seed`: with any of its questions it fills `tokens` tokens but for a sentence or two.

    `encode` is the tokenizer's; `facts` defaults to one in `TOKENS_A_FACT` tokens. Training begins with few `forms` of
    sentence and ends with names that it spells itself. The same arguments give the same document. Raises UserError
    when `tokens` cannot hold the facts.
    """
    require_number("length of a document in tokens", tokens, least=MIN_TOKENS)
    facts = min(MAX_FACTS, max(4, tokens // TOKENS_A_FACT)) if facts is None else facts
    require_number("number of facts in a document", facts, least=1, most=MAX_FACTS)
    rng = random.Random(seed)
    towns = _names(rng, "town", rng.randint(2 + facts // 16, 2 + facts // 2), respell)
    count = facts + min(MAX_FACTS, 1 + tokens // 64)  # office holders, then strangers
    first_names, last_names = _names(rng, "first", count, respell), _names(rng, "last", count, respell)
    people = [f"{first} {last}" for first, last in zip(first_names, last_names)]
    told, questions = _facts(rng, towns, people[:facts], forms, respell)
    slots = {**MATERIAL["words"], "town": towns, "person": people[facts:]}

    title = f"The Chronicle of {towns[0]}"
    room = tokens - _TAIL_TOKENS - len(encode(title))
    sentences, separators = [], []  # a fifth of the separators begin a paragraph
    while True:
        if len(sentences) < facts:
            sentence = told[len(sentences)]
        else:
            sentence = _fill(rng, rng.choice(MATERIAL["filler"]), slots)
        separator = " " if sentences and rng.random() < 0.8 else "\n\n"
        room -= len(encode(separator + sentence))
        if room < 0:
            break
        sentences.append(sentence)
        separators.append(separator)
    if len(sentences) < facts:
        raise UserError(f"{facts} facts do not fit in a document of {tokens} tokens; {len(sentences)} do")
    rng.shuffle(sentences)
    pieces = [separator + sentence for separator, sentence in zip(separators, sentences)]
    return Document(title + "".join(pieces), questions)


def _facts(rng: random.Random, towns: list[str], people: list[str], forms: int | None,
           respell: Respell | None) -> tuple[list[str], tuple[Question, ...]]:
    """One sentence and one question for each of `people`: a pair of office and town has one holder at most.

    Mostly few towns and few offices, so that facts have neighbours: the same office elsewhere, other offices here.
    """
    offices = rng.sample(MATERIAL["offices"], min(len(MATERIAL["offices"]), 2 + len(people) // 2))
    if respell is not None:
        offices = [office.lower() for office in respell(rng, offices)]
    posts = rng.sample(list(itertools.product(offices, towns)), len(people))
    told, asked = MATERIAL["facts"][:forms], MATERIAL["questions"][:forms]
    sentences, questions = [], []
    for (office, town), person in zip(posts, people):
        slots = {**MATERIAL["words"], "office": [office], "town": [town], "person": [person]}
        sentences.append(_fill(rng, rng.choice(told), slots))
        cue = _fill(rng, rng.choice(told).split(" {person}")[0], slots)
        questions.append(Question(_fill(rng, rng.choice(asked), slots), person, cue))
    return sentences, tuple(questions)


def _fill(rng: random.Random, template: str, slots: dict[str, list[str]]) -> str:
    """`template` with each {slot} replaced by one of its words, drawn anew for every slot."""
    return re.sub(r"{(\w+)}", lambda slot: rng.choice(slots[slot[1]]), template)


def _names(rng: random.Random, kind: str, count: int, respell: Respell | None) -> list[str]:
    """`count` different names of towns or people ("town", "first", "last")."""
    names = ["".join(name) for name in rng.sample(list(itertools.product(*MATERIAL["names"][kind])), count)]
    return names if respell is None else respell(rng, names)
