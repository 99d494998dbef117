"""What every solver gets exactly right on a closed form, however few its steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from unrolled import schedulers
from unrolled.core.loop import denoise
from unrolled.core.mixture import GaussianMixture
from unrolled.core.prediction import Kind
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    IPNDM,
    LCM,
    LMS,
    PLMS,
    PNDM,
    TCD,
    Ancestral,
    Churned,
    Clipped,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
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
    Thresholded,
    ToZero,
    UniPC,
    spacing,
)
from unrolled.schedulers.config import read_scheduler

MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), torch.tensor([0.4, 0.6, 0.5]), torch.tensor([1.0, 1.0, 1.0])
)
PICTURE = GaussianMixture(torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(1), torch.ones(1))
TRAINING = tuple(np.geomspace(0.03, 15.0, 1000).tolist())
SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}

STRAIGHT: dict[str, Solver] = {
    "Euler": Euler(),
    "DDIM": DDIM(),
    "Heun": Heun(),
    "DPM2": DPM2(),
    "DPMpp2S": DPMpp2S(),
    "Singlestep 3": Singlestep(3),
    "Singlestep 3 heun": Singlestep(3, solver_type="heun"),
    "Singlestep 3 eps": Singlestep(3, predicts="eps"),
    "DPMpp2M": DPMpp2M(),
    "DPMpp2M heun": DPMpp2M("heun"),
    "DPMpp3M": DPMpp3M(),
    "DPMSolver 2 eps": DPMSolver(2, predicts="eps"),
    "DPMSolver 3 eps": DPMSolver(3, predicts="eps"),
    "LMS": LMS(),
    "IPNDM": IPNDM(),
    "DEIS 4": DEIS(4),
    "PLMS": PLMS(),
    "UniPC 2": UniPC(2),
    "UniPC 3 eps": UniPC(3, predicts="eps"),
    "SASolver 3, 4": SASolver(3, 4),
    "SASolver 2, 2 eps": SASolver(2, 2, predicts="eps"),
    "Clipped Heun": Clipped(Heun(), 10.0),
    "Clipped DPMpp2M, eps kept": Clipped(DPMpp2M(), 10.0, keep_eps=True),
}
"""Without noise."""

SOLVERS: dict[str, Solver] = {
    **STRAIGHT,
    "Euler 0.5": Euler(0.5),
    "EulerAncestral": EulerAncestral(),
    "DDPM large": DDPM("large"),
    "DPM2 ancestral": DPM2(1.0),
    "DPMpp2S ancestral": DPMpp2S(1.0),
    "DPMppSDE": DPMppSDE(),
    "DPMpp2MSDE": DPMpp2MSDE(),
    "DPMpp3MSDE": DPMpp3MSDE(),
    "DPMSolver 3 SDE eps": DPMSolver(3, tau=1.0, predicts="eps"),
    "Singlestep 3 SDE": Singlestep(3, tau=1.0),
    "SASolver 2, 2 SDE": SASolver(2, 2, tau=1.0),
    "SASolver 3, 4 between": SASolver(3, 4, tau=TauBetween(0.3, 3.0)),
    "Churned Heun": Churned(Heun(), 0.2),
    "Churned DPMpp2M": Churned(DPMpp2M(), 0.2),
    "Renoised UniPC": Renoised(UniPC(), Ancestral(0.5)),
    "TCD": TCD(0.3, TRAINING),
    "ToZero": Renoised(Euler(), ToZero()),
}

# Runge–Kutta's start evaluates where its step ends, which is not to be at 0.
WITH_OWN_RULES: dict[str, Solver] = {
    "PNDM": PNDM(TRAINING),
    # The corrector moves x, and the last step, x - sigma * eps, takes the eps of before.
    "SASolver 2, 2 SDE eps": SASolver(2, 2, tau=1.0, predicts="eps"),
    # These change x0 on purpose.
    "LCM": LCM(TRAINING),
    "Thresholded DPMpp2M": Thresholded(DPMpp2M()),
}
ALL = SOLVERS | WITH_OWN_RULES


def levels(steps: int, last: float = 0.0) -> Schedule:
    return Schedule.at([*spacing.karras(steps + 1, 0.1, 10.0)[:-1], last], TRAINING)


def test_no_solver_is_left_out() -> None:
    named = {name.split()[0] for name in ALL}
    assert {name for name in schedulers.__all__ if name[0].isupper()} - {"Ancestral", "TauBetween"} <= named


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_single_picture_is_found(name: str, steps: int) -> None:
    end = denoise(PICTURE, PICTURE.latents([3, 4], levels(steps)), levels(steps), SOLVERS[name])
    assert end.sigma == 0
    assert torch.allclose(end.x, PICTURE.means.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [4, 5, 30])
def test_a_single_picture_is_found_after_a_runge_kutta_start(steps: int) -> None:
    end = denoise(PICTURE, PICTURE.latents([3, 4], levels(steps)), levels(steps), PNDM(TRAINING))
    assert torch.allclose(end.x, PICTURE.means.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", STRAIGHT)
def test_between_a_picture_and_noise_the_way_is_straight(name: str) -> None:
    schedule = levels(8, last=0.1)
    start = PICTURE.latents([3, 4], schedule)
    end = denoise(PICTURE, start, schedule, STRAIGHT[name])
    picture = PICTURE.means.double()
    assert torch.allclose(end.x, picture + (start.x - picture) * (0.1 / schedule.sigmas[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_every_parametrisation_of_the_network_leads_to_the_same_pictures(name: str) -> None:
    def run(kind: Kind) -> Tensor:
        start = MIXTURE.latents([1, 2], levels(12, last=0.1))
        return denoise(replace(MIXTURE, kind=kind), start, levels(12, last=0.1), ALL[name]).x

    told = run("x0")
    assert torch.allclose(run("epsilon"), told, rtol=0, atol=1e-8)
    assert torch.allclose(run("v"), told, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_a_split_changes_no_bit(name: str) -> None:
    schedule = levels(9)
    start = MIXTURE.latents([1, 2], schedule)
    whole = denoise(MIXTURE, start, schedule, ALL[name])
    for at in range(1, 9):
        first, rest = schedule.split(at)
        halfway = denoise(MIXTURE, start, first, ALL[name])
        assert torch.equal(denoise(MIXTURE, halfway, rest, ALL[name]).x, whole.x)


def by_config(name: str, steps: int = 9, eta: float = 0.0, **options: object) -> Tensor:
    config = read_scheduler(SD15, name, timestep_spacing="trailing", **options)
    schedule = config.schedule(steps)
    return denoise(MIXTURE, MIXTURE.latents([1, 2], schedule), schedule, config.solver(steps, eta=eta)).x


def test_ddim_is_euler() -> None:
    assert torch.equal(by_config("ddim"), by_config("euler"))


def test_ddpm_is_ancestral_euler_and_ddim_at_eta_one() -> None:
    assert torch.equal(by_config("ddpm"), by_config("euler-ancestral"))
    assert torch.equal(by_config("ddpm"), by_config("ddim", eta=1.0))
    assert not torch.equal(by_config("ddpm"), by_config("ddim", eta=0.5))


def test_first_order_multistep_is_euler() -> None:
    assert torch.allclose(by_config("dpm++2m", solver_order=1), by_config("euler"), rtol=1e-12)


def test_clipping_keeps_the_direction_only_when_asked() -> None:
    x, (sigma, sigma_next) = MIXTURE.sample([1, 2], 5.0), (5.0, 1.0)
    x0 = MIXTURE(x, sigma).x0.clamp(-0.1, 0.1)

    def no_noise(high: float, low: float) -> Tensor:
        raise AssertionError

    moved, _ = Clipped(Euler(), 0.1)(MIXTURE, x, sigma, sigma_next, (), no_noise)
    kept, _ = Clipped(Euler(), 0.1, keep_eps=True)(MIXTURE, x, sigma, sigma_next, (), no_noise)
    assert torch.allclose(moved, x0 + sigma_next * (x - x0) / sigma)
    assert torch.allclose(kept, x0 + sigma_next * MIXTURE(x, sigma).eps)
    assert not torch.allclose(moved, kept)
