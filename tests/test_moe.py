"""Mixtures of experts: the routing, the experts' sums, and every form in which a checkpoint holds their weights.

Chapter 01.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_parity import PARITY

from minprfaas.errors import UserError
from minprfaas.model.checkpoint import load_checkpoint, save_tensors
from minprfaas.model.families import read_config
from minprfaas.model.moe import MoE, MoEConfig

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"


@pytest.fixture
def copy(tmp_path):
    """A checkpoint with experts one by one, to change or damage."""
    return shutil.copytree(PARITY / "minimax_m2", tmp_path / "checkpoint")


def load(directory, dtype=torch.float32):
    return load_checkpoint(directory, read_config(directory), dtype, "cpu")


def change(directory, change_tensors):
    tensors = load_file(directory / "model.safetensors")
    save_tensors({name: tensor.contiguous() for name, tensor in change_tensors(tensors).items()},
                 directory / "model.safetensors")


def refusal(directory) -> str:
    with pytest.raises(UserError) as caught:
        load(directory)
    return str(caught.value)


@pytest.mark.parametrize("config", [
    MoEConfig(6, 2, 8, "softmax", renormalize=False), MoEConfig(6, 6, 8, "softmax", shared_size=12, shared_gate=True),
    MoEConfig(8, 3, 8, "sigmoid", num_groups=4, top_groups=2, routed_scale=2.5, shared_size=12)])
def test_tokens_sorted_by_expert_give_the_sums_that_each_token_has_by_itself(config):
    torch.manual_seed(0)
    moe, x = MoE(config, 16).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    for parameter in moe.parameters():
        parameter.data.normal_()
    out = moe(x)
    for token, got in zip(x.flatten(0, 1), out.flatten(0, 1)):
        chosen, weights = moe.gate(token[None])
        expected = torch.zeros(16, dtype=torch.float64)
        for expert, weight in zip(chosen[0], weights[0]):
            gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
            expected += weight * (moe.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        if moe.shared_experts is not None:
            open_by = 1.0 if moe.shared_expert_gate is None else moe.shared_expert_gate(token).sigmoid()
            expected += open_by * moe.shared_experts(token)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)  # the router is in float32


def test_a_group_is_kept_for_its_two_best_experts_and_the_bias_sways_the_choice_alone():
    moe = MoE(MoEConfig(6, 2, 4, "sigmoid", renormalize=False, num_groups=3), 6)
    moe.gate.weight.data = torch.eye(6)
    scores = torch.tensor([9.0, -9.0, 1.0, 1.0, 2.0, -3.0])  # the best expert is in a group of two poor ones
    chosen, weights = moe.gate(scores[None])
    assert sorted(chosen[0].tolist()) == [2, 3]
    torch.testing.assert_close(weights, torch.full((1, 2), torch.tensor(1.0).sigmoid()))
    moe.gate.e_score_correction_bias.data[5] = 5.0
    chosen, weights = moe.gate(scores[None])
    assert sorted(chosen[0].tolist()) == [4, 5]
    torch.testing.assert_close(weights.sum(), torch.tensor([2.0, -3.0]).sigmoid().sum())


@pytest.mark.parametrize("numbers", [(6, 7, 1, 1), (6, 2, 4, 1), (6, 2, 2, 3), (6, 4, 2, 1), (6, 1, 6, 1)])
def test_a_choice_that_groups_cannot_give_is_refused(numbers):
    num_experts, top_k, num_groups, top_groups = numbers
    with pytest.raises(UserError, match=f"{top_k} experts a token cannot be chosen"):
        MoEConfig(num_experts, top_k, 8, "sigmoid", num_groups=num_groups, top_groups=top_groups)


def test_fused_and_single_experts_under_any_spelling_are_the_same_model(copy):
    single = dict(load(copy).named_parameters())
    change(copy, lambda tensors: {
        name.replace("block_sparse_moe", "mlp").replace("w1.", "gate_proj.").replace("w3.", "up_proj.")
        .replace("w2.", "down_proj."): tensor for name, tensor in tensors.items()})
    respelled = dict(load(copy).named_parameters())
    change(copy, lambda tensors: {name: weight.data for name, weight in single.items()})
    fused = dict(load(copy).named_parameters())
    assert single.keys() == respelled.keys() == fused.keys()
    for name, weight in single.items():
        assert torch.equal(weight, respelled[name]) and torch.equal(weight, fused[name]), name


def test_a_router_stays_in_float32(copy):
    model = load(copy, torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".mlp.gate." in name} == {torch.float32}
    assert {dtypes[name] for name in dtypes if ".mlp.gate." not in name} == {torch.bfloat16}
    assert model(torch.arange(1, 30)[None]).isfinite().all()


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("damage, words", [
    (lambda tensors: without(tensors, EXPERT), [f"{EXPERT} is missing", "[40, 32]"]),
    (lambda tensors: without(tensors, BIAS), [f"{BIAS} is missing"]),
    (lambda tensors: {**tensors, EXPERT.replace("5.w3", "8.w3"): tensors[EXPERT]},
     ["8.w3", "not part of a minimax_m2"]),
    (lambda tensors: {**tensors, EXPERT: tensors[EXPERT][1:]}, [EXPERT, "[39, 32]", "[40, 32]"]),
    (lambda tensors: {**tensors, EXPERT: tensors[EXPERT].int()}, [EXPERT, "holds I32", "F32, BF16, F16"]),
    (lambda tensors: {**tensors, EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}, [EXPERT, "holds F8_E4M3"]),
    (lambda tensors: {**tensors, EXPERT: tensors[EXPERT].fill_(float("nan"))}, [EXPERT, "not finite"]),
    (lambda tensors: {**tensors, BIAS: tensors[BIAS].fill_(float("inf"))}, [BIAS, "not finite"]),
    (lambda tensors: {**tensors, BIAS.replace("block_sparse_moe", "mlp.gate"): tensors[BIAS]}, [BIAS, "are the same"]),
])
def test_a_damaged_checkpoint_is_refused_with_the_tensors_own_name(copy, damage, words):
    change(copy, damage)
    line = refusal(copy)
    assert all(word in line for word in words) and "\n" not in line, line


def test_a_quantized_checkpoint_is_refused_by_the_name_of_its_quantization(copy):
    raw = json.loads((copy / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (copy / "config.json").write_text(json.dumps(raw))
    assert "quantization 'fp8' is not supported" in refusal(copy)
