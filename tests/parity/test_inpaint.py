"""Inpainting against diffusers' StableDiffusionInpaintPipeline, with UNets of 4 and of 9 channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from unrolled.core.denoiser import UNetDenoiser
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.schedulers.config import read_scheduler
from unrolled.schedulers.faithful import DiffusersPLMS
from unrolled.stages.decode import decode
from unrolled.stages.image import encode_image
from unrolled.stages.inpaint import (
    Downsample,
    composite,
    inpaint_channels,
    keep_known,
    keeping_known,
    known,
    latent_mask,
    with_channels,
)
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
Run = Callable[..., Any]
SOLVERS = ("ddim", "ddpm", "dpm++2m", "euler", "euler-ancestral", "heun", "pndm")
V = {"prediction_type": "v_prediction"}
THREE: dict[str, Any] = {"prompts": ["a red apple", "a castle", "two cats"], "seeds": (1, 2, 3)}


@pytest.fixture
def ours(tiny: Model, tiny_inpaint: Model, picture: Image.Image, mask: Image.Image) -> Run:
    def run(
        channels: int,
        name: str,
        options: dict[str, Any],
        steps: int,
        strength: float,
        *,
        image: Image.Image = picture,
        mask: Image.Image = mask,
        prompts: Sequence[str] = ("a red apple",),
        seeds: Sequence[int] = (3,),
        scale: float = 5.0,
        downsample: Downsample = "nearest",
        faithful: bool = False,
    ) -> Latents:
        model = tiny if channels == 4 else tiny_inpaint
        config, source = read_scheduler(model.scheduler, name, **options), DiffusersNoise.seeded(*seeds)
        schedule, solver = config.schedule(steps), config.solver(steps, faithful=faithful)
        index = start_step(steps, strength, faithful=True)
        if isinstance(solver, DiffusersPLMS):
            schedule, solver = solver.started_at(schedule, index)
        else:
            schedule = schedule[index:]
        cond, uncond = encode_text(model, prompts), encode_text(model, "")

        # diffusers draws: the picture's posterior (not for 9 channels at full strength), the noise, the masked posterior.
        clean = encode_image(model, image, seeds=seeds, source=source) if channels == 4 or strength < 1 else None
        if strength == 1:
            start = noise(model, schedule, image.height, image.width, seeds=seeds, source=source)
            unit = start.x / (schedule.start_std or schedule.sigmas[0])
        else:
            assert clean is not None
            unit = unit_noise(clean, source)
            start = add_noise(clean, schedule, unit)
        if channels == 9:
            extra = inpaint_channels(model, image, mask, seeds=seeds, source=source, downsample=downsample)
            cond, uncond = with_channels(cond, extra), with_channels(uncond, extra)
            denoiser = classifier_free(UNetDenoiser(model.unet, config.kind), cond, uncond, scale)
            return denoise(denoiser, start, schedule, solver, noise=source)
        source(start.x.shape, "masked posterior, unused")
        assert clean is not None
        cells, known_at = latent_mask(mask, model.space, downsample), known(clean, unit, schedule)
        denoiser = classifier_free(UNetDenoiser(model.unet, config.kind), cond, uncond, scale)
        # diffusers' PNDM may evaluate twice at the first level; a start that is not pure noise may be blended too.
        denoiser = keeping_known(denoiser, cells, known_at, schedule.sigmas[0] if strength == 1 else math.inf)
        return denoise(denoiser, start, schedule, solver, hooks=[keep_known(cells, known_at)], noise=source)

    return run


@pytest.fixture
def theirs(
    components: dict[str, Any],
    inpaint_components: dict[str, Any],
    picture: Image.Image,
    mask: Image.Image,
    pipeline_of: Run,
    scheduler_of: Run,
) -> Run:
    def run(
        channels: int,
        name: str,
        options: dict[str, Any],
        steps: int,
        strength: float,
        *,
        image: Image.Image = picture,
        mask: Image.Image = mask,
        prompts: Sequence[str] = ("a red apple",),
        seeds: Sequence[int] = (3,),
        scale: float = 5.0,
        output_type: str = "latent",
        one_for_all: bool = False,
    ) -> Any:
        parts = components if channels == 4 else inpaint_components
        return pipeline_of("StableDiffusionInpaintPipeline", parts, scheduler_of(name, **options))(
            list(prompts),
            # From one picture alone diffusers would draw all posteriors by the first generator.
            image=image if one_for_all else [image] * len(seeds),
            mask_image=mask,
            width=image.width,
            height=image.height,
            strength=strength,
            num_inference_steps=steps,
            generator=DiffusersNoise.seeded(*seeds).generator,
            guidance_scale=scale,
            output_type=output_type,
        ).images

    return run


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_every_solver(channels: int, name: str, strength: float, ours: Run, theirs: Run, distance: Run) -> None:
    reference = theirs(channels, name, {}, 6, strength)
    assert distance(ours(channels, name, {}, 6, strength, faithful=True), reference, name) < TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", V),
        ("ddim", {"timestep_spacing": "linspace"}),
        ("ddpm", V | {"timestep_spacing": "trailing"}),
        ("pndm", V),
        ("pndm", {"timestep_spacing": "linspace"}),
        ("euler", V | {"use_karras_sigmas": True}),
        ("heun", V | {"use_karras_sigmas": True}),
        ("dpm++2m", {"use_karras_sigmas": True}),
        ("dpm++2m", V | {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_options(channels: int, name: str, options: dict[str, Any], ours: Run, theirs: Run, distance: Run) -> None:
    reference = theirs(channels, name, options, 5, 0.8)
    assert distance(ours(channels, name, options, 5, 0.8, faithful=True), reference, name) < TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("name", ["pndm", "heun", "euler-ancestral"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_batch_of_three(channels: int, name: str, strength: float, ours: Run, theirs: Run, distance: Run) -> None:
    reference = theirs(channels, name, {}, 5, strength, **THREE)
    assert distance(ours(channels, name, {}, 5, strength, faithful=True, **THREE), reference, name) < TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
def test_not_square(channels: int, picture: Image.Image, mask: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    wide: dict[str, Any] = {"image": picture.resize((96, 40)), "mask": mask.resize((96, 40), Image.Resampling.NEAREST)}
    out = ours(channels, "euler", {}, 5, 0.8, **wide)
    assert out.size == (40, 96)
    assert distance(out, theirs(channels, "euler", {}, 5, 0.8, **wide), "euler") < TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
def test_no_guidance(channels: int, ours: Run, theirs: Run, distance: Run) -> None:
    reference = theirs(channels, "ddim", {}, 5, 1.0, scale=1.0)
    assert distance(ours(channels, "ddim", {}, 5, 1.0, scale=1.0), reference, "ddim") < TOLERANCE


@pytest.mark.parametrize("channels", [4, 9])
def test_pixels(channels: int, tiny: Model, tiny_inpaint: Model, ours: Run, theirs: Run) -> None:
    (mine,) = decode(tiny if channels == 4 else tiny_inpaint, ours(channels, "ddim", {}, 5, 0.8))
    (reference,) = theirs(channels, "ddim", {}, 5, 0.8, output_type="pil")
    assert int(np.abs(np.asarray(mine, int) - np.asarray(reference, int)).max()) <= 1


@pytest.mark.parametrize(("channels", "apart"), [(4, 0.995), (9, 0.086)])
def test_our_default_mask_departs(channels: int, apart: float, ours: Run, theirs: Run, distance: Run) -> None:
    """With "max" we repaint every cell that a white pixel touches; diffusers' "nearest" only those whose corner is white."""
    reference = theirs(channels, "ddim", {}, 5, 1.0)
    default = distance(ours(channels, "ddim", {}, 5, 1.0, downsample="max"), reference, "ddim")
    assert default == pytest.approx(apart, rel=0.3), f"default is {default:.2e} from diffusers, {apart:.2e} was measured"


def test_a_thin_stroke_survives(tiny: Model) -> None:
    stroke = Image.new("L", (64, 64))
    ImageDraw.Draw(stroke).line((3, 11, 60, 11), fill=255)
    assert int(latent_mask(stroke, tiny.space).sum()) == 8
    assert int(latent_mask(stroke, tiny.space, "nearest").sum()) == 0


def test_a_thin_stroke_is_repainted(picture: Image.Image, ours: Run) -> None:
    """With "nearest" the run keeps the whole picture; with "max" it changes where the stroke is."""
    stroke = Image.new("L", (64, 64))
    ImageDraw.Draw(stroke).line((3, 11, 60, 11), fill=255)
    kept, painted = (ours(4, "ddim", {}, 5, 1.0, mask=stroke, downsample=d).x for d in ("nearest", "max"))
    changed = (kept - painted).abs().amax(dim=(0, 1)) > 1e-3
    assert changed[1].all()
    assert not changed[[0, *range(2, 8)]].any()


@pytest.mark.parametrize("name", SOLVERS)
def test_four_channels_keep_the_clean_latents(
    name: str, picture: Image.Image, mask: Image.Image, tiny: Model, ours: Run, distance: Run
) -> None:
    out = ours(4, name, {}, 5, 1.0)
    clean = encode_image(tiny, picture, seeds=[3], source=DiffusersNoise.seeded(3))
    keep = 1 - latent_mask(mask, tiny.space, "nearest")
    # In the VAE's coordinate: what is decoded.
    assert torch.allclose(out.unscaled * keep, clean.unscaled * keep, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(out.unscaled, clean.unscaled, atol=0.1)


@pytest.mark.parametrize("blur", [0.0, 3.0])
def test_composite_keeps_unmasked_pixels_bit_for_bit(
    blur: float, picture: Image.Image, mask: Image.Image, tiny: Model, ours: Run
) -> None:
    (painted,) = decode(tiny, ours(4, "ddim", {}, 5, 1.0, downsample="max"))
    black = np.asarray(mask) == 0
    assert (np.asarray(painted) != np.asarray(picture))[black].any(), "the VAE changes kept pixels"
    out = composite(picture, painted, mask, blur)
    assert np.array_equal(np.asarray(out)[black], np.asarray(picture)[black])
    assert (np.asarray(out) != np.asarray(picture))[~black].any()


def test_one_picture_for_several_generators(mask: Image.Image, tiny: Model, ours: Run, theirs: Run) -> None:
    """diffusers draws one picture's posterior from the first generator and gives it to all images; we draw for each."""
    keep = (1 - latent_mask(mask, tiny.space, "nearest")).bool().expand(-1, 4, -1, -1)[0]
    two: dict[str, Any] = {"prompts": ["a red apple", "a castle"], "seeds": (1, 2)}
    first, second = theirs(4, "ddim", {}, 3, 1.0, one_for_all=True, **two)
    assert torch.equal(first[keep], second[keep])
    first, second = ours(4, "ddim", {}, 3, 1.0, **two).x
    assert (first[keep] - second[keep]).abs().max() > 1e-3
