"""diffusers' pipelines and schedulers beside ours, on the same tiny weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import Tensor
from unrolled.core.denoiser import Denoiser, UNetDenoiser
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.stages.text import encode_text

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
VARIANCE_PRESERVING = ("ddim", "ddpm", "dpm++2m", "pndm")


@pytest.fixture(scope="session")
def components(tiny_folder: Path) -> dict[str, Any]:
    return dict(_quiet(diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, use_safetensors=True)).components)


@pytest.fixture(scope="session")
def inpaint_components(tiny_inpaint_folder: Path) -> dict[str, Any]:
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tiny_inpaint_folder, use_safetensors=True)
    return dict(_quiet(pipeline).components)


@pytest.fixture(scope="session")
def pipeline_of() -> Callable[[str, dict[str, Any], Any], Any]:
    """A silent diffusers pipeline of a class, on given components, with a given scheduler.

    The scheduler is put in afterwards: the constructor would silently set ``steps_offset`` to 1 and
    ``clip_sample`` to false in it.
    """

    def build(name: str, components: dict[str, Any], scheduler: Any) -> Any:
        pipeline = _quiet(getattr(diffusers, name)(**components, requires_safety_checker=False))
        pipeline.scheduler = scheduler
        return pipeline

    return build


@pytest.fixture(scope="session")
def scheduler_of(tiny: Model) -> Callable[..., Any]:
    """diffusers' scheduler of one of our solver names, configured as Stable Diffusion 1.5 but for some options."""

    def build(name: str, **options: object) -> Any:
        return getattr(diffusers, CLASSES[name]).from_config({**tiny.scheduler, **options})

    return build


@pytest.fixture(scope="session")
def sdxl_pipeline(tiny_sdxl: Model, tiny_sdxl_folder: Path, tiny_refiner_folder: Path) -> Callable[..., Any]:
    """diffusers' SDXL pipeline of a class ("", "Img2Img", "Inpaint") on the tiny base or refiner, with a solver of ours."""
    folders = {False: tiny_sdxl_folder, True: tiny_refiner_folder}

    @cache
    def load(name: str, refiner: bool) -> Any:
        return _quiet(getattr(diffusers, name).from_pretrained(folders[refiner], use_safetensors=True))

    def build(kind: str, solver: str = "euler", *, refiner: bool = False, **options: object) -> Any:
        pipeline = load(f"StableDiffusionXL{kind}Pipeline", refiner)
        pipeline.scheduler = getattr(diffusers, CLASSES[solver]).from_config({**tiny_sdxl.scheduler, **options})
        return pipeline

    return build


@pytest.fixture(scope="session")
def distance() -> Callable[[Latents, Tensor, str], float]:
    """How far our latents are from diffusers', as a part of the largest of its numbers."""

    def measure(ours: Latents, theirs: Tensor, name: str) -> float:
        x = ours.x / math.sqrt(1 + ours.sigma**2) if name in VARIANCE_PRESERVING else ours.x
        return float((x - theirs).abs().max() / theirs.abs().max())

    return measure


@pytest.fixture(scope="session")
def guided() -> Callable[..., Denoiser]:
    """The tiny UNet under classifier-free guidance."""

    def build(
        model: Model, kind: Any, prompts: Sequence[str], negative: str = "", scale: float = 5.0, rescale: float = 0.0
    ) -> Denoiser:
        cond, uncond = encode_text(model, prompts), encode_text(model, negative)
        return classifier_free(UNetDenoiser(model.unet, kind), cond, uncond, scale, rescale=rescale)

    return build


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
