"""Universal guidance in closed form, and beside the paper's algorithm written with diffusers' DDIM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from unrolled import Conditioning, DiffusersNoise, GaussianMixture, Model, classifier_free, conditioned, noise
from unrolled.examples.universal_guidance import universal

TARGET = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def loss(x0: Tensor) -> Tensor:
    return (x0 - TARGET).square().sum(dim=(1, 2, 3)) / 2


def test_one_gaussian_is_pulled_by_what_x0_follows_of_x() -> None:
    """x0 = c x with c = std^2 / (std^2 + sigma^2), so that the gradient of the loss by x is c (x0 - target)."""
    std, sigma, scale = 0.5, 2.0, 0.7
    one = GaussianMixture(torch.zeros(1, 4, 8, 8), torch.tensor([std]), torch.ones(1))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    follows = std**2 / (std**2 + sigma**2)
    with torch.no_grad():  # as the loop has it
        guided = universal(one, loss, scale)(x, sigma, 0.0)
    expected = follows * x - scale * sigma**2 * follows * (follows * x - TARGET)
    torch.testing.assert_close(guided.x0, expected)
    assert not guided.x0.requires_grad
    assert guided.x is x


def test_it_ends_where_the_papers_algorithm_does(
    tiny: Model, texts: tuple[Conditioning, Conditioning], ours: Callable[..., Tensor]
) -> None:
    scale, steps = 0.2, 6
    scheduler = DDIMScheduler.from_config(tiny.scheduler)
    scheduler.set_timesteps(steps)
    schedule = tiny.schedule(steps, "ddim")
    z = noise(tiny, schedule, source=DiffusersNoise.seeded(0)).x / (1 + schedule.sigmas[0] ** 2) ** 0.5
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t]
        z = z.requires_grad_()
        eps = tiny.unet(z, t, texts[0].context).sample
        clean = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        (slope,) = torch.autograd.grad(loss(clean).sum(), z)
        z = scheduler.step(eps.detach() + scale * (1 - alpha).sqrt() * slope, t, z.detach()).prev_sample

    plain = conditioned(tiny.denoiser, texts[0])
    guided = ours(universal(plain, loss, scale))
    assert (guided - z).abs().max() < 1e-4 * z.abs().max()
    assert float(loss(guided)) < 0.5 * float(loss(ours(plain)))


def test_guidance_may_lie_inside(tiny: Model, texts: tuple[Conditioning, Conditioning], ours: Callable[..., Tensor]) -> None:
    guided = classifier_free(tiny.denoiser, *texts, 3.0)
    assert float(loss(ours(universal(guided, loss, 0.1)))) < float(loss(ours(guided)))
