"""Properties that hold for any levels, seeds and pictures, drawn at random."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from unrolled.core.errors import BadInput
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import denoise
from unrolled.core.noise import Brownian, Noise
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import (
    DEIS,
    DPM2,
    IPNDM,
    LMS,
    PLMS,
    Ancestral,
    Churned,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    DPMSolver,
    Euler,
    Heun,
    Renoised,
    SASolver,
    Singlestep,
    UniPC,
)  # fmt: skip
from unrolled.schedulers.config import SOLVERS, read_scheduler
from unrolled.schedulers.spacing import SPACINGS

SPACE = LatentSpace("test", 4, 1, 1.0, "")
STRAIGHT = (
    Euler(), Heun(), DPM2(), DPMpp2S(), Singlestep(3), LMS(), IPNDM(), DEIS(3), PLMS(), DPMSolver(3, predicts="eps"),
    DPMpp2M(), DPMpp3M(), UniPC(3), UniPC(2, predicts="eps"), SASolver(3, 4),
)  # fmt: skip
STOCHASTIC = (
    Euler(0.5), Euler(1.0), DPM2(1.0), DPMpp2S(1.0), DPMppSDE(), DPMpp2MSDE(), DPMpp3MSDE(), Singlestep(3, tau=1.0),
    SASolver(2, 0, tau=1.0), Churned(Heun(), 0.3), Renoised(UniPC(2), Ancestral(1.0)),
)  # fmt: skip
levels = st.lists(st.floats(0.05, 40.0), min_size=2, max_size=6, unique=True).map(lambda found: sorted(found, reverse=True))


def spaced(found: list[float]) -> list[float]:
    """Only levels that differ enough for high orders to be worth their rounding."""
    assume(all(a > 1.05 * b for a, b in pairwise(found)))
    return found


def picture(size: int, value: float) -> torch.Tensor:
    return torch.full((size, 4, 32, 32), value, dtype=torch.float64)


@pytest.mark.parametrize("solver", [*STRAIGHT, *STOCHASTIC], ids=lambda solver: str(solver)[:40])
@settings(max_examples=8, deadline=None)
@given(found=levels.map(spaced), value=st.floats(-3.0, 3.0))
def test_one_picture_is_found_exactly_in_one_step_to_0(solver: Solver, found: list[float], value: float) -> None:
    start = Latents(picture(1, value) + found[0] * Noise((3,))((1, 4, 32, 32), "latents"), SPACE, found[0], (3,))

    def known(x: torch.Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction.from_x0(picture(len(x), value), x, sigma)

    end = denoise(known, start, Schedule.at([found[0], 0.0]), solver)
    assert torch.allclose(end.x, picture(1, value), atol=1e-9 * found[0])


@pytest.mark.parametrize("solver", [*STRAIGHT, *STOCHASTIC], ids=lambda solver: str(solver)[:40])
@settings(max_examples=8, deadline=None)
@given(found=levels.map(spaced), seed=st.integers(0, 2**32))
def test_around_one_picture_the_noise_left_is_the_schedules(solver: Solver, found: list[float], seed: int) -> None:
    start = Latents(found[0] * Noise((seed,))((1, 4, 32, 32), "latents").double(), SPACE, found[0], (seed,))

    def known(x: torch.Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction.from_x0(torch.zeros_like(x), x, sigma)

    end = denoise(known, start, Schedule.at(found), solver)
    # 4096 numbers are within 1.1 % of their standard deviation; five times that never fails. (The SDE of the noise,
    # DPMSolver(predicts="eps", tau=1), is not here: only small steps leave it the right amount.)
    assert abs(float(end.x.std()) / found[-1] - 1) < 0.06


@pytest.mark.parametrize("solver", [*STRAIGHT, *STOCHASTIC], ids=lambda solver: str(solver)[:40])
@settings(max_examples=4, deadline=None)
@given(seeds=st.permutations([3, 1, 4, 15]), brownian=st.booleans())
def test_the_order_of_a_batch_does_not_matter(solver: Solver, seeds: list[int], brownian: bool) -> None:
    schedule = Schedule.at([8.0, 3.0, 1.0, 0.4, 0.1])

    def crooked(x: torch.Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction(0.7 * torch.tanh(x / (1 + sigma)), x, sigma)

    def run(order: tuple[int, ...]) -> dict[int, torch.Tensor]:
        x = 8.0 * Noise(order)((len(order), 4, 4, 4), "latents")
        noise = Brownian(order) if brownian else Noise(order)
        end = denoise(crooked, Latents(x, SPACE, 8.0, order), schedule, solver, noise=noise)
        return dict(zip(order, end.x, strict=True))

    one, other = run((1, 3, 4, 15)), run(tuple(seeds))
    assert all(torch.equal(one[seed], other[seed]) for seed in seeds)


@settings(max_examples=300, deadline=None)
@given(
    solver=st.sampled_from(sorted(SOLVERS)),
    spacing=st.sampled_from([None, *SPACINGS]),
    timestep_spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    steps=st.integers(1, 200),
    zero_snr=st.booleans(),
)
def test_the_levels_of_every_solver_and_spacing_fall_to_their_end(
    solver: str, spacing: str | None, timestep_spacing: str, steps: int, zero_snr: bool
) -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "timestep_spacing": timestep_spacing, "rescale_betas_zero_snr": zero_snr,
    }  # fmt: skip
    if solver == "unclip":
        config["beta_schedule"] = "squaredcos_cap_v2"
    elif solver == "edm-euler":
        config = {"_class_name": "EDMEulerScheduler"}
    try:
        schedule, _ = read_scheduler(config, solver).sampling(steps, spacing=spacing)
    except BadInput as refused:  # a table of another model, or more steps than there are
        assert any(why in str(refused) for why in ("align-your-steps", "steps", "There is no step"))  # noqa: PT017
        return
    assert all(a > b for a, b in pairwise(schedule.sigmas))
    assert schedule.sigmas[-1] <= max(schedule.finished_at, 0.03)
    assert len(schedule) <= steps
    assert all(a > b for a, b in pairwise(schedule.timesteps)) or solver == "edm-euler" or spacing is not None
