"""The ×2 upscaler against diffusers' StableDiffusionLatentUpscalePipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise, NoiseSource
from unrolled.stages.decode import decode
from unrolled.stages.image import encode_image
from unrolled.stages.noise import noise
from unrolled.stages.text import encode_text
from unrolled.stages.upscale import enlarged_size, with_latents

TOLERANCE = 1e-4
Run = Callable[..., Any]
APPLE = ("a red apple",)
TWO: dict[str, Any] = {"prompts": ("a red apple", "a castle"), "seeds": (1, 2)}


@pytest.fixture(scope="module")
def pictures(picture: Image.Image) -> list[Image.Image]:
    """Two of 64x64."""
    return [picture, picture.transpose(Image.Transpose.ROTATE_90)]


@pytest.fixture(scope="module")
def pipeline(tiny_x2_folder: Path) -> Any:
    made = diffusers.StableDiffusionLatentUpscalePipeline.from_pretrained(tiny_x2_folder, use_safetensors=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def small(tiny_x2: Model, pictures: list[Image.Image]) -> Latents:
    """Latents of the two pictures."""
    return encode_image(tiny_x2, pictures, seeds=(1, 2), posterior="mode")


@pytest.fixture(scope="module")
def ours(tiny_x2: Model, small: Latents) -> Run:
    def run(
        steps: int,
        solver: str | None = None,
        *,
        prompts: Sequence[str] = APPLE,
        seeds: Sequence[int] = (3,),
        pictures: Sequence[Image.Image] | None = None,
        scale: float = 9.0,
        step_noise: NoiseSource | None = None,
    ) -> Latents:
        source = DiffusersNoise.seeded(*seeds)
        # diffusers draws the pictures' posterior, if there are pictures, and then the noise.
        low = encode_image(tiny_x2, pictures, seeds=seeds, source=source) if pictures else small[: len(seeds)]
        schedule = tiny_x2.schedule(steps, solver)
        start = noise(tiny_x2, schedule, *enlarged_size(tiny_x2, low.size), seeds, source=source)
        cond, uncond = (with_latents(tiny_x2, encode_text(tiny_x2, text), low) for text in (prompts, ""))
        denoiser = classifier_free(tiny_x2.denoiser, cond, uncond, scale)
        return denoise(denoiser, start, schedule, tiny_x2.solver(steps, solver), noise=step_noise or source)

    return run


@pytest.fixture(scope="module")
def theirs(pipeline: Any, small: Latents) -> Run:
    own = pipeline.scheduler

    def run(
        steps: int,
        *,
        prompts: Sequence[str] = APPLE,
        seeds: Sequence[int] = (3,),
        pictures: Sequence[Image.Image] | None = None,
        scale: float = 9.0,
        output_type: str = "latent",
        scheduler: Any = None,
    ) -> Any:
        pipeline.scheduler = scheduler or own
        return pipeline(
            list(prompts),
            image=list(pictures) if pictures else small.x[: len(seeds)],
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=DiffusersNoise.seeded(*seeds).generator,
            output_type=output_type,
        ).images

    return run


@pytest.mark.parametrize("scale", [1.0, 9.0])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_every_number_of_steps(steps: int, scale: float, ours: Run, theirs: Run, distance: Run) -> None:
    assert distance(ours(steps, scale=scale), theirs(steps, scale=scale), "euler") < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_batch_of_two(scale: float, ours: Run, theirs: Run, distance: Run) -> None:
    assert distance(ours(5, scale=scale, **TWO), theirs(5, scale=scale, **TWO), "euler") < TOLERANCE


@pytest.mark.parametrize("batch", [{}, TWO])
def test_from_pictures(batch: dict[str, Any], pictures: list[Image.Image], ours: Run, theirs: Run, distance: Run) -> None:
    batch = batch | {"pictures": pictures[: len(batch.get("seeds", [3]))]}
    assert distance(ours(5, **batch), theirs(5, **batch), "euler") < TOLERANCE


def test_not_square(picture: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    wide = picture.resize((128, 96))
    out = ours(3, pictures=[wide])
    assert out.size == (192, 256)
    assert distance(out, theirs(3, pictures=[wide]), "euler") < TOLERANCE


def test_pixels(tiny_x2: Model, pictures: list[Image.Image], ours: Run, theirs: Run) -> None:
    mine = decode(tiny_x2, ours(5, pictures=pictures, **TWO))
    for one, reference in zip(mine, theirs(5, pictures=pictures, output_type="pil", **TWO), strict=True):
        assert one.size == (128, 128)
        assert int(np.abs(np.asarray(one, int) - np.asarray(reference, int)).max()) <= 1


@pytest.mark.parametrize("steps", [1, 2, 10, 75])
def test_levels_end_above_zero(steps: int, tiny_x2: Model) -> None:
    """Even in log sigma, from the highest to the lowest training noise; diffusers plans a last 0 and never gets there."""
    scheduler = diffusers.EulerDiscreteScheduler.from_config(tiny_x2.scheduler)
    scheduler.set_timesteps(steps)
    schedule = tiny_x2.schedule(steps)
    assert len(scheduler.sigmas) == len(schedule.sigmas) + 1
    assert schedule.sigmas == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)
    assert schedule.start_std == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
    assert schedule.sigmas[-1] == pytest.approx(0.0292, rel=1e-2)


def test_guidance_scale_zero_is_the_empty_prompt(ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers swaps the prompt for "" at guidance_scale 0 alone; here a scale up to 1 means the prompt, unguided."""
    reference = theirs(5, scale=0.0)
    assert distance(ours(5, scale=1.0, prompts=("",)), reference, "euler") < TOLERANCE
    assert distance(ours(5, scale=0.0), reference, "euler") == pytest.approx(0.076, rel=0.3)


class _FromX0(diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Takes the x0 that the pipeline computes, as Euler does; on its own it refuses ``prediction_type = "sample"``."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        return super().step((sample - model_output) / self.sigmas[self.step_index], timestep, sample, *args, **options)


class _Righted(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """Puts right the x0 that the pipeline computes as if the latents were not scaled to unit variance."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        variance = 1 + float(self.sigmas[self.step_index]) ** 2
        out = (model_output - sample / variance) / math.sqrt(variance - 1)
        x0 = (sample + math.sqrt(variance - 1) * out) / math.sqrt(variance)
        return super().step(x0, timestep, sample, *args, **options)


def test_heun(tiny_x2: Model, ours: Run, theirs: Run, distance: Run) -> None:
    scheduler = diffusers.HeunDiscreteScheduler.from_config({**tiny_x2.scheduler, "prediction_type": "sample"})
    assert distance(ours(5, "heun"), theirs(5, scheduler=scheduler), "heun") < TOLERANCE


def test_euler_ancestral(tiny_x2: Model, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers' pipeline gives the scheduler no generator: its noise is the global one's, here it is the seeds'."""
    scheduler = _FromX0.from_config({**tiny_x2.scheduler, "prediction_type": "epsilon"})
    torch.manual_seed(5)
    reference = theirs(5, scheduler=scheduler)
    globally = DiffusersNoise(torch.Generator().manual_seed(5))
    assert distance(ours(5, "euler-ancestral", step_noise=globally), reference, "euler-ancestral") < TOLERANCE


def test_dpmpp_2m(tiny_x2: Model, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers' pipeline computes x0 for latents in Euler's coordinate, whatever the scheduler's is."""
    config = {**tiny_x2.scheduler, "prediction_type": "sample"}
    mine = ours(5, "dpm++2m")
    assert distance(mine, theirs(5, scheduler=_Righted.from_config(config)), "dpm++2m") < TOLERANCE
    wrong = theirs(5, scheduler=diffusers.DPMSolverMultistepScheduler.from_config(config))
    assert distance(mine, wrong, "dpm++2m") == pytest.approx(0.53, rel=0.3)
