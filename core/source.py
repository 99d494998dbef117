"""Finds where models lie: short names, folders, hub ids; reads their configs, never their weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .catalog import CATALOG, MOVED, Entry
from .checkpoint import COMPONENTS, TOKENIZERS
from .errors import BadModel, Note
from .hub import CONFIGS, download_file, download_folder, is_model, refuse_single_files
from .single_file import is_single_file, kind_of, parts_in, scheduler_changes
from .weights import Part, read_json, read_tensors

MINIATURES = Path(__file__).parent.parent / "miniatures"

System = Literal["sd", "sdxl", "kandinsky", "x2", "x4", "prior"]
"""Which wiring a model needs: Stable Diffusion's, SDXL's (base and refiner), Kandinsky 2.2's decoders, the two
upscalers', or that of Kandinsky's prior, which makes no picture."""

_LOCAL = (".", "/", "~")


@dataclass(frozen=True)
class Source:
    """Where the components of one model lie on this disk.

    Args:
        folders: of each component's config, and of its weights where ``files`` has none for it.
        files: the whole checkpoint in one file that holds a component's weights.
        changes: what such a file says of its training, over the scheduler's config.
        variant, allow_pickle: which weights are read; see ``Part``.
    """

    name: str
    folders: Mapping[str, Path]
    files: Mapping[str, Path] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    allow_pickle: bool = False

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
        return read_json(self.folders["scheduler"] / "scheduler_config.json") | dict(self.changes)

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

    def part(self, name: str) -> Part:
        """Where a component lies."""
        return Part(name, self.folders[name], self.files.get(name), self.variant, self.allow_pickle)

    def config(self, part: str) -> dict[str, Any]:
        """A component's ``config.json``."""
        return read_json(self.folders[part] / "config.json")

    @property
    def downscale(self) -> int:
        """Pixels to a latent cell, each way."""
        return int(2 ** (len(self.config(self.vae).get("block_out_channels", [0] * 4)) - 1))

    def sizes(self) -> tuple[int, int]:
        """Native side in pixels, and what sides must be multiples of, from the configs alone."""
        unet = self.config("unet")
        levels = len(unet.get("block_out_channels", [0] * 4))
        return int(unet.get("sample_size", 64)) * self.downscale, cell(self.system, self.downscale, levels)

    def borrowing(self, components: Mapping[str, Source]) -> Source:
        """The same model with some components of others in place of its own.

        Raises:
            BadModel: one of the two has no such component.
        """
        for part, other in components.items():
            for model in (self, other):
                if part not in model.parts:
                    raise BadModel(f"{model.name} has no {part} to share: it is made of {', '.join(model.parts)}.")
        folders = {**self.folders, **{part: other.folders[part] for part, other in components.items()}}
        files = {part: file for part, file in self.files.items() if part not in components}
        files |= {part: other.files[part] for part, other in components.items() if part in other.files}
        return replace(self, folders=folders, files=files)


def system_of(unet: Mapping[str, Any]) -> System:
    """Which wiring a UNet of this config needs."""
    if unet.get("time_embedding_type") == "fourier":
        return "x2"
    if unet.get("num_class_embeds"):
        return "x4"
    kinds: dict[Any, System] = {"text_time": "sdxl", "image": "kandinsky"}
    return kinds.get(unet.get("addition_embed_type"), "sd")


def enlarges(system: System) -> int:
    """How many times as wide as what goes in is what a model of this system makes."""
    return {"x2": 2, "x4": 4}.get(system, 1)


def cell(system: System, downscale: int, levels: int) -> int:
    """What the sides in pixels of what goes in must be multiples of.

    Kandinsky's UNet was made for latents of multiples of 8; the x2 upscaler's, of so many levels, cannot mirror the
    edges of others, and makes what goes in twice as large first.
    """
    if system == "x2":
        return downscale * int(2 ** (levels - 1)) // 2
    return {"kandinsky": downscale**2, "x4": 1}.get(system, downscale)


def find(
    name: str,
    models: str = "miniature",
    variant: str | None = None,
    revision: str | None = None,
    *,
    weights: bool | Collection[str] = True,
    allow_pickle: bool = False,
) -> Source:
    """Where a model's components lie: short name, then folder, then hub id.

    A name that ends in .safetensors or .ckpt is a whole checkpoint in one file: a path, one in the folder of models,
    or with ``models="hub"`` a file of a repository as ``owner/name/file.safetensors``. Its configs, tokenizers and
    scheduler, and the text encoders or VAE that it lacks, are those of the catalog's model of its kind.

    Args:
        weights: which components' weights are fetched from the hub; False fetches only the configs (and such a file).
        allow_pickle: whether pickled weights count, read by torch's loader that takes tensors only.

    Raises:
        BadModel: nothing of that name can be found, or a file is of no known kind.
    """
    parts = tuple(COMPONENTS) if weights is True else tuple(weights or ())
    if is_single_file(name):
        return _single_file(name, models, variant, revision, parts, allow_pickle)
    return replace(_locate(name, models, variant, revision, parts, allow_pickle), variant=variant, allow_pickle=allow_pickle)


def _locate(
    name: str, models: str, variant: str | None, revision: str | None, weights: Collection[str], allow_pickle: bool
) -> Source:
    if name in MOVED:
        warnings.warn(f"{name} is gone from the hub; it has moved to {MOVED[name]}.", Note, stacklevel=2)
        name = MOVED[name]
    entry = CATALOG.get(name)
    if entry and models == "miniature":
        return _miniature(name, entry)
    if models not in ("miniature", "hub"):
        hub = entry.hub if entry else name
        places = [Path(models) / name, Path(models) / hub, *([Path(models)] if entry else [])]
        if held := [folder for folder in places if is_model(folder)]:
            return _folder(name, held[0])
        if entry:
            raise BadModel(f"{models} holds no model folder {name} or {hub}: put one there or use --models miniature.")
    if entry:
        return _folder(name, download_folder(entry.hub, variant, revision, weights, allow_pickle))
    if Path(name).is_dir():
        if not is_model(Path(name)):
            refuse_single_files(name, [file.name for file in sorted(Path(name).iterdir())])
        return _folder(name, Path(name))
    if name.count("/") == 1 and not name.startswith(_LOCAL):
        if models != "hub":
            raise BadModel(f'There is no folder {name} here; if it is a hub id, say so with --models hub (models="hub").')
        return _folder(name, download_folder(name, variant, revision, weights, allow_pickle))
    raise BadModel(f"There is no model {name!r}: use a folder, a hub id, or one of {', '.join(CATALOG)}.")


def _single_file(
    name: str, models: str, variant: str | None, revision: str | None, weights: Collection[str], allow_pickle: bool
) -> Source:
    file = find_file(name, models, revision, allow_pickle)
    tensors = read_tensors(file, allow_pickle)
    kind = kind_of(tensors, file)
    held = parts_in(tensors, kind)
    try:
        base = find(kind, models, variant, weights=[part for part in weights if part not in held])
    except BadModel as error:
        raise BadModel(f"{file} is of the kind {kind}, whose configs and tokenizers it needs: {error}") from error
    if lacking := [part for part in base.parts if part not in (*held, *TOKENIZERS)]:
        warnings.warn(f"{file.name} holds no {' and no '.join(lacking)}: taken from {kind}.", Note, stacklevel=3)
    files = {part: file for part in held if part in base.parts}
    return replace(base, name=name, files=files, changes=scheduler_changes(tensors), allow_pickle=allow_pickle)


def find_file(name: str, models: str, revision: str | None, allow_pickle: bool = False) -> Path:
    """Where one file of weights lies: a path, one in the folder of models, or a file of a hub's repository.

    Raises:
        BadModel: there is none, or it is a pickle that is not allowed.
    """
    for file in (Path(name), Path(models) / name):
        if file.is_file():
            return file
    if models != "hub" or name.count("/") < 2 or name.startswith(_LOCAL):
        raise BadModel(
            f"There is no file {name}: give a path, or a file of a hub repository as OWNER/NAME/FILE with --models hub."
        )
    if not (name.endswith(".safetensors") or allow_pickle):
        read_tensors(Path(name))  # refuses it before it is fetched
    return download_file(name, revision)


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
    return Source(name, {part: folder / part for part in (*COMPONENTS, *CONFIGS)} | {"index": folder})
