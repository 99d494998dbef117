"""MultiDiffusion beside diffusers' StableDiffusionPanoramaPipeline."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline
from unrolled import DDIM, Latents, Model, Prediction, classifier_free, denoise, encode_text
from unrolled.examples.multidiffusion_panorama import panorama

STEPS, SHAPE = 2, (1, 4, 64, 80)  # diffusers' windows are 64 wide, one every 8


def test_it_is_diffusers_pipeline(tiny: Model, tiny_folder: Path) -> None:
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    schedule = tiny.schedule(STEPS, "ddim")
    plain = classifier_free(tiny.denoiser, encode_text(tiny, "a mountain"), encode_text(tiny, ""), 5.0)
    start = Latents(unit * math.sqrt(1 + schedule.sigmas[0] ** 2), tiny.space, schedule.sigmas[0])
    ours = denoise(panorama(plain, window=64, stride=8), start, schedule, DDIM())

    pipeline = StableDiffusionPanoramaPipeline.from_pretrained(tiny_folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(tiny.scheduler)
    size = {"height": 8 * SHAPE[2], "width": 8 * SHAPE[3]}
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = pipeline("a mountain", latents=unit, **size, **settings).images
    assert (ours.x / math.sqrt(1 + ours.sigma**2) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_every_place_is_the_mean_of_the_windows_over_it() -> None:
    def numbered(x: torch.Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction.from_x0(torch.arange(len(x)).view(-1, 1, 1, 1).expand_as(x).float(), x, sigma)

    x0 = panorama(numbered, window=4, stride=2)(torch.zeros(1, 1, 1, 9), 1.0, 0.0).x0
    assert x0.flatten().tolist() == [0, 0, 0.5, 0.5, 1.5, 2, 2.5, 2.5, 3]  # they begin at 0, 2, 4 and, to reach the end, 5
