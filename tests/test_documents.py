"""Documents: facts that are stated once, distractors around them, and lengths that are kept. Chapter 01."""

import pytest

from minprfaas.documents import END_OF_TEXT, EVALUATION_SEEDS, MAX_FACTS, make_document
from minprfaas.errors import UserError
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import read_config
from minprfaas.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EMBEDDED, read_config(EMBEDDED))


def sentences(text: str) -> list[str]:
    return text.replace("\n\n", " ").replace("?", ".").split(". ")


def test_a_seed_always_draws_the_same_document_and_another_seed_another(tokenizer):
    first, again, other = (make_document(seed, 512, tokenizer.encode) for seed in (5, 5, 6))
    assert first == again
    assert first.text != other.text
    assert not {q.answer for q in first.questions} & {q.answer for q in other.questions}


def test_every_answer_is_stated_in_exactly_one_sentence_together_with_its_town_and_office(tokenizer):
    document = make_document(11, 2048, tokenizer.encode)
    for question in document.questions:
        stated = [sentence for sentence in sentences(document.text) if question.answer in sentence]
        assert len(stated) == 1
        cue_words = {word for word in question.cue.split() if word[0].isupper()} - {"The", "In", "For", "People"}
        town = cue_words.pop().strip(",")
        assert town in stated[0] and town in question.text


def test_no_two_questions_of_a_document_ask_for_the_same_post(tokenizer):
    for seed in range(20):
        document = make_document(seed, 1024, tokenizer.encode, forms=1)  # one form, so equal posts are equal texts
        texts = [question.text for question in document.questions]
        assert len(set(texts)) == len(texts)
        assert len({question.answer for question in document.questions}) == len(texts)


def test_most_facts_have_a_neighbour_in_the_same_town_or_office(tokenizer):
    neighbours = total = 0
    for seed in range(20):
        questions = make_document(seed, 1024, tokenizer.encode, forms=1).questions
        posts = [question.text.removeprefix("Who is the ").rstrip("?").split(" of ") for question in questions]
        for office, town in posts:
            total += 1
            neighbours += sum(office == o or town == t for o, t in posts) > 1
    assert neighbours / total > 0.8


@pytest.mark.parametrize("tokens", [256, 1024, 8192])
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(tokenizer, tokens):
    for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + 3):
        document = make_document(seed, tokens, tokenizer.encode)
        for question in document.questions:
            whole = document.prompt(question) + " " + question.answer + END_OF_TEXT
            assert tokens - 64 < len(tokenizer.encode(whole)) <= tokens


def test_facts_lie_everywhere_in_a_document(tokenizer):
    quarters = set()
    for seed in range(10):
        document = make_document(seed, 1024, tokenizer.encode)
        for question in document.questions:
            quarters.add(4 * document.text.index(question.answer) // len(document.text))
    assert quarters == {0, 1, 2, 3}


def test_an_answer_is_tokenized_alike_with_and_without_its_prompt(tokenizer):
    document = make_document(3, 512, tokenizer.encode)
    for question in document.questions:
        prompt, answer = document.prompt(question), " " + question.answer
        assert tokenizer.encode(prompt + answer) == tokenizer.encode(prompt) + tokenizer.encode(answer)


def test_a_document_that_cannot_be_written_is_refused_in_one_line(tokenizer):
    with pytest.raises(UserError, match="in tokens is 64; it must be a number of at least 128"):
        make_document(0, 64, tokenizer.encode)
    with pytest.raises(UserError, match=f"facts in a document is 65; .* at least 1 and of at most {MAX_FACTS}"):
        make_document(0, 4096, tokenizer.encode, facts=65)
    with pytest.raises(UserError, match="40 facts do not fit in a document of 256 tokens"):
        make_document(0, 256, tokenizer.encode, facts=40)
