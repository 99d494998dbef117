"""Reads weight files, safetensors or where asked for pickles of tensors and nothing else; nothing in them is executed."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import BadModel

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
PICKLE_ADVICE = (
    "which can run code: convert them to safetensors, or give allow_pickle=True (allow_pickle = true in a chain), "
    "which reads tensors from pickles and refuses all else."
)


@dataclass(frozen=True)
class Part:
    """Where one component of a model lies.

    Args:
        name: "unet", "vae", …
        folder: its config or vocabulary, and its weights unless there is a ``file``.
        file: a whole checkpoint in one file that holds its weights; see ``single_file``.
        variant: which of the weights in the folder ("fp16").
        allow_pickle: whether pickled weights are read, tensors only, where there are no safetensors.
    """

    name: str
    folder: Path
    file: Path | None = None
    variant: str | None = None
    allow_pickle: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        BadModel: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadModel(f"{path} is missing: the folder is not a complete diffusers model.") from error
    except (ValueError, OSError) as error:
        raise BadModel(f"{path} is damaged and cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BadModel(f"{path} holds a {type(value).__name__} where a JSON object is expected.")
    return value


def read_tensors(file: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of one weight file, mapped into memory rather than read.

    Raises:
        BadModel: damaged, or a pickle that is not allowed or holds anything but tensors and plain values.
    """
    if file.suffix != ".safetensors":
        if not allow_pickle:
            raise BadModel(f"{file} is pickled, {PICKLE_ADVICE}")
        return _read_pickle(file)
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{file} is damaged and cannot be read as safetensors ({error}).") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # bytes that are no pickle make it raise anything
        if call := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadModel(
                f"{file} was refused: its pickle calls {call[1]}, and pickles of tensors only are read; "
                "get the weights as safetensors."
            ) from error
        lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        reason = lines[0].strip().split(". ")[0] if lines else type(error).__name__
        raise BadModel(f"{file} is damaged and cannot be read as a pickle of tensors ({reason}).") from error
    if isinstance(held, Mapping):  # the last is AUTOMATIC1111's, of a textual inversion
        held = held.get("state_dict", held.get("string_to_param", held))
    tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)} if isinstance(held, Mapping) else {}
    if not tensors:
        raise BadModel(f"{file} holds a {type(held).__name__} without tensors where weights are expected.")
    return tensors


def weight_files(part: Part) -> list[Path]:
    """The files that hold a component's weights, all readable.

    Raises:
        BadModel: there are none, only pickles that are not allowed, or one is damaged.
    """
    folder, variant = part.folder, part.variant
    if part.file:
        return [part.file]
    if not folder.is_dir():
        raise BadModel(f"{folder} is missing: the folder is not a complete diffusers model.")
    end = ".safetensors"
    chosen = _chosen(folder, end, variant)
    if not chosen and part.allow_pickle:
        end = ".bin"
        chosen = _chosen(folder, end, variant)
    if not chosen:
        every = sorted(folder.glob("*.safetensors"))
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickles and not part.allow_pickle:
            raise BadModel(f"{folder} holds only pickled weights ({pickles[0]}), {PICKLE_ADVICE}")
        there = ", ".join([*(f.name for f in every), *pickles]) or "none"
        wanted = f'of variant "{variant}" ' if variant else ""
        raise BadModel(f"{folder} has no {'' if part.allow_pickle else 'safetensors '}weights {wanted}(found: {there}).")
    for shard in _shards(folder, end, variant):
        if "-of-" in chosen[0].name and not shard.is_file():
            raise BadModel(f"{shard} is missing: the folder is not a complete diffusers model.")
    for file in chosen:
        _require_readable(*file_state(file), part.allow_pickle)
    return chosen


def file_state(file: Path) -> tuple[Path, int, int]:
    """Path, size and time of change: what is kept about a file is kept under these."""
    found = file.stat()
    return file, found.st_size, found.st_mtime_ns


@cache
def _require_readable(file: Path, size: int, modified: int, allow_pickle: bool) -> None:
    read_tensors(file, allow_pickle)


def has_weights(part: Part) -> bool:
    """Whether a component's weights are on this disk; for a plan only configs are fetched."""
    ends = (".safetensors", *_PICKLES) if part.allow_pickle else (".safetensors",)
    return part.file is not None or any(file.suffix in ends for file in part.folder.glob("*"))


def _chosen(folder: Path, end: str, variant: str | None) -> list[Path]:
    """The weight files of a variant among those with an ending; without a variant, the plainly named ones."""
    every = sorted(folder.glob(f"*{end}"))
    if variant:
        return [f for f in every if f".{variant}." in f.name or f".{variant}-" in f.name]
    plain = [f for f in every if f.name.removesuffix(end) in _STEMS]
    return plain or [f for f in every if "-of-" in f.name and f.name.count(".") == 1]


def _shards(folder: Path, end: str, variant: str | None) -> list[Path]:
    """The files that the index of weights in several files names, if there is one."""
    ends = f"{end}.index.{variant}.json" if variant else f"{end}.index.json"
    indices = [read_json(file) for file in sorted(folder.glob(f"*{ends}"))]
    return sorted({folder / Path(name).name for index in indices for name in index.get("weight_map", {}).values()})
