"""Every spacing against its formula, and every class's levels and timesteps against diffusers' own lists."""

from __future__ import annotations

import math
from itertools import groupby, pairwise, product
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution
from unrolled.core.errors import BadInput
from unrolled.core.schedule import Schedule
from unrolled.schedulers import spacing
from unrolled.schedulers.config import SOLVERS, read_scheduler
from unrolled.schedulers.multistep_classes import ExponentialConfig

STEPS = (1, 2, 5, 10, 25, 50, 1000)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {name: kind.__name__.replace("Config", "Scheduler") for name, kind in SOLVERS.items()}
LOW, HIGH = 0.0291671582, 14.6146412293


# --- formulas


def test_karras() -> None:
    for steps, rho in product((2, 3, 10), (1.0, 5.0, 7.0)):
        i = np.arange(steps) / (steps - 1)
        levels = (HIGH ** (1 / rho) + i * (LOW ** (1 / rho) - HIGH ** (1 / rho))) ** rho
        assert spacing.karras(steps, LOW, HIGH, rho) == pytest.approx(levels)


def test_polyexponential() -> None:
    for steps, rho in product((2, 3, 10), (0.5, 1.0, 3.0)):
        ramp = np.linspace(1, 0, steps) ** rho
        levels = np.exp(ramp * (math.log(HIGH) - math.log(LOW)) + math.log(LOW))
        assert spacing.polyexponential(steps, LOW, HIGH, rho) == pytest.approx(levels)


def test_exponential_is_polyexponential_and_lu_is_exponential() -> None:
    """diffusers' ``use_lu_lambdas`` with its fixed rho of 1, on its own scheduler."""
    for steps in (1, 2, 7, 25):
        assert spacing.exponential(steps, LOW, HIGH) == spacing.polyexponential(steps, LOW, HIGH, 1.0)
        assert spacing.SPACINGS["lu"](steps, LOW, HIGH) == spacing.exponential(steps, LOW, HIGH)
        assert spacing.exponential(steps, LOW, HIGH) == pytest.approx(np.geomspace(HIGH, LOW, steps))
        lu = diffusers.DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True)
        exponential = diffusers.DPMSolverMultistepScheduler(**BETAS, use_exponential_sigmas=True)
        lu.set_timesteps(steps)
        exponential.set_timesteps(steps)
        assert lu.sigmas.tolist() == pytest.approx(exponential.sigmas.tolist(), rel=2e-6)


def test_beta() -> None:
    for steps in (2, 3, 10):
        quantiles = beta_distribution.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6)
        assert spacing.beta(steps, LOW, HIGH) == pytest.approx(LOW + quantiles * (HIGH - LOW))


def test_kl_optimal() -> None:
    for steps in (2, 3, 10):
        i = np.arange(steps) / (steps - 1)
        levels = np.tan((1 - i) * math.atan(HIGH) + i * math.atan(LOW))
        assert spacing.kl_optimal(steps, LOW, HIGH) == pytest.approx(levels)


@pytest.mark.parametrize(
    ("name", "published", "high"),
    [("sd", "StableDiffusion", 14.615), ("sdxl", "StableDiffusionXL", 14.615), ("svd", "StableDiffusionVideo", 700.0)],
)
def test_align_your_steps(name: str, published: str, high: float) -> None:
    ten = AysSchedules[f"{published}Sigmas"][:-1]
    assert spacing.align_your_steps(10, 0.0, high, name) == pytest.approx(ten)
    twenty = spacing.align_your_steps(20, 0.0, high, name)
    assert twenty[::2] == pytest.approx(ten)
    assert twenty[1:-1:2] == pytest.approx([math.sqrt(a * b) for a, b in pairwise(ten)])
    assert spacing.align_your_steps(1, 0.0, high, name) == pytest.approx([high])


@pytest.mark.parametrize(("name", "published"), [("align-your-steps", ""), ("align-your-steps-xl", "XL")])
def test_align_your_steps_tells_the_published_timesteps(name: str, published: str) -> None:
    """To 3, because they were rounded, and at low noise so were the sigmas."""
    schedule = read_scheduler({"_class_name": "EulerDiscreteScheduler", **BETAS}).schedule(10, spacing=name)
    assert schedule.timesteps == pytest.approx(AysSchedules[f"StableDiffusion{published}Timesteps"], abs=3)
    assert schedule.sigmas[-1] == 0


def test_a_table_of_another_model() -> None:
    message = (
        r"^The align-your-steps table of svd begins at sigma 700, but this run at 14\.61: take the table of this model, "
        r"or another spacing\.$"
    )
    with pytest.raises(BadInput, match=message):
        read_scheduler({"_class_name": "PNDMScheduler", **BETAS}).schedule(10, spacing="align-your-steps-svd")
    edm = read_scheduler({"_class_name": "EDMEulerScheduler", "sigma_max": 700.0})
    assert edm.schedule(10, spacing="align-your-steps-svd").sigmas[1] == pytest.approx(54.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 1000])
def test_linear_quadratic(steps: int) -> None:
    """As published, by the coefficients of the parabola."""
    linear, threshold = steps // 2, 0.025
    gone = [i * threshold / linear for i in range(linear)] if linear else [0.0]
    if linear:
        excess, rest = linear - threshold * steps, steps - linear
        a, b = excess / (linear * rest**2), threshold / linear - 2 * excess / rest**2
        gone += [a * i**2 + b * i + a * linear**2 for i in range(linear, steps)]
    assert spacing.linear_quadratic(steps, HIGH) == pytest.approx([HIGH * (1 - part) for part in gone])


@pytest.mark.parametrize("name", spacing.SPACINGS)
@given(steps=st.integers(1, 200), low=st.floats(1e-3, 0.1), share=st.floats(1.0, 3.0))
def test_levels_fall(name: str, steps: int, low: float, share: float) -> None:
    """Strictly, from the highest level, and where a spacing takes the lowest, exactly to it."""
    high = {"align-your-steps": 14.61, "align-your-steps-xl": 14.62, "align-your-steps-svd": 700.0}.get(name, 10**share)
    levels = spacing.named(name, steps, low, high)
    assert len(levels) == steps
    assert all(a > b > 0 for a, b in pairwise(levels))
    assert levels[0] == pytest.approx(high, rel=2e-3)
    if steps > 1 and name not in ("align-your-steps", "align-your-steps-xl", "align-your-steps-svd", "linear-quadratic"):
        assert (levels[0], levels[-1]) == (high, low)


def test_unknown_spacing() -> None:
    message = r"^There is no spacing 'cosine': use one of align-your-steps, .*, linspace, or sigmas of your own\.$"
    with pytest.raises(BadInput, match=message):
        spacing.named("cosine", 10, LOW, HIGH)
    with pytest.raises(BadInput, match=r"^There is no spacing 'karas'; did you mean 'karras'\?$"):
        spacing.named("karas", 10, LOW, HIGH)


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
def test_timesteps_may_be_named_as_spacings_too(kind: str) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", **BETAS, "use_karras_sigmas": True}
    plain = read_scheduler({"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": kind})
    assert read_scheduler(config).sampling(9, spacing=kind) == plain.sampling(9)
    message = rf"^lcm has timesteps of its own: leave spacing = '{kind}' out\.$"
    if kind == "leading":
        with pytest.raises(BadInput, match=message.replace("lcm", "unclip")):
            read_scheduler({"_class_name": "UnCLIPScheduler"}).sampling(9, spacing=kind)


def test_a_spacing_of_ones_own() -> None:
    def halving(steps: int, sigma_min: float, sigma_max: float) -> list[float]:
        return [sigma_max / 2**i for i in range(steps)]

    schedule = read_scheduler({"_class_name": "EulerDiscreteScheduler", **BETAS}).schedule(4, spacing=halving)
    top = schedule.training_sigmas[-1]
    assert schedule.sigmas == (top, top / 2, top / 4, top / 8, 0.0)
    assert schedule.origin == "euler, halving"


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "unclip"])
@pytest.mark.parametrize("name", [name for name in spacing.SPACINGS if name != "align-your-steps-svd"])
def test_every_solver_takes_every_spacing(solver: str, name: str) -> None:
    edm = {"_class_name": "EDMEulerScheduler", "sigma_max": 14.615}
    config = read_scheduler(edm if solver == "edm-euler" else {"_class_name": "PNDMScheduler", **BETAS}, solver)
    for steps in (1, 2, 7, 30):
        schedule, _ = config.sampling(steps, spacing=name)
        assert schedule.origin == f"{solver}, {name}"
        assert schedule.sigmas[0] == pytest.approx(14.6, rel=0.01)
        assert len(schedule) + len(schedule.inside) in (steps, steps - 1)  # or it ends where its last level was


# --- diffusers' own lists

TIMESTEPS = [{"timestep_spacing": kind} for kind in ("leading", "trailing", "linspace")]
SIGMAS: list[dict[str, Any]] = [{}, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))]
ZERO = {"rescale_betas_zero_snr": True}
OTHER: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"set_alpha_to_one": False, "steps_offset": 1}, ZERO],
    "ddpm": [ZERO],
    "pndm": [{"skip_prk_steps": True, "steps_offset": 1}],
    "euler": [
        *({"interpolation_type": "log_linear", "timestep_spacing": "leading"} | flag for flag in SIGMAS),
        *({"sigma_min": 0.1, "sigma_max": 9.0, "final_sigmas_type": "sigma_min"} | flag for flag in SIGMAS),
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        ZERO,
    ],
    "euler-ancestral": [ZERO],
    "dpm++2m": [
        *({"final_sigmas_type": "sigma_min"} | flag for flag in SIGMAS),
        {"use_lu_lambdas": True},
        *({"lambda_min_clipped": -2.0} | spaced for spaced in TIMESTEPS),
        {"lambda_min_clipped": -2.0, "use_karras_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        ZERO,
    ],
    "dpm++2s": [
        {"final_sigmas_type": "sigma_min", "lower_order_final": True},
        {"final_sigmas_type": "sigma_min", "lambda_min_clipped": -2.0},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    ],
    "unipc": [
        *({"final_sigmas_type": "sigma_min"} | flag for flag in SIGMAS),
        *({"sigma_min": 0.1, "sigma_max": 9.0} | flag for flag in SIGMAS),
        ZERO,
    ],
    "sa-solver": [{"lambda_min_clipped": -2.0} | spaced for spaced in TIMESTEPS],
    "edm-euler": [
        {},
        {"sigma_schedule": "exponential"},
        {"sigma_min": 0.03, "sigma_max": 14.0, "rho": 5.0, "final_sigmas_type": "sigma_min"},
    ],
    "lcm": [{"original_inference_steps": 50}, {"original_inference_steps": 1000}, {"original_inference_steps": 30}],
    "tcd": [{"original_inference_steps": 50}, {"original_inference_steps": 1000}],
    "unclip": [{}, {"num_train_timesteps": 500}],
}


def options_of(name: str) -> list[dict[str, Any]]:
    """Every combination of the spacings that a class has, and its own further options."""
    fields = SOLVERS[name].model_fields
    spaced = TIMESTEPS if "timestep_spacing" in fields and name not in ("lcm", "tcd") else [{}]
    flags = SIGMAS if "use_beta_sigmas" in fields else [{}]
    betas = BETAS if "beta_start" in fields and name != "unclip" else {}
    offsets = [{"steps_offset": 1}] if "steps_offset" in fields else []
    every = [a | b for a, b in product(spaced, flags)] + offsets + OTHER.get(name, [])
    return [betas | options for options in every]


CASES = [pytest.param(name, options, id=f"{name}-{i}") for name in SOLVERS for i, options in enumerate(options_of(name))]


def listed(name: str, scheduler: Any, steps: int) -> tuple[list[float], list[float]]:
    """What diffusers plans: timesteps it evaluates at, and their sigmas with the last; without the repetitions by
    which its second-order methods plan two evaluations, and without empty steps.
    """
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    if name in ("dpm2", "dpm2-ancestral", "dpm++sde"):
        timesteps = timesteps[::2]
    if name == "heun":
        timesteps = [timesteps[0], *timesteps[1::2]]
    if name == "pndm":
        timesteps = sorted(set(scheduler._timesteps.tolist()), reverse=True)
    if hasattr(scheduler, "sigmas"):
        sigmas = [sigma for sigma, _ in groupby(scheduler.sigmas.tolist())]
        # Log-linear Euler plans a level 0 that it never steps to.
        return timesteps[: len(sigmas) - 1], sigmas[: len(timesteps) + 1]
    alphas = scheduler.alphas_cumprod.double().clamp(2**-40)
    last = getattr(scheduler, "final_alpha_cumprod", None)
    end = 1.0 if last is None or name == "lcm" else float(alphas[0] if name == "tcd" else last)
    sigmas = [math.sqrt((1 - a) / a) for a in (*alphas[timesteps].tolist(), end)]
    sigmas = [sigma for sigma, _ in groupby(sigmas)]
    return timesteps[: len(sigmas) - 1], sigmas


def evaluated(schedule: Schedule) -> tuple[list[float], list[float]]:
    """The same of ours."""
    pairs = sorted((*zip(schedule.sigmas, schedule.timesteps, strict=False), *schedule.inside), reverse=True)
    return [timestep for _, timestep in pairs], [*(sigma for sigma, _ in pairs), schedule.sigmas[-1]]


def told_alike(ours: float, theirs: float, truncated: bool) -> bool:
    """Equal up to the rounding of a float32 log."""
    near = 4e-3
    return abs(ours - theirs) < near or (truncated and theirs in (math.floor(ours - near), math.floor(ours + near)))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_levels_are_diffusers(name: str, options: dict[str, Any]) -> None:
    config, fitting = read_scheduler({"_class_name": CLASSES[name], **options}), 0
    # diffusers' Runge–Kutta start cannot be planned for under 4 steps; the levels are the same without it.
    scheduler = getattr(diffusers, CLASSES[name])(**options | ({"skip_prk_steps": True} if name == "pndm" else {}))
    # The exponential integrators of diffusers truncate fractional timesteps, which we tell as they are.
    whole = isinstance(config, ExponentialConfig)
    truncated = whole and (config.own_spacing in ("exponential", "beta"))
    for steps in STEPS:
        try:
            schedule = config.schedule(steps)
        except BadInput:
            assert steps in (1, 1000) or steps > getattr(config, "original_inference_steps", steps)
            continue
        timesteps, sigmas = listed(name, scheduler, steps)
        if options.get("sigma_schedule") == "exponential" and steps == 1:  # diffusers begins and ends where noise ends
            assert (schedule.sigmas[0], sigmas[0]) == pytest.approx((80.0, 0.002))
            continue
        if len(sigmas) == 1:  # diffusers makes no step at all, from the highest level to itself
            assert schedule.sigmas == pytest.approx((sigmas[0], config._last_sigma()))
            continue
        told, levels = evaluated(schedule)
        assert levels == pytest.approx(sigmas, rel=1e-5), steps
        assert len(told) == len(timesteps)
        assert all(told_alike(a, b, truncated) for a, b in zip(told, timesteps, strict=True)), (steps, told, timesteps)
        fitting += 1
    assert fitting >= len(STEPS) - 2
