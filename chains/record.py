"""What is written into and beside a picture, so that it can be made again."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin

from ..core.errors import BadInput
from ..core.loading import Shelf
from ..stages.finish import FORMATS
from .chain import Chain, Denoising, ImageToImage, Inpaint
from .trail import picture_digest

if TYPE_CHECKING:
    from .outputs import Result

_PACKAGES = ("unrolled", "torch", "diffusers", "transformers", "safetensors", "pillow", "triton", "xformers")
_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_EXIF_ROOM = 60_000
"""Bytes: JPEG has 64 KiB for all of EXIF. The file beside the picture holds what finds no room."""

_A1111_NAMES = {
    "ddim": "DDIM", "ddpm": "DDPM", "deis": "DEIS", "dpm++2m": "DPM++ 2M", "dpm++2m-sde": "DPM++ 2M SDE",
    "dpm++2s": "DPM++ 2S", "dpm++3m-sde": "DPM++ 3M SDE", "dpm++sde": "DPM++ SDE", "dpm2": "DPM2",
    "dpm2-ancestral": "DPM2 a", "euler": "Euler", "euler-ancestral": "Euler a", "heun": "Heun", "lcm": "LCM", "lms": "LMS",
    "pndm": "PLMS", "unipc": "UniPC",
}  # fmt: skip
_SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def versions() -> dict[str, str]:
    """Versions of what shapes a picture, and of Python."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Machine(NamedTuple):
    """What a chain ran on, and where its models came from."""

    device: torch.device
    dtype: torch.dtype
    models: str = "miniature"
    variant: str | None = None
    revision: str | None = None
    attention: str | None = None
    fast: bool = False
    offload: str = "auto"
    vram: int | None = None

    @classmethod
    def of(cls, shelf: Shelf) -> Machine:
        """As the shelf has it."""
        how = (shelf.attention, shelf.fast, shelf.memory.offload, shelf.memory.vram)
        return cls(shelf.device, shelf.dtype, shelf.models, shelf.variant, shelf.revision, *how)

    def shelf(self) -> Shelf:
        """A shelf like the one it is of."""
        where: Any = {"offload": self.offload, "vram": self.vram, "attention": self.attention, "fast": self.fast}
        return Shelf(self.models, self.device, self.dtype, self.variant, self.revision, **where)

    def told(self) -> dict[str, Any]:
        """As JSON can hold it; :meth:`read` is the way back."""
        models = str(Path(self.models).resolve()) if Path(self.models).is_dir() else self.models
        dtype = str(self.dtype).removeprefix("torch.")
        return self._asdict() | {"device": str(self.device), "dtype": dtype, "models": models}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Machine:
        """What :meth:`told` said; KeyError, TypeError, AttributeError or RuntimeError if that is not what this is."""
        return cls(**dict(told) | {"device": torch.device(told["device"]), "dtype": dtype_of(told["dtype"])})


def manifest(chain: Chain, index: int, result: Result, machine: Machine) -> dict[str, Any]:
    """Everything that made picture ``index`` of a run, so that :func:`~unrolled.chains.replay.replay` can make it again."""
    seed = chain.seeds()[index]
    return {
        "chain": chain.model_dump(mode="json") | {"seed": seed, "batch": 1},
        "forked": result.forked,
        "made_in": {"seed": chain.seed, "batch": chain.batch, "index": index},
        "inputs": {name: picture_digest(picture) for name, picture in result.inputs.items()},
        "models": {name: dict(prints) for name, prints in result.models.items()},
        "versions": versions(),
        "device": device_name(machine.device),
        "threads": torch.get_num_threads() if machine.device.type == "cpu" else None,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "models_from": machine.models,
        "variant": machine.variant,
        "revision": machine.revision,
        "attention": machine.attention,
        "fast": machine.fast,
        "notes": list(result.notes),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "pixels": picture_digest(result.pictures[index]),
        "trail": {name: [images[index] for images in steps] for name, steps in result.trail.items()},
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a picture that a run wrote, or in the file beside it.

    Raises:
        BadInput: there is no such file, or there is none in it.
    """
    if not path.is_file():
        raise BadInput(f"There is no picture at {path}.")
    try:
        text = path.read_text(encoding="utf-8") if path.suffix == ".json" else _embedded(path)
        facts = json.loads(text)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} cannot be read as a picture or a manifest ({error}).") from error
    if not isinstance(facts, dict) or not {"chain", "versions", "pixels"} <= facts.keys():
        raise BadInput(f"{path} does not say what made it: give a picture that `unrolled run` wrote, or its .json.")
    return facts


def _embedded(path: Path) -> str:
    with Image.open(path) as picture:
        inside = picture.info.get("unrolled") or picture.getexif().get_ifd(_EXIF).get(_MAKER_NOTE, b"{}")
    return inside.decode("utf-8") if isinstance(inside, bytes) else str(inside)


def parameters(chain: Chain, seed: int, size: tuple[int, int]) -> str:
    """The last denoising stage in the form AUTOMATIC1111's web UI writes and many tools read."""
    stage = next((s for s in reversed(chain.stages) if isinstance(s, Denoising)), None)
    if stage is None:
        return ""
    facts: dict[str, object] = {"Steps": stage.steps, "Sampler": _sampler(stage)}
    scale = stage.guidance_scale[0] if isinstance(stage.guidance_scale, list) else stage.guidance_scale
    facts |= {} if scale is None else {"CFG scale": f"{scale:g}"}
    facts |= {"Seed": seed, "Size": f"{size[0]}x{size[1]}"}
    facts["Model"] = stage.model
    if isinstance(stage, ImageToImage | Inpaint) and stage.strength is not None:
        facts["Denoising strength"] = f"{stage.strength:g}"
    if stage.clip_skip:
        facts["Clip skip"] = stage.clip_skip + 1  # the web UI counts from 1
    facts["Version"] = f"unrolled {versions().get('unrolled', 'unknown')}"
    negative = f"Negative prompt: {stage.negative_prompt}\n" if stage.negative_prompt else ""
    loras = "".join(f" <lora:{Path(told.file).stem}:{told.weight:g}>" for told in stage.lora)
    return f"{stage.prompt}{loras}\n{negative}" + ", ".join(f"{key}: {_quoted(value)}" for key, value in facts.items())


def encode(picture: Image.Image, ending: str, text: str, facts: Mapping[str, Any]) -> bytes:
    """The picture as PNG (text chunks), JPEG or WebP (EXIF), with ``text`` and ``facts`` in it."""
    file, rgb = io.BytesIO(), picture.convert("RGB")
    if ending == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("parameters", text) if not text.isascii() else chunks.add_text("parameters", text)
        chunks.add_text("unrolled", json.dumps(facts))
        rgb.save(file, "PNG", pnginfo=chunks)
        return file.getvalue()
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    note = json.dumps(facts).encode()
    if len(note) + 2 * len(text) < _EXIF_ROOM:
        exif.get_ifd(_EXIF)[_MAKER_NOTE] = note
    quality: dict[str, Any] = {"quality": 95} if ending in ("jpg", "jpeg") else {"lossless": True}
    rgb.save(file, FORMATS[ending], exif=exif.tobytes(), **quality)
    return file.getvalue()


def _sampler(stage: Denoising) -> str:
    name = _A1111_NAMES.get(stage.solver or "", stage.solver or "")
    flagged = (spacing for option, spacing in _SPACINGS.items() if stage.scheduler.get(option))
    spacing = stage.spacing or next(flagged, "")
    return f"{name} {spacing.capitalize()}".strip()


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text


def dtype_of(name: str) -> torch.dtype:
    """By its name; AttributeError or TypeError if there is none of that name."""
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and which instructions of it torch uses: others round otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
