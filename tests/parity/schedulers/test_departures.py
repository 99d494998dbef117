"""Where diffusers' schedulers go wrong, crash or refuse, with what that costs; ``docs/departures.md`` has the figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from unrolled.schedulers import Churned
from unrolled.schedulers.dpm import taylor

Run = Callable[..., Any]
Options = dict[str, Any]

SD: Options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS, TO_MIN = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
DPM, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS, SA = "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_third_order_of_the_sde(run_both: Run) -> None:
    """``0.5`` has the wrong sign: D2's weight goes to -1 instead of 0 as steps get short."""
    assert abs(taylor(1.0, 0.999, "x0", 1.0).curve) < 1e-3
    assert taylor(1.0, 0.999, "x0", 1.0, faithful=True).curve == pytest.approx(-1.0, abs=1e-3)
    options = SD | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    ours, theirs = run_both(DPM, options, 10)
    assert off(ours.end, theirs.end) == pytest.approx(0.30, abs=0.01)
    ours, theirs = run_both(DPM, options, 10, faithful=True)
    assert ours.gap(theirs) < 1e-5


def test_churn(run_theirs: Run, run_ours: Run) -> None:
    """diffusers adds the noise of churning after the network was asked, so that it is not seen."""
    theirs = run_theirs("EulerDiscreteScheduler", SD, 10, s_churn=3.0)
    ours = run_ours("EulerDiscreteScheduler", SD, 10, wrap=lambda solver: Churned(solver, 0.3))
    plain = run_ours("EulerDiscreteScheduler", SD, 10)
    assert off(theirs.shown[0], plain.shown[0]) < 1e-6
    assert off(theirs.shown[0], ours.shown[0]) == pytest.approx(0.99, abs=0.01)
    assert off(theirs.end, ours.end) == pytest.approx(1.32, abs=0.01)


@pytest.mark.parametrize(
    ("name", "options", "steps", "moved"),
    [
        (UNIPC, KARRAS | TO_MIN, 10, 3.4e-4),
        (UNIPC, KARRAS | TO_MIN | {"solver_order": 3}, 10, 4.7e-3),
        (SA, KARRAS, 10, 0.0995),
        (SA, KARRAS, 20, 1.2e-4),
        (DEIS, KARRAS, 10, 0.0),
        (DPM, KARRAS | TO_MIN, 10, 0.0),
        (DPM, KARRAS | TO_MIN | {"solver_order": 3}, 20, math.nan),
    ],
)
def test_a_last_step_that_goes_nowhere(name: str, options: Options, steps: int, moved: float, run_both: Run) -> None:
    """The last sigma twice costs an evaluation, corrects once more, and is 0 / 0 in the third order of DPM-Solver++."""
    ours, theirs = run_both(name, SD | options, steps)
    assert len(ours.shown) == steps - 1
    assert ours.gap(theirs) < 1e-5  # before it
    assert off(theirs.after_empty_step, theirs.end) == pytest.approx(moved, rel=0.05, abs=1e-6, nan_ok=True)


# Where leaving out the empty last step could show, but must not.
EMPTY = [
    (DPM, SD | KARRAS | TO_MIN | {"euler_at_final": True}, 20),
    (SINGLE, SD | KARRAS | TO_MIN | {"lower_order_final": True}, 5),
    (SINGLE, SD | KARRAS | TO_MIN | {"lower_order_final": True, "solver_order": 3}, 7),
]


@pytest.mark.parametrize(("name", "options", "steps"), EMPTY)
def test_an_empty_last_step_may_be_left_out(name: str, options: Options, steps: int, run_both: Run) -> None:
    ours, theirs = run_both(name, options, steps)
    assert ours.gap(theirs) < 1e-5


@pytest.mark.parametrize("name", [DEIS, SA])
def test_one_step_that_goes_nowhere(name: str, run_ours: Run, run_theirs: Run) -> None:
    """diffusers returns the noise that it was given."""
    theirs, ours = (run(name, SD | KARRAS, 1) for run in (run_theirs, run_ours))
    assert torch.equal(theirs.after_empty_step, theirs.end)
    assert off(ours.shown[0], theirs.end) < 1e-6
    assert off(ours.end, theirs.end) > 1


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"solver_type": "bh1"}, math.nan),
        ({"predict_x0": False}, math.nan),
        ({"lower_order_final": False}, math.inf),
    ],
)
def test_unipc_to_0(options: Options, end: float, run_ours: Run, run_theirs: Run) -> None:
    """A step to 0 is infinitely long in log sigma, and UniPC's weights with it; ours is of first order there."""
    theirs, ours = (run(UNIPC, SD | options, 10) for run in (run_theirs, run_ours))
    assert float(theirs.end.abs().max()) == pytest.approx(end, nan_ok=True)
    assert bool(ours.end.isfinite().all())


@pytest.mark.parametrize("name", [DPM, SINGLE, DEIS, UNIPC, SA])
@pytest.mark.parametrize("spacing", ["exponential", "beta"])
def test_timesteps_are_cut_to_whole_ones(name: str, spacing: str, run_ours: Run) -> None:
    """Even 999, which is 998.99 after rounding; and where two first ones are the same diffusers starts at the second."""
    options = SD | {f"use_{spacing}_sigmas": True}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    ours = run_ours(name, options, 10)
    assert (scheduler.timesteps[0], ours.told[0]) == (998, 999)
    if spacing == "beta":
        with pytest.raises((IndexError, AssertionError)):
            whole_run(scheduler, 50)
        assert bool(run_ours(name, options, 50).end.isfinite().all())


def whole_run(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x: Tensor = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, timestep)), timestep, x).prev_sample
    return x


CRASHES: list[tuple[str, Options, type[Exception]]] = [
    (DPM, TO_MIN | {"algorithm_type": "sde-dpmsolver", "solver_order": 3}, UnboundLocalError),
    (SA, {"algorithm_type": "noise_prediction", "thresholding": True}, RuntimeError),
    (SINGLE, TO_MIN | {"algorithm_type": "dpmsolver", "thresholding": True}, RuntimeError),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, NotImplementedError),
    ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, NotImplementedError),
    ("KDPM2AncestralDiscreteScheduler", {"prediction_type": "sample"}, NotImplementedError),
    ("DPMSolverSDEScheduler", {"prediction_type": "sample"}, NotImplementedError),
    ("PNDMScheduler", {"prediction_type": "sample", "skip_prk_steps": True}, ValueError),
]


@pytest.mark.parametrize(("name", "options", "error"), CRASHES)
def test_what_diffusers_has_not(name: str, options: Options, error: type[Exception], run_ours: Run) -> None:
    with pytest.raises(error):
        whole_run(getattr(diffusers, name)(**SD, **options), 5)
    assert bool(run_ours(name, SD | options, 5).end.isfinite().all())


def test_dpm2_ancestral_at_large_sigmas(run_both: Run) -> None:
    """What is left under a root is below 0 after rounding: NaN; sigma goes to 2e4 with cosine betas."""
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "use_beta_sigmas": True}
    ours, theirs = run_both("KDPM2AncestralDiscreteScheduler", options, 10)
    exact, _ = run_both("KDPM2AncestralDiscreteScheduler", options, 10, torch.float64)
    assert bool(theirs.end.isnan().any())
    assert off(ours.end.double(), exact.end) < 1e-3


def test_dpm2_starts_late(run_ours: Run, run_theirs: Run) -> None:
    """Where the first timestep, rounded for Karras, comes again, diffusers takes the second for its first, silently."""
    options = {"beta_schedule": "squaredcos_cap_v2"} | KARRAS
    scheduler = diffusers.KDPM2DiscreteScheduler(**options)
    scheduler.set_timesteps(10)
    scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.ones(1))
    assert scheduler.step_index == 3
    assert run_theirs("KDPM2DiscreteScheduler", options, 10) is None  # which the sweeps leave out
    assert len(run_ours("KDPM2DiscreteScheduler", options, 10).shown) == 19


def test_sa_solver_draws_where_it_adds_nothing(run_both: Run) -> None:
    ours, theirs = run_both(SA, SD, 10)
    added = sum(200 <= timestep <= 800 for timestep in theirs.told)
    assert (len(theirs.draws), added) == (10, 7)
    assert ours.gap(theirs) < 1e-5


def test_one_exponential_step_of_edm(run_ours: Run, run_theirs: Run) -> None:
    """diffusers' only level is the lowest one."""
    options = {"sigma_schedule": "exponential"}
    theirs, ours = (run("EDMEulerScheduler", options, 1) for run in (run_theirs, run_ours))
    assert theirs.told == [pytest.approx(math.log(0.002) / 4)]
    assert ours.told == [pytest.approx(math.log(80.0) / 4)]


def test_unipc_between_levels_of_its_own(run_ours: Run, run_theirs: Run) -> None:
    """To ``sigma_min`` diffusers ends at the config's level with its noise left, ours at training's lowest."""
    options = SD | KARRAS | TO_MIN | {"sigma_min": 0.1, "sigma_max": 10.0}
    theirs, ours = (run(UNIPC, options, 10) for run in (run_theirs, run_ours))
    assert (len(theirs.shown), len(ours.shown)) == (9, 10)
    assert off(ours.shown[-1], theirs.end) < 1e-5
    assert off(ours.end, theirs.end) == pytest.approx(0.011, abs=0.001)
