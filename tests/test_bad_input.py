"""Every mistake a person can make on the command line: one line that names it, exit status 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minprfaas.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(argument, ...)` runs `python -m minprfaas generate` and returns its one line on stderr."""

    def run(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(["generate", *map(str, arguments)])
        out, err = capsys.readouterr()
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
    assert "nowhere is not a directory" in refused("--model", tmp_path / "nowhere", "hello")


def test_an_architecture_that_is_not_supported(refused, damaged):
    rewrite_config(damaged, model_type="gpt2")
    line = refused("--model", damaged, "hello")
    assert "architecture 'gpt2' is not supported; supported: kimi_linear, llama, qwen3" in line


def test_a_model_whose_tensors_do_not_fit_its_configuration(refused, damaged):
    rewrite_config(damaged, intermediate_size=50)
    line = refused("--model", damaged, "hello")
    assert "model.layers.0.mlp.gate_proj.weight" in line and "[48, 32]" in line and "[50, 32]" in line


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
    ("--temperature", "-1", "temperature is -1.0"),
    ("--temperature", "nan", "temperature is nan"),
    ("--top-k", "-2", "top_k is -2"),
    ("--top-p", "1.5", "top_p is 1.5"),
    ("--seed", str(2**64), f"seed is {2**64}"),
    ("--stop", "", "stop is ('',)"),
    ("--prefill-chunk", "0", "prefill chunk of 0 tokens"),
    ("--pool-blocks", "0", "num_blocks is 0"),
    ("--device", "cuda:77", "device 'cuda:77' is not there; this machine has: cpu"),
    ("--device", "toaster", "device 'toaster' is not there; this machine has: cpu"),
])
def test_an_option_out_of_range(refused, checkpoints, option, value, words):
    assert words in refused("--model", checkpoints["llama"], option, value, "hello")


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
