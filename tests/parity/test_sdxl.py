"""SDXL's base and refiner against diffusers' three pipelines, wired by hand from the public functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from unrolled.core.denoiser import conditioned
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.decode import decode
from unrolled.stages.image import encode_image
from unrolled.stages.noise import add_noise, noise, start_step, unit_noise
from unrolled.stages.size import sizes_in_turn, with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
Run = Callable[..., Any]
SOLVERS = ("euler", "dpm++2m", "euler-ancestral")
TWO: dict[str, Any] = {"prompts": ["a red apple", "a castle"], "seeds": (1, 2)}
BIG: dict[str, Any] = {"original": (1024, 768), "crop": (8, 16), "target": (512, 640)}
SMALL: dict[str, Any] = {"original": (40, 40), "crop": (0, 4), "target": (32, 48)}


@pytest.fixture
def ours(tiny_sdxl: Model) -> Run:
    """Text to image, with sizes and negative sizes."""

    def run(
        name: str,
        options: dict[str, Any],
        steps: int,
        *,
        model: Model = tiny_sdxl,
        prompts: Sequence[str] = ("a red apple",),
        prompts_2: Sequence[str] | None = None,
        negative: str | None = None,
        seeds: Sequence[int] = (3,),
        size: tuple[int, int] = (64, 64),
        sizes: dict[str, Any] | None = None,
        negative_sizes: dict[str, Any] | None = None,
        scale: float = 5.0,
        rescale: float = 0.0,
        faithful: bool = False,
    ) -> Latents:
        schedule, source = model.schedule(steps, name, **options), DiffusersNoise.seeded(*seeds)
        cond = with_size(model, encode_text(model, prompts, prompts_2=prompts_2), *size, **sizes or {})
        uncond = with_size(model, encode_text(model, negative), *size, **(negative_sizes or sizes or {}))
        if faithful:
            cond, uncond = sizes_in_turn(cond, uncond, len(seeds))
        denoiser = classifier_free(model.denoiser, cond, uncond, scale, rescale=rescale)
        start = noise(model, schedule, *size, seeds=seeds, source=source)
        return denoise(denoiser, start, schedule, model.solver(steps, name, **options), noise=source)

    return run


@pytest.fixture
def theirs(sdxl_pipeline: Run) -> Run:
    def run(
        name: str,
        options: dict[str, Any],
        steps: int,
        *,
        prompts: Sequence[str] = ("a red apple",),
        prompts_2: Sequence[str] | None = None,
        negative: str | None = None,
        seeds: Sequence[int] = (3,),
        size: tuple[int, int] = (64, 64),
        sizes: dict[str, Any] | None = None,
        negative_sizes: dict[str, Any] | None = None,
        scale: float = 5.0,
        rescale: float = 0.0,
        output_type: str = "latent",
    ) -> Any:
        return sdxl_pipeline("", name, **options)(
            list(prompts),
            prompt_2=prompts_2,
            negative_prompt=None if negative is None else [negative] * len(prompts),
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            generator=DiffusersNoise.seeded(*seeds).generator,
            guidance_scale=scale,
            guidance_rescale=rescale,
            output_type=output_type,
            **named(sizes or {}),
            **named(negative_sizes or {}, "negative_"),
        ).images

    return run


def named(sizes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What diffusers calls the same."""
    names = {"original": "original_size", "crop": "crops_coords_top_left", "target": "target_size"}
    return {prefix + names.get(key, key): value for key, value in sizes.items()}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batch", [{}, TWO], ids=["one", "two"])
def test_text_to_image(name: str, batch: dict[str, Any], ours: Run, theirs: Run, distance: Run) -> None:
    assert distance(ours(name, {}, 5, **batch), theirs(name, {}, 5, **batch), name) < TOLERANCE


@pytest.mark.parametrize(
    "more",
    [
        {"sizes": BIG},
        {"sizes": BIG, "negative_sizes": SMALL},
        {"scale": 1.0, "sizes": BIG},
        {"rescale": 0.7},
        {"negative": ""},
        {"negative": "blurry", "prompts_2": ["at night"]},
        {"size": (40, 96)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SOLVERS[:2])
def test_options(name: str, more: dict[str, Any], ours: Run, theirs: Run, distance: Run) -> None:
    out, reference = ours(name, {}, 4, **more), theirs(name, {}, 4, **more)
    assert distance(out, reference, name) < TOLERANCE
    assert distance(ours(name, {}, 4), reference, name) > 10 * TOLERANCE if "size" not in more else out.size == (40, 96)


def test_pixels(tiny_sdxl: Model, ours: Run, theirs: Run) -> None:
    for mine, reference in zip(
        decode(tiny_sdxl, ours("euler", {}, 5, **TWO)), theirs("euler", {}, 5, **TWO, output_type="pil"), strict=True
    ):
        assert apart(mine, reference) <= 1


def test_sizes_take_turns_in_diffusers(ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers' rows of time ids are negative, positive, negative, positive in a batch of two."""
    sizes: dict[str, Any] = {"sizes": BIG, "negative_sizes": SMALL, **TWO}
    reference = theirs("euler", {}, 5, **sizes)
    default = distance(ours("euler", {}, 5, **sizes), reference, "euler")
    assert default == pytest.approx(0.182, rel=0.3), f"default is {default:.2e} from diffusers"
    assert distance(ours("euler", {}, 5, faithful=True, **sizes), reference, "euler") < TOLERANCE
    # Where both sizes are one, taking turns changes nothing.
    assert distance(ours("euler", {}, 5, sizes=BIG, **TWO), theirs("euler", {}, 5, sizes=BIG, **TWO), "euler") < TOLERANCE


def test_a_negative_crop_alone_is_lost_in_diffusers(ours: Run, theirs: Run, distance: Run) -> None:
    """It is looked at only beside a negative original and target size."""
    crop: dict[str, Any] = {"sizes": {}, "negative_sizes": {"crop": (32, 32)}}
    reference = theirs("euler", {}, 5, **crop)
    default = distance(ours("euler", {}, 5, **crop), reference, "euler")
    assert default == pytest.approx(0.045, rel=0.3), f"default is {default:.2e} from diffusers"
    assert distance(ours("euler", {}, 5), reference, "euler") < TOLERANCE


# Image to image: the posterior, then the noise; the refiner with its aesthetic scores.


@pytest.mark.parametrize("refiner", [False, True], ids=["base", "refiner"])
@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batch", [{}, TWO], ids=["one", "two"])
def test_image_to_image(
    refiner: bool, strength: float, name: str, batch: dict[str, Any], tiny_sdxl: Model, tiny_refiner: Model,
    picture: Image.Image, sdxl_pipeline: Run, distance: Run,
) -> None:  # fmt: skip
    model, steps = (tiny_refiner if refiner else tiny_sdxl), 10
    prompts, seeds = batch.get("prompts", ["a red apple"]), batch.get("seeds", (3,))
    sizes: list[dict[str, Any]] = (
        [{"aesthetic_score": 6.0}, {"aesthetic_score": 2.5}] if refiner else [{}, {"original": (9, 9)}]
    )
    positive, negative = sizes
    reference = sdxl_pipeline("Img2Img", name, refiner=refiner)(
        prompts, image=picture, strength=strength, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
        generator=DiffusersNoise.seeded(*seeds).generator, **named(positive), **named(negative, "negative_"),
    ).images  # fmt: skip

    source = DiffusersNoise.seeded(*seeds)
    schedule = model.schedule(steps, name)[start_step(steps, strength) :]
    cond = with_size(model, encode_text(model, prompts), picture.height, picture.width, **positive)
    uncond = with_size(model, encode_text(model, None), picture.height, picture.width, **negative)
    clean = encode_image(model, picture, seeds=seeds, source=source)
    noisy = add_noise(clean, schedule, unit_noise(clean, source))
    denoiser = classifier_free(model.denoiser, cond, uncond, 5.0)
    out = denoise(denoiser, noisy, schedule, model.solver(steps, name), noise=source)
    assert len(schedule) == round(10 * strength)
    assert distance(out, reference, name) < TOLERANCE


def test_the_score_matters(tiny_refiner: Model) -> None:
    text, x = encode_text(tiny_refiner, "a castle"), torch.ones(1, 4, 8, 8)
    low, high = (with_size(tiny_refiner, text, 64, 64, aesthetic_score=score) for score in (2.5, 6.0))
    apart = (
        conditioned(tiny_refiner.denoiser, low)(x, 1.0, 100.0).out
        - conditioned(tiny_refiner.denoiser, high)(x, 1.0, 100.0).out
    )
    assert apart.abs().max() > 1e-3


# SDXL's VAE overflows in half precision and says so by force_upcast.


def test_half_precision_decodes_in_single(tiny_sdxl: Model, ours: Run) -> None:
    model = replace(tiny_sdxl, vae=copy.deepcopy(tiny_sdxl.vae).half())
    (mine,), (single,) = (decode(m, ours("euler", {}, 4)) for m in (model, tiny_sdxl))
    assert model.vae.dtype == torch.float16
    assert apart(mine, single) <= 1


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())
