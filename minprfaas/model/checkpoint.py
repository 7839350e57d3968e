"""Checkpoints: Hugging Face directories, every tensor's name and shape checked before one is loaded. Chapter 01."""

import hashlib
import json
import os
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError
from minprfaas.files import read_json, write_whole
from minprfaas.model.families import read_config
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer, parameter_shapes

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-hybrid"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load(path: str | Path | None = None, dtype: torch.dtype = torch.float32,
         device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer from a Hugging Face directory (no path: the embedded model). Raises UserError."""
    directory = Path(path) if path is not None else EMBEDDED
    config = read_config(directory)
    tokenizer = Tokenizer(directory, config)
    return load_checkpoint(directory, config, dtype, device), tokenizer


def load_checkpoint(directory: Path, config: ModelConfig, dtype: torch.dtype,
                    device: str | torch.device) -> Transformer:
    """The model alone. UserError names a missing, extra or misshapen tensor (with both shapes), an unreadable file, or
    weights that the device cannot hold."""
    device = checked_device(device)
    files = _weight_files(directory)
    elements = _check_names_and_shapes(directory, config, _tensor_shapes(files))
    _check_memory(directory, elements * dtype.itemsize, device)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for file in files:
            with _opened(file) as weights:
                for name in weights.keys():
                    if name in parameters:
                        parameters[name].copy_(weights.get_tensor(name))
    model.fingerprint = _fingerprint([directory / "config.json", *files], dtype)
    return model.eval().requires_grad_(False)


def save_checkpoint(model: Transformer, config_json: dict, directory: str | Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` (weights in `dtype`); each file appears whole or not at all.
    UserError when the directory cannot be written."""
    directory = Path(directory)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.named_parameters()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, directory / (SINGLE + ".partial"))
        os.replace(directory / (SINGLE + ".partial"), directory / SINGLE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
    write_whole(directory / "config.json", json.dumps(config_json, indent=2) + "\n")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Contiguous CPU tensors as one safetensors file (the library's own torch helper needs numpy; we do without)."""
    specs = {
        name: TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                         data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
        for name, tensor in tensors.items()}
    serialize_file(specs, path, metadata={"format": "pt"})


def checked_device(name: str | torch.device) -> torch.device:
    """The device of that name; UserError when it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"device {str(name)!r} is not there; this machine has: {', '.join(there)}") from None
    if device.type == "meta":
        raise UserError("device 'meta' cannot hold a model; use cpu or cuda")
    return device


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not is_map or not weight_map:
            raise UserError(f"{directory / INDEX} has no weight_map of tensor names to file names")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} has no *.safetensors file; a checkpoint directory has at least one")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {INDEX} names it")
    return files


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt: {error}") from None
    except RuntimeError as error:  # a file larger than memory, as a sparse one easily is
        raise UserError(f"{file} is too large for this machine: {error}") from None


def _tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in files:
        with _opened(file) as weights:
            for name in weights.keys():
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes


def _check_names_and_shapes(directory: Path, config: ModelConfig, found: dict[str, tuple[int, ...]]) -> int:
    """UserError unless the files hold exactly the configuration's tensors; returns how many elements they have."""
    expected = {}
    for name, shape in parameter_shapes(config):
        if name not in found:
            raise UserError(f"{directory}: tensor {name} is missing; {config.family} needs it with shape {list(shape)}")
        if found[name] != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(found[name])}; "
                            f"config.json asks for {list(shape)}")
        expected[name] = prod(shape)
    for name, shape in found.items():
        is_tied_head = name == "lm_head.weight" and config.tie_embeddings
        if name not in expected and not is_tied_head and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{directory}: tensor {name} with shape {list(shape)} is not part of a "
                            f"{config.family} model")
    return sum(expected.values())


def _check_memory(directory: Path, needed_bytes: int, device: torch.device) -> None:
    """A sparse file costs its writer nothing, so a header may speak of more than any machine holds."""
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > memory_bytes:
        raise UserError(f"{directory}: the weights take {needed_bytes / 2**30:,.1f} GiB; "
                        f"{device} has {memory_bytes / 2**30:,.1f} GiB")


def _fingerprint(files: list[Path], dtype: torch.dtype) -> bytes:
    """Names configuration, weights and number format: two nodes share KVCache only where this agrees."""
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=32)
    for file in files:
        with open(file, "rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.digest()
