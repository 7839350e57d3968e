"""Writes a checkpoint of a real model's shape with random weights: for speed and memory, not for answers.

`python scripts/random_checkpoint.py --shape qwen3-0.6b OUT`; its tokenizer is the embedded model's.
"""

import shutil
import sys
from pathlib import Path

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error, long_import, require_number

QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
         "tie_word_embeddings": True, "max_position_embeddings": 40960, "eos_token_id": 151645,
         "num_key_value_heads": 8}
KIMI = {"model_type": "kimi_linear", "vocab_size": 163840, "rms_norm_eps": 1e-5, "model_max_length": 1048576,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "eos_token_id": 163586}
SHAPES = {
    "tiny-dense": {**QWEN3, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},  # to rehearse with
    "tiny-hybrid": {**KIMI, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8,
                    "num_attention_heads": 4, "first_k_dense_replace": 8, "tie_word_embeddings": True,
                    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
                    "linear_attn_config": {"num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4,
                                           "full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}},
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32},
    "hybrid-1b": {**KIMI, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                  "num_attention_heads": 16, "first_k_dense_replace": 28, "tie_word_embeddings": True,
                  "linear_attn_config": {"num_heads": 16, "head_dim": 128, "short_conv_kernel_size": 4,
                                         "full_attn_layers": list(range(4, 29, 4)),
                                         "kda_layers": [n for n in range(1, 29) if n % 4]}},
}


@exit_on_user_error
def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] + " The tokenizer is the embedded model's.",
                            epilog="example: python scripts/random_checkpoint.py --shape tiny-hybrid out/tiny-hybrid")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", metavar="NAME",
                        help=f"{', '.join(sorted(SHAPES))} (qwen3-0.6b)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one, other weights (0)")
    args = parser.parse_args()
    require_number("--seed", args.seed, least=0, most=2**63 - 1)
    with long_import():  # neither --help nor a mistake above is to wait for it
        import torch

        from minprfaas.model.checkpoint import EMBEDDED, save_checkpoint
        from minprfaas.model.families import config_from_hf
        from minprfaas.model.transformer import Transformer
    out = Path(args.out)
    try:  # the small file first: a place that cannot be written is then known before the weights are drawn
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(EMBEDDED / "tokenizer.json", out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    torch.manual_seed(args.seed)
    model = Transformer(config_from_hf(SHAPES[args.shape]))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    save_checkpoint(model, SHAPES[args.shape], args.out, torch.bfloat16)
    print(f"{args.out}: {args.shape}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M random parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
