"""Loading checkpoint directories: whole ones in every form, and every way in which one can be broken. Chapter 01."""

import json
import os
import shutil

import pytest
import torch
from conftest import FAMILIES, TINY, write_checkpoint
from safetensors.torch import load_file

from minprfaas import load
from minprfaas.errors import UserError
from minprfaas.model.checkpoint import checked_device, load_checkpoint, save_checkpoint, save_tensors
from minprfaas.model.families import config_from_hf, read_config
from minprfaas.model.transformer import Transformer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A hybrid checkpoint to damage."""
    return shutil.copytree(checkpoints["kimi_linear"], tmp_path / "checkpoint")


def refusal(directory, **options) -> str:
    """The one line that loading `directory` is refused with."""
    with pytest.raises(UserError) as caught:
        load(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_tensors(directory, change) -> None:
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_tensors(tensors, directory / "model.safetensors")


def shard(directory, count: int) -> list[str]:
    """Split model.safetensors into `count` shards with an index; returns their names."""
    tensors = load_file(directory / "model.safetensors")
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: names[position % count] for position, name in enumerate(tensors)}
    for file in names:
        save_tensors({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_what_is_loaded(tmp_path, family):
    raw = {"vocab_size": 257, **TINY[family]}
    torch.manual_seed(3)
    model = Transformer(config_from_hf(raw))
    save_checkpoint(model, raw, tmp_path, torch.float32)
    loaded = load_checkpoint(tmp_path, read_config(tmp_path), torch.float32, "cpu")
    for (name, saved), (_, read) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(saved, read), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_sharded_checkpoint_equals_the_single_file(copy, hybrid):
    shard(copy, 3)
    sharded = load(copy)[0]
    for (name, whole), (_, part) in zip(hybrid[0].named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(whole, part), name


def test_tied_embeddings_are_one_tensor_with_or_without_a_stored_head(tmp_path):
    directory = write_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    without_head = load(directory)[0]
    assert without_head.lm_head.weight is without_head.model.embed_tokens.weight
    change_tensors(directory, lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    with_head = load(directory)[0]
    ids = torch.arange(1, 20)[None]
    assert torch.equal(with_head(ids), without_head(ids))


def test_a_stored_rope_table_is_ignored_as_older_files_have_one(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "old")
    change_tensors(directory, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(directory)


def test_weights_are_converted_to_the_asked_number_format(copy):
    assert {parameter.dtype for parameter in load(copy, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_the_fingerprint_tells_weights_configuration_and_number_format_apart(copy, hybrid):
    original = hybrid[0].fingerprint
    assert len(original) == 32 and load(copy)[0].fingerprint == original
    assert load(copy, dtype=torch.bfloat16)[0].fingerprint != original
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-3}))
    assert load(copy)[0].fingerprint != original
    (copy / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    assert load(copy)[0].fingerprint == original
    change_tensors(copy, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert load(copy)[0].fingerprint != original


def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert "config.json is missing" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "nowhere")


def test_a_checkpoint_without_weights_or_tokenizer(copy):
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(copy)


def test_an_architecture_that_is_not_supported_is_named_with_the_supported_ones(copy):
    (copy / "config.json").write_text('{"model_type": "mamba2"}')
    line = refusal(copy)
    assert "'mamba2'" in line and all(family in line for family in FAMILIES)


def test_a_missing_tensor_is_named_with_the_shape_it_should_have(copy):
    change_tensors(copy, lambda tensors: tensors.pop("model.layers.1.self_attn.f_b_proj.weight"))
    line = refusal(copy)
    assert "model.layers.1.self_attn.f_b_proj.weight is missing" in line and "[16, 8]" in line


def test_an_extra_tensor_is_named_with_its_shape(copy):
    change_tensors(copy, lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}))
    line = refusal(copy)
    assert "model.layers.4.mlp.up_proj.weight" in line and "[48, 32]" in line and "not part of" in line


def test_a_misshapen_tensor_is_named_with_both_shapes(copy):
    change_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}))
    line = refusal(copy)
    assert "model.norm.weight" in line and "[33]" in line and "[32]" in line


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.03, 0.2, 0.5, 0.999])
def test_a_file_cut_short_anywhere_is_refused(copy, kept):
    """In the header's length, in the header, in the data, and by its last bytes."""
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "model.safetensors is truncated or corrupt" in refusal(copy)


@pytest.mark.parametrize("damage", [
    lambda data: b"\xff" * 8 + data[8:],  # a header of 2**64 bytes
    lambda data: data[:8] + b"\xff" * 16 + data[24:],  # a header that is no JSON
    lambda data: data + b"\0" * 64,  # more data than the header speaks of
    lambda data: b"PK\x03\x04" + data,  # another kind of file
    lambda data: data.replace(b'"F32"', b'"F99"', 1),  # a number format that there is not
])
def test_a_corrupt_header_is_refused(copy, damage):
    path = copy / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors is truncated or corrupt" in refusal(copy)


def test_a_missing_or_damaged_shard_is_named(copy):
    names = shard(copy, 3)
    (copy / names[1]).rename(copy / "elsewhere")
    line = refusal(copy)
    assert f"{names[1]} is missing" in line and INDEX in line
    data = (copy / "elsewhere").read_bytes()
    (copy / names[1]).write_bytes(data[: len(data) // 2])
    assert f"{names[1]} is truncated or corrupt" in refusal(copy)


@pytest.mark.parametrize("index", [
    '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}', '{"weight_map": [1]}', "{"])
def test_a_malformed_index_is_named(copy, index):
    shard(copy, 2)
    (copy / INDEX).write_text(index)
    assert INDEX in refusal(copy)


@pytest.mark.parametrize("share, words", [(0.9, "the weights take"), (1000, "too large for this machine")])
def test_weights_beyond_the_memory_are_refused_though_files_and_configuration_agree(tmp_path, share, words):
    """A sparse file of bfloat16: 0.9 of the memory can be mapped, but takes 1.8 of it in float32."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hidden_size = 2**18
    raw = {**TINY["llama"], "hidden_size": hidden_size, "head_dim": 8, "tie_word_embeddings": True,
           "vocab_size": min(int(share * memory_bytes / 2 / hidden_size), 2**24)}
    header, end = {}, 0
    with torch.device("meta"):
        model = Transformer(config_from_hf(raw))
    for name, weight in model.named_parameters():
        size = 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + end)
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(tmp_path, read_config(tmp_path), torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_named_with_those_that_are(copy):
    for device in ("cuda:99", "abacus", "meta", "cpu:x"):
        line = refusal(copy, device=device)
        assert repr(device) in line and "cpu" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_on_a_machine_without_it_is_one_line(copy):
    assert "'cuda' is not there; this machine has: cpu" in refusal(copy, device="cuda")


def test_devices_that_are_there_pass():
    assert checked_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
def test_a_checkpoint_loads_onto_cuda(copy, hybrid):
    model = load(copy, device="cuda")[0]
    assert model.device.type == "cuda"
    assert torch.equal(model.model.norm.weight.cpu(), hybrid[0].model.norm.weight)
