"""Chronicles of invented towns, and questions about the people in them: what the embedded model reads. Chapter 01.

A document is filler prose with facts scattered through it: one person holds one office in one town. Every town and
person is invented for that document, so a right answer can only come out of the context, that is, out of the KVCache.
The distractors are in the text: the same office in other towns, other offices in the same town, and strangers.
Training, evaluation, the demo and the tests all draw their documents and write their prompts here.
"""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from minprfaas.errors import UserError

END_OF_TEXT = "<|end|>"
MIN_TOKENS, MAX_FACTS, TOKENS_A_FACT = 128, 64, 96
EVALUATION_SEEDS = 1_000_000_000  # seeds from here on are never trained on
_TAIL_TOKENS = 36  # room that a document leaves for its question and the answer

# A name is a beginning and an ending, one token each: 512 words of each kind, and a quarter of a million people.
_TOWN = (
    "Vel Tarn Ost Bry Quel Sunder Harrow Mist Lor Kest Dren Wy Glas Farr Ith Nev Skar Pol Rath Ulm Yar Zen Crag El "
    "Morn Thess Gold Amber Cind Hesk Orl Pell".split(),
    "mora holm mouth vik dale stead haven gate wen reach mere fell by port moor tor".split())
_FIRST = (
    "Il Bren Mar Tor Ed Cal Jor Hal Os Wil Per Ros Ger Al Dor Lin Fen Cor Ber Tam Ul Vin Nor Sel Han Rud Kel Mir Ans "
    "Eil Gar Bel".split(),
    "sa den ric la wyn mund ta bert na gus lis ven ra dan mira thea".split())
_LAST = (
    "Tren Hol Ash Black Wind Thorn Green Hart Cop Lang Whit Bram Ryd Stan Mer Cald Wex Pem Hask Oak Fair Dun Ches "
    "Lock Sax Brad Cliff Fern Nash Pres Rad Shel".split(),
    "ter lin ford wick worth ley more ham bury combe field stone ton er brook man".split())

_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl sh sk sm st th tr".split()
_CODAS = ["", "", "", *"k l m n r s t ld nd nt rd rk rt st th x".split()]

_OFFICES = (
    "harbour master, baker, miller, bridge keeper, clock maker, judge, teacher, doctor, ferry captain, blacksmith, "
    "librarian, gardener, treasurer, night watch, bell ringer, map maker, weaver, mayor, innkeeper, shepherd, "
    "archivist, glass blower, organ player, postmaster").split(", ")

_FACTS = (
    "The {office} of {town} is {person}.",
    "In {town}, the {office} is {person}.",
    "The {office} of {town} is {person}, who {habit}.",
    "In {town}, the post of {office} belongs to {person}.",
    "For many a {season}, the {office} of {town} has been {person}.",
    "People in {town} will tell you that their {office} is {person}.",
    "In {town}, the council chose a new {office}, and the choice fell on {person}.",
)
_QUESTIONS = (
    "Who is the {office} of {town}?",
    "In {town}, who is the {office}?",
    "What is the name of the {office} of {town}?",
    "Which person holds the post of {office} in {town}?",
)
_FILLER = (
    "The {season} was {weather}, and the {crop} came in late.",
    "A {weather} wind blew over the hills and shook the {tree} trees.",
    "The road to {town} runs beside the river and is lined with {tree} trees.",
    "Merchants carry {goods} from {town} to {town} before the first snow.",
    "At the market you can buy {goods}, {goods} and a little {goods}.",
    "An old song says that the river once ran backwards for a whole {season}.",
    "The children of {town} fly paper kites whenever the weather is {weather}.",
    "A traveller called {person} passed through {town} with a cart full of {goods}.",
    "Nobody remembers who planted the {tree} tree in front of the town hall.",
    "Every {season} the people mend the walls, paint the doors and sweep the streets.",
    "It is said that {goods} from the coast keeps better than {goods} from the hills.",
    "The letter that {person} sent from abroad took a whole {season} to arrive.",
    "A {animal} sleeps in the doorway of the old mill and cannot be moved.",
    "The bells ring twice at noon, once for the living and once for the sea.",
    "After the flood the fields were {weather} for weeks and the {crop} had to be sown again.",
    "There is a path behind the church where a {animal} was seen last {season}.",
    "The inn serves soup with {crop}, dark bread and a good deal of {goods}.",
    "On {weather} evenings the lamps are lit early and the shutters are closed.",
    "Two brothers from {town} built a boat and named it after a {animal}.",
    "The price of {goods} rose a little, and the price of {crop} fell.",
    "A poet once wrote that {town} smells of {goods} and of rain.",
    "The wedding lasted three days, and even the {animal} was given a ribbon.",
    "Where the two rivers meet there is a stone with no name on it.",
    "In a {weather} {season} the ice on the lake is thick enough for a horse.",
    "The story of {person}, who walked to the sea and back, is still told at night.",
    "Most houses have a small garden with {crop} and {tree} trees.",
    "When the fog is thick, the fishermen of {town} blow a horn and wait.",
    "The library keeps a drawing of a {animal} that no one has ever been able to name.",
    "A painter called {person} spent one {season} here and left a picture of the harbour.",
    "The old tower leans to the east, and each {season} it leans a little more.",
    "Some say that a {animal} brings luck, and others say that it brings rain.",
    "The ferry is slow, but the view of {town} from the water is worth the hours.",
)
_WORDS = {
    "season": "spring summer autumn winter".split(),
    "weather": "cold warm wet dry grey bright mild stormy quiet golden".split(),
    "crop": "barley wheat beans apples onions pears turnips oats".split(),
    "tree": "oak elm willow lime chestnut birch cherry pine".split(),
    "goods": "salt wool honey candles rope cheese paper tar silver tea linen pepper".split(),
    "animal": "heron fox goose hare cat dog goat bear".split(),
    "habit": ("keeps bees:sings at weddings:rarely sleeps:collects old coins:came here from the coast:grows roses:"
              "writes long letters:plays the fiddle").split(":"),
}


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
                  forms: int | None = None, spelled: float = 0.0) -> Document:
    """Draw the document of `seed`: with any of its questions it fills `tokens` tokens but for a sentence or two.

    `encode` is the tokenizer's (`Tokenizer.encode`); `facts` defaults to one in `TOKENS_A_FACT` tokens, at most
    `MAX_FACTS`; `forms` limits the forms of sentence that facts and questions take (training begins with one);
    `spelled` is the share of names and offices that are spelled freely, letter by letter, so that readers may bring
    their own.
    The same arguments give the same document. Raises UserError when `tokens` cannot hold the facts.
    """
    if tokens < MIN_TOKENS:
        raise UserError(f"a document of {tokens} tokens is too short; it must be at least {MIN_TOKENS}")
    facts = min(MAX_FACTS, max(4, tokens // TOKENS_A_FACT)) if facts is None else facts
    if not 1 <= facts <= MAX_FACTS:
        raise UserError(f"a document with {facts} facts cannot be written; it must have 1 to {MAX_FACTS}")
    rng = random.Random(seed)
    towns = _names(rng, _TOWN, rng.randint(2 + facts // 16, 2 + facts // 2), spelled)
    count = facts + min(MAX_FACTS, 1 + tokens // 64)  # office holders, then strangers
    first_names, last_names = _names(rng, _FIRST, count, spelled), _names(rng, _LAST, count, spelled)
    people = [f"{first} {last}" for first, last in zip(first_names, last_names)]
    told, questions = _facts(rng, towns, people[:facts], forms, spelled)
    slots = {**_WORDS, "town": towns, "person": people[facts:]}
    filler = (_fill(rng, rng.choice(_FILLER), slots) for _ in itertools.count())

    title = f"The Chronicle of {towns[0]}"
    sentences, separators = [], []  # a fifth of the separators begin a paragraph
    room = tokens - _TAIL_TOKENS - len(encode(title))
    for sentence in itertools.chain(told, filler):
        separator = " " if sentences and rng.random() < 0.8 else "\n\n"
        room -= len(encode(separator + sentence))
        if room < 0:
            break
        sentences.append(sentence)
        separators.append(separator)
    if len(sentences) < facts:
        raise UserError(f"{facts} facts do not fit in a document of {tokens} tokens; {len(sentences)} do")
    rng.shuffle(sentences)
    return Document(title + "".join(map("".join, zip(separators, sentences))), questions)


def _facts(rng: random.Random, towns: list[str], people: list[str],
           forms: int | None, spelled: float) -> tuple[list[str], tuple[Question, ...]]:
    """One sentence and one question for each of `people`: a pair of office and town has one holder at most.

    Mostly few towns and few offices, so that facts have neighbours: the same office elsewhere, other offices here.
    """
    offices = rng.sample(_OFFICES, min(len(_OFFICES), 2 + len(people) // 2))
    offices = [office.lower() for office in _respelled(rng, offices, spelled)]
    posts = rng.sample(list(itertools.product(offices, towns)), len(people))
    sentences, questions = [], []
    for (office, town), person in zip(posts, people):
        slots = {**_WORDS, "office": [office], "town": [town], "person": [person]}
        sentences.append(_fill(rng, rng.choice(_FACTS[:forms]), slots))
        cue = _fill(rng, rng.choice(_FACTS[:forms]).split(" {person}")[0], slots)
        questions.append(Question(_fill(rng, rng.choice(_QUESTIONS[:forms]), slots), person, cue))
    return sentences, tuple(questions)


def _fill(rng: random.Random, template: str, slots: dict[str, list[str]]) -> str:
    """`template` with each {slot} replaced by one of its words, drawn anew for every slot."""
    return re.sub(r"{(\w+)}", lambda slot: rng.choice(slots[slot[1]]), template)


def _names(rng: random.Random, pieces: tuple[list[str], list[str]], count: int, spelled: float) -> list[str]:
    """`count` different words, each a beginning and an ending, or, with probability `spelled`, spelled freely."""
    return _respelled(rng, ["".join(word) for word in rng.sample(list(itertools.product(*pieces)), count)], spelled)


def _respelled(rng: random.Random, words: list[str], share: float) -> list[str]:
    """`words`, a `share` of them replaced by one to three syllables that no list holds; all different."""
    while True:
        kept = [_invented(rng) if share and rng.random() < share else word for word in words]
        if len(set(map(str.lower, kept))) == len(words):
            return kept


def _invented(rng: random.Random) -> str:
    syllables = (rng.choice(_ONSETS) + rng.choice("aeiouy") + rng.choice(_CODAS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables).capitalize()


def vocabulary() -> list[str]:
    """Every word that documents and prompts are made of, as a tokenizer meets it, names cut into their two pieces."""
    templates = (*_FILLER, *_FACTS, *_QUESTIONS)
    words = {"Question", "Answer", " Chronicle", *(template.split()[0].strip(",") for template in templates)}
    for template in (*templates, *_OFFICES, *itertools.chain(*_WORDS.values())):
        words.update(" " + word for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", template)))
    for beginnings, endings in (_TOWN, _FIRST, _LAST):
        words.update([*(" " + beginning for beginning in beginnings), *endings])
    return sorted(words)
