"""Writes the golden checkpoints: tiny random models, and the logits that Hugging Face Transformers computes from them.

Run once, by hand, where `transformers` (5.17) is installed: `python tests/golden/make_golden.py`. The tests read
what it left, and need no `transformers`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (KimiLinearConfig, KimiLinearForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 150  # more than two KDA chunks, and beyond the original context of the scaled RoPE
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_attention_heads=4, max_position_embeddings=256,
             bos_token_id=None, eos_token_id=0, pad_token_id=None)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2)),
    "llama_scaled_biased_tied": (LlamaForCausalLM, LlamaConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=1, head_dim=16, attention_bias=True, tie_word_embeddings=True,
        rope_parameters=LLAMA3_ROPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=16)),
    "kimi_linear": (KimiLinearForCausalLM, KimiLinearConfig(
        **SIZES, num_hidden_layers=4, num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, first_k_dense_replace=4, linear_attn_config=dict(
            num_heads=2, head_dim=8, short_conv_kernel_size=4, kda_layers=[1, 2, 3], full_attn_layers=[4]))),
}


def main() -> int:
    for seed, (name, (model_class, config)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        randomize(model)
        directory = HERE / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        use_published_names(directory / "model.safetensors")
        token_ids = torch.randint(0, config.vocab_size, (1, PROMPT_TOKENS))
        with torch.no_grad():
            logits = model(token_ids).logits
        save_file({"token_ids": token_ids, "logits": logits.contiguous()}, HERE / f"{name}.logits.safetensors")
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {count:,} parameters, logits with a standard deviation of {logits.std():.2f}")
    return 0


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Make every tensor matter: fresh weights have norms of exactly one, biases of zero and near-uniform attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-1.0, 1.5)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4.0, 1.0)
        elif parameter.dim() == 1:
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 0.2)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def use_published_names(path: Path) -> None:
    """Transformers saves Kimi Linear's dense MLPs as `block_sparse_moe`; the published checkpoints call them `mlp`."""
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
