"""Finds where models lie: short names, folders, hub ids; reads their configs, never their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .catalog import CATALOG, MOVED, Entry
from .checkpoint import COMPONENTS, read_json
from .errors import BadModel

MINIATURES = Path(__file__).parent.parent / "miniatures"

System = Literal["sd", "sdxl", "kandinsky", "x2", "x4", "prior"]
"""Which wiring a model needs: Stable Diffusion's, SDXL's (base and refiner), Kandinsky 2.2's decoders, the two
upscalers', or that of Kandinsky's prior, which makes no picture."""

_CONFIGS = ("scheduler", "low_res_scheduler", "image_processor")


@dataclass(frozen=True)
class Source:
    """Where the components of one model lie on this disk."""

    name: str
    folders: Mapping[str, Path]

    @cached_property
    def index(self) -> dict[str, Any]:
        """Its ``model_index.json``, empty without one."""
        file = self.folders["index"] / "model_index.json"
        return read_json(file) if file.is_file() else {}

    @property
    def parts(self) -> tuple[str, ...]:
        """The components it is made of: those its index names, or else those there is a folder for."""
        if not self.index:
            held = tuple(part for part in COMPONENTS if self.folders[part].is_dir())
            return held if "prior" in held else tuple({**dict.fromkeys(held), "unet": None})
        named = (part for part in COMPONENTS if isinstance(self.index.get(part), list))
        return tuple(part for part in named if self.index[part][-1] is not None)

    @cached_property
    def system(self) -> System:
        """Which wiring it needs, by its UNet's config."""
        if "prior" in self.parts:
            return "prior"
        return system_of(self.config("unet"))

    @property
    def scheduler(self) -> dict[str, Any]:
        """The raw options of its ``scheduler_config.json``."""
        return read_json(self.folders["scheduler"] / "scheduler_config.json")

    @property
    def low_res_scheduler(self) -> dict[str, Any]:
        """The same of the scheduler that puts noise on what an upscaler enlarges; empty without one."""
        file = self.folders["low_res_scheduler"] / "scheduler_config.json"
        return read_json(file) if file.is_file() else {}

    @property
    def image_processor(self) -> dict[str, Any]:
        """How its image encoder wants pictures: the raw options of ``preprocessor_config.json``."""
        return read_json(self.folders["image_processor"] / "preprocessor_config.json")

    @property
    def vae(self) -> str:
        """The component that decodes: "vae", or Kandinsky's "movq"."""
        return "movq" if "movq" in self.parts else "vae"

    def config(self, part: str) -> dict[str, Any]:
        """A component's ``config.json``."""
        return read_json(self.folders[part] / "config.json")

    def sizes(self) -> tuple[int, int]:
        """Native side in pixels, and what sides must be multiples of, from the configs alone."""
        downscale = 2 ** (len(self.config(self.vae).get("block_out_channels", [0] * 4)) - 1)
        native = int(self.config("unet").get("sample_size", 64)) * downscale
        return native, cell(self.system, downscale)

    def borrowing(self, components: Mapping[str, Source]) -> Source:
        """The same model with some components of others in place of its own.

        Raises:
            BadModel: one of the two has no such component.
        """
        for part, other in components.items():
            for model in (self, other):
                if part not in model.parts:
                    raise BadModel(f"{model.name} has no {part} to share: it is made of {', '.join(model.parts)}.")
        borrowed = {part: other.folders[part] for part, other in components.items()}
        return replace(self, folders={**self.folders, **borrowed})


def system_of(unet: Mapping[str, Any]) -> System:
    """Which wiring a UNet of this config needs."""
    if unet.get("time_embedding_type") == "fourier":
        return "x2"
    if unet.get("num_class_embeds"):
        return "x4"
    kinds: dict[Any, System] = {"text_time": "sdxl", "image": "kandinsky"}
    return kinds.get(unet.get("addition_embed_type"), "sd")


def cell(system: System, downscale: int) -> int:
    """What the sides of pictures must be multiples of; Kandinsky's UNet goes three levels further down."""
    return downscale**2 if system == "kandinsky" else downscale


def find(
    name: str,
    models: str = "miniature",
    variant: str | None = None,
    revision: str | None = None,
    *,
    weights: bool = True,
) -> Source:
    """Where a model's components lie: short name, then folder, then hub id.

    Args:
        weights: False fetches only the configs from the hub.

    Raises:
        BadModel: nothing of that name can be found.
    """
    entry = CATALOG.get(name)
    if entry and models == "miniature":
        return _miniature(name, entry)
    if models not in ("miniature", "hub"):
        hub = entry.hub if entry else MOVED.get(name, name)
        places = [Path(models) / name, Path(models) / hub, *([Path(models)] if entry else [])]
        if held := [folder for folder in places if _is_model(folder)]:
            return _folder(name, held[0])
        if entry:
            raise BadModel(f"{models} holds no model folder {name} or {hub}: put one there or use --models miniature.")
    if entry:
        return _folder(name, _download(entry.hub, variant, revision, weights))
    if Path(name).is_dir():
        return _folder(name, Path(name))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        if models != "hub":
            raise BadModel(f'There is no folder {name} here; if it is a hub id, say so with --models hub (models="hub").')
        return _folder(name, _download(MOVED.get(name, name), variant, revision, weights))
    raise BadModel(f"There is no model {name!r}: use a folder, a hub id, or one of {', '.join(CATALOG)}.")


def check_classes(source: Source) -> None:
    """Raise BadModel if the folder's ``model_index.json`` names a class that is not on the allow-list."""
    for part, entry in source.index.items():
        if part in COMPONENTS and isinstance(entry, list) and entry[-1] not in (None, *COMPONENTS[part]):
            allowed, index = " or ".join(COMPONENTS[part]), source.folders["index"] / "model_index.json"
            raise BadModel(f"{index} wants {part} to be a {entry[-1]}, but only {allowed} is allowed there.")


def _miniature(name: str, entry: Entry) -> Source:
    source = _folder(name, MINIATURES / name)
    borrowed = {part: MINIATURES / folder for part, folder in entry.borrows.items()}
    return replace(source, folders={**source.folders, **borrowed})


def _folder(name: str, folder: Path) -> Source:
    return Source(name, {part: folder / part for part in (*COMPONENTS, *_CONFIGS)} | {"index": folder})


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or any((folder / part).is_dir() for part in ("unet", "prior"))


def _download(repository: str, variant: str | None, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["model_index.json", *(f"{part}/*.{end}" for part in (*COMPONENTS, *_CONFIGS) for end in ("json", "txt"))]
    if weights:
        wanted += [f"{part}/*.{variant}*safetensors" if variant else f"{part}/*.safetensors" for part in COMPONENTS]
    skipped = None if variant else ["*.fp16.*", "*.fp16-*", "*.non_ema.*"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=skipped))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadModel(
            f"{repository} could not be fetched from the hub ({reason}): check the name and the network, "
            "or give a folder with --models FOLDER."
        ) from error
