"""What chapters make up: a published model made small (01), a small hybrid and its users (06)."""

import random
import shutil
from pathlib import Path

import torch

from minprfaas.config import LayerConfig, ModelConfig
from minprfaas.files import read_json
from minprfaas.model.checkpoint import EMBEDDED, save_checkpoint
from minprfaas.model.families import SHIPPED, config_from_hf, read_config
from minprfaas.model.kda import KDAConfig
from minprfaas.model.layers import DenseConfig
from minprfaas.model.mla import MLAConfig
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


def small_hybrid() -> Transformer:
    """Eight layers, of which every fourth is MLA and the others KDA: that of chapter 03."""
    kda = KDAConfig(num_heads=4, head_dim=32)
    mla = MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_dim=32, qk_shared_dim=16, v_dim=32)
    layers = tuple(LayerConfig(mixer, DenseConfig(256)) for mixer in (kda, kda, kda, mla) * 2)
    return Transformer(ModelConfig("kimi_linear", 512, 128, layers, norm_eps=1e-6, tie_embeddings=True,
                                   max_context_tokens=8192)).eval()


def conversations(turns: int, rng: random.Random) -> list[list[int]]:
    """For each turn the numbers of its prompt's blocks: equal where two prompts begin alike. Half of the conversations
    open with one of 8 system prompts of 10 blocks; each turn brings 1 to 7 more."""
    trace, chats, fresh = [], [], iter(range(10**9))
    openings = [[next(fresh) for _ in range(10)] for _ in range(8)]
    for _ in range(turns):
        if chats and rng.random() < 0.6:  # one of the last hundred or so goes on
            chat = chats[-min(int(rng.expovariate(0.02)) + 1, len(chats))]
        else:
            chat = list(rng.choice(openings)) if rng.random() < 0.5 else []
            chats.append(chat)
        chat += [next(fresh) for _ in range(rng.randrange(1, 8))]
        trace.append(list(chat))
    return trace
