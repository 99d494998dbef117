"""The only file that reads weights: components from a diffusers-layout folder, safetensors only.

A model folder is untrusted input: classes come from an allow-list, nothing in it is executed, and
every fault is reported with the file's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import BadModel

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

TOKENIZERS = ("tokenizer", "tokenizer_2")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 256, 65536


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


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, headers checked.

    Raises:
        BadModel: there are none, only pickles, or one is damaged.
    """
    if not folder.is_dir():
        raise BadModel(f"{folder} is missing: the folder is not a complete diffusers model.")
    every = sorted(folder.glob("*.safetensors"))
    chosen = [f for f in every if (f".{variant}." in f.name or f".{variant}-" in f.name) == bool(variant)]
    if variant is None:
        plain = [f for f in every if f.name.startswith(("diffusion_pytorch_model.safe", "model.safe", "pytorch_model.safe"))]
        chosen = plain or [f for f in every if "-of-" in f.name and f.name.count(".") == 1]
    if not chosen:
        pickles = [f.name for f in folder.iterdir() if f.suffix in _PICKLES]
        if pickles:
            raise BadModel(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code: convert them to safetensors."
            )
        there = ", ".join(f.name for f in every) or "none"
        wanted = f'of variant "{variant}" ' if variant else ""
        raise BadModel(f"{folder} has no safetensors weights {wanted}(found: {there}).")
    for shard in _shards(folder, variant):
        if "-of-" in chosen[0].name and not shard.is_file():
            raise BadModel(f"{shard} is missing: the folder is not a complete diffusers model.")
    for file in chosen:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{file} is damaged and cannot be read as safetensors ({error}).") from error
    return chosen


def _shards(folder: Path, variant: str | None) -> list[Path]:
    """The files that the index of weights in several files names, if there is one."""
    ends = f".safetensors.index.{variant}.json" if variant else ".safetensors.index.json"
    indices = [read_json(file) for file in sorted(folder.glob(f"*{ends}"))]
    return sorted({folder / Path(name).name for index in indices for name in index.get("weight_map", {}).values()})


def component_files(folder: Path, name: str, variant: str | None = None) -> list[Path]:
    """The files that make a component what it is: weights and config, or a tokenizer's vocabulary.

    Raises:
        BadModel: one is missing or damaged.
    """
    if name in TOKENIZERS:
        return sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt"))
    files = weight_files(folder, variant)
    read_json(folder / "config.json")
    return [*files, folder / "config.json"]


def fingerprint(files: list[Path]) -> str:
    """A digest of weight files: of all bytes where they are few, else of samples spread over each file.

    Tells checkpoints apart in milliseconds; it does not prove a file untouched.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            stride = max(_SAMPLE_BYTES, size // _SAMPLES)
            for start in range(0, size, stride):
                handle.seek(start)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def encoder_fingerprint(files: list[Path]) -> str:
    """A digest of a VAE's encoder weights in half precision, so that fp32 and fp16 files of one VAE agree."""
    digests = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in sorted(handle.keys()):
                if name.startswith(("encoder.", "quant_conv.")):
                    digests[name] = hashlib.sha256(handle.get_tensor(name).half().numpy().tobytes()).digest()
    digest = hashlib.sha256()
    for name in sorted(digests):  # however the weights are spread over files
        digest.update(name.encode() + digests[name])
    return digest.hexdigest()[:16]


def read_component(folder: Path, name: str, dtype: torch.dtype, variant: str | None = None) -> Any:
    """One component on the CPU, in evaluation mode.

    Raises:
        BadModel: wrong class, damaged or missing files, or a config that does not fit the weights.
    """
    if name in TOKENIZERS:
        return _read_tokenizer(folder)
    import diffusers
    import transformers

    library: Any = transformers if name.endswith(("encoder", "encoder_2")) else diffusers
    weight_files(folder, variant)
    config = read_json(folder / "config.json")
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), "no named class")
    if found not in COMPONENTS[name]:
        raise BadModel(f"{folder} holds {found} where {name} must be {' or '.join(COMPONENTS[name])}.")
    options: dict[str, Any] = {"torch_dtype": dtype, "low_cpu_mem_usage": True}
    if library is transformers:  # weights of another shape are then in its report; diffusers raises for them
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            model, report = getattr(library, found).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True, **options
            )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[0].split(". If you want")[0].split())
        raise BadModel(f"{folder} cannot be loaded: its config.json does not fit its weights ({reason}).") from error
    faults = {}
    for kind in ("mismatched_keys", "missing_keys"):
        if names := sorted(key if isinstance(key, str) else key[0] for key in report[kind] or []):
            faults[kind] = names
    # transformers 4 saved an index buffer that 5 no longer has.
    if extra := [key for key in report["unexpected_keys"] or [] if not key.endswith("position_ids")]:
        faults["unexpected_keys"] = sorted(extra)
    for kind, names in faults.items():
        what = f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}"
        raise BadModel(f"{folder} cannot be loaded: its config.json does not fit its weights ({what}).")
    return model.eval().requires_grad_(False)


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
