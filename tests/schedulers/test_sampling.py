"""Schedule and solver in one call, and levels of one's own."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from unrolled.core.denoiser import UNetDenoiser
from unrolled.core.errors import BadInput
from unrolled.core.model import Model
from unrolled.core.noise import Brownian
from unrolled.core.prediction import Preconditioned, Prediction
from unrolled.schedulers import DPMppSDE
from unrolled.schedulers.config import SOLVERS, read_scheduler
from unrolled.schedulers.seeded import Seeded

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER = read_scheduler({"_class_name": "EulerDiscreteScheduler", **BETAS})
EDM = {"_class_name": "EDMEulerScheduler"}
SD15 = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True, "steps_offset": 1}


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "unclip"])
def test_both_halves_are_of_one_run(name: str) -> None:
    config = read_scheduler(EDM if name == "edm-euler" else SD15, name)
    for given in ({"spacing": "kl-optimal"}, {"sigmas": [9.0, 3.0, 1.0]}, {}):
        steps = None if "sigmas" in given else 7
        schedule, solver = config.sampling(steps, **given)
        assert (config.schedule(steps, **given), config.solver(steps, **given)) == (schedule, solver)


@pytest.mark.parametrize("sigmas", [[14.0, 5.0, 1.0, 0.3, 0.0], [14.0, 5.0, 1.0, 0.3]])
def test_sigmas_of_ones_own_are_diffusers(sigmas: list[float]) -> None:
    """With or without the 0 at their end."""
    theirs = diffusers.EulerDiscreteScheduler(**BETAS)
    theirs.set_timesteps(sigmas=[14.0, 5.0, 1.0, 0.3, 0.0])
    ours = EULER.schedule(sigmas=sigmas)
    assert ours == EULER.schedule(4, sigmas=sigmas)
    assert ours.sigmas == (14.0, 5.0, 1.0, 0.3, 0.0)
    assert ours.timesteps == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    assert ours.origin == "euler, sigmas"


def test_they_end_where_the_class_ends_or_where_they_say() -> None:
    ddim = read_scheduler(SD15, "ddim", set_alpha_to_one=False)
    lowest = ddim.training_sigmas()[0]
    assert ddim.schedule(sigmas=[5.0, 1.0]).sigmas == (5.0, 1.0, lowest)
    assert ddim.schedule(sigmas=[5.0, 1.0, 0.0]).sigmas == (5.0, 1.0, 0.0)
    assert ddim.schedule(sigmas=[5.0, 1.0, 0.01]).sigmas == (5.0, 1.0, 0.01)


def test_timesteps_of_ones_own_are_diffusers() -> None:
    theirs = diffusers.EulerDiscreteScheduler(**BETAS)
    theirs.set_timesteps(timesteps=[999, 600, 20])
    ours = EULER.schedule(timesteps=[999, 600, 20])
    assert ours.timesteps == (999, 600, 20)
    assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), rel=1e-6)
    between = EULER.schedule(timesteps=[500.5]).sigmas[0]
    assert between == pytest.approx((EULER.training_sigmas()[500] + EULER.training_sigmas()[501]) / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"^A run has a number of steps, or sigmas or timesteps of your own: give one of them\.$"),
        ({"spacing": "beta"}, r"^A run has a number of steps"),
        (
            {"spacing": "beta", "sigmas": [1.0]},
            r"^The levels of a run are given by one of spacing, sigmas and timesteps: le",
        ),
        (
            {"timesteps": [5], "sigmas": [1.0]},
            r"^The levels of a run are given by one of spacing, sigmas and timesteps: leave",
        ),
        ({"steps": 3, "sigmas": [2.0, 1.0, 0.0]}, r"^3 steps were asked for, but levels for 2 given: leave steps out\.$"),
        ({"steps": 3, "timesteps": [9, 5]}, r"^3 steps were asked for, but levels for 2 given: leave steps out\.$"),
        (
            {"sigmas": []},
            r"^The sigmas of a run begin above 0 and at most at 1e\+07 and fall strictly, to 0 at the lowest, got none\.$",
        ),
        ({"sigmas": [0.0]}, r"^The sigmas of a run begin above 0 and at most at 1e\+07 and fall strictly, .* got 0\.$"),
        ({"sigmas": [1.0, 1.0]}, r"^The sigmas of a run .* got 1 1\.$"),
        ({"sigmas": [2.0, 0.0, 1.0]}, r"^The sigmas of a run .* got 2 0 1\.$"),
        ({"sigmas": [2.0, -1.0]}, r"^The sigmas of a run .* got 2 -1\.$"),
        ({"sigmas": [math.nan]}, r"^The sigmas of a run .* got nan\.$"),
        ({"sigmas": [math.inf, 1.0]}, r"^The sigmas of a run .* got inf 1\.$"),
        (
            {"timesteps": [1000]},
            r"^The timesteps of a run begin above 0 and at most at 999 and fall strictly, .* got 1000\.$",
        ),
        ({"timesteps": [5, 7]}, r"^The timesteps of a run .* got 5 7\.$"),
    ],
)
def test_levels_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EULER.sampling(**given)


def test_no_step_to_take() -> None:
    """One step of linspace begins at timestep 0, where PNDM ends."""
    message = r"^There is no step to take: these levels begin at sigma 0\.02917, where pndm ends\.$"
    with pytest.raises(BadInput, match=message):
        read_scheduler(SD15, timestep_spacing="linspace").schedule(1)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_faithful_counts_in_training_timesteps(name: str) -> None:
    config = read_scheduler(SD15, name)
    assert config.solver(timesteps=[900, 400], faithful=True) != config.solver(timesteps=[900, 400])
    message = rf"^Faithful {name} counts in training timesteps, and these levels lie between them: leave faithful out, or"
    for given in ({"spacing": "karras"}, {"timesteps": [900.5, 400]}):
        with pytest.raises(BadInput, match=message):
            config.sampling(7 if "spacing" in given else None, faithful=True, **given)


def test_a_flag_is_diffusers_and_a_spacing_runs_over_all_of_training() -> None:
    """They differ where the flag's levels go from the first timestep to the last one that "leading" takes."""
    leading = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading"}
    flag = read_scheduler(leading, use_karras_sigmas=True).schedule(10)
    whole = read_scheduler(leading).schedule(10, spacing="karras")
    assert flag.sigmas[0] == pytest.approx(read_scheduler(leading).schedule(10).sigmas[0])
    assert whole.sigmas[0] == pytest.approx(14.6146, rel=1e-4)
    narrow = read_scheduler(leading, sigma_min=0.1, sigma_max=5.0).schedule(10, spacing="karras")
    assert (narrow.sigmas[0], narrow.sigmas[-2]) == (5.0, 0.1)


def test_a_model_hands_out_both_halves(tiny: Model) -> None:
    given: dict[str, Any] = {"spacing": "exponential", "eta": 0.5, "clip_sample": True}
    schedule, solver = tiny.sampling(6, "ddim", **given)
    assert (tiny.schedule(6, "ddim", **given), tiny.solver(6, "ddim", **given)) == (schedule, solver)
    assert schedule.origin == "ddim, exponential"
    assert len(tiny.schedule(sigmas=[5.0, 1.0])) == 2


# --- networks that are told ln(sigma) / 4


@pytest.mark.parametrize(
    "file",
    [EDM, {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"}],
)
def test_continuous_timesteps_everywhere(file: dict[str, Any]) -> None:
    """At planned levels, between them, and where a run is taken up."""
    schedule = read_scheduler(file).schedule(10)
    levels = [*schedule.sigmas[:-1], 3.21]
    assert [schedule.timestep_at(sigma) for sigma in levels] == pytest.approx([math.log(s) / 4 for s in levels])
    assert schedule.starting_at(3.21).timesteps[0] == pytest.approx(math.log(3.21) / 4)
    assert schedule[4:].timestep_at(0.5) == pytest.approx(math.log(0.5) / 4)


def test_a_cut_in_training_time_of_a_continuous_run() -> None:
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction", **BETAS}
    plain, continuous = (
        read_scheduler({"_class_name": "EulerDiscreteScheduler"} | o).schedule(20) for o in (BETAS, options)
    )
    assert plain.sigmas == continuous.sigmas
    assert continuous.index(training_time=0.8) == plain.index(training_time=0.8) == 16


def test_continuous_and_timesteps_of_ones_own() -> None:
    config = read_scheduler(
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"}
    )
    schedule = config.schedule(timesteps=[999, 10])
    assert schedule.timesteps == pytest.approx([math.log(sigma) / 4 for sigma in schedule.sigmas[:2]])
    message = r"^edm-euler knows noise levels but no training timesteps: give sigmas instead of timesteps\.$"
    with pytest.raises(BadInput, match=message):
        read_scheduler(EDM).schedule(timesteps=[5])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_preconditioning_is_diffusers(prediction_type: str, sigma_data: float) -> None:
    options = {"prediction_type": prediction_type, "sigma_data": sigma_data}
    theirs, ours = diffusers.EDMEulerScheduler(**options), read_scheduler(EDM | options)
    theirs.set_timesteps(5)
    schedule = ours.schedule(5)
    assert schedule.timesteps == pytest.approx(theirs.timesteps.tolist(), abs=1e-6)
    assert schedule.start_std == pytest.approx(theirs.init_noise_sigma)
    x, out = torch.randn(2, 1, 4, 8, 8)
    for sigma in schedule.sigmas[:-1]:
        prediction = Prediction(out, x, sigma, ours.kind)
        assert torch.allclose(prediction.x0, theirs.precondition_outputs(x, out, sigma), atol=1e-5)
        assert torch.allclose(prediction.x0 + sigma * prediction.eps, x, rtol=1e-5, atol=1e-4)


def test_v_is_a_preconditioning_of_unit_data() -> None:
    x, out = torch.randn(2, 1, 4, 8, 8)
    for sigma in (0.1, 1.0, 30.0):
        v, same = Prediction(out, x, sigma, "v"), Prediction(out, x, sigma, Preconditioned(1.0, -1))
        assert torch.equal(v.x0, same.x0)
        assert torch.equal(v.eps, same.eps)


def test_the_input_is_scaled_by_the_data(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from unrolled.stages.text import encode_text

    seen = list[Tensor]()

    def unet(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        seen.append(x)
        return (x,)

    monkeypatch.setattr(tiny.unet, "forward", unet)
    x, cond = torch.ones(1, 4, 8, 8), encode_text(tiny, "a barn")
    UNetDenoiser(tiny.unet, Preconditioned(0.5))(x, 3.0, 0.0, cond)
    assert torch.allclose(seen[0], x / math.sqrt(3.0**2 + 0.5**2))


def test_a_seed_of_its_own() -> None:
    """The noise is that of the solver's seed, and of the next for the next image, whatever the run's."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, sigma: float) -> Prediction:
        return Prediction.from_x0(0.5 * x, x, sigma)

    def none(high: float, low: float) -> Tensor:
        raise AssertionError("the run's own noise was asked for")

    path = Brownian((5, 6))
    seeded, _ = Seeded(DPMppSDE(), 5)(denoise, x, 10.0, 2.0, (), none)
    drawn, _ = DPMppSDE()(denoise, x, 10.0, 2.0, (), lambda high, low: path(x.shape, "step", levels=(high, low)))
    assert torch.equal(seeded, drawn)


def test_the_lowest_level_of_edm_counts_as_clean_and_no_other_does() -> None:
    config = read_scheduler({**EDM, "final_sigmas_type": "sigma_min"})
    schedule = config.schedule(5)
    assert schedule.finished_at == schedule.sigmas[-1] == 0.002
    assert config.schedule(sigmas=[80.0, 5.0, 0.5, 0.1]).finished_at == 0.002
    with pytest.raises(BadInput, match="does not know its training timesteps"):
        schedule.index(training_time=0.5)
