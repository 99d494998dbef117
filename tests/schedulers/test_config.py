"""Reading scheduler_config.json: what is honoured, and a clear sentence for what is not."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import diffusers
import pytest
from unrolled.core.errors import BadInput, BadModel
from unrolled.schedulers.config import SOLVERS, read_scheduler

CLASSES = [kind.__name__.replace("Config", "Scheduler") for kind in SOLVERS.values()]
MULTI, SINGLE, DEIS_CLASS, UNIPC, SA, EDM = (
    f"{name}Scheduler"
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver", "EDMEuler")
)
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


def having(option: str) -> list[str]:
    """The classes with an option."""
    return [name for name, kind in zip(CLASSES, SOLVERS.values(), strict=True) if option in kind.model_fields]


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
        *((name, {"timestep_spacing": "random"}, "timestep_spacing = 'random'") for name in having("timestep_spacing")),
        *((name, {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'") for name in having("beta_schedule")),
        *((name, {"num_train_timesteps": 0}, "num_train_timesteps = 0") for name in CLASSES),
        ("DDIMScheduler", {"clip_sample": "perhaps"}, "clip_sample = 'perhaps'"),
        ("DDIMScheduler", {"clip_sample_range": 0.0}, "clip_sample_range = 0.0"),
        ("DDIMScheduler", {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio = 1.5"),
        *(
            ("DDPMScheduler", {"variance_type": kind}, f"variance_type = '{kind}'")
            for kind in ("fixed_large_log", "learned")
        ),
        ("UnCLIPScheduler", {"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
        ("UnCLIPScheduler", {"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type = 'cubic'"),
        ("EulerDiscreteScheduler", {"timestep_type": "integer"}, "timestep_type = 'integer'"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "max"}, "final_sigmas_type = 'max'"),
        *(("EulerDiscreteScheduler", {key: 0.0}, f"{key} = 0.0") for key in ("sigma_min", "sigma_max")),
        *((name, {"solver_order": 4}, "solver_order = 4") for name in (MULTI, SINGLE, DEIS_CLASS, UNIPC)),
        *((name, {"use_flow_sigmas": True}, "use_flow_sigmas = True") for name in (MULTI, SINGLE, DEIS_CLASS, UNIPC, SA)),
        *(
            (name, {"use_dynamic_shifting": True}, "use_dynamic_shifting = True")
            for name in (MULTI, SINGLE, DEIS_CLASS, UNIPC)
        ),
        *(
            (name, {"time_shift_type": "linear"}, "time_shift_type = 'linear'")
            for name in (MULTI, SINGLE, DEIS_CLASS, UNIPC)
        ),
        *((name, {"variance_type": "fixed_small"}, "variance_type = 'fixed_small'") for name in (MULTI, SINGLE, SA)),
        *((name, {"algorithm_type": "data"}, "algorithm_type = 'data'") for name in (MULTI, SINGLE, DEIS_CLASS, SA)),
        (SINGLE, {"algorithm_type": "sde-dpmsolver"}, "algorithm_type = 'sde-dpmsolver'"),
        *((name, {"solver_type": "euler"}, "solver_type = 'euler'") for name in (MULTI, SINGLE, DEIS_CLASS, UNIPC)),
        *((name, {"final_sigmas_type": "max"}, "final_sigmas_type = 'max'") for name in (MULTI, SINGLE, UNIPC, EDM)),
        (UNIPC, {"solver_p": "euler"}, "solver_p = 'euler'"),
        (UNIPC, {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        (UNIPC, {"disable_corrector": "all"}, "disable_corrector = 'all'"),
        (SA, {"tau_func": "one"}, "tau_func = 'one'"),
        *((SA, {key: 5}, f"{key} = 5") for key in ("predictor_order", "corrector_order")),
        (EDM, {"sigma_schedule": "beta"}, "sigma_schedule = 'beta'"),
        (EDM, {"prediction_type": "sample"}, "prediction_type = 'sample'"),
        *((EDM, {key: 0.0}, f"{key} = 0.0") for key in ("sigma_min", "sigma_max", "sigma_data", "rho")),
        *(("TCDScheduler", {key: True}, f"{key} = True") for key in ("clip_sample", "thresholding")),
        ("LCMScheduler", {"original_inference_steps": 0}, "original_inference_steps = 0"),
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


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("ddim", "tcd", "unclip")])
def test_eta_is_ddims_and_tcds_alone(solver: str) -> None:
    with pytest.raises(BadInput, match=rf"^eta is for ddim and tcd, and this solver is {re.escape(solver)}: leave eta out"):
        read_scheduler({"_class_name": "EDMEulerScheduler"} if solver == "edm-euler" else SD15, solver).solver(5, eta=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_start": -0.1}, "beta_start = -0.1 is not honoured"),
        ({"steps_offset": -1}, "steps_offset = -1 is not honoured"),
        (
            {"trained_betas": [0.1] * 10},
            r"^PNDMScheduler options are not honoured: 10 betas for 1000 training timesteps\.$",
        ),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModel, match=message):
        read_scheduler(SD15 | options)


@pytest.mark.parametrize(("name", "shown"), [("IPNDMScheduler", "IPNDMScheduler"), (None, r"\(none\)")])
def test_unknown_class(name: str | None, shown: str) -> None:
    message = rf"^The scheduler class {shown} is not supported: use one of DDIM, DDPM, .*, UniPCMultistep \(…Scheduler\)\.$"
    with pytest.raises(BadModel, match=message):
        read_scheduler({"_class_name": name} if name else {})


def test_unknown_solver() -> None:
    with pytest.raises(
        BadInput, match=r"^There is no solver 'rk45': use one of ddim, ddpm, deis, dpm\+\+2m, dpm\+\+2m-sde, dpm"
    ):
        read_scheduler(SD15, "rk45")


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_too_many_steps_or_none(steps: int) -> None:
    message = rf"^Steps go from 1 to 1000 \(the training timesteps of this model\), got {steps}\.$"
    with pytest.raises(BadInput, match=message):
        read_scheduler(SD15).schedule(steps)


def test_steps_that_the_offset_pushes_over_the_end() -> None:
    message = (
        r"^1000 steps with leading spacing do not fit into 1000 training timesteps: take fewer steps or another spacing"
    )
    with pytest.raises(BadInput, match=message):
        read_scheduler(SD15).schedule(1000)
    assert len(read_scheduler(SD15, steps_offset=0, set_alpha_to_one=True).schedule(1000)) == 1000


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(
        BadInput, match=rf"^eta goes from 0 \(deterministic\) to 1 \(new noise in every step\), got {eta:g}\.$"
    ):
        read_scheduler(SD15, "ddim").solver(10, eta=eta)


def test_another_solver_takes_what_is_written_not_the_defaults() -> None:
    """As ``EulerDiscreteScheduler.from_config(pndm.config)``: PNDM's leading spacing stays with PNDM."""
    pndm = diffusers.PNDMScheduler.from_config(SD15)
    for name, kind in SOLVERS.items():
        if name in ("unclip", "edm-euler"):  # one knows no other betas than its own, the other none
            continue
        theirs = getattr(diffusers, kind.__name__.replace("Config", "Scheduler")).from_config(pndm.config).config
        ours = read_scheduler(SD15, name).model_dump()
        assert {key: value for key, value in ours.items() if key in theirs} == {
            key: theirs[key] for key in ours if key in theirs
        }
    assert read_scheduler(SD15, "euler").schedule(5).origin == "euler, linspace"
    assert read_scheduler({**SD15, "timestep_spacing": "leading"}, "euler").schedule(5).origin == "euler, leading"


@pytest.mark.parametrize("name", having("use_beta_sigmas"))
def test_one_spacing_at_most(name: str) -> None:
    with pytest.raises(BadModel, match=rf"^{name} options are .* levels are karras and beta at once\.$"):
        read_scheduler({"_class_name": name, "use_karras_sigmas": True, "use_beta_sigmas": True})


def test_lu_is_a_spacing_too() -> None:
    assert read_scheduler({"_class_name": MULTI, "use_lu_lambdas": True}).own_spacing == "lu"
    with pytest.raises(BadModel, match="levels are exponential and lu at once"):
        read_scheduler({"_class_name": MULTI, "use_lu_lambdas": True, "use_exponential_sigmas": True})


@pytest.mark.parametrize(("name", "algorithm"), [(MULTI, "dpmsolver"), (MULTI, "sde-dpmsolver"), (SINGLE, "dpmsolver")])
def test_what_extrapolates_noise_ends_above_0(name: str, algorithm: str) -> None:
    with pytest.raises(BadModel, match=rf"^{name} options .* {algorithm} cannot end at 0: it needs final_sigmas_type = 'si"):
        read_scheduler({"_class_name": name, "algorithm_type": algorithm})


def test_trained_betas_are_the_table() -> None:
    betas = [0.1, 0.2, 0.5]
    config = read_scheduler({"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 3})
    alphas = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5]
    assert config.training_sigmas() == pytest.approx([math.sqrt((1 - a) / a) for a in alphas])


def test_edm_and_the_rest_do_not_stand_in_for_one_another() -> None:
    message = (
        r"^edm-euler cannot stand in for pndm: one is for networks with the preconditioning of EDM, .* another solver\.$"
    )
    with pytest.raises(BadInput, match=message):
        read_scheduler({"_class_name": "PNDMScheduler"}, "edm-euler")
    with pytest.raises(BadInput, match=r"^euler cannot stand in for edm-euler"):
        read_scheduler({"_class_name": "EDMEulerScheduler"}, "euler")


def test_a_misspelt_solver_is_recognised() -> None:
    with pytest.raises(BadInput, match=r"^There is no solver 'unipcc'; did you mean 'unipc'\?$"):
        read_scheduler({"_class_name": "PNDMScheduler"}, "unipcc")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler"])
def test_a_range_that_is_none(name: str) -> None:
    with pytest.raises(BadInput, match=rf"^{name} options are not honoured: sigma_min = 5 is not below sigma_max = 1\.$"):
        read_scheduler({"_class_name": name}, sigma_min=5.0, sigma_max=1.0)


def test_whose_fault_an_option_is() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler"}
    with pytest.raises(BadInput, match=r"dpmsolver cannot end at 0: it needs final_sigmas_type = 'sigma_min'\.$"):
        read_scheduler(config, algorithm_type="dpmsolver")
    with pytest.raises(BadModel, match=r"dpmsolver cannot end at 0"):
        read_scheduler(config | {"algorithm_type": "dpmsolver"})
