"""DDIM's inversion beside diffusers' scheduler, and on a Gaussian mixture, whose noise for a picture is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler
from unrolled import Conditioning, Euler, GaussianMixture, Latents, Model, Schedule, conditioned, denoise
from unrolled.examples.ddim_inversion import inverted

MEANS, STDS, WEIGHTS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6])
MIXTURE = GaussianMixture(MEANS, STDS, WEIGHTS, "epsilon")


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("to_one", [False, True])
def test_it_is_diffusers_inverse_scheduler(
    tiny: Model, texts: tuple[Conditioning, Conditioning], steps: int, to_one: bool
) -> None:
    picture = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMInverseScheduler.from_config(tiny.scheduler, set_alpha_to_one=to_one, clip_sample=False)
    scheduler.set_timesteps(steps)
    theirs = picture
    for t in scheduler.timesteps:
        out = tiny.unet(theirs, t, texts[0].expand(2).context).sample
        theirs = scheduler.step(out, int(t), theirs).prev_sample

    schedule = tiny.schedule(steps, "ddim", set_alpha_to_one=to_one)
    noisy = inverted(conditioned(tiny.denoiser, texts[0]), Latents(picture, tiny.space), schedule)
    ours = noisy.x / (1 + noisy.sigma**2) ** 0.5
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_way_there_and_back_is_of_first_order() -> None:
    there, back = [], []
    for steps in (50, 100, 200):
        schedule = Schedule.at([10.0 * (1 - i / steps) ** 3 for i in range(steps + 1)])
        picture = Latents(MIXTURE.sample(range(50))[:, :, None, None], MIXTURE.space)
        noisy = inverted(MIXTURE, picture, schedule)
        there.append(float((noisy.x - MIXTURE.solve(picture.x, 0.0, 10.0)).abs().mean()))
        back.append(float((denoise(MIXTURE, noisy, schedule, Euler()).x - picture.x).abs().mean()))
    for errors in (there, back):
        assert [more / fewer for more, fewer in pairwise(errors)] == pytest.approx([2, 2], abs=0.2)
