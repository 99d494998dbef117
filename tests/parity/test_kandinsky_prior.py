"""Kandinsky's prior against diffusers' KandinskyV22PriorPipeline and its interpolation: same weights and noise, fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.loading import Prior
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.prior import blend, embed_image, sample_prior, zero_image_embeds

TOLERANCE = 1e-4
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def their_prior(tiny_prior_folder: Path, exact: Run) -> Any:
    pipeline = diffusers.KandinskyV22PriorPipeline.from_pretrained(tiny_prior_folder, use_safetensors=True)
    pipeline.scheduler = exact(pipeline.scheduler)
    return _quiet(pipeline)


@pytest.mark.parametrize("steps", [2, 5, 25])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("seeds", [(7,), (7, 8)])
def test_prior(steps: int, scale: float, seeds: tuple[int, ...], tiny_prior: Prior, their_prior: Any) -> None:
    prompts, noise = ["a red apple", "two cats"][: len(seeds)], DiffusersNoise.seeded(*seeds)
    reference = their_prior(prompts, num_inference_steps=steps, guidance_scale=scale, generator=noise.generator)
    mine = sample_prior(
        tiny_prior, prompts, steps=steps, guidance_scale=scale, seeds=seeds, source=DiffusersNoise.seeded(*seeds)
    )
    assert _apart(mine.image_embeds, reference.image_embeds) < TOLERANCE
    assert _apart(zero_image_embeds(tiny_prior, len(seeds)).image_embeds, reference.negative_image_embeds) < TOLERANCE


@pytest.mark.parametrize("seeds", [(7, 8), (7, 8, 9, 10)])
def test_prior_with_a_negative_prompt(seeds: tuple[int, ...], tiny_prior: Prior, their_prior: Any) -> None:
    half = len(seeds) // 2
    prompts, negative = ["a red apple", "two cats"][:half], ["blurred", "a house"][:half]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    reference = their_prior(prompts, negative_prompt=negative, num_inference_steps=5, generator=generators)
    mine = sample_prior(
        tiny_prior,
        [*prompts, *negative],
        negative_prompt=negative * 2,
        steps=5,
        seeds=seeds,
        source=DiffusersNoise.seeded(*seeds),
    )
    assert mine.image_embeds is not None
    assert _apart(mine.image_embeds[:half], reference.image_embeds) < TOLERANCE
    assert _apart(mine.image_embeds[half:], reference.negative_image_embeds) < TOLERANCE


def test_interpolation(tiny_prior: Prior, their_prior: Any, picture: Image.Image) -> None:
    parts: list[Any] = ["a red apple", picture.resize((90, 70)), "two cats"]
    weights = [0.5, 0.2, 0.3]
    reference = their_prior.interpolate(
        parts, weights, num_inference_steps=5, generator=torch.Generator().manual_seed(7), negative_prompt="blurred"
    )
    source = DiffusersNoise.seeded(7)  # drawn from in turn

    def prior_embeds(prompt: str) -> Conditioning:
        return sample_prior(tiny_prior, prompt, steps=5, source=source)

    mine = blend([prior_embeds(part) if isinstance(part, str) else embed_image(tiny_prior, part) for part in parts], weights)
    assert _apart(mine.image_embeds, reference.image_embeds) < TOLERANCE
    assert _apart(prior_embeds("blurred").image_embeds, reference.negative_image_embeds) < TOLERANCE


def test_the_prior_in_float32_is_off(tiny_prior: Prior, tiny_prior_folder: Path) -> None:
    """diffusers' last step multiplies by 0.9995; see tests/schedulers/test_learned_variance.py."""
    pipeline = _quiet(diffusers.KandinskyV22PriorPipeline.from_pretrained(tiny_prior_folder, use_safetensors=True))
    reference = pipeline("a red apple", num_inference_steps=5, generator=torch.Generator().manual_seed(7)).image_embeds
    mine = sample_prior(tiny_prior, "a red apple", steps=5, source=DiffusersNoise.seeded(7))
    assert _apart(mine.image_embeds, reference) == pytest.approx(4.9e-4, rel=0.3)


def test_nothing_is_not_black(tiny_prior: Prior) -> None:
    """diffusers hands the encoder zeros as normalised pixels: a plain picture of CLIP's mean colour, a grey."""
    grey, black = Image.new("RGB", (64, 64), (123, 117, 104)), Image.new("RGB", (64, 64))
    nothing = zero_image_embeds(tiny_prior).image_embeds
    assert nothing is not None
    assert _apart(embed_image(tiny_prior, grey).image_embeds, nothing) < 0.1
    assert _apart(embed_image(tiny_prior, black).image_embeds, nothing) > 0.3


def _apart(ours: Tensor | None, theirs: Tensor) -> float:
    assert ours is not None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
