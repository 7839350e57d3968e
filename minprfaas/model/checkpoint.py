"""Checkpoints: Hugging Face directories, every tensor's name and shape checked before one is loaded. Chapter 01."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch.overrides import TorchFunctionMode

from minprfaas.config import ModelConfig
from minprfaas.errors import UserError
from minprfaas.files import make_folder, read_json, write_whole, written_whole
from minprfaas.model.families import read_config
from minprfaas.model.moe import ExpertRouter
from minprfaas.model.names import AROUND_ZERO, our_name, places, spelled
from minprfaas.model.tokenizer import Tokenizer
from minprfaas.model.transformer import Transformer

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-hybrid"
FLOATS = ("F32", "BF16", "F16")  # as safetensors names them
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
    """The model alone, read one tensor at a time. UserError names a tensor that is missing, extra, misshapen (with both
    shapes), not of floats or not finite, an unreadable file, or weights that the device cannot hold."""
    device = checked_device(device)
    files = _weight_files(directory)
    stored = _stored_tensors(directory, files, config)
    model = _without_memory(directory, config, stored)
    _check_memory(directory, sum(weight.numel() for weight in model.parameters()) * dtype.itemsize, device)
    model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:  # `to_empty` gave each of the two a memory of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, ExpertRouter):
            module.float()
    with torch.no_grad():
        for name, place in places(model, stored):
            place.copy_(_read(directory, stored[name]))
            if config.norms_around_zero and AROUND_ZERO.search(name):
                place.add_(1.0)
    model.weights = _digest([directory / "config.json", *files])
    # Two nodes share blocks only where this agrees.
    model.fingerprint = hashlib.blake2b(model.weights + str(dtype).encode(), digest_size=32).digest()
    return model.eval().requires_grad_(False)


def save_checkpoint(model: Transformer, config_json: dict, directory: str | Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` (weights in `dtype`), each whole or not at all. Raises UserError."""
    directory = Path(directory)
    tensors = {}
    for name, tensor in model.named_parameters():
        is_less_one = model.config.norms_around_zero and AROUND_ZERO.search(name)
        tensors[name] = (tensor.detach() - 1.0 if is_less_one else tensor.detach()).to("cpu", dtype).contiguous()
    make_folder(directory)
    with written_whole(directory / SINGLE) as partial:
        save_tensors(tensors, partial)
    write_whole(directory / "config.json", json.dumps(config_json, indent=2) + "\n")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Contiguous CPU tensors as one safetensors file (the library's own torch helper needs numpy; we do without).
    OSError when it cannot be written."""
    specs = {}
    for name, tensor in tensors.items():
        specs[name] = TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                                 data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
    try:
        serialize_file(specs, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def checked_device(name: str | torch.device) -> torch.device:
    """The device of that name; UserError when it is not there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has a device, but no numbers
    except (RuntimeError, AssertionError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"device {str(name)!r} is not there; this machine has: {', '.join(there)}") from None
    return device


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} has no *.safetensors file; a checkpoint directory has at least one")
        return files
    try:
        files = sorted({directory / name for name in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError):
        files = []
    if not files:
        raise UserError(f"{index} has no weight_map of tensor names to file names")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {INDEX} names it")
    return files


class _Stored(NamedTuple):
    """A tensor of a checkpoint: its name there, and the open file that has it."""

    name: str
    file: safe_open


def _stored_tensors(directory: Path, files: list[Path], config: ModelConfig) -> dict[str, _Stored]:
    """By our own name, every tensor that the files hold; UserError unless each is there once and holds floats."""
    stored: dict[str, _Stored] = {}
    layers = len(config.layers)
    further = tuple(f"model.layers.{layer}." for layer in range(layers, layers + config.further_layers))
    for file in files:
        weights = _opened(file)
        for name in weights.keys():
            ours = our_name(name)
            if ours is None or ours.startswith(further):
                continue
            if ours in stored:
                raise UserError(f"{directory}: tensors {stored[ours].name} and {name} are the same of the model's")
            number_format = weights.get_slice(name).get_dtype()
            if number_format not in FLOATS:
                raise UserError(f"{directory}: tensor {name} holds {number_format}; weights are {', '.join(FLOATS)}")
            stored[ours] = _Stored(name, weights)
    return stored


def _read(directory: Path, stored: _Stored) -> torch.Tensor:
    tensor = stored.file.get_tensor(stored.name)
    if not tensor.isfinite().all():
        raise UserError(f"{directory}: tensor {stored.name} holds a number that is not finite")
    return tensor


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt: {error}") from None
    except RuntimeError as error:  # a file larger than memory, as a sparse one easily is
        raise UserError(f"{file} is too large for this machine: {error}") from None


class _NoValues(TorchFunctionMode):
    """A new model draws its parameters' values. Where they have none, on the meta device, PyTorch imports its compiler
    to work that out, which takes as long as PyTorch itself; so what leaves a tensor's shape as it is is left out."""

    LEFT_OUT = {torch.nn.init.normal_, torch.Tensor.mul, torch.Tensor.add, torch.Tensor.neg, torch.Tensor.log,
                torch.Tensor.exp, torch.expm1}

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if function in self.LEFT_OUT:
            return args[0] if args else None
        return function(*args, **(kwargs or {}))


def _without_memory(directory: Path, config: ModelConfig, stored: dict[str, _Stored]) -> Transformer:
    """The model on the meta device; UserError unless the files hold exactly its tensors."""
    found = {name: list(tensor.file.get_slice(tensor.name).get_shape()) for name, tensor in stored.items()}
    # Never more than one layer beyond those of the files: a configuration of thousands of layers costs nothing then.
    stored_layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    with torch.device("meta"), _NoValues():
        model = Transformer(replace(config, layers=config.layers[: len(stored_layers) + 1]))
    expected = {name: list(place.shape) for name, place in places(model, found)}
    for name, shape in expected.items():
        if name not in found:
            theirs = spelled(name, {ours: tensor.name for ours, tensor in stored.items()})
            raise UserError(f"{directory}: tensor {theirs} is missing; {config.family} needs it with shape {shape}")
        if found[name] != shape:
            raise UserError(f"{directory}: tensor {stored[name].name} has shape {found[name]}; "
                            f"config.json asks for {shape}")
    for name, shape in found.items():
        is_tied_head = name == "lm_head.weight" and config.tie_embeddings
        if name not in expected and not is_tied_head:
            raise UserError(f"{directory}: tensor {stored[name].name} with shape {shape} is not part of a "
                            f"{config.family} model")
    return model


def _check_memory(directory: Path, needed_bytes: int, device: torch.device) -> None:
    """A sparse file costs its writer nothing, so a header may speak of more than any machine holds."""
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > memory_bytes:
        raise UserError(f"{directory}: the weights take {needed_bytes / 2**30:,.1f} GiB; "
                        f"{device} has {memory_bytes / 2**30:,.1f} GiB")


def _digest(files: list[Path]) -> bytes:
    """Names configuration and weights: between nodes in which this differs no KVCache crosses."""
    digest = hashlib.blake2b(digest_size=32)
    for file in files:
        with open(file, "rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.digest()
