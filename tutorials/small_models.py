"""A published configuration made small enough to run here, with random weights. Chapter 01."""

import shutil
from pathlib import Path

import torch

from minprfaas.files import read_json
from minprfaas.model.checkpoint import EMBEDDED, save_checkpoint
from minprfaas.model.families import SHIPPED, config_from_hf, read_config
from minprfaas.model.transformer import Transformer

LAYERS = 8  # one whole group of every kind of layer
SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
         "num_experts_per_tok": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "eos_token_id": None,
         "num_hidden_layers": LAYERS, "vocab_size": read_config(EMBEDDED).vocab_size}


def made_small(fields: dict) -> dict:
    """A published config.json with its first layers alone and narrow; the heads keep their shapes."""
    small = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = made_small(value)
        elif name in ("full_attn_layers", "kda_layers"):
            value = [number for number in value if number <= LAYERS]
        elif isinstance(value, list) and len(value) > LAYERS:
            value = value[:LAYERS]
        small[name] = SMALL.get(name, value)
    return small


def write_small(name: str, directory: Path) -> Path:
    """A checkpoint of that model with random weights and the embedded model's tokenizer; returns where it is."""
    raw = made_small(read_json(SHIPPED / f"{name}.json"))
    torch.manual_seed(0)
    save_checkpoint(Transformer(config_from_hf(raw)), raw, directory / name, torch.float32)
    shutil.copy(EMBEDDED / "tokenizer.json", directory / name)
    return directory / name
