"""The paper's six models as their authors publish them, by name: configurations, no weights. Chapter 00; table 1."""

from pathlib import Path

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError
from minprfaas.files import read_json
from minprfaas.model.families import config_from_hf

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "models"  # each says where it is from
PUBLISHED = {  # our name -> the paper's
    "kimi-linear-48b": "Kimi Linear", "mimo-v2-flash": "MiMo-V2-Flash", "qwen3.5-397b": "Qwen3.5-397B",
    "ring-2.5-1t": "Ring-2.5-1T", "minimax-m2.5": "MiniMax-M2.5", "qwen3-235b": "Qwen3-235B"}


def read_published(name: str) -> ModelConfig:
    """One of `PUBLISHED`. Raises UserError with the names that there are."""
    if name not in PUBLISHED:
        raise UserError(f"no configuration {name[:80]!r} is shipped; there are: {', '.join(PUBLISHED)}")
    return config_from_hf(read_json(SHIPPED / f"{name}.json"))
