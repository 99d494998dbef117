"""The ×4 upscaler against diffusers' StableDiffusionUpscalePipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled.core.conditioning import Conditioning
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model, load
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise, NoiseSource
from unrolled.stages.decode import decode
from unrolled.stages.noise import noise
from unrolled.stages.pictures import to_tensor
from unrolled.stages.text import encode_text
from unrolled.stages.upscale import enlarged_size, with_low_res

TOLERANCE = 1e-4
Run = Callable[..., Any]
APPLE = ("a red apple",)
TWO: dict[str, Any] = {"prompts": ("a red apple", "a castle"), "seeds": (1, 2)}


@pytest.fixture(scope="module")
def pipeline(tiny_x4_folder: Path) -> Any:
    made = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tiny_x4_folder, use_safetensors=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def tiles(picture: Image.Image) -> list[Image.Image]:
    """Two pictures of 24x16."""
    return [picture.resize((24, 16)), picture.rotate(90).resize((24, 16))]


@pytest.fixture(scope="module")
def ours(tiny_x4: Model, tiles: list[Image.Image]) -> Run:
    def run(
        steps: int,
        solver: str | None = None,
        *,
        prompts: Sequence[str] = APPLE,
        seeds: Sequence[int] = (3,),
        pictures: Sequence[Image.Image] = tiles,
        noise_level: int = 20,
        scale: float = 9.0,
    ) -> Latents:
        def told(prompts: Any, source: NoiseSource) -> Conditioning:
            texts, several = encode_text(tiny_x4, prompts), pictures[: len(seeds)]
            return with_low_res(tiny_x4, texts, several, noise_level=noise_level, seeds=seeds, source=source)

        schedule, source = tiny_x4.schedule(steps, solver), DiffusersNoise.seeded(*seeds)
        # diffusers draws the noise on the pictures, the same for prompt and negative prompt, and then that of the latents.
        cond, uncond = told(prompts, source), told("", DiffusersNoise.seeded(*seeds))
        size = enlarged_size(tiny_x4, (pictures[0].height, pictures[0].width))
        start = noise(tiny_x4, schedule, *size, seeds, source=source)
        denoiser = classifier_free(tiny_x4.denoiser, cond, uncond, scale)
        return denoise(denoiser, start, schedule, tiny_x4.solver(steps, solver, faithful=True), noise=source)

    return run


@pytest.fixture(scope="module")
def theirs(pipeline: Any, tiles: list[Image.Image]) -> Run:
    own = pipeline.scheduler

    def run(
        steps: int,
        *,
        prompts: Sequence[str] = APPLE,
        seeds: Sequence[int] = (3,),
        pictures: Any = tiles,
        scheduler: Any = None,
        scale: float = 9.0,
        noise_level: int = 20,
        output_type: str = "latent",
        per_prompt: int = 1,
    ) -> Any:
        pipeline.scheduler = scheduler or own
        return pipeline(
            list(prompts),
            image=pictures[: len(prompts)],
            num_inference_steps=steps,
            guidance_scale=scale,
            noise_level=noise_level,
            num_images_per_prompt=per_prompt,
            generator=DiffusersNoise.seeded(*seeds).generator,
            output_type=output_type,
        ).images

    return run


@pytest.mark.parametrize("noise_level", [0, 20, 350])
@pytest.mark.parametrize("scale", [1.0, 9.0])
@pytest.mark.parametrize("steps", [5, 10])
def test_every_noise_level(steps: int, scale: float, noise_level: int, ours: Run, theirs: Run, distance: Run) -> None:
    options = {"scale": scale, "noise_level": noise_level}
    assert distance(ours(steps, **options), theirs(steps, **options), "ddim") < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_batch_of_two(scale: float, ours: Run, theirs: Run, distance: Run) -> None:
    assert distance(ours(5, scale=scale, **TWO), theirs(5, scale=scale, **TWO), "ddim") < TOLERANCE


@pytest.mark.parametrize("name", ["ddpm", "dpm++2m", "euler", "euler-ancestral", "heun", "pndm"])
def test_other_solvers(name: str, tiny_x4: Model, ours: Run, theirs: Run, scheduler_of: Run, distance: Run) -> None:
    reference = theirs(5, scheduler=scheduler_of(name, **tiny_x4.scheduler))
    assert distance(ours(5, name), reference, name) < TOLERANCE


def test_pixels(tiny_x4: Model, ours: Run, theirs: Run) -> None:
    mine = decode(tiny_x4, ours(5, **TWO))
    for one, reference in zip(mine, theirs(5, output_type="pil", **TWO), strict=True):
        assert one.size == (96, 64)
        assert int(np.abs(np.asarray(one, int) - np.asarray(reference, int)).max()) <= 1


def test_from_a_tensor(tiles: list[Image.Image], theirs: Run) -> None:
    """What diffusers makes of a tensor of 0 to 1 is what it makes of the picture."""
    assert torch.equal(theirs(2, pictures=to_tensor(tiles) / 2 + 0.5), theirs(2))


def test_takes_any_size(picture: Image.Image, ours: Run, theirs: Run, distance: Run) -> None:
    """diffusers resamples to multiples of 4 pixels (the VAE's, though no VAE sees the picture); here it stays as it is."""
    odd = picture.resize((23, 14))
    assert ours(2, pictures=[odd]).size == (56, 92)
    assert tuple(theirs(2, pictures=[odd]).shape[2:]) == (12, 20)
    cut = odd.resize((20, 12), Image.Resampling.BICUBIC)
    assert distance(ours(2, pictures=[cut]), theirs(2, pictures=[odd]), "ddim") < TOLERANCE


def test_two_images_for_each_of_two_prompts(tiny_x4: Model, tiles: list[Image.Image], theirs: Run, distance: Run) -> None:
    """diffusers gives prompts 1 1 2 2 the pictures 1 2 1 2, and both images of a picture the same noise on it."""
    reference = theirs(5, prompts=TWO["prompts"], per_prompt=2)
    source, schedule = DiffusersNoise.seeded(3), tiny_x4.schedule(5)
    seen = with_low_res(tiny_x4, encode_text(tiny_x4, ""), tiles, seeds=(1, 2), source=source)
    start = noise(tiny_x4, schedule, 64, 96, (1, 2, 3, 4), source=source)
    assert seen.channels is not None
    four = [prompt for prompt in TWO["prompts"] for _ in range(2)]

    def paired(channels: Tensor) -> Latents:
        labels = torch.full((4,), 20)
        cond = replace(encode_text(tiny_x4, four), channels=channels, class_labels=labels)
        uncond = replace(encode_text(tiny_x4, [""] * 4), channels=channels, class_labels=labels)
        denoiser = classifier_free(tiny_x4.denoiser, cond, uncond, 9.0)
        return denoise(denoiser, start, schedule, tiny_x4.solver(5))

    assert distance(paired(seen.channels.repeat(2, 1, 1, 1)), reference, "ddim") < TOLERANCE
    right = paired(seen.channels.repeat_interleave(2, 0))
    apart = [distance(right[i : i + 1], reference[i : i + 1], "ddim") for i in range(4)]
    assert max(apart[0], apart[3]) < TOLERANCE
    assert max(apart[1:3]) == pytest.approx(0.37, rel=0.3)


def test_scales_its_latents_by_what_it_was_trained_with(tiny_x4_folder: Path, tmp_path: Path) -> None:
    """Copies of the checkpoint whose VAE says 0.18215 are around; diffusers overrides it."""
    folder = Path(shutil.copytree(tiny_x4_folder, tmp_path / "old"))
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.08333", "0.18215"))
    with pytest.warns(FutureWarning, match="seems highly unlikely"):
        made = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder, use_safetensors=True)
    assert made.vae.config.scaling_factor == load(str(folder), device="cpu").space.scaling == 0.08333
