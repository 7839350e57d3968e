"""Tiny random checkpoints of every family and the logits that Hugging Face Transformers computes from them. Chapter 01.

Run by hand where `transformers` (5.24) is installed; the tests read what it leaves and need no `transformers`:

    python scripts/make_parity_fixtures.py                     write all fixtures, print how far off we are
    python scripts/make_parity_fixtures.py qwen3_moe --speed   one of them, and prefill times at 2,048 tokens

A fixture is a checkpoint, `tests/fixtures/parity/NAME/`, and beside it `NAME.expected.safetensors`: the prompt, the
logits of each of its tokens, and ten greedy tokens decoded from the oracle's cache with the logits of each.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import minprfaas  # noqa: F401  (before torch: it silences what torch says of NumPy)
import torch
from safetensors.torch import save_file

from minprfaas.errors import ArgumentParser, UserError, exit_on_user_error
from minprfaas.model.checkpoint import load_checkpoint
from minprfaas.model.families import FAMILIES, read_config
from minprfaas.model.state import ContiguousState
from minprfaas.model.transformer import Transformer
from minprfaas.observe.tables import table

PARITY = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "parity"
PROMPT_TOKENS, DECODE_STEPS = 150, 10  # the prompt: more than two chunks of the delta rule
SPEED_TOKENS, SPEED_RUNS, SPEED_SCALE = 2048, 5, 8
MOST_BYTES = 2**20
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=2, out_hidden_size=32,
              num_position_embeddings=16)  # of the multimodal wrappers, whose text part alone is read
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, pad_token_id=None)
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim",
          "v_head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "linear_key_head_dim",
          "linear_value_head_dim", "linear_head_dim", "rotary_dim")  # what grows for the speed ratio


@dataclass(frozen=True)
class Fixture:
    """One row of the table below. `settings` are the oracle's own, beside `SIZES`; the family is its name up to "-"."""

    settings: dict = field(default_factory=dict)
    published: dict | None = None  # laid over config.json, as its authors spell it; None takes a field out
    prompt_tokens: int = PROMPT_TOKENS
    fused: bool = False  # experts as one tensor, as the oracle holds them, not one by one as they are published
    ties: bool = False  # the first router gives every expert the same score

    @property
    def whole_settings(self) -> dict:
        """All that the oracle is given; a multimodal wrapper has the sizes in its text part."""
        return self.settings if "text_config" in self.settings else {**SIZES, **self.settings}


GQA = dict(num_key_value_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=32)
HALF = dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5)
QWEN_MOE = dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True)
MIMO = dict(num_hidden_layers=4, num_key_value_heads=1, head_dim=24, v_head_dim=16, sliding_window=33,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
LINEAR, FULL = "linear_attention", "full_attention"
MLA = dict(num_hidden_layers=4, num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
           v_head_dim=8, num_local_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
KIMI = dict(MLA, linear_num_heads=2, linear_head_dim=8, layer_types=[LINEAR] * 3 + [FULL])
GATED = dict(GQA, num_hidden_layers=4, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=8,
             linear_num_key_heads=2, linear_num_value_heads=4)
GATED_MOE = dict(GATED, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16,
                 shared_expert_intermediate_size=16)
TEXT = dict(GQA, num_hidden_layers=4, num_local_experts=4, block_size=32, layer_types=[LINEAR] * 3 + [FULL])
FIXTURES = {
    "llama": Fixture(GQA),
    "llama-scaled_biased_tied": Fixture(dict(num_key_value_heads=1, head_dim=16, attention_bias=True,
                                             tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-linear_rope": Fixture(dict(GQA, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0))),
    "qwen3": Fixture(dict(GQA, head_dim=16)),
    "qwen3-yarn": Fixture(dict(GQA, head_dim=16, rope_parameters=YARN)),
    "qwen3_moe": Fixture(dict(GQA, **QWEN_MOE)),
    "qwen3_moe-ties_fused": Fixture(
        {**GQA, **QWEN_MOE, "norm_topk_prob": False, "mlp_only_layers": [1], "num_hidden_layers": 3},
        fused=True, ties=True),
    "qwen3_moe-step_bias_yarn": Fixture(dict(QWEN_MOE, num_key_value_heads=4, decoder_sparse_step=2,
                                             attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN)),
    "minimax_m2": Fixture(dict(GQA, head_dim=16, num_local_experts=8, num_experts_per_tok=3, rope_parameters=HALF),
                          published=dict(rope_parameters=None, rope_theta=1e4, rotary_dim=8, scoring_func="sigmoid",
                                         use_routing_bias=True, use_qk_norm=True, attn_type_list=[1, 1])),
    "minimax_m2-ties_fused": Fixture(dict(num_key_value_heads=1, head_dim=12, num_local_experts=6,
                                          num_experts_per_tok=2), fused=True, ties=True),
    "mimo_v2_flash": Fixture(MIMO, published=dict(
        layer_types=None, mlp_layer_types=None, rope_parameters=None, sliding_window=32, sliding_window_size=32,
        hybrid_layer_pattern=[0, 1, 1, 0], moe_layer_freq=[0, 1, 1, 1], rope_theta=5e6, swa_rope_theta=1e4,
        partial_rotary_factor=0.334, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=24,
        swa_v_head_dim=16, layernorm_epsilon=1e-5, rms_norm_eps=None, add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False, attention_value_scale=0.707, n_shared_experts=None)),
    "mimo_v2_flash-groups_ties": Fixture(
        dict(MIMO, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             mlp_layer_types=["sparse", "sparse", "dense"], sliding_window=160, n_group=4, topk_group=2,
             routed_scaling_factor=2.5, attention_bias=True, attention_value_scale=None, head_dim=16, v_head_dim=16),
        fused=True, ties=True),
    "mimo_v2_flash-short_window": Fixture(dict(MIMO, sliding_window=7, norm_topk_prob=False, num_key_value_heads=2,
                                               v_head_dim=8, head_dim=16)),
    "kimi_linear": Fixture(KIMI, published=dict(
        layer_types=None, mlp_layer_types=None, linear_num_heads=None, linear_head_dim=None, first_k_dense_replace=1,
        linear_conv_kernel_dim=None, moe_layer_freq=1, moe_router_activation_func="sigmoid", mla_use_nope=True,
        linear_attn_config=dict(num_heads=2, head_dim=8, short_conv_kernel_size=4, kda_layers=[1, 2, 3],
                                full_attn_layers=[4]))),
    "kimi_linear-groups_fused": Fixture(
        dict(KIMI, num_expert_group=4, topk_group=2, q_lora_rank=12, linear_num_heads=3, linear_conv_kernel_dim=3,
             mlp_layer_types=["dense", "sparse", "dense", "sparse"], attention_bias=True, moe_renormalize=False),
        fused=True, ties=True, prompt_tokens=129),
    "kimi_linear-one_chunk": Fixture(dict(KIMI, num_shared_experts=2), prompt_tokens=64),
    "bailing_hybrid": Fixture(dict(MLA, head_dim=8, layer_group_size=2, n_group=2, topk_group=1), published=dict(
        layer_types=None, mlp_layer_types=None, linear_head_dim=None, linear_num_heads=None, head_dim=8,
        linear_conv_kernel_dim=None, rope_parameters=None, rope_theta=6e6)),
    "bailing_hybrid-yarn_fused": Fixture(
        dict(MLA, head_dim=12, layer_types=[FULL, LINEAR, FULL, LINEAR], n_group=1, topk_group=1, q_lora_rank=20,
             kda_safe_gate=False, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=0.7)),
        fused=True, prompt_tokens=65),
    "bailing_hybrid-bound": Fixture(dict(MLA, head_dim=8, layer_group_size=4, kda_lower_bound=-2.0, n_group=4,
                                         topk_group=2, first_k_dense_replace=0), prompt_tokens=63, ties=True),
    "qwen3_next": Fixture(GATED_MOE, published=dict(layer_types=None, full_attention_interval=4, rope_parameters=None,
                                                    rope_theta=1e4, partial_rotary_factor=0.25)),
    "qwen3_next-heads_dense_fused": Fixture(
        dict(GATED_MOE, linear_num_value_heads=6, linear_key_head_dim=24, linear_conv_kernel_dim=3,
             norm_topk_prob=False, mlp_only_layers=[1], layer_types=[FULL, LINEAR, LINEAR, FULL],
             rope_parameters={**HALF, **YARN}),
        fused=True, ties=True, prompt_tokens=128),
    "qwen3_5_text": Fixture(dict(GATED, linear_value_head_dim=16, tie_word_embeddings=True), prompt_tokens=127),
    "qwen3_5_text-heads": Fixture(dict(GATED, num_key_value_heads=1, linear_num_key_heads=1, linear_num_value_heads=3,
                                       linear_value_head_dim=12, attention_bias=True, rope_parameters=HALF)),
    "qwen3_5_moe_text-fused": Fixture(GATED_MOE, fused=True, ties=True),
    "qwen3_5": Fixture(dict(text_config={**SIZES, **GATED}, vision_config=VISION)),
    "qwen3_5_moe": Fixture(dict(text_config={**SIZES, **GATED_MOE, "num_experts_per_tok": 2}, vision_config=VISION)),
    "minimax": Fixture(TEXT, published=dict(
        model_type="minimax_text_01", layer_types=None, attn_type_list=[0, 0, 0, 1], postnorm=True,
        rope_parameters=None, rope_theta=1e6, rotary_dim=8, shared_intermediate_size=0)),
    "minimax-weights_fused": Fixture(
        dict(TEXT, head_dim=16, num_key_value_heads=1, layer_types=[FULL, LINEAR, LINEAR, FULL], num_experts_per_tok=3,
             full_attn_alpha_factor=3.5, full_attn_beta_factor=0.7, linear_attn_alpha_factor=2.5,
             linear_attn_beta_factor=1.3, mlp_alpha_factor=1.5, mlp_beta_factor=0.6),
        fused=True, ties=True, prompt_tokens=65),
}


@exit_on_user_error
def main() -> int:
    args = parse_arguments()
    names = args.names or [name for name in FIXTURES if family_of(name) in FAMILIES]
    rows, speeds = [], []
    for name in names:
        if name not in FIXTURES:
            raise UserError(f"fixture {name!r} is not in the table; it has: {', '.join(FIXTURES)}")
        rows.append(parity_row(name))
        if args.speed:
            speeds.append(speed_row(name))
    print(table(["fixture", "KiB", "largest difference", "decode difference", "tokens equal"], rows))
    if args.speed:
        print(f"\nprefill of {SPEED_TOKENS:,} tokens on this machine, {torch.get_num_threads()} threads, float32, "
              f"median of {SPEED_RUNS} interleaved runs")
        print(table(["fixture", "parameters", "oracle s", "ours s", "oracle / ours", "in CPU time"], speeds))
    return 0


def parity_row(name: str) -> list[str]:
    """Write one fixture, and hold our model against it."""
    directory, fixture = PARITY / name, FIXTURES[name]
    oracle = build(name, fixture, fixture.whole_settings, seed=zlib.crc32(name.encode()))
    save(oracle, fixture, directory)
    expected = expectation(oracle, fixture.prompt_tokens)
    save_file(expected, PARITY / f"{name}.expected.safetensors")
    nbytes = sum(file.stat().st_size for file in [*directory.iterdir(), PARITY / f"{name}.expected.safetensors"])
    if nbytes > MOST_BYTES:
        raise UserError(f"fixture {name!r} has {nbytes:,} bytes; it must have {MOST_BYTES:,} at most")
    return [name, f"{nbytes / 1024:.0f}", *differences(directory, expected)]


def differences(directory: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """How far our model, loaded from the checkpoint, is off: the prompt's logits, the decoded ones', the tokens."""
    logits, decoded = ours(load_checkpoint(directory, read_config(directory), torch.float32, "cpu"), expected)
    equal = logits[-1].argmax() == expected["tokens"][0]
    equal &= torch.equal(decoded.argmax(dim=-1), expected["tokens"][1:])
    return [f"{(logits - expected['logits']).abs().max():.1e}",
            f"{(decoded - expected['decode_logits']).abs().max():.1e}", "yes" if equal else "NO"]


def family_of(name: str) -> str:
    """`qwen3_moe-ties` is a variant of `qwen3_moe`."""
    return name.partition("-")[0]


def build(name: str, fixture: Fixture, settings: dict, seed: int) -> torch.nn.Module:
    """The oracle's model, with `settings` of the fixture's kind and weights that all matter."""
    try:
        import transformers  # here: --help needs none
    except ModuleNotFoundError:
        raise UserError("the oracle is transformers 5.24, which is not installed") from None
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family_of(name), **copy.deepcopy(settings))  # it changes them
    is_wrapped = "text_config" in settings
    kind = transformers.AutoModelForImageTextToText if is_wrapped else transformers.AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    draw_weights(model, fixture.ties)
    return model


@torch.no_grad()
def draw_weights(model: torch.nn.Module, ties: bool = False) -> None:
    """Fresh weights have norms of one, biases of zero, near-uniform attention and routers that hardly choose."""
    ends = ("correction_bias", "expert_bias")
    biases = {place: buffer for place, buffer in model.named_buffers() if place.endswith(ends)}
    for place, tensor in {**dict(model.named_parameters()), **biases}.items():
        if place.endswith("A_log"):
            tensor.uniform_(-1.0, 1.5)
        elif place.endswith("dt_bias"):
            tensor.uniform_(-4.0, 1.0)
        elif tensor.dim() == 1:
            tensor.normal_(tensor.mean().round().item(), 0.2)  # fresh norms are 1, or 0 where 1 is added
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
    if ties:
        first = next(place for place, _ in model.named_parameters() if place.endswith("mlp.gate.weight"))
        for place, tensor in [*model.named_parameters(), *biases.items()]:
            if place == first or place.startswith(first.removesuffix("gate.weight")) and place in biases:
                tensor.zero_()


def save(oracle: torch.nn.Module, fixture: Fixture, directory: Path) -> None:
    """The checkpoint: as `save_pretrained` writes it, or with the configuration as its authors publish it."""
    oracle.save_pretrained(directory, save_original_format=not fixture.fused)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if fixture.published is not None:
        path = directory / "config.json"
        fields = {**json.loads(path.read_text()), **fixture.published}
        written = {name: value for name, value in fields.items() if name not in fixture.published or value is not None}
        path.write_text(json.dumps(written, indent=2) + "\n")


@torch.no_grad()
def expectation(oracle: torch.nn.Module, prompt_tokens: int) -> dict[str, torch.Tensor]:
    """What the oracle says: `logits` `[prompt, vocab]`; `tokens` `[steps + 1]`, the first drawn after the prompt;
    `decode_logits` `[steps, vocab]`, after each of them but the last."""
    prompt = torch.randint(1, SIZES["vocab_size"], (1, prompt_tokens))
    logits = oracle(prompt, use_cache=False).logits[0]
    out = oracle(prompt, use_cache=True)
    tokens, decoded = [out.logits[0, -1].argmax()], []
    for step in range(DECODE_STEPS):
        cache = getattr(out, "cache", None)
        cache = out.past_key_values if cache is None else cache
        # Said, because MiniMax counts what is cached in its first layer, which may keep no tokens.
        positions = torch.tensor([[prompt_tokens + step]])
        out = oracle(tokens[-1].view(1, 1), cache=cache, use_cache=True, position_ids=positions)
        decoded.append(out.logits[0, -1])
        tokens.append(decoded[-1].argmax())
    return {"prompt": prompt[0], "logits": logits.contiguous(), "tokens": torch.stack(tokens),
            "decode_logits": torch.stack(decoded)}


@torch.no_grad()
def ours(model: Transformer, expected: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from our model: the logits of the whole prompt, and of each decoded token."""
    prompt, state, decoded = expected["prompt"][None], ContiguousState(model.config, "float32"), []
    logits = model(prompt)[0]
    model(prompt, state)
    state.advance(prompt.shape[1])
    for token in expected["tokens"][:-1]:
        decoded.append(model(token.view(1, 1), state)[0, -1])
        state.advance(1)
    return logits, torch.stack(decoded)


@torch.no_grad()
def speed_row(name: str) -> list[str]:
    """Prefill of one long prompt by the oracle and by us, one after the other: a wider model of the same family."""
    oracle = build(name, FIXTURES[name], scaled(FIXTURES[name].whole_settings), seed=0)
    with tempfile.TemporaryDirectory() as directory:
        save(oracle, replace(FIXTURES[name], published=None), Path(directory))
        model = load_checkpoint(Path(directory), read_config(directory), torch.float32, "cpu")
    prompt = torch.randint(1, SIZES["vocab_size"], (1, SPEED_TOKENS))
    runs = {"oracle": lambda: oracle(prompt, use_cache=True, logits_to_keep=1),
            "ours": lambda: model(prompt, ContiguousState(model.config, "float32"), last_only=True)}
    elapsed, busy = {who: [] for who in runs}, {who: [] for who in runs}
    for _ in range(SPEED_RUNS):
        for who, run in runs.items():
            began_at_s, began_busy_s = time.perf_counter(), time.process_time()
            run()
            elapsed[who].append(time.perf_counter() - began_at_s)
            busy[who].append(time.process_time() - began_busy_s)
    oracle_s, ours_s, oracle_busy_s, ours_busy_s = (
        statistics.median(seconds[who]) for seconds in (elapsed, busy) for who in ("oracle", "ours"))
    parameters = sum(weight.numel() for weight in model.parameters())
    return [name, f"{parameters:,}", f"{oracle_s:.3f}", f"{ours_s:.3f}", f"{oracle_s / ours_s:.2f}",
            f"{oracle_busy_s / ours_busy_s:.2f}"]


def scaled(settings: dict) -> dict:
    """The settings with every width `SPEED_SCALE` times as large."""
    larger = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = scaled(value)
        larger[name] = value * SPEED_SCALE if name in WIDTHS and value is not None else value
    return larger


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0],
                            epilog="example: python scripts/make_parity_fixtures.py qwen3_moe --speed")
    parser.add_argument("names", nargs="*", metavar="NAME", help="fixtures to write (default: all)")
    parser.add_argument("--speed", action="store_true", help=f"also time prefill of {SPEED_TOKENS:,} tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
