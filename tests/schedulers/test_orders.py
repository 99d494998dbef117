"""How fast the errors of deterministic solvers fall, and what splits and strength do to them.

On a mixture of Gaussians the true solution of the probability-flow ODE is known. An order of convergence is the slope
of log error over log steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from unrolled.core.latents import Latents
from unrolled.core.loop import denoise
from unrolled.core.mixture import GaussianMixture
from unrolled.core.noise import DiffusersNoise
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Past, Solver
from unrolled.schedulers import (
    DEIS,
    DPM2,
    IPNDM,
    LMS,
    PLMS,
    PNDM,
    Churned,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMppSDE,
    DPMSolver,
    Euler,
    Heun,
    SASolver,
    Singlestep,
    UniPC,
    spacing,
)

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), torch.tensor([0.4, 0.6, 0.5]), torch.tensor([1.0, 1.0, 1.0])
)
HIGH, LOW = 10.0, 0.1

Levels = tuple[float, ...]


def geometric(steps: int) -> Levels:
    return tuple(HIGH * (LOW / HIGH) ** (i / steps) for i in range(steps + 1))


def karras(steps: int) -> Levels:
    return tuple(spacing.karras(steps + 1, LOW, HIGH))


def even(steps: int) -> Levels:
    return tuple(4.0 - 3.5 * i / steps for i in range(steps + 1))


@cache
def true_path(levels: Levels) -> tuple[Tensor, ...]:
    """Twelve pictures at each level, by the true solution."""
    xs = [MIXTURE.latents(range(12), Schedule.at(levels)).x]
    for sigma, sigma_next in pairwise(levels):
        xs.append(MIXTURE.solve(xs[-1], sigma, sigma_next))
    return tuple(xs)


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt())


def run(solver: Solver, levels: Levels, past: int = 0, forgets_at: int | None = None) -> Tensor:
    """Where the solver ends; the first ``past`` levels are truly solved and remembered."""
    *before, x = true_path(levels[: past + 1])
    history = tuple(Past(sigma, x, MIXTURE(x, sigma).x0) for sigma, x in zip(levels, before, strict=False))
    latents = Latents(x, MIXTURE.space, levels[past], tuple(range(len(x))), history=history)
    rest = Schedule.at(levels)[past:]
    if forgets_at is not None:
        first, rest = rest.split(forgets_at)
        latents = replace(denoise(MIXTURE, latents, first, solver), history=())
    return denoise(MIXTURE, latents, rest, solver).x


def error(solver: Solver, levels: Levels, past: int = 0, forgets_at: int | None = None) -> float:
    """Root mean square distance from the true solution."""
    return apart(run(solver, levels, past, forgets_at), true_path((levels[0], levels[-1]))[-1])


def slope(errors: Sequence[float], steps: Sequence[int]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDERS: dict[str, tuple[Solver, int]] = {
    "Euler": (Euler(), 1),
    "Heun": (Heun(), 2),
    "Heun, no churn": (Churned(Heun(), 0.0), 2),
    "DPM2": (DPM2(), 2),
    "DPMpp2S": (DPMpp2S(), 2),
    "DPMppSDE, no noise": (DPMppSDE(0.0), 2),
    "Singlestep 2 heun": (Singlestep(2, solver_type="heun"), 2),
    "Singlestep 2 eps heun": (Singlestep(2, predicts="eps", solver_type="heun"), 2),
    "Singlestep 3": (Singlestep(3), 3),
    "Singlestep 3 heun": (Singlestep(3, solver_type="heun"), 3),
    "Singlestep 3 eps": (Singlestep(3, predicts="eps"), 3),
    "Singlestep 3 eps heun": (Singlestep(3, predicts="eps", solver_type="heun"), 3),
    "DPMSolver 1": (DPMSolver(1), 1),
    "DPMpp2M": (DPMpp2M(), 2),
    "DPMpp2M heun": (DPMpp2M("heun"), 2),
    "DPMSolver 2 eps": (DPMSolver(2, predicts="eps"), 2),
    "DPMSolver 2 eps heun": (DPMSolver(2, predicts="eps", solver_type="heun"), 2),
    # The third order as published has half the second derivative that belongs there, and converges as the second.
    "DPMpp3M": (DPMpp3M(), 2),
    "DPMSolver 3 eps": (DPMSolver(3, predicts="eps"), 2),
    "LMS 2": (LMS(2), 2),
    "LMS 3": (LMS(3), 3),
    "LMS 4": (LMS(4), 4),
    "DEIS 2": (DEIS(2), 2),
    "DEIS 3": (DEIS(3), 3),
    "DEIS 4": (DEIS(4), 4),
    # These are meant for even levels. On others they are of second order, however many points they take.
    "IPNDM 4": (IPNDM(4), 2),
    "PLMS": (PLMS(), 2),
    "PNDM": (PNDM(geometric(1920)[::-1]), 2),
    # The corrector adds one.
    "UniPC 1": (UniPC(1), 2),
    "UniPC 2": (UniPC(2), 3),
    "UniPC 3": (UniPC(3), 4),
    "UniPC 2 bh1": (UniPC(2, solver_type="bh1"), 3),
    "UniPC 3 bh1": (UniPC(3, solver_type="bh1"), 4),
    "UniPC 2 eps": (UniPC(2, predicts="eps"), 3),
    "UniPC 3 eps": (UniPC(3, predicts="eps"), 4),
    # As many as the corrector has points (one of them the new one), but at most one more than the predictor.
    "SASolver 2, 0": (SASolver(2, 0), 2),
    "SASolver 3, 0": (SASolver(3, 0), 3),
    "SASolver 4, 0": (SASolver(4, 0), 4),
    "SASolver 1, 1": (SASolver(1, 1), 1),
    "SASolver 1, 2": (SASolver(1, 2), 2),
    "SASolver 2, 2": (SASolver(2, 2), 2),
    "SASolver 2, 3": (SASolver(2, 3), 3),
    "SASolver 3, 4": (SASolver(3, 4), 4),
    "SASolver 2, 4": (SASolver(2, 4), 3),
}
EVEN_ORDERS: dict[str, tuple[Solver, int]] = {
    "LMS 4": (LMS(4), 4),
    "IPNDM 2": (IPNDM(2), 2),
    "IPNDM 3": (IPNDM(3), 3),
    "IPNDM 4": (IPNDM(4), 4),
    "PLMS": (PLMS(), 4),
    "PNDM": (PNDM(even(1920)[::-1]), 4),
}


@pytest.mark.parametrize("grid", [geometric, karras])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, grid: Callable[[int], Levels]) -> None:
    """With a true past, so that no method is judged by how it starts."""
    solver, order = ORDERS[name]
    steps = (80, 160, 320) if order < 4 else (40, 80, 160)
    assert slope([error(solver, grid(n), past=3) for n in steps], steps) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", EVEN_ORDERS)
def test_order_of_convergence_on_even_levels(name: str) -> None:
    solver, order = EVEN_ORDERS[name]
    steps = (80, 160, 320)
    assert slope([error(solver, even(n), past=3) for n in steps], steps) == pytest.approx(order, abs=0.3)


def test_three_points_and_three_make_third_order_in_the_end() -> None:
    """At usual steps the fourth order's part of the error is the larger, and the slope wanders between 2.4 and 4.6."""
    steps = (400, 1200)
    for predicts in ("x0", "eps"):
        solver = SASolver(3, 3, predicts=predicts)
        assert slope([error(solver, geometric(n), past=3) for n in steps], steps) == pytest.approx(3, abs=0.25)


def test_the_third_order_of_dpm_solver_is_not() -> None:
    """The published weights have 7 times the error of the exact ones of the same points in 40 steps, 50 times in 320."""
    published, exact = ([error(solver, geometric(n), past=3) for n in (40, 320)] for solver in (DPMpp3M(), SASolver(3, 0)))
    assert slope(published, (40, 320)) == pytest.approx(2, abs=0.1)
    assert slope(exact, (40, 320)) == pytest.approx(3, abs=0.1)
    assert [a / b for a, b in zip(published, exact, strict=True)] == pytest.approx([6.8, 50], rel=0.1)


@pytest.mark.parametrize(
    ("solver", "grid", "order"),
    [
        (DPMpp2M(), geometric, 2),  # nothing is lost: one step of first order is an error of second
        (DEIS(4), geometric, 2),
        (SASolver(4, 0), geometric, 2),
        (SASolver(4, 4), geometric, 3),  # corrected, the first step is of second order
        (PNDM(even(1920)[::-1]), even, 4),  # and Runge–Kutta's is of fourth
    ],
    ids=["DPMpp2M", "DEIS 4", "SASolver 4, 0", "SASolver 4, 4", "PNDM"],
)
def test_a_start_without_past_costs_high_orders_theirs(solver: Solver, grid: Callable[[int], Levels], order: int) -> None:
    steps = (80, 160, 320)
    assert slope([error(solver, grid(n)) for n in steps], steps) == pytest.approx(order, abs=0.3)


def test_a_first_order_end_moves_the_error_by_little() -> None:
    levels = geometric(10)
    plain, tapered = error(DPMpp2M(), levels), error(DPMpp2M(taper=levels[-1:]), levels)
    assert 0.5 < tapered / plain < 0.9  # here it even helps
    assert plain < error(Euler(), levels) / 5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_with_bh1_is_an_adams_predictor_and_corrector(order: int) -> None:
    one, other = UniPC(order, solver_type="bh1"), SASolver(order, order + 1)
    assert torch.allclose(run(one, karras(9)), run(other, karras(9)), rtol=0, atol=1e-11)


COSTS = {
    "Heun": 1.0, "Singlestep 3": 1.0, "PLMS": 1.0, "UniPC 2": 1.6, "DPMpp2M": 1.8, "LMS 4": 3.8, "SASolver 3, 4": 4.2,
    "DPMpp3M": 7.3, "UniPC 3": 9.3, "DEIS 3": 18.6,
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_a_split_that_drops_the_history_costs_high_orders_most(name: str) -> None:
    """20 steps of which the 11th, where sigma is 1 and pictures part, starts afresh: so many times the error."""
    levels, solver = geometric(20), ORDERS[name][0]
    assert error(solver, levels, forgets_at=10) / error(solver, levels) == pytest.approx(COSTS[name], rel=0.05)


@pytest.mark.parametrize("name", ["Euler", "Heun", "DPMpp2M", "UniPC 2"])
def test_strength_decides_how_far_pictures_move_and_how_far_off_they_end(name: str) -> None:
    """Noise added to true pictures and taken away again: the distribution stays what it was at any strength."""
    solver, schedule = ORDERS[name][0], Schedule.at(karras(20))
    pictures = MIXTURE.sample(range(4000), 0.0, DiffusersNoise.seeded(0)).reshape(4000, 2, 1, 1)
    unit = DiffusersNoise.seeded(1)(pictures.shape, "latents")
    moved, errors = [], []
    for run_steps in (5, 10, 15, 20):
        part = schedule[20 - run_steps :]
        noisy = pictures + part.sigmas[0] * unit
        end = denoise(MIXTURE, Latents(noisy, MIXTURE.space, part.sigmas[0]), part, solver).x
        moved.append(apart(end, pictures))
        errors.append(apart(end[:500], MIXTURE.solve(noisy[:500], part.sigmas[0], LOW)))
        assert MIXTURE.distance(end, LOW) < (0.04 if solver == Euler() else 0.02)
    assert moved == sorted(moved)
    assert moved == pytest.approx([0.38, 0.86, 1.11, 1.2], rel=0.03)
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 3
