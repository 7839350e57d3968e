"""The embedded model answers out of its context, and the programs that train and measure it do what they say.

Chapter 01.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minprfaas import SamplingParams, generate, load
from minprfaas.documents import EVALUATION_SEEDS, make_document
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import read_config
from minprfaas.model.kda import KDAConfig
from minprfaas.model.mla import MLAConfig

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def embedded():
    return load()


def script(name: str):
    """A program of scripts/ as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and worker processes look their module up
    spec.loader.exec_module(module)
    return module


def answers(embedded, prompts: list[str]) -> list[str]:
    model, tokenizer = embedded
    return [output.text.strip() for output in generate(model, tokenizer, prompts, SamplingParams(max_tokens=16))]


def test_the_embedded_model_is_a_small_three_to_one_hybrid(embedded):
    model, _ = embedded
    kinds = [type(layer.mixer) for layer in model.config.layers]
    assert kinds == 2 * [KDAConfig, KDAConfig, KDAConfig, MLAConfig]
    assert sum(parameter.numel() for parameter in model.parameters()) <= 10_000_000
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 16 * 2**20


def test_it_answers_fresh_documents_with_the_whole_name_and_nothing_else(embedded):
    model, tokenizer = embedded
    documents = [make_document(EVALUATION_SEEDS + 5_000 + n, 512, tokenizer.encode) for n in range(12)]
    prompts = [document.prompt(document.questions[0]) for document in documents]
    given = answers(embedded, prompts)
    right = sum(text == document.questions[0].answer for text, document in zip(given, documents))
    assert right >= 11


def test_it_finds_a_fact_at_the_beginning_in_the_middle_and_at_the_end(embedded):
    _, tokenizer = embedded
    document = make_document(EVALUATION_SEEDS + 6_000, 2048, tokenizer.encode)
    in_order = sorted(document.questions, key=lambda question: document.text.index(question.answer))
    chosen = [in_order[0], in_order[len(in_order) // 2], in_order[-1]]
    assert answers(embedded, [document.prompt(q) for q in chosen]) == [q.answer for q in chosen]


def test_it_reads_the_name_from_the_document_and_not_from_its_weights(embedded):
    _, tokenizer = embedded
    document = make_document(EVALUATION_SEEDS + 7_000, 512, tokenizer.encode)
    question, other = document.questions[:2]
    swapped = document.text.replace(question.answer, "\0").replace(other.answer, question.answer)
    swapped = swapped.replace("\0", other.answer)
    before, after = answers(embedded, [document.prompt(question), swapped + question.prompt_tail])
    assert (before, after) == (question.answer, other.answer)


def test_the_embedded_tokenizer_is_the_one_that_training_writes(embedded, tmp_path):
    _, tokenizer = embedded
    written = script("train_tiny").write_tokenizer(tmp_path)
    text = make_document(1, 1024, tokenizer.encode).text
    assert written.encode(text) == tokenizer.encode(text)


def test_every_word_of_the_documents_is_one_token(embedded):
    _, tokenizer = embedded
    assert [word for word in script("train_tiny").vocabulary() if len(tokenizer.encode(word)) != 1] == []


def test_no_training_document_has_an_evaluation_seed(monkeypatch, embedded):
    train_tiny = script("train_tiny")
    seeds = []
    monkeypatch.setattr(train_tiny.Examples, "_row", lambda self, seed, tokens, stage: seeds.append(seed) or ([0], [0]))
    examples = train_tiny.Examples(embedded[1])
    for step in range(len(examples)):
        examples[step]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < EVALUATION_SEEDS


def small_training(monkeypatch, out: Path, *options: str) -> None:
    """Run scripts/train_tiny.py's main on a model and a curriculum of a few seconds."""
    train_tiny = script("train_tiny")
    train_tiny.CURRICULUM = (train_tiny.Stage((256,), 512, 2, cues=0.5, forms=1), train_tiny.Stage((512, 256), 512, 2))
    train_tiny.CONFIG = {**train_tiny.CONFIG, "hidden_size": 32, "intermediate_size": 64, "kv_lora_rank": 16}
    fixed = ["--out", str(out), "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *fixed, *options])
    assert train_tiny.main() == 0


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(monkeypatch, tmp_path, capsys):
    small_training(monkeypatch, tmp_path / "whole")
    small_training(monkeypatch, tmp_path / "parts", "--minutes", "0")
    assert "stopped at step 1 of 4" in capsys.readouterr().out
    small_training(monkeypatch, tmp_path / "parts", "--resume")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    model, tokenizer = load(tmp_path / "whole")  # what training leaves is a checkpoint like any other
    assert generate(model, tokenizer, ["Who"], SamplingParams(max_tokens=2))[0].prompt_tokens == 1


def test_a_resume_without_an_earlier_run_is_refused_in_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        small_training(monkeypatch, tmp_path, "--resume")
    assert stopped.value.code == 2
    assert "resume.pt is missing" in capsys.readouterr().err


def test_training_counts_an_answer_as_right_only_when_all_of_it_is(embedded):
    """The share that training prints, against greedy answers to the same questions."""
    train_tiny = script("train_tiny")
    model = train_tiny.Transformer(read_config(EMBEDDED))
    model.load_state_dict(embedded[0].state_dict())
    train_tiny.CURRICULUM = (train_tiny.Stage((512,), 1024, 1),)
    ids, kinds = train_tiny.Examples(embedded[1])[0]
    still = [torch.optim.SGD(model.parameters(), lr=0.0)]
    assert train_tiny.train_step(model, still, ids, kinds)[1].item() >= 0.95
    ends = (kinds == train_tiny.ANSWER) & (ids == train_tiny.END_ID)
    row, position = ends.nonzero()[0].tolist()
    ids[row, position - 1] = (ids[row, position - 1] + 1) % 1000 + 1  # another last piece: one answer of all is wrong
    assert train_tiny.train_step(model, still, ids, kinds)[1].item() == pytest.approx(1 - 1 / ends.sum().item())


def test_the_measuring_program_counts_and_prints(monkeypatch, capsys):
    eval_tiny = script("eval_tiny")
    monkeypatch.setattr(sys, "argv", ["eval_tiny.py", "--device", "cpu", "--documents", "4", "--lengths", "256"])
    assert eval_tiny.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["256", "4", "4", "4", "100.0%"]
    monkeypatch.setattr(sys, "argv", ["eval_tiny.py", "--device", "cpu", "--lengths", "99999"])
    with pytest.raises(SystemExit):
        eval_tiny.main()
    assert "99999 tokens is longer than the model's context, 16384 tokens" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_accuracy_table_holds_on_this_machine(embedded):
    """Ten documents of 8K tokens, a minute or two: python -m pytest -m heavy tests/test_tiny_asset.py"""
    model, tokenizer = embedded
    right, _ = script("eval_tiny").evaluate(model, tokenizer, 8192, 10, show_wrong=False)
    assert right >= 9
