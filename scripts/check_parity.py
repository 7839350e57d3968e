"""Every family at shapes that nobody chose: random ones, our logits beside the oracle's. Chapter 01.

    python scripts/check_parity.py --seed 7            where `transformers` (5.24) is installed; nothing is written
    python scripts/check_parity.py --seed 7 --ring DIR     Ring 2.5 alone; DIR: a checkout of inclusionAI/Ring-V2.5

A shape begins as one of the fixtures (`make_parity_fixtures.py`); its widths, heads, layers, experts, windows and
prompt are drawn anew. Ring 2.5 is not in the library: its authors' own code is the oracle, which runs under
transformers 4.57 and takes the recurrence from flash-linear-attention; here that is written out, token by token in
float64.
"""

import importlib
import json
import random
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path

import minprfaas  # noqa: F401  (before torch: it silences what torch says of NumPy)
import torch
from make_parity_fixtures import (DECODE_STEPS, FIXTURES, VISION, Fixture, build, differences, draw_weights,
                                  expectation, family_of, save)
from safetensors.torch import save_file
from tqdm import tqdm

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error, require_number
from minprfaas.observe.tables import table

PROMPTS = (1, 2, 17, 63, 64, 65, 100, 127, 128, 129, 150, 190)  # around the linear mixers' chunks, too
CHOICES = {  # widths and counts that are drawn by themselves
    "hidden_size": (36, 72),  # the library's Llama wants a multiple of the heads, of which there are 1 to 9
    "intermediate_size": (24, 40, 56), "moe_intermediate_size": (8, 12, 20),
    "shared_expert_intermediate_size": (8, 12, 20), "kv_lora_rank": (12, 16, 24), "q_lora_rank": (12, 20),
    "qk_nope_head_dim": (6, 8, 12), "qk_rope_head_dim": (2, 4, 6), "v_head_dim": (6, 8, 12),
    "linear_num_heads": (1, 2, 3, 4), "linear_head_dim": (4, 8, 12), "linear_conv_kernel_dim": (2, 3, 4),
    "linear_key_head_dim": (8, 12, 16), "linear_value_head_dim": (8, 12, 16), "sliding_window": tuple(range(2, 170)),
    "block_size": (16, 32, 64), "num_shared_experts": (1, 2), "layer_group_size": (2, 3)}


@exit_on_user_error
def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0],
                            epilog="example: python scripts/check_parity.py --seed 7")
    parser.add_argument("--seed", type=int, default=0, help="of the first shape of each family (0)")
    parser.add_argument("--shapes", type=int, default=3, help="of each family (3)")
    parser.add_argument("--ring", metavar="DIR", help="check Ring 2.5, by its authors' code in DIR")
    args = parser.parse_args()
    require_number("--shapes", args.shapes, least=1, whole=True)
    if args.ring:
        sys.path.insert(0, args.ring)
        cases = [("bailing_moe_v2_5", seed) for seed in range(args.seed, args.seed + args.shapes)]
    else:
        families = sorted(set(map(family_of, FIXTURES)))
        cases = [(name, seed) for name in families for seed in range(args.seed, args.seed + args.shapes)]
    rows = []
    for name, seed in tqdm(cases, unit="shape", disable=None, leave=False):
        rows.append(ring_row(seed) if args.ring else row(name, seed))
    print(table(["family", "seed", "shape", "prompt", "largest difference", "decode difference", "tokens equal"], rows))
    return 0


def row(family: str, seed: int) -> list[str]:
    """One shape of a family that the library has."""
    rng = random.Random(f"{family} {seed}")
    base = rng.choice([name for name in FIXTURES if family_of(name) == family])
    fixture = shaken(FIXTURES[base], rng)
    oracle = build(base, fixture, fixture.whole_settings, seed)
    with tempfile.TemporaryDirectory() as directory:
        save(oracle, fixture, Path(directory))
        found = differences(Path(directory), expectation(oracle, fixture.prompt_tokens))
    return [family, str(seed), words(base, fixture.whole_settings), str(fixture.prompt_tokens), *found]


def words(base: str, settings: dict) -> str:
    """The fixture that it began as, its layers, heads and width."""
    settings = settings.get("text_config", settings)
    layers, heads, kv_heads = (settings[f"num_{name}"] for name in (
        "hidden_layers", "attention_heads", "key_value_heads"))
    variant = base.partition("-")[2]
    return f"{layers} layers, {heads}:{kv_heads} heads, {settings['hidden_size']} wide {variant}".rstrip()


def shaken(fixture: Fixture, rng: random.Random) -> Fixture:
    """The fixture at another shape, in the library's own spelling."""
    settings = fixture.whole_settings
    if "text_config" in settings:
        text = shaken_settings(settings["text_config"], rng)
        settings = {"text_config": text, "vision_config": {**VISION, "out_hidden_size": text["hidden_size"]}}
    else:
        settings = shaken_settings(settings, rng)
    return replace(fixture, settings=settings, published=None, prompt_tokens=rng.choice(PROMPTS))


def shaken_settings(settings: dict, rng: random.Random) -> dict:
    """Other sizes wherever the settings have one; which features there are stays as it is."""
    new = dict(settings)
    for name, choices in CHOICES.items():
        if new.get(name) is not None:
            new[name] = rng.choice(choices)
    kv_heads, is_mla = rng.choice((1, 2, 3)), "kv_lora_rank" in new
    # MiMo's layers with a window have twice as many KV heads.
    new["num_attention_heads"] = kv_heads * rng.choice((2, 4) if "sliding_window" in new else (1, 2, 3))
    new["num_key_value_heads"] = new["num_attention_heads"] if is_mla else kv_heads
    if not is_mla or "head_dim" in new:
        new["head_dim"] = rng.choice((8, 16, 24))
    if "linear_num_key_heads" in new:
        new["linear_num_key_heads"] = rng.choice((1, 2, 3))
        new["linear_num_value_heads"] = new["linear_num_key_heads"] * rng.choice((1, 2, 3))
    experts = next((name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in new), None)
    if experts:
        group_name = next((name for name in ("n_group", "num_expert_group") if name in new), None)
        groups, each = rng.choice((1, 2, 3)) if group_name else 1, rng.choice((3, 4, 5))
        chosen = rng.randint(1, groups)
        new |= {experts: groups * each, "num_experts_per_tok": rng.randint(1, min(4, chosen * each))}
        if group_name:
            new |= {group_name: groups, "topk_group": chosen}
    count = new["num_hidden_layers"] = rng.randint(4, 7)  # one of each kind where every fourth is of the other
    for name in ("layer_types", "mlp_layer_types"):
        if new.get(name):
            kinds = sorted(set(new[name]))
            drawn = kinds + rng.choices(kinds, k=count - len(kinds))
            new[name] = rng.sample(drawn, count)
    return new


# ---- Ring 2.5

@torch.no_grad()
def ring_row(seed: int) -> list[str]:
    """One shape of Ring 2.5, beside its authors' code. That keeps its cache in another version's classes: each token is
    decoded by it from the whole text."""
    rng = random.Random(f"ring {seed}")
    torch.manual_seed(seed)
    settings, prompt_tokens = ring_settings(rng), rng.choice(PROMPTS)
    configuration, modeling = authors_code()
    config = configuration.BailingMoeV2_5Config(**settings)
    config._attn_implementation = "eager"
    oracle = modeling.BailingMoeV2_5ForCausalLM(config).float().eval()
    draw_weights(oracle)
    tokens = torch.randint(1, settings["vocab_size"], (1, prompt_tokens))
    logits = oracle(tokens, use_cache=False).logits[0]
    steps = [logits[-1]]
    for _ in range(DECODE_STEPS):
        tokens = torch.cat([tokens, steps[-1].argmax().view(1, 1)], dim=1)
        steps.append(oracle(tokens, use_cache=False).logits[0, -1])
    expected = {"prompt": tokens[0, :prompt_tokens], "logits": logits, "decode_logits": torch.stack(steps[1:]),
                "tokens": torch.stack(steps).argmax(dim=-1)}
    with tempfile.TemporaryDirectory() as directory:
        save_file({name: tensor.contiguous() for name, tensor in oracle.state_dict().items()},
                  Path(directory) / "model.safetensors")
        raw = {**settings, "architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid"}
        (Path(directory) / "config.json").write_text(json.dumps(raw))
        found = differences(Path(directory), expected)
    return ["bailing_moe_v2_5", str(seed), words("", settings), str(prompt_tokens), *found]


def ring_settings(rng: random.Random) -> dict:
    """As `shaken_settings`; what the published model has in common (RoPE of as many channels in both mixers) stays."""
    heads, head_dim = rng.choice((2, 3, 4, 5, 6)), rng.choice((8, 12, 16, 20))
    groups, each = rng.choice((1, 2, 4)), rng.choice((2, 3, 4))
    chosen = rng.randint(1, groups)
    yarn = dict(type="yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0,
                mscale_all_dim=rng.choice((0.7, 1.0)))
    return dict(
        vocab_size=64, hidden_size=rng.choice((24, 32, 40, 48)), intermediate_size=rng.choice((24, 40, 56)),
        num_hidden_layers=rng.choice((3, 4, 5, 7, 9)), layer_group_size=rng.choice((2, 3, 4)), head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=heads, group_norm_size=rng.choice((1, 2, heads)),
        kv_lora_rank=rng.choice((12, 16, 24)), q_lora_rank=rng.choice((None, 12, 20)), qk_rope_head_dim=head_dim // 2,
        qk_nope_head_dim=rng.choice((6, 8, 12)), v_head_dim=rng.choice((6, 8, 12)), num_experts=groups * each,
        n_group=groups, topk_group=chosen, num_experts_per_tok=rng.randint(1, min(3, chosen * each)),
        num_shared_experts=rng.choice((1, 2)), moe_intermediate_size=rng.choice((8, 12, 20)),
        first_k_dense_replace=rng.choice((0, 1, 2)), routed_scaling_factor=rng.choice((1.0, 2.5)),
        use_qk_norm=rng.choice((True, False)), partial_rotary_factor=0.5, rope_theta=rng.choice((1e4, 6e5, 6e6)),
        rope_scaling=rng.choice((None, yarn)), max_position_embeddings=4096, eos_token_id=0, pad_token_id=None)


def authors_code() -> tuple[types.ModuleType, types.ModuleType]:
    """Configuration and model as their authors publish them, over the recurrence in PyTorch."""
    for part in ("fla", "fla.ops", "fla.ops.simple_gla"):
        sys.modules.setdefault(part, types.ModuleType(part))
    for part, name in (("chunk", "chunk_simple_gla"), ("fused_recurrent", "fused_recurrent_simple_gla")):
        module = types.ModuleType(f"fla.ops.simple_gla.{part}")
        setattr(module, name, simple_gla)
        sys.modules[module.__name__] = module
    try:
        return tuple(importlib.import_module(f"models.{part}_bailing_moe_v2_5")
                     for part in ("configuration", "modeling"))
    except ModuleNotFoundError as error:
        raise UserError(f"--ring: {error}; its code needs transformers 4.57") from None


def simple_gla(q, k, v, g, initial_state=None, output_final_state=False):
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T; o_t = S_t^T q_t / sqrt(dim), in float64."""
    q, k, v, g = (tensor.double() for tensor in (q, k, v, g))
    memory = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1).float(), None


if __name__ == "__main__":
    sys.exit(main())
