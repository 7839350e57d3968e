"""How checkpoints spell the names of tensors, and which of ours they fill. Chapter 01.

Our modules carry the names that most Hugging Face checkpoints use. Others differ by author, and by whether the model's
authors wrote the file or the Transformers library did.
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

SPELLINGS = tuple((re.compile(pattern), ours) for pattern, ours in (  # applied to every name, in this order
    (r"\.block_sparse_moe\.", ".mlp."),  # MiniMax, Kimi
    (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),  # MiniMax
    (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),  # Qwen
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),  # MiniMax, Kimi
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    (r"\.self_attn\.attention_sink_bias$", ".self_attn.sinks"),  # MiMo
    (r"^model\.language_model\.", "model."),  # Qwen3.5, beside a part that sees
    (r"\.linear_attn\.", ".self_attn."),  # Qwen
    (r"^model\.word_embeddings\.", "model.embed_tokens."),  # Ling, Ring
    (r"\.attention\.", ".self_attn."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.self_attn\.(dense|out_proj)\.", ".self_attn.o_proj."),  # and Qwen, MiniMax
    (r"\.self_attn\.query_key_value\.", ".self_attn.qkv_proj."),  # Ring
    (r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.self_attn\.g_norm\.", ".self_attn.norm."),
    (r"\.self_attn\.output_gate\.", ".self_attn.g_proj."),  # MiniMax
    (r"\.self_attn\.forget_gate\.", ".self_attn."),  # Kimi and Ling, when the Transformers library wrote them
    (r"\.([qkv])_conv1d\.weight$", r".conv1d.\1.weight"),
))
NUMBER = re.compile(r"\.\d+(?=\.)")  # of a layer, or an expert
AROUND_ZERO = re.compile(r"(layernorm|[qk]_norm|^model\.norm)\.weight$")  # see `ModelConfig.norms_around_zero`
# Tables that follow from the configuration, heads that guess further tokens, and a part that sees.
NOT_NEEDED = re.compile(r"rotary_emb\.inv_freq$|\.(slope_rate|query_decay|key_decay|diagonal_decay)$|^(model\.)?mtp\."
                        r"|^model\.visual\.")


def our_name(stored: str) -> str | None:
    """Our name for a tensor of a checkpoint; None for one that is not needed."""
    if NOT_NEEDED.search(stored):
        return None
    for pattern, ours in SPELLINGS:
        stored = pattern.sub(ours, stored)
    return stored


def spelled(name: str, stored: dict[str, str]) -> str:
    """Our `name` as a checkpoint with the tensors `stored` (our name -> its name) would spell it, judged by the same
    tensor of another layer or expert; as it is, where there is none."""
    for ours, theirs in stored.items():
        if NUMBER.sub("", ours) == NUMBER.sub("", name):
            numbers = iter(NUMBER.findall(name))
            return NUMBER.sub(lambda _: next(numbers), theirs)
    return name


def places(model: nn.Module, found: set[str] | dict) -> Iterator[tuple[str, Tensor]]:
    """(name, where it belongs) of each tensor that a checkpoint with the names `found` must hold: a parameter, or, when
    its module can also be filled by parts and the whole is not there, each part's view of it."""
    seen = set()  # tied embeddings are one tensor in two modules
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}"
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if whole in found or not hasattr(module, "parts"):
                yield whole, weight
            else:
                for part, view in module.parts(name):
                    yield f"{prefix}.{part}", view
