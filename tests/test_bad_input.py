"""Every mistake a person can make on the command line: one line that names it, exit status 2, nothing half-written.

Chapter 01.
"""

import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minprfaas import load
from minprfaas.__main__ import main
from minprfaas.model.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def refused(capfd, tmp_path):
    """`refused(argument, ...)` runs `python -m minprfaas generate` and returns its one line on stderr, where libraries
    may write past Python."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(["generate", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """A hybrid checkpoint to damage."""
    return shutil.copytree(checkpoints["kimi_linear"], tmp_path / "damaged")


def rewrite_config(directory, **changes):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **changes}))


def test_a_directory_that_is_no_checkpoint(refused, tmp_path):
    assert f"{tmp_path}/config.json is missing" in refused("--model", tmp_path, "hello")
    for name in ("nowhere", "x" * 300):
        assert f"{name} is not a directory" in refused("--model", tmp_path / name, "hello")


def test_an_architecture_that_is_not_supported(refused, damaged):
    rewrite_config(damaged, model_type="gpt2")
    line = refused("--model", damaged, "hello")
    assert f"architecture 'gpt2' is not supported; supported: {', '.join(sorted(FAMILIES))}" in line


def test_a_model_whose_tensors_do_not_fit_its_configuration(refused, damaged):
    rewrite_config(damaged, intermediate_size=50)
    line = refused("--model", damaged, "hello")
    assert "model.layers.0.mlp.gate_proj.weight" in line and "[48, 32]" in line and "[50, 32]" in line


@pytest.mark.parametrize("change", [
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=300_000), dict(num_attention_heads=2**62),
    dict(hidden_size=2**62), dict(vocab_size=2**62), dict(intermediate_size=2**62), dict(kv_lora_rank=2**62),
    dict(max_position_embeddings=2**62), dict(rms_norm_eps=-1), dict(rope_theta=0),
    dict(eos_token_id="end")])
def test_a_configuration_beyond_every_model_is_refused_by_its_number(refused, damaged, checkpoints, change):
    (name, value), = change.items()
    if name in ("rope_theta", "max_position_embeddings"):  # the hybrid has no RoPE, and another name for its context
        shutil.copy(checkpoints["llama"] / "config.json", damaged)
    rewrite_config(damaged, **change)
    line = refused("--model", damaged, "hello")
    assert "; it must be a whole number of" in line or "; it must be a number" in line
    assert repr(value) in line


def test_a_stack_deeper_than_the_files_is_refused_before_it_is_built(refused, checkpoints, tmp_path):
    deep = shutil.copytree(checkpoints["llama"], tmp_path / "deep")
    rewrite_config(deep, num_hidden_layers=10_000)
    built = []
    hook = torch.nn.modules.module.register_module_module_registration_hook(lambda *names: built.append(names))
    try:
        assert "tensor model.layers.2.self_attn.q_proj.weight is missing" in refused("--model", deep, "hello")
    finally:
        hook.remove()
    assert 0 < len(built) < 100


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_sparse_file_of_a_terabyte(refused, damaged, name):
    path = damaged / name
    os.truncate(path, 2**40)
    line = refused("--model", damaged, "hello")
    assert str(path) in line and ("is too large" in line or "is truncated or corrupt" in line)


def test_a_truncated_weight_file(refused, damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is truncated or corrupt" in refused("--model", damaged, "hello")


def test_a_tokenizer_of_another_model(refused, damaged):
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 999
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused("--model", damaged, "hello")
    assert "does not match the vocabulary" in line and "999" in line and "257" in line


REPLACE = {"type": "Replace", "content": "x"}
HARD = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": r"(a+)+\d\d"}}


@pytest.mark.parametrize("parts, words", [
    (dict(normalizer={**REPLACE, "pattern": {"String": ""}}), "tokenizer.json cannot encode a text: index out of"),
    (dict(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "tokenizer.json is not a tokenizer: Pre"),
    (dict(pre_tokenizer={"type": "FixedLength", "length": 0}), "cannot encode a text: chunk size must be non-zero"),
    (dict(pre_tokenizer=HARD), "cannot encode a text: Onig: Regex search error: retry-limit-in-match over"),
    (dict(model={"type": "WordLevel", "vocab": {"hello": 0}, "unk_token": "<unk>"}, pre_tokenizer=None),
     "cannot encode a text: WordLevel error: Missing [UNK] token"),
])
def test_a_tokenizer_that_panics(refused, damaged, parts, words):
    tokenizer = {**json.loads((damaged / "tokenizer.json").read_text()), **parts}
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert words in refused("--model", damaged, "a" * 60 + "1")


def test_padding_and_truncation_of_a_tokenizer_do_not_touch_a_prompt(damaged):
    tokenizer = json.loads((damaged / "tokenizer.json").read_text())
    tokenizer["padding"] = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (damaged / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load(damaged)[1].encode("a" * 60)) == 60


def test_a_lone_surrogate_in_a_prompt(refused, checkpoints):
    line = refused("--model", checkpoints["llama"], "two \ud800 halves")
    assert r"'\ud800' at character 5, half of a surrogate pair" in line


def test_a_prompt_longer_than_the_context(refused, checkpoints):
    line = refused("--model", checkpoints["kimi_linear"], "x" * 700)
    assert "700 prompt tokens" in line and "context holds 512" in line


def test_a_prompt_longer_than_the_pool(refused, checkpoints):
    line = refused("--model", checkpoints["llama"], "--pool-blocks", 2, "x" * 200)
    assert "200 prompt tokens" in line and "pool holds 128 tokens" in line


def test_an_empty_prompt(refused, checkpoints):
    assert "empty prompt" in refused("--model", checkpoints["llama"], "")


def test_a_bad_line_in_a_prompts_file(refused, checkpoints, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "x", "top_p": 3}\n')
    assert f"{path}, line 2: top_p is 3" in refused("--model", checkpoints["llama"], "--prompts", path)
    assert "none.jsonl cannot be read" in refused("--model", checkpoints["llama"], "--prompts", tmp_path / "none.jsonl")


@pytest.mark.parametrize("option, value, words", [
    ("--max-tokens", "0", "max_tokens is 0"),
    ("--max-tokens", str(10**15), "max_tokens is 1000000000000000; it must be a whole number of at least 1"),
    ("--max-tokens", "1" + "0" * 5000, "argument --max-tokens: invalid int value: '1000"),
    ("--temperature", "-1", "temperature is -1.0"),
    ("--temperature", "nan", "temperature is nan"),
    ("--top-k", "-2", "top_k is -2"),
    ("--top-p", "1.5", "top_p is 1.5"),
    ("--seed", str(2**64), f"seed is {2**64}"),
    ("--stop", "", "stop is ('',)"),
    ("--prefill-chunk", "0", "--prefill-chunk is 0"),
    ("--pool-blocks", "0", "--pool-blocks is 0"),
    ("--device", "cuda:77", "device 'cuda:77' is not there; this machine has: cpu"),
    ("--device", "toaster", "device 'toaster' is not there; this machine has: cpu"),
])
def test_an_option_out_of_range(refused, checkpoints, option, value, words):
    line = refused("--model", checkpoints["llama"], option, value, "hello")
    assert words in line and len(line) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(refused, checkpoints):
    line = refused("--model", checkpoints["llama"], "--device", "cuda", "x")
    assert "device 'cuda' is not there; this machine has: cpu" in line


def test_no_prompt_and_prompts_twice(refused, tmp_path):
    assert "no prompt was given" in refused()
    assert "both" in refused("--prompts", tmp_path / "p.jsonl", "hello")


def python_m_minprfaas(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "minprfaas", *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=environment)


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(name, argument, ...)` runs a script in this process; returns its exit status, stdout and stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("program", ["demo_prompts.py", "random_checkpoint.py"])
def test_a_script_that_cannot_write_its_file_says_so_before_its_work(tmp_path, script, program):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "out", "/proc/nowhere/out"]
    if program == "demo_prompts.py":
        places += [""]  # a directory; `OutputFile` has tests of its own for the others
    for place in places:
        status, said, errors = script(program, place)
        assert (status, said) == (2, ""), place
        assert "cannot be written" in errors and errors.count("\n") == 1, (place, errors)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_demo_prompts_on_a_full_disk_leaves_nothing_behind(tmp_path, script):
    """The limit on a file's size stands for the disk's end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        ended = script("demo_prompts.py", tmp_path / "out", "--tokens", 2048, "--next-turn", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended == (2, "", f"error: {tmp_path}/out cannot be written: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_says_one_line_and_exits_with_2(tmp_path):
    done = python_m_minprfaas("generate", "--model", tmp_path / "nowhere", "hello")
    assert (done.returncode, done.stdout) == (2, "")
    reason = "is not a directory; a checkpoint is a directory with config.json"
    assert done.stderr == f"error: {tmp_path}/nowhere {reason}\n"


def test_a_real_process_answers_prompts_as_json_lines(checkpoints, hybrid, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "Once", "max_tokens": 3}\n{"id": "b", "prompt": "Twice", "max_tokens": 2}\n')
    done = python_m_minprfaas("generate", "--model", checkpoints["kimi_linear"], "--prompts", path, "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["id"], len(line["token_ids"]), line["prompt_tokens"]) for line in lines] == [("a", 3, 4), ("b", 2, 5)]
    assert lines[0]["token_ids"][0] == int(hybrid[0](torch.tensor([hybrid[1].encode("Once")]))[0, -1].argmax())
