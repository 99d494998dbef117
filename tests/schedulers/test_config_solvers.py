"""Which solver each config stands for."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
from unrolled.core.errors import BadInput
from unrolled.schedulers import (
    DEIS,
    DPM2,
    LCM,
    LMS,
    PLMS,
    PNDM,
    TCD,
    Clipped,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    DPMpp3MSDE,
    DPMppSDE,
    DPMSolver,
    Euler,
    Heun,
    SASolver,
    Singlestep,
    TauBetween,
    Thresholded,
    UniPC,
)
from unrolled.schedulers.config import VARIANTS, read_scheduler
from unrolled.schedulers.faithful import DiffusersDDIM, DiffusersPLMS
from unrolled.schedulers.seeded import Seeded

MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("name", "options", "solver"),
    [
        ("ddim", {}, Euler()),
        ("ddim", {"clip_sample": True, "clip_sample_range": 2.0}, Clipped(Euler(), 2.0, keep_eps=True)),
        ("ddpm", {}, Euler(1.0)),
        ("ddpm", {"variance_type": "fixed_large"}, Euler(1.0, "large")),
        ("euler", {}, Euler()),
        ("euler-ancestral", {}, Euler(1.0)),
        ("heun", {}, Heun()),
        ("heun", {"clip_sample": True}, Clipped(Heun(), 1.0)),
        ("pndm", {"set_alpha_to_one": True}, PLMS()),
        ("ddim", {"thresholding": True, "sample_max_value": 3.0}, Thresholded(Euler(), 0.995, 3.0, keep_eps=True)),
        ("ddpm", {"thresholding": True, "clip_sample": True}, Thresholded(Euler(1.0))),
        ("unclip", {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}, Clipped(Euler(1.0), 1.0)),
        ("lms", {}, LMS()),
        ("dpm2", {}, DPM2()),
        ("dpm2-ancestral", {}, DPM2(1.0)),
        ("dpm++sde", {}, DPMppSDE()),
        ("edm-euler", {}, Euler()),
        ("dpm++2m", {}, DPMpp2M()),
        ("dpm++2m", {"solver_type": "heun"}, DPMpp2M("heun")),
        ("dpm++2m", {"algorithm_type": "deis", "solver_type": "logrho"}, DPMpp2M()),
        ("dpm++2m", {"solver_order": 1}, DPMSolver(1)),
        ("dpm++2m", {"thresholding": True}, Thresholded(DPMpp2M())),
        ("dpm++2m", {"variance_type": "learned_range"}, DPMpp2M()),
        ("dpm++3m", {}, DPMpp3M()),
        ("dpm++2m-sde", {"solver_type": "heun"}, DPMpp2MSDE(solver_type="heun")),
        ("dpm++3m-sde", {"solver_type": "heun"}, DPMpp3MSDE()),
        ("dpm++2m", SIGMA_MIN | {"algorithm_type": "dpmsolver"}, DPMSolver(2, predicts="eps")),
        ("dpm++2m", SIGMA_MIN | {"algorithm_type": "sde-dpmsolver"}, DPMSolver(2, predicts="eps", tau=1.0)),
        ("deis", {"solver_order": 3, "algorithm_type": "dpmsolver++", "solver_type": "bh2"}, DEIS(3)),
        ("deis", {"thresholding": True}, Thresholded(DEIS())),
        ("unipc", {"lower_order_final": False}, UniPC()),
        (
            "unipc",
            {"lower_order_final": False, "predict_x0": False, "solver_type": "bh1", "solver_order": 3, "thresholding": True},
            Thresholded(UniPC(3, solver_type="bh1", predicts="eps")),
        ),
        ("unipc", {"lower_order_final": False, "solver_type": "midpoint"}, UniPC()),
    ],
)
def test_solver_of_each_class(name: str, options: dict[str, Any], solver: object) -> None:
    config = {key: value for key, value in SD15.items() if not (name == "unclip" and key == "beta_schedule")}
    config = {"_class_name": "EDMEulerScheduler"} if name == "edm-euler" else config
    assert read_scheduler(config, name, **options).solver(20) == solver


def test_faithful_solvers() -> None:
    assert isinstance(read_scheduler(SD15, "ddim").solver(20, faithful=True), DiffusersDDIM)
    assert isinstance(read_scheduler(SD15).solver(20, faithful=True), DiffusersPLMS)
    assert isinstance(read_scheduler(SD15, skip_prk_steps=False).solver(20), PNDM)


@pytest.mark.parametrize("name", ["dpm++2m", "deis"])
def test_lower_orders_at_the_end_of_short_runs(name: str) -> None:
    schedule, solver = read_scheduler(SD15, name).sampling(14)
    assert solver.taper == schedule.sigmas[-3:]  # type: ignore[attr-defined]
    assert read_scheduler(SD15, name).solver(15).taper == ()  # type: ignore[attr-defined]
    assert read_scheduler(SD15, name, lower_order_final=False).solver(14).taper == ()  # type: ignore[attr-defined]


def test_euler_at_the_end() -> None:
    schedule, solver = read_scheduler(SD15, "dpm++2m", euler_at_final=True, **SIGMA_MIN).sampling(20)
    assert solver == DPMpp2M(taper=schedule.sigmas[-1:])
    schedule, solver = read_scheduler(SD15, "dpm++2m", euler_at_final=True).sampling(10)
    assert solver == DPMpp2M(taper=schedule.sigmas[-3:])


@pytest.mark.parametrize("steps", [5, 50])
def test_unipc_and_sa_solver_lower_the_order_at_the_end_of_every_run(steps: int) -> None:
    schedule, solver = read_scheduler(SD15, "unipc", disable_corrector=[0, 2, 99]).sampling(steps)
    assert solver == UniPC(taper=schedule.sigmas[-3:], uncorrected=(schedule.sigmas[1], schedule.sigmas[3]))
    schedule, solver = read_scheduler(SD15, "sa-solver", predictor_order=3, corrector_order=4).sampling(steps)
    noisy = [s for s, t in zip(schedule.sigmas, schedule.timesteps, strict=False) if 200 <= t <= 800]
    assert solver == SASolver(3, 4, tau=TauBetween(noisy[-1], noisy[0]), taper=schedule.sigmas[-3:])


def test_an_empty_last_step_of_diffusers_counts_for_the_order() -> None:
    schedule, solver = read_scheduler(SD15, "deis", use_karras_sigmas=True).sampling(10)
    assert len(schedule) == 9
    assert solver == DEIS(taper=(*schedule.sigmas[-2:], 0.0))


def test_sa_solver_without_timesteps_to_be_stochastic_at() -> None:
    config = read_scheduler(SD15, "sa-solver", algorithm_type="noise_prediction", lower_order_final=False, thresholding=True)
    assert config.solver(timesteps=[999, 900]) == Thresholded(SASolver(predicts="eps"))


@pytest.mark.parametrize("options", [{}, {"solver_order": 3}, {"solver_order": 1}, {"lower_order_final": True}])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22])
def test_single_steps_are_the_blocks_of_diffusers(options: dict[str, Any], final: str, steps: int) -> None:
    theirs = diffusers.DPMSolverSinglestepScheduler(final_sigmas_type=final, **options)
    theirs.set_timesteps(steps)
    config = read_scheduler({"_class_name": SINGLE}, final_sigmas_type=final, **options)
    schedule, solver = config.sampling(steps)
    starts = [i for i, order in enumerate(theirs.order_list) if order == 1]
    assert schedule.timesteps == tuple(float(theirs.timesteps[i]) for i in starts)
    assert isinstance(solver, Singlestep)
    assert set(solver.levels) == {*schedule.sigmas, *(sigma for sigma, _ in schedule.inside)}
    inside = [i for i in range(steps) if i not in starts]
    assert [timestep for _, timestep in schedule.inside] == [float(theirs.timesteps[i]) for i in inside]
    assert [schedule.timestep_at(sigma) for sigma, _ in schedule[-1:].inside] == [t for _, t in schedule.inside]


def test_variants() -> None:
    """A solver of diffusers and the options that make it another, whatever the file says of them."""
    file = {"_class_name": MULTI, "solver_order": 1, "algorithm_type": "dpmsolver++"}
    for name, (solver, options) in VARIANTS.items():
        assert read_scheduler(file, name) == read_scheduler(file, solver, **options)
        (option, *_) = options
        message = rf"^The solver {re.escape(name)} is {re.escape(solver)} with another {option}: take"
        with pytest.raises(BadInput, match=message):
            read_scheduler(file, name, **{option: options[option]})


def test_consistency_models() -> None:
    file = {"_class_name": "LCMScheduler", "timestep_scaling": 7.0}
    table = read_scheduler(file).training_sigmas()
    schedule, solver = read_scheduler(file).sampling(4)
    assert (schedule.timesteps, schedule.sigmas[-1]) == ((999, 759, 499, 259), 0)
    assert solver == LCM(table, 7.0)
    assert read_scheduler(file, clip_sample=True).solver(4) == Clipped(LCM(table, 7.0), 1.0)
    schedule, solver = read_scheduler(file, "tcd").sampling(4, eta=0.3)
    assert (schedule.timesteps, schedule.sigmas[-1]) == ((999, 759, 499, 259), table[0])
    assert solver == TCD(0.3, table)
    message = (
        r"^The steps of lcm are chosen among the 50 its model was distilled at \(original_inference_steps\), got 51: take"
    )
    with pytest.raises(BadInput, match=message):
        read_scheduler(file).schedule(51)
    with pytest.raises(
        BadInput, match=r"^TCDScheduler options .* 2000 original_inference_steps of 1000 training timesteps\.$"
    ):
        read_scheduler(file, "tcd", original_inference_steps=2000)


def test_noise_with_a_seed_of_its_own() -> None:
    _, solver = read_scheduler(SD15, "dpm++sde", noise_sampler_seed=5).sampling(10)
    assert solver == Seeded(DPMppSDE(), 5)
