"""SDEdit beside diffusers' image-to-image pipeline with ancestral Euler, which is its algorithm with the SDE's noise."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from unrolled import Latents, Model, Noise, classifier_free, encode_text
from unrolled.examples.sdedit import sdedit

STEPS, FIRST, SHAPE = 8, 3, (1, 4, 8, 8)


def test_it_is_diffusers_image_to_image(tiny: Model, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Latents(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), tiny.space, seeds=(7,))
    denoiser = classifier_free(tiny.denoiser, encode_text(tiny, "a red apple"), encode_text(tiny, ""), 5.0)
    schedule = tiny.schedule(STEPS, "euler-ancestral")
    ours = sdedit(denoiser, guide, schedule, schedule.sigmas[FIRST])

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(tiny.scheduler)
    draw, index = Noise((7,)), count(FIRST)
    of_pipeline, of_scheduler = pipeline_stable_diffusion_img2img, scheduling_euler_ancestral_discrete
    monkeypatch.setattr(of_pipeline, "randn_tensor", lambda *_, **__: draw(SHAPE, "latents"))
    monkeypatch.setattr(of_scheduler, "randn_tensor", lambda *_, **__: draw(SHAPE, "step", next(index)))
    strength = (STEPS - FIRST) / STEPS
    settings = {"strength": strength, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = pipeline("a red apple", image=guide.x, **settings).images
    assert next(index) == STEPS
    assert (ours.x - theirs).abs().max() < 1e-4 * theirs.abs().max()
