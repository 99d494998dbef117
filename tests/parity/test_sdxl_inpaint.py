"""SDXL's refiner as an inpainting model of 4 channels, against diffusers' StableDiffusionXLInpaintPipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.stages.image import encode_image
from unrolled.stages.inpaint import keep_known, known, latent_mask
from unrolled.stages.noise import add_noise, start_step, unit_noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
STEPS = 20
Run = Callable[..., Any]


@pytest.fixture
def ours(tiny_sdxl: Model, tiny_refiner: Model, picture: Image.Image, mask: Image.Image) -> Run:
    def run(
        name: str, *, refiner: bool = True, strength: float = 0.9999, end: float = 1.0, faithful: bool = False
    ) -> tuple[Latents, Latents]:
        """The result, and the kept picture's clean latents."""
        model, source = tiny_refiner if refiner else tiny_sdxl, DiffusersNoise.seeded(3)
        cond = with_size(model, encode_text(model, "a castle"), 64, 64)
        uncond = with_size(model, encode_text(model, None), 64, 64, aesthetic_score=2.5)
        whole = model.schedule(STEPS, name)
        schedule = whole[start_step(STEPS, strength) : whole.index(training_time=end)]
        clean = encode_image(model, picture, seeds=[3], source=source)
        unit = unit_noise(clean, source)
        source(clean.x.shape, "masked posterior, unused")
        known_at = known(clean, unit, schedule)

        def clean_at_any_end(sigma: float) -> Tensor:
            return clean.x if sigma == schedule.sigmas[-1] else known_at(sigma)

        keep = keep_known(latent_mask(mask, model.space, "nearest"), clean_at_any_end if faithful else known_at)
        denoiser = classifier_free(model.denoiser, cond, uncond, 5.0)
        start = add_noise(clean, schedule, unit)
        return denoise(denoiser, start, schedule, model.solver(STEPS, name), hooks=[keep], noise=source), clean

    return run


@pytest.fixture
def theirs(sdxl_pipeline: Run, picture: Image.Image, mask: Image.Image) -> Run:
    def run(name: str, *, refiner: bool = True, strength: float = 0.9999, end: float | None = None) -> Any:
        return sdxl_pipeline("Inpaint", name, refiner=refiner)(
            "a castle", image=picture, mask_image=mask, height=64, width=64, strength=strength, denoising_end=end,
            num_inference_steps=STEPS, guidance_scale=5.0, generator=DiffusersNoise.seeded(3).generator,
            output_type="latent",
        ).images  # fmt: skip

    return run


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "euler-ancestral", "ddim"])
@pytest.mark.parametrize("strength", [0.9999, 0.6])
@pytest.mark.parametrize("refiner", [True, False], ids=["refiner", "base"])
def test_inpainting(name: str, strength: float, refiner: bool, ours: Run, theirs: Run, distance: Run) -> None:
    out, _ = ours(name, strength=strength, refiner=refiner)
    assert out.is_clean
    assert distance(out, theirs(name, strength=strength, refiner=refiner), name) < TOLERANCE


def test_almost_full_strength_leaves_out_the_first_step() -> None:
    assert start_step(STEPS, 0.9999) == start_step(STEPS, 0.9999, faithful=True) == 1


def test_the_kept_part_of_a_stopped_run_is_as_noisy_as_the_rest(
    tiny_refiner: Model, mask: Image.Image, ours: Run, theirs: Run, distance: Run
) -> None:
    """diffusers blends the *clean* picture in after what it takes for the last step, here at sigma 1.38."""
    reference = theirs("euler", end=0.5)
    keep = (1 - latent_mask(mask, tiny_refiner.space, "nearest")).bool().expand(1, 4, -1, -1)
    out, clean = ours("euler", end=0.5)
    assert not out.is_clean
    assert out.sigma == pytest.approx(1.376, abs=1e-3)
    deviations = [float(x[keep].std()) for x in (out.x, reference, clean.x)]
    assert deviations == pytest.approx([1.32, 0.127, 0.127], rel=0.1)
    assert distance(out, reference, "euler") == pytest.approx(0.154, rel=0.3)
    assert torch.equal(reference[keep], clean.x[keep])
    assert distance(ours("euler", end=0.5, faithful=True)[0], reference, "euler") < TOLERANCE
