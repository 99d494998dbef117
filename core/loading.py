"""Hands out the components of models, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..schedulers.config import read_scheduler
from .checkpoint import TOKENIZERS, component_files, encoder_fingerprint, fingerprint, read_component, weight_files
from .denoiser import ConditionalDenoiser, UNetDenoiser, UpscalerDenoiser
from .errors import BadInput, BadModel
from .latents import LatentSpace
from .schedule import Schedule
from .solver import Solver
from .source import Source, System, cell, check_classes, find, system_of


@dataclass(frozen=True, repr=False)
class Model:
    """The components of one checkpoint, wired to nothing: the stages do that.

    ``scheduler`` and ``low_res_scheduler`` hold the raw options of the scheduler files, ``index`` those of
    ``model_index.json``; ``fingerprints`` tell which weights these are. ``vae`` is the MoVQ of Kandinsky.
    """

    name: str
    unet: Any
    vae: Any
    scheduler: Mapping[str, Any]
    space: LatentSpace
    fingerprints: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any = None
    text_encoder: Any = None
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    low_res_scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Model({self.name}, {self.device} {dtype}, space=[{self.space}], {self.native_size} px)"

    @property
    def system(self) -> System:
        """Which wiring it needs."""
        return system_of(self.unet.config)

    @property
    def denoiser(self) -> ConditionalDenoiser:
        """The UNet as a conditional denoiser."""
        if self.system == "x2":
            return UpscalerDenoiser(self.unet)
        return UNetDenoiser(self.unet, read_scheduler(self.scheduler).kind)

    @property
    def native_size(self) -> int:
        """The side in pixels of the pictures the UNet was trained on."""
        return int(self.unet.config.sample_size) * self.space.downscale

    @property
    def cell(self) -> int:
        """What the sides of its pictures must be multiples of."""
        return cell(self.system, self.space.downscale)

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents (9 channels)."""
        return bool(self.unet.config.in_channels == 2 * self.space.channels + 1)

    @property
    def scored(self) -> bool:
        """Whether it is conditioned by an aesthetic score, as SDXL's refiner."""
        return bool(self.index.get("requires_aesthetics_score", False))

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


@dataclass(frozen=True, repr=False)
class Prior:
    """Kandinsky's prior: from a prompt, or a picture, to the image embedding that its decoders take.

    ``image_processor`` holds the raw options of ``preprocessor_config.json``.
    """

    name: str
    prior: Any
    tokenizer: Any
    text_encoder: Any
    image_encoder: Any
    image_processor: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Prior({self.name}, {self.device} {dtype}, embeddings of {self.prior.config.embedding_dim})"

    @property
    def system(self) -> System:
        """Which wiring it needs."""
        return "prior"

    @property
    def space(self) -> LatentSpace:
        """Where its embeddings live, seen as latents of one pixel."""
        width = self.prior.config.embedding_dim
        return LatentSpace("CLIP image embedding", width, 1, 1.0, self.fingerprints["image_encoder"])


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
        self._components: dict[tuple[str, str], Any] = {}

    def find(self, name: str, components: Mapping[str, str] | None = None, *, weights: bool = True) -> Source:
        """Where a model's components lie, some of them those of other models; see :func:`find`."""
        source = find(name, self.models, self.variant, self.revision, weights=weights)
        check_classes(source)
        others = {part: self.find(other, weights=weights) for part, other in (components or {}).items()}
        return source.borrowing(
            {("movq" if part == "vae" and "movq" in source.parts else part): other for part, other in others.items()}
        )

    def load(self, name: str, components: Mapping[str, str] | None = None) -> Model:
        """A model by short name, folder or hub id.

        Args:
            components: whose component to use in place of the model's own: ``{"vae": "sd-1.5"}``.

        Raises:
            BadModel: it cannot be found, is damaged, of another class or not safe to read.
        """
        source = self.find(name, components)
        if source.system == "prior":
            raise BadModel(f"{name} is a prior, which makes no picture: a Kandinsky decoder takes it as its prior.")
        read_scheduler(source.scheduler)  # refuse what cannot be honoured now, not after the first stage
        parts, digests = self._parts(source)
        vae = parts.pop(source.vae)
        return Model(
            name,
            vae=vae,
            **parts,
            scheduler=source.scheduler,
            low_res_scheduler=source.low_res_scheduler,
            index=source.index,
            space=self._space(source, vae),
            fingerprints=digests,
            device=self.device,
            dtype=self.dtype,
        )

    def load_prior(self, name: str = "kandinsky-2.2-prior") -> Prior:
        """Kandinsky's prior by short name, folder or hub id; raises as :meth:`load`."""
        source = self.find(name)
        if source.system != "prior":
            raise BadModel(f"{name} is no prior: use kandinsky-2.2-prior, or a folder with a prior in it.")
        parts, digests = self._parts(source)
        return Prior(
            name,
            **parts,
            image_processor=source.image_processor,
            scheduler=source.scheduler,
            fingerprints=digests,
            device=self.device,
            dtype=self.dtype,
        )

    def _parts(self, source: Source) -> tuple[dict[str, Any], dict[str, str]]:
        parts, digests = dict[str, Any](), dict[str, str]()
        for name in source.parts:
            parts[name], digests[name] = self._component(source.folders[name], name)
        return parts, digests

    def _space(self, source: Source, vae: Any) -> LatentSpace:
        return LatentSpace(
            family=type(vae).__name__,
            channels=vae.config.latent_channels,
            downscale=2 ** (len(vae.config.block_out_channels) - 1),
            scaling=1.0 if source.vae == "movq" else vae.config.scaling_factor,
            fingerprint=encoder_fingerprint(weight_files(source.folders[source.vae], self.variant)),
        )

    def _component(self, folder: Path, name: str) -> tuple[Any, str]:
        digest = fingerprint(component_files(folder, name, self.variant))
        if (name, digest) not in self._components:
            component = read_component(folder, name, self.dtype, self.variant)
            self._components[name, digest] = component if name in TOKENIZERS else component.to(self.device)
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


def load_prior(
    name: str = "kandinsky-2.2-prior",
    models: str = "miniature",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Prior:
    """Kandinsky's prior; arguments as for :class:`Shelf`."""
    return Shelf(models, device, dtype, variant, revision).load_prior(name)


def require_known_device(device: str) -> None:
    """Raise BadInput if torch cannot use ``device`` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"Device {device!r} cannot be used here ({str(error).splitlines()[0]}): use cpu or see unrolled doctor."
        ) from error
