"""Small shared things: tiny random models of every family, as objects and as checkpoint directories."""

import os
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and processes that share two cores

import pytest
import tokenizers

import minprfaas  # noqa: F401  (before torch: it silences what torch says of NumPy)
import torch

from minprfaas.engine.pieces import compiled
from minprfaas.model.checkpoint import load, save_checkpoint
from minprfaas.model.families import config_from_hf
from minprfaas.model.transformer import Transformer

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0)
TINY = {
    "llama": dict(SIZES, model_type="llama", num_key_value_heads=2, max_position_embeddings=512),
    "qwen3": dict(SIZES, model_type="qwen3", num_key_value_heads=1, head_dim=16, max_position_embeddings=512),
    "kimi_linear": dict(
        SIZES, model_type="kimi_linear", num_hidden_layers=4, first_k_dense_replace=4, model_max_length=512,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, linear_attn_config=dict(
            num_heads=2, head_dim=8, short_conv_kernel_size=4, kda_layers=[1, 2, 3], full_attn_layers=[4])),
    "mimo_v2_flash": dict(
        SIZES, model_type="mimo_v2_flash", num_hidden_layers=3, num_key_value_heads=1, head_dim=8, v_head_dim=4,
        sliding_window=20, layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"], n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=16, max_position_embeddings=512),
}
FAMILIES = tuple(TINY)
END_OF_TEXT = "<|end|>"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """257 tokens: the end of text (id 0) and every byte. What a random model writes is then rarely whole UTF-8."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0, **{letter: number for number, letter in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def write_checkpoint(directory, family: str, **overrides):
    """A tiny random checkpoint with a byte tokenizer; returns `directory`. The same family has the same weights."""
    raw = {"vocab_size": 257, **TINY[family], **overrides}
    torch.manual_seed(7)
    model = Transformer(config_from_hf(raw))
    with torch.no_grad():  # loud enough that every earlier token sways the next one
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1 if "embed" in name else weight.shape[1] ** -0.5)
    save_checkpoint(model, raw, directory, torch.float32)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Family -> checkpoint directory. Shared by all tests: copy before you damage one."""
    return {family: write_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="session")
def models(checkpoints):
    """Family -> (model, tokenizer) in float32 on the CPU."""
    return {family: load(directory) for family, directory in checkpoints.items()}


@pytest.fixture(autouse=True)
def products_are_exact():
    """A fast runner in bfloat16 allows TF32 for the whole process: with its test that is over."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def unwritten_is_nan(request):
    """Memory that a test on a CPU has not written is NaN, as it may be; on a GPU a library would refuse."""
    if request.node.callspec.params.get("device") == "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which is what fills it
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def hybrid(models):
    """The hybrid's (model, tokenizer)."""
    return models["kimi_linear"]


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Failed to initialize NumPy")  # torch works without it


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not by keyword: a checkout may lie in a folder of that name
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced, and run as it is: a backend adds nothing to count or to round."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled.cache_clear()  # of other tests, which had a backend
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")  # after a warm-up nothing is compiled
    compiled.cache_clear()
    torch._dynamo.reset()
