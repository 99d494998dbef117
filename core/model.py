"""What one checkpoint is made of, once it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..schedulers.classes import Given
from ..schedulers.config import read_scheduler
from ..schedulers.spacing import Spacing
from .denoiser import ConditionalDenoiser, PriorDenoiser, UNetDenoiser, UpscalerDenoiser
from .errors import BadInput
from .latents import LatentSpace
from .prediction import Kind
from .schedule import Schedule
from .solver import Solver
from .source import System, cell, system_of


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
        return self.denoiser_of(read_scheduler(self.scheduler).kind)

    def denoiser_of(self, kind: Kind, *, scale_input: bool = True) -> ConditionalDenoiser:
        """The same where the checkpoint's config does not say what its UNet predicts; see :class:`UNetDenoiser`."""
        return UpscalerDenoiser(self.unet) if self.system == "x2" else UNetDenoiser(self.unet, kind, scale_input)

    @property
    def native_size(self) -> int:
        """The side in pixels of the pictures the UNet was trained on."""
        return int(self.unet.config.sample_size) * self.space.downscale

    @property
    def cell(self) -> int:
        """What the sides of its pictures must be multiples of."""
        return cell(self.system, self.space.downscale, len(self.unet.config.block_out_channels))

    @property
    def inpaints(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents (9 channels)."""
        return bool(self.unet.config.in_channels == 2 * self.space.channels + 1)

    @property
    def scored(self) -> bool:
        """Whether it is conditioned by an aesthetic score, as SDXL's refiner."""
        return bool(self.index.get("requires_aesthetics_score", False))

    def sampling(
        self,
        steps: int | None = None,
        solver: str | None = None,
        *,
        spacing: Spacing | str | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float = 0.0,
        faithful: bool = False,
        **options: object,
    ) -> tuple[Schedule, Solver]:
        """The checkpoint's own noise levels and solver, or those of another diffusers scheduler.

        Args:
            steps: 1 to the number of training timesteps, evaluations as in diffusers; follows from ``sigmas`` or
                ``timesteps``.
            solver: "euler", "dpm++2m", … to take that scheduler's conventions.
            spacing, sigmas, timesteps: other levels, see :meth:`SchedulerConfig.sampling`.
            eta: DDIM's or TCD's, 0 to 1.
            faithful: repeat what diffusers does even where it is wrong (docs/departures.md).
            options: diffusers' scheduler options, e.g. ``use_karras_sigmas=True``.

        A run of "dpm++sde" is meant for ``steps(..., noise=Brownian(latents.seeds, latents.stream))``.

        Raises:
            BadInput: steps, levels or eta are out of range, or an option is not honoured; BadModel: one of the file is not.
        """
        if "prediction_type" in options:
            raise BadInput(
                "prediction_type says what the network's output means, which no schedule changes: leave it out, and take "
                "model.denoiser_of(kind) if the checkpoint's config is wrong."
            )
        config = read_scheduler(self.scheduler, solver, **options)
        given: Given = {"spacing": spacing, "sigmas": sigmas, "timesteps": timesteps}
        return config.sampling(steps, **given, eta=eta, faithful=faithful)

    def schedule(self, steps: int | None = None, solver: str | None = None, **options: Any) -> Schedule:
        """The noise levels of :meth:`sampling`, with its arguments."""
        return self.sampling(steps, solver, **options)[0]

    def solver(self, steps: int | None = None, solver: str | None = None, **options: Any) -> Solver:
        """The solver of :meth:`sampling`, with its arguments."""
        return self.sampling(steps, solver, **options)[1]


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

    @property
    def denoiser(self) -> PriorDenoiser:
        """The transformer as a conditional denoiser."""
        return PriorDenoiser(self.prior, read_scheduler(self.scheduler).kind)

    def schedule(self, steps: int) -> Schedule:
        """The checkpoint's own noise levels."""
        return read_scheduler(self.scheduler).schedule(steps)

    def solver(self, steps: int) -> Solver:
        """The checkpoint's own solver."""
        return read_scheduler(self.scheduler).solver(steps)
