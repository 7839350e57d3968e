"""Checkpoint families: what each Hugging Face `config.json` means in our own pieces. Chapter 01.

A family is one reader, entered in `FAMILIES`, that lays out a mixer and an MLP a layer; `shared.py` reads what all of
them share. Each reads both forms of its configuration that are about: its authors' own and the Transformers library's.
The paper's six models are here by name, as their authors publish them: configurations, no weights (table 1).
"""

import os
from pathlib import Path

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError
from minprfaas.files import read_json
from minprfaas.model.families.dense import llama, qwen3
from minprfaas.model.families.kimi import kimi_linear
from minprfaas.model.families.ling import bailing_hybrid, bailing_moe_v2_5
from minprfaas.model.families.mimo import mimo_v2_flash
from minprfaas.model.families.minimax import minimax_m2
from minprfaas.model.families.minimax_text import minimax
from minprfaas.model.families.qwen_hybrid import qwen3_5, qwen3_next
from minprfaas.model.families.qwen_moe import qwen3_moe

FAMILIES = {reader.__name__: reader for reader in (
    llama, qwen3, qwen3_moe, kimi_linear, mimo_v2_flash, minimax_m2, minimax, qwen3_next, qwen3_5, bailing_hybrid,
    bailing_moe_v2_5)}
FAMILIES |= {"minimax_text_01": minimax, "qwen3_5_text": qwen3_5, "qwen3_5_moe": qwen3_5, "qwen3_5_moe_text": qwen3_5}

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"  # each says where it is from
PUBLISHED = {  # our name -> the paper's
    "kimi-linear-48b": "Kimi Linear", "mimo-v2-flash": "MiMo-V2-Flash", "qwen3.5-397b": "Qwen3.5-397B",
    "ring-2.5-1t": "Ring-2.5-1T", "minimax-m2.5": "MiniMax-M2.5", "qwen3-235b": "Qwen3-235B"}


def read_published(name: str) -> ModelConfig:
    """One of `PUBLISHED`. Raises UserError with the names that there are."""
    if name not in PUBLISHED:
        raise UserError(f"no configuration {name[:80]!r} is shipped; there are: {', '.join(PUBLISHED)}")
    return config_from_hf(read_json(SHIPPED / f"{name}.json"))


def read_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json`'s end-of-text ids, if there). Raises UserError."""
    directory = Path(directory)
    if not os.path.isdir(directory):  # `Path.is_dir` raises where a folder may not be looked into
        raise UserError(f"{directory} is not a directory; a checkpoint is a directory with config.json")
    raw = read_json(directory / "config.json", "a checkpoint directory has one")
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        eos = read_json(generation_path).get("eos_token_id")
        raw["eos_token_id"] = raw.get("eos_token_id") if eos is None else eos
    return config_from_hf(raw)


def config_from_hf(raw: dict) -> ModelConfig:
    """Build from the contents of a Hugging Face `config.json`. Raises UserError naming the field at fault."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"architecture {str(family)[:80]!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "of an unknown kind") if isinstance(method, dict) else method
        raise UserError(f"quantization {str(method)[:80]!r} is not supported; supported: none, weights are floats of "
                        "32 or 16 bits")
    try:
        return FAMILIES[family](raw)
    except KeyError as error:
        raise UserError(f"config.json of architecture {family!r} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of the wrong kind, or a zero
        raise UserError(f"config.json of architecture {family!r} is malformed: {error}") from None
