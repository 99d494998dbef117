"""Blended latent diffusion beside algorithm 1 of the paper, written on diffusers' DDIM scheduler."""

from __future__ import annotations

import math

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from unrolled import DDIM, Latents, Model, Noise, conditioned, denoise, encode_text
from unrolled.examples.blended_latent_diffusion import blended

STEPS, SHAPE, SEEDS = 6, (2, 4, 8, 8), (3, 4)


def algorithm_1(model: Model, z: Tensor, z_init: Tensor, mask: Tensor) -> Tensor:
    """``z_fg ~ denoise(z_t, d, t)``, ``z_bg ~ noise(z_init, t)``, ``z_t = z_fg m + z_bg (1 - m)``."""
    scheduler = DDIMScheduler.from_config({**model.scheduler, "set_alpha_to_one": True})
    scheduler.set_timesteps(STEPS)
    context = encode_text(model, "a panda").context
    assert context is not None
    for index, t in enumerate(scheduler.timesteps):
        foreground = scheduler.step(model.unet(z, t, context.expand(2, -1, -1)).sample, t, z).prev_sample
        after = scheduler.timesteps[index + 1] if index + 1 < STEPS else None
        unit = Noise(SEEDS, "background")(SHAPE, "step", index)
        background = z_init if after is None else scheduler.add_noise(z_init, unit, after)
        z = foreground * mask + background * (1 - mask)
    return z


def test_it_is_algorithm_1(tiny: Model) -> None:
    generator = torch.Generator().manual_seed(2)
    z, z_init = torch.randn(2, *SHAPE, generator=generator)
    mask = (torch.rand(1, 1, 8, 8, generator=generator) < 0.5).float()
    schedule = tiny.schedule(STEPS, "ddim", set_alpha_to_one=True)
    start = Latents(z * math.sqrt(1 + schedule.sigmas[0] ** 2), tiny.space, schedule.sigmas[0], SEEDS)
    hook = blended(Latents(z_init, tiny.space, seeds=SEEDS), mask)
    ours = denoise(conditioned(tiny.denoiser, encode_text(tiny, "a panda")), start, schedule, DDIM(), [hook])
    with torch.no_grad():
        expected = algorithm_1(tiny, z, z_init, mask)
    assert (ours.x - expected).abs().max() < 1e-4 * expected.abs().max()
