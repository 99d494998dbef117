"""Finds models and hands out their components, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..schedulers.config import read_scheduler
from .catalog import CATALOG, MOVED, Entry
from .checkpoint import (
    COMPONENTS,
    component_files,
    encoder_fingerprint,
    fingerprint,
    read_component,
    read_json,
    weight_files,
)
from .denoiser import UNetDenoiser
from .errors import BadInput, BadModel
from .latents import LatentSpace
from .schedule import Schedule
from .solver import Solver

MINIATURES = Path(__file__).parent.parent / "miniatures"


@dataclass(frozen=True, repr=False)
class Model:
    """The components of one checkpoint, wired to nothing: the stages do that.

    ``scheduler`` holds the raw options of ``scheduler_config.json``; ``fingerprints`` tell which
    weights these are.
    """

    name: str
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Mapping[str, Any]
    space: LatentSpace
    fingerprints: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Model({self.name}, {self.device} {dtype}, space=[{self.space}], {self.native_size} px)"

    @property
    def denoiser(self) -> UNetDenoiser:
        """The UNet as a conditional denoiser."""
        return UNetDenoiser(self.unet, read_scheduler(self.scheduler).kind)

    @property
    def native_size(self) -> int:
        """The side in pixels of the pictures the UNet was trained on."""
        return int(self.unet.config.sample_size) * self.space.downscale

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents (9 channels)."""
        return bool(self.unet.config.in_channels == 2 * self.space.channels + 1)

    def schedule(self, steps: int, solver: str | None = None, **options: object) -> Schedule:
        """The checkpoint's own noise levels, or those of another diffusers scheduler.

        Args:
            steps: 1 to the number of training timesteps.
            solver: "euler", "dpm++2m", … to take that scheduler's conventions.
            options: diffusers' scheduler options, e.g. ``use_karras_sigmas=True``.
        """
        return read_scheduler(self.scheduler, solver, **options).schedule(steps)

    def solver(
        self, steps: int, solver: str | None = None, *, eta: float = 0.0, faithful: bool = False, **options: object
    ) -> Solver:
        """The checkpoint's own solver, or a named one; arguments as for :meth:`schedule`.

        Args:
            eta: DDIM's, 0 to 1.
            faithful: repeat what diffusers does even where it is wrong (docs/departures.md).
        """
        return read_scheduler(self.scheduler, solver, **options).solver(steps, eta=eta, faithful=faithful)


@dataclass(frozen=True)
class Source:
    """Where the components of one model lie on this disk."""

    name: str
    folders: Mapping[str, Path]

    @property
    def scheduler(self) -> dict[str, Any]:
        """The raw options of its ``scheduler_config.json``."""
        return read_json(self.folders["scheduler"] / "scheduler_config.json")

    def sizes(self) -> tuple[int, int]:
        """Native side in pixels and downscale, read from the configs alone."""
        vae = read_json(self.folders["vae"] / "config.json")
        downscale = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
        return int(read_json(self.folders["unet"] / "config.json").get("sample_size", 64)) * downscale, downscale


class Shelf:
    """Loads models; components with the same weights are loaded once.

    Args:
        models: "miniature" (offline stand-ins), "hub", or a folder that holds model folders.
        device, dtype: where and in what precision; by default CUDA in float16 if there is one, else
            the CPU in float32.
        variant, revision: which of the weights in a folder ("fp16"), and which state of a hub repository.
    """

    def __init__(
        self,
        models: str = "miniature",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.models, self.variant, self.revision = models, variant, revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self._models: dict[str, Model] = {}
        self._components: dict[tuple[str, str], Any] = {}

    def load(self, name: str) -> Model:
        """A model by short name, folder or hub id.

        Raises:
            BadModel: it cannot be found, is damaged, of another class or not safe to read.
        """
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def find(self, name: str, *, weights: bool = True) -> Source:
        """Where the model's components lie; see :func:`find`."""
        return find(name, self.models, self.variant, self.revision, weights=weights)

    def _load(self, name: str) -> Model:
        source = self.find(name)
        check_classes(source)
        read_scheduler(source.scheduler)  # refuse what cannot be honoured now, not after the first stage
        parts, digests = {}, {}
        for component in COMPONENTS:
            parts[component], digests[component] = self._component(source.folders[component], component)
        config = parts["vae"].config
        space = LatentSpace(
            family=type(parts["vae"]).__name__,
            channels=config.latent_channels,
            downscale=2 ** (len(config.block_out_channels) - 1),
            scaling=config.scaling_factor,
            fingerprint=encoder_fingerprint(weight_files(source.folders["vae"], self.variant)),
        )
        return Model(
            name,
            **parts,
            scheduler=source.scheduler,
            space=space,
            fingerprints=digests,
            device=self.device,
            dtype=self.dtype,
        )

    def _component(self, folder: Path, name: str) -> tuple[Any, str]:
        digest = fingerprint(component_files(folder, name, self.variant))
        if (name, digest) not in self._components:
            component = read_component(folder, name, self.dtype, self.variant)
            self._components[name, digest] = component if name == "tokenizer" else component.to(self.device)
        return self._components[name, digest], digest


def load(
    name: str,
    models: str = "miniature",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Model:
    """One model; to load several that share components, keep a :class:`Shelf`. Arguments as there."""
    return Shelf(models, device, dtype, variant, revision).load(name)


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
    index = source.folders["index"] / "model_index.json"
    if not index.is_file():
        return
    for component, entry in read_json(index).items():
        if component in COMPONENTS and isinstance(entry, list) and entry[-1] not in COMPONENTS[component]:
            allowed = " or ".join(COMPONENTS[component])
            raise BadModel(f"{index} wants {component} to be a {entry[-1]}, but only {allowed} is allowed there.")


def _miniature(name: str, entry: Entry) -> Source:
    source = _folder(name, MINIATURES / entry.miniature)
    borrowed = {component: MINIATURES / other / component for component, other in entry.borrows.items()}
    return replace(source, folders={**source.folders, **borrowed})


def _folder(name: str, folder: Path) -> Source:
    return Source(name, {part: folder / part for part in (*COMPONENTS, "scheduler")} | {"index": folder})


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or (folder / "unet").is_dir()


def _download(repository: str, variant: str | None, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["model_index.json", *(f"{part}/*.{end}" for part in (*COMPONENTS, "scheduler") for end in ("json", "txt"))]
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


def require_known_device(device: str) -> None:
    """Raise BadInput if torch cannot use ``device`` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"Device {device!r} cannot be used here ({str(error).splitlines()[0]}): use cpu or see unrolled doctor."
        ) from error
