"""Restart sampling on Gaussian mixtures: the paper's algorithm written out, and what it does to a sampler's error."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from unrolled import Euler, GaussianMixture, Noise, Schedule, denoise
from unrolled.examples.restart_sampling import restarted

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.5]]), torch.tensor([0.1, 0.2, 0.1]), torch.tensor([0.3, 0.5, 0.2])
)
LEVELS = (20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.0)
SCHEDULE = Schedule.at(LEVELS)


def test_it_is_the_papers_algorithm() -> None:
    start = MIXTURE.latents(range(5), SCHEDULE)

    def down(x: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
        for t, t_next in pairwise(levels):
            x = x + (t_next - t) * (x - MIXTURE(x, t).x0) / t
        return x

    x = down(start.x, (20.0, 10.0, 5.0, 2.5, 1.2, 0.6))
    for k in range(3):
        z = Noise(start.seeds, f"restart {k}")(x.shape, "latents").double()
        x = down(x + math.sqrt(5.0**2 - 0.6**2) * z, (5.0, 2.5, 1.2, 0.6))
    x = down(x, (0.6, 0.3, 0.0))

    end = restarted(MIXTURE, start, SCHEDULE, Euler(), low=0.7, high=5.0, times=3)
    torch.testing.assert_close(end.x, x, rtol=1e-9, atol=1e-9)
    assert (end.sigma, end.seeds) == (0.0, start.seeds)


def test_no_times_is_the_ordinary_run() -> None:
    start = MIXTURE.latents(range(5), SCHEDULE)
    ordinary = denoise(MIXTURE, start, SCHEDULE, Euler())
    assert torch.equal(restarted(MIXTURE, start, SCHEDULE, Euler(), 0.7, 5.0, 0).x, ordinary.x)


def test_it_forgets_the_errors_made_above() -> None:
    """One giant step to 1 brings the pictures to wrong places, and every time over the small steps below makes it good."""
    fine = [0.9**i for i in range(30)]
    schedule = Schedule.at([20.0, *fine, 0.0])
    start = MIXTURE.latents(range(2000), schedule)
    never, once, twice = (
        MIXTURE.distance(restarted(MIXTURE, start, schedule, Euler(), low=0.3, high=1.0, times=times).x)
        for times in (0, 1, 2)
    )
    assert never > 1.8 * once
    assert once > 1.5 * twice
    assert twice < 1.5 * MIXTURE.distance(MIXTURE.sample(range(2000)))  # as far as so many true samples are
