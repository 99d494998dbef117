"""Components of models from a diffusers-layout folder, or from one file that holds them all.

What is read is untrusted: classes come from an allow-list, nothing is executed, and every fault is reported with
the file's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadModel
from .single_file import control_config, convert, convert_controlnet
from .weights import Part, file_state, read_json, read_tensors, weight_files

COMPONENTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "prior": ("PriorTransformer",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "movq": ("VQModel",),
}
"""The components of all systems, and the classes each may be."""

CONTROLNET = "controlnet"
"""A component that no system has and that people bring."""

_CLASSES = {**COMPONENTS, CONTROLNET: ("ControlNetModel",)}

TOKENIZERS = ("tokenizer", "tokenizer_2")
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""A VAE's attention before diffusers 0.17, as the files of Stable Diffusion 1.5 still have it."""


_WRITERS = ("dtype", "torch_dtype", "transformers_version")
"""What a config says of the program that wrote it, beside what begins with an underscore."""


def component_files(part: Part) -> list[Path]:
    """The files that make a component what it is: weights and config, or a tokenizer's vocabulary.

    Raises:
        BadModel: one is missing or damaged.
    """
    if part.name in TOKENIZERS:
        return sorted(f for f in part.folder.glob("*") if f.suffix in (".json", ".txt"))
    files = weight_files(part)
    read_json(part.folder / "config.json")
    return [*files, part.folder / "config.json"]


def _tensors(part: Part) -> dict[str, Tensor]:
    """A component's weights by diffusers' names, mapped into memory."""
    held = {key: tensor for file in weight_files(part) for key, tensor in read_tensors(file, part.allow_pickle).items()}
    if part.file is None:
        return held
    with _quiet():
        if part.name == CONTROLNET:
            return convert_controlnet(held, read_config(part), part.file)
        return convert(held, part.name, read_config(part), part.file)


def read_config(part: Part) -> dict[str, Any]:
    """A component's ``config.json``; for a ControlNet in one file, made of that of the UNet that it is for."""
    config = read_json(part.folder / "config.json")
    return control_config(config) if part.file and part.name == CONTROLNET else config


def require_class(part: Part) -> str:
    """The class that a component's config names; BadModel if it is not one of those that it may be."""
    config = read_config(part)
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), "no named class")
    if found not in _CLASSES[part.name]:
        raise BadModel(f"{part.folder} holds {found} where {part.name} must be {' or '.join(_CLASSES[part.name])}.")
    return str(found)


def fingerprint_of(file: Path) -> str:
    """A digest of one file of weights."""
    return _digest(*file_state(file)).hex()[:16]


def fingerprint(part: Part) -> str:
    """A digest of what makes a component: every byte of its weights, and its config but for who wrote it with what.

    Raises:
        BadModel: a file is missing or damaged.
    """
    digest = hashlib.sha256()
    for file in component_files(part):
        if file.name == "config.json":
            config = {key: value for key, value in read_json(file).items() if key[0] != "_" and key not in _WRITERS}
            digest.update(json.dumps(config, sort_keys=True).encode())
        else:
            digest.update(_digest(*file_state(file)))
    return digest.hexdigest()[:16]


@cache
def _digest(file: Path, size: int, modified: int) -> bytes:
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64:  # the hub's cache names large files by their sha256
        return bytes.fromhex(blob)
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def tensor_bytes(part: Part, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each tensor of a component takes once loaded in ``dtype``; the files are mapped, not read."""
    shapes = _shapes(part, tuple(file_state(file) for file in weight_files(part)))
    return {name: math.prod(shape) * (dtype if kind.is_floating_point else kind).itemsize for name, shape, kind in shapes}


def layer_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """The shape of every layer's weight, by the layer's name; the files are mapped, not read."""
    shapes = _shapes(part, tuple(file_state(file) for file in weight_files(part)))
    return {name.removesuffix(".weight"): shape for name, shape, _ in shapes if name.endswith(".weight")}


@cache
def _shapes(part: Part, states: tuple[tuple[Path, int, int], ...]) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(part).items())


def encoder_fingerprint(part: Part) -> str:
    """A digest of a VAE's encoder weights in half precision.

    fp32 and fp16 files of one VAE agree, and so do a folder of it and a whole checkpoint that holds it.
    """
    return _encoder_digest(part, tuple(file_state(file) for file in weight_files(part)))


@cache
def _encoder_digest(part: Part, states: tuple[tuple[Path, int, int], ...]) -> str:
    digests = {}
    for name, tensor in _tensors(part).items():
        if name.startswith(("encoder.", "quant_conv.")):
            for old, new in _OLD_NAMES.items():
                name = name.replace(old, new)
            digests[name] = hashlib.sha256(tensor.half().contiguous().numpy().tobytes()).digest()
    digest = hashlib.sha256()
    for name in sorted(digests):  # however the weights are spread over files
        digest.update(name.encode() + digests[name])
    return digest.hexdigest()[:16]


def read_component(part: Part, dtype: torch.dtype) -> Any:
    """One component on the CPU, in evaluation mode.

    Raises:
        BadModel: wrong class, damaged or missing files, or a config that does not fit the weights.
    """
    if part.name in TOKENIZERS:
        return _read_tokenizer(part.folder)
    import diffusers
    import transformers

    library: Any = transformers if part.name.endswith(("encoder", "encoder_2")) else diffusers
    files = weight_files(part)
    config, found = read_config(part), require_class(part)
    if "quantization_config" in config:
        raise BadModel(f"{part.folder / 'config.json'} asks for a quantizer, which is not run: use plain weights.")
    misfit = f"{part.folder} cannot be loaded: its config.json does not fit its weights"
    if part.file:
        misfit = f"{part.file} does not fit {part.folder / 'config.json'}; give the models it was made from (--models)"
    kind, pickled = getattr(library, found), files[0].suffix != ".safetensors"
    try:
        with _quiet():
            if part.file:
                model, report = _fill(kind, config, _tensors(part), dtype)
            else:
                model, report = _from_folder(kind, part, dtype, pickled)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[0].split(". If you want")[0].split())
        raise BadModel(f"{misfit} ({reason}).") from error
    faults = {}
    for fault in ("mismatched_keys", "missing_keys"):
        if names := sorted(key if isinstance(key, str) else key[0] for key in report[fault] or []):
            faults[fault] = names
    # transformers 4 saved an index buffer that 5 no longer has.
    if extra := [key for key in report["unexpected_keys"] or [] if not key.endswith("position_ids")]:
        faults["unexpected_keys"] = sorted(extra)
    for fault, names in faults.items():
        raise BadModel(f"{misfit} ({len(names)} {fault.replace('_', ' ')}, first {names[0]}).")
    return model.eval().requires_grad_(False)


def _from_folder(kind: Any, part: Part, dtype: torch.dtype, pickled: bool) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"torch_dtype": dtype, "low_cpu_mem_usage": True}
    if kind.__module__.startswith("transformers"):  # weights of another shape are in its report; diffusers raises for them
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
        options["attn_implementation"] = "sdpa"  # what the config asks for may be code on the hub
    options |= {"local_files_only": True, "variant": part.variant, "output_loading_info": True}
    model, report = kind.from_pretrained(part.folder, use_safetensors=not pickled, **options)
    return model, report


def _fill(kind: Any, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model with weights that are in memory already, and what of them did not fit."""
    if kind.__module__.startswith("transformers"):
        options = {
            "dtype": dtype,
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            "attn_implementation": "sdpa",
        }
        model, report = kind.from_pretrained(None, config=kind.config_class(**config), state_dict=tensors, **options)
        return model, report
    with torch.device("meta"):
        model = kind.from_config(config)
    wanted = model.state_dict()
    report = {
        "mismatched_keys": [key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape],
        "missing_keys": wanted.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - wanted.keys(),
    }
    if not any(report.values()):  # copies, so that the file may go
        model.load_state_dict({key: tensor.to(dtype, copy=True) for key, tensor in tensors.items()}, assign=True)
    return model, report


def _read_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt"):
            if not (folder / file).is_file():
                raise BadModel(f"{folder / file} is missing: the folder is not a complete diffusers model.")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadModel(f"{folder} is damaged and cannot be read as a CLIP tokenizer ({error}).") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers and transformers log what we raise, and transformers draws a bar per component."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels, bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
