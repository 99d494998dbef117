"""Solvers against closed forms: where the denoiser is exact, so is the answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from unrolled.core.denoiser import Denoiser
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import denoise
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import DDIM, DDPM, PLMS, PNDM, DPMpp2M, Euler, EulerAncestral, Heun
from unrolled.schedulers.clip import Clipped
from unrolled.schedulers.config import read_scheduler

SPACE = LatentSpace("test", 4, 1, 1.0, "0" * 16)
MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64).view(1, 4, 1, 1)
SPREAD = torch.tensor([0.4, 0.7, 1.0, 1.5], dtype=torch.float64).view(1, 4, 1, 1)
HIGH, LOW = 4.0, 0.5
EVEN = tuple(LOW + (HIGH - LOW) * i / 1920 for i in range(1921))

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def normal(x: Tensor, sigma: float, timestep: float = 0.0) -> Prediction:
    """The exact denoiser of data that is normal in each dimension."""
    return Prediction.from_x0(MEAN + (x - MEAN) * (SPREAD**2 / (SPREAD**2 + sigma**2)), x, sigma)


def point(x: Tensor, sigma: float, timestep: float = 0.0) -> Prediction:
    """The exact denoiser of a single picture."""
    return Prediction.from_x0(MEAN.expand_as(x), x, sigma)


def solved(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the probability-flow ODE of :func:`normal` takes ``x``."""
    return MEAN + (x - MEAN) * ((SPREAD**2 + sigma_next**2) / (SPREAD**2 + sigma**2)).sqrt()


def latents(sigma: float, size: int = 1) -> Latents:
    x = torch.full((size, 4, 1, 1), 1.0, dtype=torch.float64) * (1 + sigma)
    return Latents(x, SPACE, sigma, tuple(range(size)))


def even(steps: int) -> Schedule:
    return Schedule(tuple(HIGH + (LOW - HIGH) * i / steps for i in range(steps + 1)), (0.0,) * steps)


def geometric(steps: int) -> Schedule:
    return Schedule(tuple(HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps + 1)), (0.0,) * steps)


def error(solver: Solver, schedule: Schedule) -> float:
    start = latents(schedule.sigmas[0])
    end = denoise(normal, start, schedule, solver)
    return float((end.x - solved(start.x, schedule.sigmas[0], schedule.sigmas[-1])).abs().max())


@pytest.mark.parametrize(
    ("solver", "grid", "order"),
    [
        (Euler(), even, 1),
        (Euler(), geometric, 1),
        (DDIM(), geometric, 1),
        (Heun(), even, 2),
        (Heun(), geometric, 2),
        (DPMpp2M(), even, 2),
        (DPMpp2M(), geometric, 2),
        (DPMpp2M("heun"), even, 2),
        (DPMpp2M("heun"), geometric, 2),
        (PLMS(), even, 3),  # fourth order, but started by a step of second and two of lower order
        (PNDM(EVEN), even, 4),
    ],
)
def test_order_of_convergence(solver: Solver, grid: Callable[[int], Schedule], order: int) -> None:
    errors = [error(solver, grid(steps)) for steps in (60, 120, 240)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert order - 0.3 < min(rates) <= max(rates) < order + 1


def test_a_first_order_end_costs_little_but_is_seen() -> None:
    schedule = geometric(10)
    plain, capped = error(DPMpp2M(), schedule), error(DPMpp2M(first_order_to=LOW), schedule)
    assert plain < capped < error(Euler(), schedule)


SOLVERS: list[Solver] = [
    Euler(),
    Euler(0.5),
    EulerAncestral(),
    DDPM(),
    DDPM("large"),
    Heun(),
    DPMpp2M(),
    DPMpp2M("heun"),
    PLMS(),
    Clipped(Euler(), 10.0),
    Clipped(Euler(), 10.0, keep_eps=True),
    Clipped(Heun(), 10.0),
]


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_single_picture_is_found_exactly(solver: Solver, steps: int) -> None:
    schedule = read_scheduler(SD15, "euler").schedule(steps)
    end = denoise(point, latents(schedule.sigmas[0]), schedule, solver)
    assert end.sigma == 0
    assert torch.allclose(end.x, MEAN, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [4, 5, 30])
def test_runge_kutta_start_finds_it_too(steps: int) -> None:
    config = read_scheduler(SD15)
    schedule = config.schedule(steps)
    end = denoise(point, latents(schedule.sigmas[0]), schedule, config.solver(steps))
    assert torch.allclose(end.x, MEAN, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMpp2M(), DPMpp2M("heun"), PLMS(), PNDM(EVEN)], ids=repr)
def test_between_picture_and_noise_the_way_is_straight(solver: Solver) -> None:
    schedule = even(8)
    start = latents(HIGH)
    end = denoise(point, start, schedule, solver)
    assert torch.allclose(end.x, MEAN + (start.x - MEAN) * (LOW / HIGH), rtol=1e-12)


def run(name: str, denoiser: Denoiser = normal, steps: int = 9, eta: float = 0.0, **options: object) -> Tensor:
    config = read_scheduler(SD15, name, timestep_spacing="trailing", **options)
    schedule = config.schedule(steps)
    return denoise(denoiser, latents(schedule.sigmas[0], 2), schedule, config.solver(steps, eta=eta)).x


def test_ddim_is_euler() -> None:
    assert DDIM is Euler
    assert torch.equal(run("ddim"), run("euler"))


def test_ddpm_is_ancestral_euler_and_ddim_at_eta_one() -> None:
    assert torch.equal(run("ddpm"), run("euler-ancestral"))
    assert torch.equal(run("ddpm"), run("ddim", eta=1.0))
    assert not torch.equal(run("ddpm"), run("ddim", eta=0.5))


def test_first_order_multistep_is_euler() -> None:
    assert torch.allclose(run("dpm++2m", solver_order=1), run("euler"), rtol=1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_solvers_keep_the_distribution(eta: float) -> None:
    """A step on normal data is ``a x + b noise``: the variance it leads to tends to the data's, to first order."""

    def gap(steps: int) -> float:
        schedule = read_scheduler(SD15, "euler").schedule(steps)
        variance = SPREAD**2 + schedule.sigmas[0] ** 2
        for sigma, sigma_next in zip(schedule.sigmas, schedule.sigmas[1:], strict=False):
            above, _ = Euler(eta)(normal, MEAN + 1.0, sigma, sigma_next, (), lambda _: torch.zeros_like(MEAN))
            noise, _ = Euler(eta)(normal, MEAN + 0.0, sigma, sigma_next, (), lambda _: torch.ones_like(MEAN))
            variance = (above - MEAN) ** 2 * variance + (noise - MEAN) ** 2
        return float((variance - SPREAD**2).abs().max())

    assert gap(500) < 0.05
    assert math.log2(gap(250) / gap(500)) == pytest.approx(1.0, abs=0.25)


def test_clipping_keeps_the_direction_only_when_asked() -> None:
    x, (sigma, sigma_next) = MEAN + 3.0, (2.0, 1.0)
    x0 = normal(x, sigma).x0.clamp(-1, 1)
    moved, _ = Clipped(Euler(), 1.0)(normal, x, sigma, sigma_next, (), torch.zeros)
    kept, _ = Clipped(Euler(), 1.0, keep_eps=True)(normal, x, sigma, sigma_next, (), torch.zeros)
    assert torch.allclose(moved, x0 + sigma_next * (x - x0) / sigma)
    assert torch.allclose(kept, x0 + sigma_next * normal(x, sigma).eps)
    assert not torch.allclose(moved, kept)
