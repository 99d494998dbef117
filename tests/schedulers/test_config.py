"""Reading scheduler_config.json: what is honoured, and a clear sentence for what is not."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import diffusers
import pytest
from unrolled.core.errors import BadInput, BadModel
from unrolled.schedulers import PLMS, PNDM, DPMpp2M, Euler, Heun
from unrolled.schedulers.clip import Clipped
from unrolled.schedulers.config import SOLVERS, read_scheduler
from unrolled.schedulers.faithful import DiffusersDDIM, DiffusersPLMS

CLASSES = [kind.__name__.replace("Config", "Scheduler") for kind in SOLVERS.values()]
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


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_diffusers_is_known_with_its_default(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    ours = read_scheduler({"_class_name": name})
    theirs = {key: value.default for key, value in parameters.items() if key != "self" and not key.startswith("_")}
    assert theirs.keys() - set(type(ours).model_fields) == set()
    assert {key: getattr(ours, key) for key in theirs} == theirs


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        *((name, {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'") for name in CLASSES),
        *((name, {"timestep_spacing": "random"}, "timestep_spacing = 'random'") for name in CLASSES),
        *((name, {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'") for name in CLASSES),
        *((name, {"num_train_timesteps": 0}, "num_train_timesteps = 0") for name in CLASSES),
        *((f"{k}Scheduler", {"thresholding": True}, "thresholding = True") for k in ("DDIM", "DDPM", "DPMSolverMultistep")),
        *(
            (f"{k}Scheduler", {f"use_{sigmas}_sigmas": True}, f"use_{sigmas}_sigmas = True")
            for k in ("EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep")
            for sigmas in ("exponential", "beta")
        ),
        ("DDIMScheduler", {"clip_sample": "perhaps"}, "clip_sample = 'perhaps'"),
        *(
            ("DDPMScheduler", {"variance_type": kind}, f"variance_type = '{kind}'")
            for kind in ("fixed_large_log", "learned", "learned")
        ),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type = 'cubic'"),
        ("EulerDiscreteScheduler", {"timestep_type": "integer"}, "timestep_type = 'integer'"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "max"}, "final_sigmas_type = 'max'"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order = 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver"),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}, "solver_type = 'bh2'"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "use_lu_lambdas = True"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type = 'learned'"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
    ],
)
def test_what_is_not_honoured_is_refused(name: str, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadModel) as caught:
        read_scheduler({"_class_name": name, **options})
    assert str(caught.value).startswith(f"{name} option {fault}")
    assert " is not honoured: " in str(caught.value)
    assert caught.value.exit_code == 3


def test_unknown_option() -> None:
    with pytest.raises(BadModel, match=r"^PNDMScheduler has no option beta_stop: it cannot be honoured, remove it from"):
        read_scheduler({**SD15, "beta_stop": 0.012})


@pytest.mark.parametrize(("solver", "option"), [("euler", "karras"), (None, "use_karras_sigmas"), ("euler", "clip_sample")])
def test_a_change_without_effect_is_refused(solver: str | None, option: str) -> None:
    with pytest.raises(BadInput, match=rf"has no option {option}: take another solver or leave it out"):
        read_scheduler(SD15, solver, **{option: True})


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("ddim", "unclip")])
def test_eta_is_ddims_alone(solver: str) -> None:
    with pytest.raises(BadInput, match=f"eta is DDIM's, and this solver is {re.escape(solver)}"):
        read_scheduler(SD15, solver).solver(5, eta=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_start": -0.1}, "beta_start = -0.1 is not honoured"),
        ({"steps_offset": -1}, "steps_offset = -1 is not honoured"),
        ({"trained_betas": [0.1] * 10}, "10 betas for 1000 training timesteps"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModel, match=message):
        read_scheduler(SD15 | options)


@pytest.mark.parametrize(("name", "shown"), [("UniPCMultistepScheduler", "UniPCMultistepScheduler"), (None, r"\(none\)")])
def test_unknown_class(name: str | None, shown: str) -> None:
    with pytest.raises(BadModel, match=rf"^The scheduler class {shown} is not supported: use one of DDIMScheduler, DDPM"):
        read_scheduler({"_class_name": name} if name else {})


def test_unknown_solver() -> None:
    with pytest.raises(BadInput, match=r"^There is no solver 'dpm': use one of ddim, ddpm, dpm\+\+2m, euler"):
        read_scheduler(SD15, "dpm")


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_too_many_steps_or_none(steps: int) -> None:
    message = rf"^Steps go from 1 to 1000 \(the training timesteps of this model\), got {steps}\.$"
    with pytest.raises(BadInput, match=message):
        read_scheduler(SD15).schedule(steps)


def test_steps_that_the_offset_pushes_over_the_end() -> None:
    message = r"^1000 steps with leading spacing \(offset 1\) do not fit into 1000 training timesteps: take fewer steps or"
    with pytest.raises(BadInput, match=message):
        read_scheduler(SD15).schedule(1000)
    assert len(read_scheduler(SD15, steps_offset=0, set_alpha_to_one=True).schedule(1000)) == 1000


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(BadInput, match=rf"^DDIM's eta goes from 0 \(deterministic\) to 1 \(DDPM\), got {eta:g}\.$"):
        read_scheduler(SD15, "ddim").solver(10, eta=eta)


def test_another_solver_takes_what_is_written_not_the_defaults() -> None:
    """As ``EulerDiscreteScheduler.from_config(pndm.config)``: PNDM's leading spacing stays with PNDM."""
    pndm = diffusers.PNDMScheduler.from_config(SD15)
    for name, kind in SOLVERS.items():
        if name == "unclip":  # knows no other betas than its own, in diffusers too
            continue
        theirs = getattr(diffusers, kind.__name__.replace("Config", "Scheduler")).from_config(pndm.config).config
        ours = read_scheduler(SD15, name).model_dump()
        assert {key: value for key, value in ours.items() if key in theirs} == {
            key: theirs[key] for key in ours if key in theirs
        }
    assert read_scheduler(SD15, "euler").timestep_spacing == "linspace"
    assert read_scheduler({**SD15, "timestep_spacing": "leading"}, "euler").timestep_spacing == "leading"


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
        ("dpm++2m", {"solver_order": 1}, Euler()),
        ("dpm++2m", {"solver_type": "heun"}, DPMpp2M("heun")),
        ("pndm", {"set_alpha_to_one": True}, PLMS()),
    ],
)
def test_solver_of_each_class(name: str, options: dict[str, Any], solver: object) -> None:
    assert read_scheduler(SD15, name, **options).solver(20) == solver


def test_faithful_solvers() -> None:
    assert isinstance(read_scheduler(SD15, "ddim").solver(20, faithful=True), DiffusersDDIM)
    assert isinstance(read_scheduler(SD15).solver(20, faithful=True), DiffusersPLMS)
    assert isinstance(read_scheduler(SD15, skip_prk_steps=False).solver(20), PNDM)


def test_trained_betas_are_the_table() -> None:
    betas = [0.1, 0.2, 0.5]
    config = read_scheduler({"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 3})
    alphas = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5]
    assert config.training_sigmas() == pytest.approx([math.sqrt((1 - a) / a) for a in alphas])
