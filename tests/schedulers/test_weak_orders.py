"""How fast the distributions that stochastic solvers make come to be the right one.

Of a Gaussian the standard deviation that they lead to is reckoned exactly, without sampling; on a mixture the
distance of samples is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from unrolled.core.latents import Latents
from unrolled.core.loop import denoise
from unrolled.core.mixture import GaussianMixture
from unrolled.core.noise import Brownian, DiffusersNoise, Levels, NoiseSource
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import (
    DDPM,
    DPM2,
    LCM,
    Ancestral,
    Churned,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3MSDE,
    DPMppSDE,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Renoised,
    SASolver,
    Singlestep,
    TauBetween,
    ToZero,
    UniPC,
    spacing,
)

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), torch.tensor([0.4, 0.6, 0.5]), torch.tensor([1.0, 1.0, 1.0])
)
GAUSSIAN = GaussianMixture(
    torch.tensor([[0.5, -1.0, 0.0, 2.0]], dtype=torch.float64), torch.tensor([[0.3, 0.5, 1.0, 2.0]]), torch.ones(1)
)
HIGH, LOW = 10.0, 0.1
TRAINING = tuple(np.geomspace(0.03, 15.0, 1000).tolist())
GAMMA = 4.0
"""Churn of a whole run, which is spread over its steps."""

ORDERS: dict[str, tuple[Callable[[int], Solver], int]] = {
    "Euler 0.5": (lambda n: Euler(0.5), 1),
    "EulerAncestral": (lambda n: EulerAncestral(), 1),
    "DDPM large": (lambda n: DDPM("large"), 1),
    "DPM2 ancestral": (lambda n: DPM2(1.0), 2),
    "DPMpp2S ancestral": (lambda n: DPMpp2S(1.0), 2),
    "DPMppSDE": (lambda n: DPMppSDE(), 2),
    "DPMppSDE 0.5": (lambda n: DPMppSDE(0.5), 2),
    "DPMpp2MSDE": (lambda n: DPMpp2MSDE(), 2),
    "DPMpp2MSDE 0.5": (lambda n: DPMpp2MSDE(0.5), 2),
    "DPMpp2MSDE heun": (lambda n: DPMpp2MSDE(solver_type="heun"), 2),
    "DPMpp3MSDE": (lambda n: DPMpp3MSDE(), 2),
    "DPMSolver 1 SDE": (lambda n: DPMSolver(1, tau=1.0), 1),
    "DPMSolver 2 SDE eps": (lambda n: DPMSolver(2, tau=1.0, predicts="eps"), 2),
    # diffusers' wrong sign in the third order loses what is won over the first.
    "DPMSolver 3 SDE faithful": (lambda n: DPMSolver(3, tau=1.0, faithful=True), 1),
    # The noise is not extrapolated, so that more points win nothing in the end.
    "SASolver 2, 2": (lambda n: SASolver(2, 2, tau=1.0), 2),
    "SASolver 2, 2 eps": (lambda n: SASolver(2, 2, tau=1.0, predicts="eps"), 2),
    "SASolver 3, 4": (lambda n: SASolver(3, 4, tau=1.0), 2),
    # Noise of its own at every evaluation, as in diffusers: what is evaluated then knows nothing of the step's end.
    "Singlestep 2 SDE": (lambda n: Singlestep(2, tau=1.0), 1),
    "Singlestep 3 SDE": (lambda n: Singlestep(3, tau=1.0), 1),
    "Churned Euler": (lambda n: Churned(Euler(), min(GAMMA / n, 0.4)), 1),
    "Churned Heun": (lambda n: Churned(Heun(), min(GAMMA / n, 0.4)), 2),
    # What a multistep method remembers is from before the churn.
    "Churned DPMpp2M": (lambda n: Churned(DPMpp2M(), min(GAMMA / n, 0.4)), 1),
    # As is what it remembers from before the new noise.
    "Renoised Heun": (lambda n: Renoised(Heun(), Ancestral(1.0)), 2),
    "Renoised DPMpp2M": (lambda n: Renoised(DPMpp2M(), Ancestral(1.0)), 1),
    "Renoised UniPC": (lambda n: Renoised(UniPC(3), Ancestral(1.0)), 1),
}


def geometric(steps: int) -> tuple[float, ...]:
    return tuple(HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps + 1))


class Impulses:
    """Noise that is 0 but for one picture of the batch, in the next draw the next one."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(
        self, shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None
    ) -> Tensor:
        self.drawn += 1
        unit = torch.zeros(*shape)
        unit[1 + self.drawn] = 1.0
        return unit


def spread(solver: Solver, levels: tuple[float, ...]) -> Tensor:
    """The exact standard deviation of what a solver makes of a Gaussian.

    On a Gaussian every solver is linear, and variances add up. Picture 0 starts at the mean, picture 1 one standard
    deviation off, and each of the others meets one draw.
    """
    mean, pictures = GAUSSIAN.means[0], 2 + 3 * len(levels)
    x = mean.repeat(pictures, 1)
    x[1] += (GAUSSIAN.stds[0] ** 2 + levels[0] ** 2).sqrt()
    start = Latents(x[..., None, None], GAUSSIAN.space, levels[0])
    end = denoise(GAUSSIAN, start, Schedule.at(levels), solver, noise=Impulses()).x[..., 0, 0]
    assert torch.allclose(end[0], mean, rtol=0, atol=1e-10)
    return (end - mean).square().sum(0).sqrt()


def spread_error(solver: Solver, levels: tuple[float, ...]) -> float:
    """The largest relative error of the standard deviation."""
    true = (GAUSSIAN.stds[0] ** 2 + levels[-1] ** 2).sqrt()
    return float((spread(solver, levels) / true - 1).abs().max())


@pytest.mark.parametrize("name", ORDERS)
def test_weak_order_of_convergence(name: str) -> None:
    make, order = ORDERS[name]
    steps = (40, 80, 160)
    errors = [spread_error(make(n), geometric(n)) for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.3)
    assert errors[-1] < {1: 0.02, 2: 0.0005}[order]


def test_a_wrong_sign_costs_the_third_order_two_orders_of_magnitude() -> None:
    right, wrong = (spread_error(DPMSolver(3, tau=1.0, faithful=faithful), geometric(160)) for faithful in (False, True))
    assert [right, wrong] == pytest.approx([9.0e-5, 5.2e-3], rel=0.05)


def test_tau_between_two_levels_is_noise_there_and_none_elsewhere() -> None:
    between, never = SASolver(3, 0, tau=TauBetween(0.3, 3.0)), SASolver(3, 0, tau=TauBetween(20.0, 30.0))
    assert spread_error(between, geometric(160)) < 0.002
    assert torch.equal(spread(never, geometric(20)), spread(SASolver(3, 0), geometric(20)))


def test_impulses_find_what_sampling_finds() -> None:
    """20,000 samples of a run so short that its standard deviation is far from the true one."""
    solver, levels = Singlestep(2, tau=1.0), geometric(12)
    start = GAUSSIAN.latents(range(20_000), Schedule.at(levels), DiffusersNoise.seeded(0))
    end = denoise(GAUSSIAN, start, Schedule.at(levels), solver, noise=DiffusersNoise.seeded(1)).x
    assert torch.allclose(end.std(0).flatten(), spread(solver, levels), rtol=0.02)
    assert spread_error(solver, levels) > 0.1


# Those renoised multistep methods are of first order with so large an error that 40 steps do not show it fall.
@pytest.mark.parametrize("name", [name for name in ORDERS if name not in ("Renoised DPMpp2M", "Renoised UniPC")])
def test_samples_come_to_follow_the_mixture(name: str) -> None:
    """By the sliced Wasserstein distance, at which 4,000 true samples are 0.01 to 0.03 away."""
    make, _ = ORDERS[name]

    def distance(steps: int) -> float:
        schedule = Schedule.at(spacing.karras(steps + 1, LOW, HIGH))
        start = MIXTURE.latents(range(4000), schedule, DiffusersNoise.seeded(0))
        end = denoise(MIXTURE, start, schedule, make(steps), noise=DiffusersNoise.seeded(1))
        return MIXTURE.distance(end.x, LOW)

    few, more, many = (distance(steps) for steps in (4, 16, 40))
    assert max(few, more) > 1.4 * many
    assert many < 0.04


def test_a_brownian_path_makes_the_same_picture_of_any_number_of_steps() -> None:
    def change(noise: NoiseSource, steps: int) -> float:
        runs = (Schedule.at(geometric(n)) for n in (steps, 2 * steps))
        coarse, fine = (denoise(MIXTURE, MIXTURE.latents(range(32), r), r, DPMppSDE(), noise=noise).x for r in runs)
        return float((coarse - fine).square().mean().sqrt())

    path = Brownian(tuple(range(32)))
    assert change(path, 32) < 0.5 * change(path, 8) < 0.15
    assert change(DiffusersNoise.seeded(0), 32) > 0.5


def test_consistency_sampling_is_exact_with_a_consistent_model() -> None:
    """Its model says where the ODE ends; with such a one, any number of steps gives the distribution, with a mean not."""
    schedule = Schedule.at([10.0, 2.0, 0.5, 0.0], TRAINING)
    start = MIXTURE.latents(range(3000), schedule, DiffusersNoise.seeded(0))

    def consistent(x: Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction.from_x0(MIXTURE.solve(x, sigma, 0.0), x, sigma)

    for solver in (LCM(TRAINING), Renoised(Euler(), ToZero())):
        right, wrong = (
            MIXTURE.distance(denoise(model, start, schedule, solver, noise=DiffusersNoise.seeded(1)).x)
            for model in (consistent, MIXTURE)
        )
        assert right < 0.03
        assert wrong > 0.1
