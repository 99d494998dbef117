"""Our solvers against k-diffusion's published samplers, recorded by ``tests/references/record_k_diffusion.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from unrolled.core.latents import Latents, LatentSpace
from unrolled.core.loop import steps
from unrolled.core.noise import Levels, NoiseSource
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers import (
    DPM2,
    LMS,
    Churned,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3MSDE,
    DPMppSDE,
    Euler,
    Heun,
    Singlestep,
    spacing,
)

TOLERANCE = 1e-9
SPACE = LatentSpace("test", 4, 1, 1.0, "0" * 16)
CELLS = torch.arange(16, dtype=torch.float64).view(1, 4, 2, 2)

with safe_open(Path(__file__).parents[1] / "references" / "k_diffusion.safetensors", "pt") as file:
    FACTS = json.loads(file.metadata()["k-diffusion"])
    RECORDED = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
RUNS = sorted({name.rpartition("/")[0] for name in RECORDED if not name.startswith("sigmas/")})


# --- the formulas of the recording


def denoiser(x: Tensor, sigma: float, timestep: float) -> Prediction:
    variance = 0.25 + sigma**2
    return Prediction.from_x0((0.25 * x + sigma**2 * 0.8 * torch.tanh(0.8 * x / variance)) / variance, x, sigma)


def path(sigma: float) -> Tensor:
    return torch.sin(5.0 * torch.tensor(sigma, dtype=torch.float64).log() + CELLS).mul(sigma**0.5)


def path_noise(shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None) -> Tensor:
    assert levels is not None
    high, low = levels
    return (path(high) - path(low)).div(abs(high - low) ** 0.5)


def churn_noise(shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: Levels | None = None) -> Tensor:
    return torch.sin(3.0 * step + CELLS).mul(2.0**0.5)


# --- ours


def churned(solver: Solver) -> Solver:
    """k-diffusion's ``s_churn`` is spread over the run: 3 in 10 steps."""
    return Churned(solver, 0.3, low=0.1, high=8.0, scale=1.01)


OURS: dict[str, Solver] = {
    "euler": Euler(),
    "euler, churned": churned(Euler()),
    "heun": Heun(),
    "heun, churned": churned(Heun()),
    "dpm2": DPM2(),
    "dpm2, churned": churned(DPM2()),
    "lms": LMS(),
    "lms, order 2": LMS(2),
    "dpm++2m": DPMpp2M(),
}
ETAS: dict[str, Callable[[float], Solver]] = {
    "euler ancestral": Euler,
    "dpm2 ancestral": DPM2,
    "dpm++2s": DPMpp2S,
    "dpm++sde": DPMppSDE,
    "dpm++2m sde": DPMpp2MSDE,
    "dpm++2m sde heun": lambda eta: DPMpp2MSDE(eta, "heun"),
    "dpm++3m sde": DPMpp3MSDE,
}
OURS |= {f"{name}, eta {eta:g}": solver(eta) for name, solver in ETAS.items() for eta in (0.0, 0.5, 1.0)}


def run(schedule: Schedule, solvers: Sequence[Solver], noise: NoiseSource = path_noise) -> dict[str, Tensor]:
    """Every x and sigma the denoiser is asked at, and the x at the end; one solver, or one for each step."""
    latents = Latents(schedule.sigmas[0] * torch.cos(2.0 * CELLS), SPACE, schedule.sigmas[0])
    asked: list[Prediction] = []
    for i, solver in enumerate(solvers):
        part = schedule if len(solvers) == 1 else schedule[i : i + 1]
        for step in steps(denoiser, latents, part, solver, noise):
            asked += step.predictions
            latents = step.latents
    sigmas = torch.tensor([p.sigma for p in asked], dtype=torch.float64)
    return {"x": torch.cat([p.x for p in asked]), "sigma": sigmas, "end": latents.x}


def assert_equal(ours: dict[str, Tensor], name: str) -> None:
    theirs = {part: RECORDED[f"{name}/{part}"] for part in ours}
    assert ours["x"].shape == theirs["x"].shape, "another number of evaluations"
    torch.testing.assert_close(ours["sigma"], theirs["sigma"], rtol=1e-12, atol=0)
    for part in ("x", "end"):
        scale = theirs[part].abs().amax((1, 2, 3), keepdim=True)
        gap = float(((ours[part] - theirs[part]) / scale).abs().max())
        assert gap < TOLERANCE, f"{name}: {part} is {gap:.2g} off"


def test_every_recorded_sampler_is_ours_too() -> None:
    assert FACTS["version"] == "0.1.1.post1"
    assert OURS.keys() == FACTS["cases"].keys()


@pytest.mark.parametrize("name", [run for run in RUNS if not run.endswith("/even")])
def test_trajectory(name: str) -> None:
    case, grid = name.rsplit("/", 1)
    sigmas = RECORDED["sigmas/karras"] if grid == "karras" else RECORDED["sigmas/polyexponential"][:-1]
    noise = churn_noise if case.endswith("churned") else path_noise
    assert_equal(run(Schedule.at(sigmas.tolist()), [OURS[case]], noise), name)


@pytest.mark.parametrize(("evaluations", "orders"), [(12, [3, 3, 3, 2, 1]), (13, [3, 3, 3, 3, 1]), (14, [3, 3, 3, 3, 2])])
def test_dpm_fast(evaluations: int, orders: list[int]) -> None:
    """k-diffusion's DPM-Solver-fast is single steps of falling order on even steps of log sigma."""
    levels = spacing.exponential(len(orders) + 1, 0.03, 14.6)
    solvers = [Singlestep(order, predicts="eps") for order in orders]
    assert_equal(run(Schedule.at(levels), solvers), f"dpm fast, {evaluations} evaluations/even")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("karras", spacing.karras(10, 0.03, 14.6)),
        ("karras, rho 5", spacing.karras(6, 0.1, 80.0, 5.0)),
        ("exponential", spacing.exponential(10, 0.03, 14.6)),
        ("polyexponential", spacing.polyexponential(10, 0.03, 14.6, 1.5)),
    ],
)
def test_spacing(name: str, ours: list[float]) -> None:
    *theirs, last = RECORDED[f"sigmas/{name}"].tolist()
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert last == 0.0
