"""Networks that people bring to stand beside a model's own: ControlNets and IP-Adapters, found and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import CONTROLNET
from .errors import BadModel
from .hub import download_component
from .image_adapter import ImageAdapter, read_image_adapter
from .loading import Shelf
from .model import Model
from .single_file import is_single_file
from .source import Source, find_file
from .weights import Part


@dataclass(frozen=True)
class ImageAdapterSource:
    """Where an IP-Adapter and the image encoder it was trained with lie."""

    file: Path
    image_encoder: Part


def find_controlnet(
    name: str,
    source: Source,
    models: str = "miniature",
    variant: str | None = None,
    revision: str | None = None,
    *,
    weights: bool = True,
) -> Part:
    """Where a ControlNet for a model lies: a folder with its ``config.json``, a hub id, or one ``.safetensors`` file.

    A file, of ControlNet's first authors or of diffusers, has no config: it is made of that of the model's UNet.

    Raises:
        BadModel: there is none.
    """
    if is_single_file(name):
        return Part(CONTROLNET, source.folders["unet"], find_file(name, models, revision))
    return Part(CONTROLNET, _component(name, CONTROLNET, models, variant, revision, weights), variant=variant)


def find_image_adapter(
    name: str,
    image_encoder: str | None = None,
    models: str = "miniature",
    revision: str | None = None,
    *,
    weights: bool = True,
) -> ImageAdapterSource:
    """Where an IP-Adapter's ``.safetensors`` file lies, and its image encoder: a folder, or a hub's.

    Args:
        image_encoder: by default the folder of that name beside the file.

    Raises:
        BadModel: there is none.
    """
    file = find_file(name, models, revision)
    beside = name.rpartition("/")[0] if models == "hub" and not Path(name).is_file() else file.parent
    folder = _component(image_encoder or f"{beside}/image_encoder", "image_encoder", models, None, revision, weights)
    return ImageAdapterSource(file, Part("image_encoder", folder))


def load_controlnet(
    shelf: Shelf, name: str | Part, model: Model, size: tuple[int, int] | None = None, batch: int = 1
) -> Any:
    """A ControlNet for a model of the same shelf, as diffusers' ``ControlNetModel``; loaded once.

    Args:
        name: as for :func:`find_controlnet`, or what it found.
        size, batch: as for :meth:`Shelf.load`.

    Raises:
        BadModel: it cannot be found, is damaged, of another class or not safe to read; BadInput: there is no room.
    """
    if isinstance(name, str):
        source = shelf.find(model.name, weights=False)
        name = find_controlnet(name, source, shelf.models, shelf.variant, shelf.revision)
    return shelf.component(name, size or (model.native_size,) * 2, model.space.downscale, batch)


def load_image_adapter(
    shelf: Shelf, name: str | ImageAdapterSource, model: Model, image_encoder: str | None = None
) -> ImageAdapter:
    """An IP-Adapter for a model of the same shelf, with its image encoder; arguments as :func:`find_image_adapter`'s.

    Raises:
        BadInput: the model takes none; BadModel: it cannot be found, is none, or does not fit the model's UNet.
    """
    if isinstance(name, str):
        name = find_image_adapter(name, image_encoder, shelf.models, shelf.revision)
    return read_image_adapter(name.file, model, shelf.component(name.image_encoder))


def _component(name: str, part: str, models: str, variant: str | None, revision: str | None, weights: bool) -> Path:
    for folder in (Path(name), Path(models) / name):
        if (folder / "config.json").is_file():
            return folder
    if models == "hub" and name.count("/") and not name.startswith((".", "/", "~")):
        return download_component(name, revision, variant, weights)
    raise BadModel(
        f"There is no {part.replace('_', ' ')} {name}: give a folder with its config.json, or a hub id with --models hub."
    )
