"""A run split between SDXL's base and refiner, against diffusers' ``denoising_end`` and ``denoising_start``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unrolled.core.denoiser import Denoiser
from unrolled.core.errors import BadInput
from unrolled.core.guidance import classifier_free
from unrolled.core.latents import Latents
from unrolled.core.loading import Model
from unrolled.core.loop import denoise
from unrolled.core.noise import DiffusersNoise
from unrolled.schedulers import Euler
from unrolled.stages.noise import noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

TOLERANCE = 1e-4
STEPS = 20
KARRAS = {"use_karras_sigmas": True}
Run = Callable[..., Any]


@pytest.fixture
def theirs(sdxl_pipeline: Run) -> Run:
    """diffusers' base up to ``end``, or from ``start`` on what it is given."""

    def run(
        name: str,
        options: dict[str, Any],
        latents: Tensor | None = None,
        *,
        refiner: bool = True,
        prompts: Sequence[str] = ("a castle",),
        **more: Any,
    ) -> Any:
        from_latents = {} if latents is None else {"image": latents}
        pipeline = (
            sdxl_pipeline("", name, **options)
            if latents is None
            else sdxl_pipeline("Img2Img", name, refiner=refiner, **options)
        )
        return pipeline(
            list(prompts), num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
            generator=DiffusersNoise.seeded(3).generator, **from_latents, **more,
        ).images  # fmt: skip

    return run


def guided(model: Model, prompts: Sequence[str] = ("a castle",)) -> Denoiser:
    """As diffusers' defaults: no negative prompt, aesthetic scores of 6 and 2.5."""
    cond = with_size(model, encode_text(model, prompts), 64, 64)
    uncond = with_size(model, encode_text(model, None), 64, 64, aesthetic_score=2.5)
    return classifier_free(model.denoiser, cond, uncond, 5.0)


def pure_noise(model: Model, name: str, options: dict[str, Any]) -> tuple[Latents, DiffusersNoise]:
    source = DiffusersNoise.seeded(3)
    return noise(model, model.schedule(STEPS, name, **options), seeds=[3], source=source), source


def handed_on(latents: Latents) -> Latents:
    """What another model takes: what the solver remembers of this one's x0 is not the other's."""
    return replace(latents, history=())


@pytest.mark.parametrize("cut", [0.8, 0.5, 0.33])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("euler", KARRAS),
        ("euler", {"timestep_spacing": "trailing"}),
        ("euler-ancestral", {}),
        ("dpm++2m", {}),
        ("dpm++2m", KARRAS),
        ("ddim", {}),
    ],
)
def test_both_parts(
    name: str, options: dict[str, Any], cut: float, tiny_sdxl: Model, tiny_refiner: Model, theirs: Run, distance: Run
) -> None:
    schedule, solver = tiny_sdxl.schedule(STEPS, name, **options), tiny_sdxl.solver(STEPS, name, **options)
    before, after = schedule.split(schedule.index(training_time=cut))
    start, source = pure_noise(tiny_sdxl, name, options)
    middle = denoise(guided(tiny_sdxl), start, before, solver, noise=source)
    reference = theirs(name, options, denoising_end=cut)
    assert distance(middle, reference, name) < TOLERANCE
    assert middle.sigma == before.sigmas[-1] == after.sigmas[0] > 0.1

    end = denoise(guided(tiny_refiner), handed_on(middle), after, solver, noise=DiffusersNoise.seeded(3))
    assert distance(end, theirs(name, options, reference, denoising_start=cut), name) < TOLERANCE
    assert end.is_clean


@pytest.mark.parametrize(
    ("name", "options", "cut", "steps"),
    [("euler", {}, 0.8, 16), ("euler", KARRAS, 0.8, 12), ("dpm++2m", KARRAS, 0.8, 12), ("euler", KARRAS, 0.5, 9)],
)
def test_training_time_is_not_a_part_of_the_steps(
    name: str, options: dict[str, Any], cut: float, steps: int, tiny_sdxl: Model
) -> None:
    schedule = tiny_sdxl.schedule(STEPS, name, **options)
    assert schedule.index(training_time=cut) == steps
    assert schedule.index(steps_fraction=cut) == cut * STEPS


@pytest.mark.parametrize("first", ["euler", "euler-ancestral"])
@pytest.mark.parametrize("second", ["euler", "euler-ancestral"])
def test_another_solver_for_the_refiner(
    first: str, second: str, tiny_sdxl: Model, tiny_refiner: Model, theirs: Run, distance: Run
) -> None:
    before, after = tiny_sdxl.schedule(STEPS, first), tiny_refiner.schedule(STEPS, second)
    start, source = pure_noise(tiny_sdxl, first, {"timestep_spacing": "leading"})
    before = before[: before.index(training_time=0.8)]
    middle = denoise(guided(tiny_sdxl), start, before, tiny_sdxl.solver(STEPS, first), noise=source)
    after = after.starting_at(middle.sigma)
    end = denoise(guided(tiny_refiner), middle, after, tiny_refiner.solver(STEPS, second), noise=DiffusersNoise.seeded(3))
    reference = theirs(second, {}, theirs(first, {}, denoising_end=0.8), denoising_start=0.8)
    assert distance(end, reference, second) < TOLERANCE


def test_diffusers_hands_on_another_scale_and_level(
    tiny_sdxl: Model, tiny_refiner: Model, theirs: Run, distance: Run
) -> None:
    """From Euler's x = x0 + sigma noise to DPM++'s unit variance, and to timesteps that are not Euler's."""
    first, second = tiny_sdxl.schedule(STEPS), tiny_refiner.schedule(STEPS, "dpm++2m")
    solver = tiny_refiner.solver(STEPS, "dpm++2m")
    start, _ = pure_noise(tiny_sdxl, "euler", {})
    middle = denoise(guided(tiny_sdxl), start, first[: first.index(training_time=0.8)], tiny_sdxl.solver(STEPS))
    reference = theirs("dpm++2m", {}, theirs("euler", {}, denoising_end=0.8), denoising_start=0.8)

    own = second[second.index(training_time=0.8) :]
    assert own.sigmas[0] != middle.sigma
    taken_for = replace(middle, x=middle.x * (1 + own.sigmas[0] ** 2) ** 0.5, sigma=own.sigmas[0])
    assert distance(denoise(guided(tiny_refiner), taken_for, own, solver), reference, "dpm++2m") < TOLERANCE

    end = denoise(guided(tiny_refiner), middle, second.starting_at(middle.sigma), solver)
    apart = distance(end, reference, "dpm++2m")
    assert apart == pytest.approx(0.122, rel=0.3), f"default is {apart:.2e} from diffusers"


# Heun calls the UNet twice in a step, and diffusers cuts between the two.


@pytest.mark.parametrize(("cut", "error"), [(0.8, 0.0032), (0.2, 0.034)])
def test_heun_is_split_between_steps(cut: float, error: float, tiny_sdxl: Model, theirs: Run, distance: Run) -> None:
    """The base twice, so that there is something to be exact to: the run that was never split."""
    schedule, heun, denoiser = tiny_sdxl.schedule(STEPS, "heun"), tiny_sdxl.solver(STEPS, "heun"), guided(tiny_sdxl)
    at = schedule.index(training_time=cut)
    start, _ = pure_noise(tiny_sdxl, "heun", {})
    whole = denoise(denoiser, start, schedule, heun)
    assert at == cut * STEPS
    assert torch.equal(denoise(denoiser, denoise(denoiser, start, schedule[:at], heun), schedule[at:], heun).x, whole.x)

    unsplit, middle = theirs("heun", {}), theirs("heun", {}, denoising_end=cut)
    split = theirs("heun", {}, middle, refiner=False, denoising_start=cut)
    assert distance(whole, unsplit, "heun") < TOLERANCE
    assert distance(whole, split, "heun") == pytest.approx(error, rel=0.3)

    # What diffusers does: the step to the cut by Euler, and then the same step again, on what that gave.
    astray = denoise(denoiser, denoise(denoiser, start, schedule[: at - 1], heun), schedule[at - 1 : at], Euler())
    assert distance(astray, middle, "heun") < TOLERANCE
    astray = denoise(denoiser, replace(astray, sigma=schedule.sigmas[at - 1]), schedule[at - 1 :], heun)
    assert distance(astray, split, "heun") < TOLERANCE


def test_heun_with_the_refiner(tiny_sdxl: Model, tiny_refiner: Model, theirs: Run, distance: Run) -> None:
    schedule, heun = tiny_sdxl.schedule(STEPS, "heun"), tiny_sdxl.solver(STEPS, "heun")
    before, after = schedule.split(schedule.index(training_time=0.8))
    start, _ = pure_noise(tiny_sdxl, "heun", {})
    middle = denoise(guided(tiny_sdxl), start, before, heun)
    end = denoise(guided(tiny_refiner), middle, after, heun)
    reference = theirs("heun", {}, theirs("heun", {}, denoising_end=0.8), denoising_start=0.8)
    assert distance(end, reference, "heun") == pytest.approx(0.0037, rel=0.3)

    astray = denoise(guided(tiny_sdxl), start, before[:-1], heun)
    astray = denoise(guided(tiny_sdxl), astray, before[-1:], Euler())
    astray = replace(astray, sigma=before.sigmas[-2])
    astray = denoise(guided(tiny_refiner), astray, schedule.starting_at(astray.sigma), heun)
    assert distance(astray, reference, "heun") < TOLERANCE


def test_history_of_one_model_is_carried(tiny_sdxl: Model, theirs: Run, distance: Run) -> None:
    """diffusers forgets it, whichever model goes on; here it is in the latents."""
    name, denoiser = "dpm++2m", guided(tiny_sdxl)
    schedule, solver = tiny_sdxl.schedule(STEPS, name), tiny_sdxl.solver(STEPS, name)
    before, after = schedule.split(schedule.index(training_time=0.2))
    start, _ = pure_noise(tiny_sdxl, name, {})
    middle = denoise(denoiser, start, before, solver)
    assert len(middle.history) == 1
    whole = theirs(name, {})
    split = theirs(name, {}, theirs(name, {}, denoising_end=0.2), refiner=False, denoising_start=0.2)
    assert distance(denoise(denoiser, middle, after, solver), whole, name) < TOLERANCE
    assert distance(denoise(denoiser, handed_on(middle), after, solver), split, name) < TOLERANCE
    assert float((whole - split).abs().max() / whole.abs().max()) == pytest.approx(0.0033, rel=0.3)


def test_another_models_history_is_not(tiny_sdxl: Model, tiny_refiner: Model, theirs: Run, distance: Run) -> None:
    name = "dpm++2m"
    schedule, solver = tiny_sdxl.schedule(STEPS, name), tiny_sdxl.solver(STEPS, name)
    before, after = schedule.split(schedule.index(training_time=0.2))
    start, _ = pure_noise(tiny_sdxl, name, {})
    middle = denoise(guided(tiny_sdxl), start, before, solver)
    reference = theirs(name, {}, theirs(name, {}, denoising_end=0.2), denoising_start=0.2)
    assert distance(denoise(guided(tiny_refiner), handed_on(middle), after, solver), reference, name) < TOLERANCE
    foreign = distance(denoise(guided(tiny_refiner), middle, after, solver), reference, name)
    assert foreign == pytest.approx(0.023, rel=0.3)


# The refiner on levels of its own.


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("euler", {}, 20), ("euler", {}, 33), ("euler", KARRAS, 15), ("dpm++2m", KARRAS, 20), ("heun", {}, 9)],
)
def test_another_schedule_for_the_refiner(
    name: str, options: dict[str, Any], steps: int, tiny_sdxl: Model, tiny_refiner: Model
) -> None:
    """It goes on at the level it is handed, whatever levels it would have had."""
    first = tiny_sdxl.schedule(STEPS)
    start, _ = pure_noise(tiny_sdxl, "euler", {})
    middle = denoise(guided(tiny_sdxl), start, first[: first.index(training_time=0.8)], tiny_sdxl.solver(STEPS))
    own = tiny_refiner.schedule(steps, name, **options)
    after = own.starting_at(middle.sigma)
    assert after.sigmas[0] == middle.sigma
    assert after.sigmas[1:] == tuple(sigma for sigma in own.sigmas if sigma < middle.sigma)
    assert after.timesteps[0] == pytest.approx(first.timesteps[16])
    end = denoise(guided(tiny_refiner), handed_on(middle), after, tiny_refiner.solver(steps, name, **options))
    assert end.is_clean
    # Near the same refiner's answer on the base's levels: another discretisation, not another picture.
    same = denoise(guided(tiny_refiner), handed_on(middle), first[16:], tiny_refiner.solver(STEPS))
    assert (end.x - same.x).abs().max() < 1e-3 * same.x.abs().max()
    with pytest.raises(BadInput, match=r"The latents are at sigma .* but the schedule starts at"):
        denoise(guided(tiny_refiner), middle, own, tiny_refiner.solver(steps, name, **options))


# Where to cut.


def test_numpy_numbers_cut_too(tiny_sdxl: Model, theirs: Run, distance: Run) -> None:
    schedule = tiny_sdxl.schedule(STEPS)
    for cut in (np.float32(0.8), np.float64(0.8)):
        assert schedule.index(training_time=cut) == 16  # type: ignore[arg-type]
    whole = theirs("euler", {})
    assert torch.equal(theirs("euler", {}, denoising_end=np.float32(0.8)), whole)  # does not stop, and does not say so
    start, _ = pure_noise(tiny_sdxl, "euler", {})
    stopped = denoise(guided(tiny_sdxl), start, schedule[:16], tiny_sdxl.solver(STEPS))
    assert distance(stopped, theirs("euler", {}, denoising_end=0.8), "euler") < TOLERANCE
    assert distance(stopped, whole, "euler") == pytest.approx(0.0125, rel=0.3)


@pytest.mark.parametrize("cut", [0.0, 1.0])
def test_a_cut_at_an_end(cut: float, tiny_sdxl: Model, theirs: Run, distance: Run) -> None:
    """Everything lies on one side; diffusers' refiner takes steps of its strength from latents without noise."""
    schedule, solver = tiny_sdxl.schedule(STEPS), tiny_sdxl.solver(STEPS)
    start, _ = pure_noise(tiny_sdxl, "euler", {})
    before, after = schedule.split(schedule.index(training_time=cut))
    assert (len(before), len(after)) == ((20, 0) if cut else (0, 20))
    whole = denoise(guided(tiny_sdxl), start, schedule, solver)
    end = denoise(guided(tiny_sdxl), denoise(guided(tiny_sdxl), start, before, solver), after, solver)
    assert torch.equal(end.x, whole.x)
    given = theirs("euler", {}) if cut else start.x
    apart = distance(end, theirs("euler", {}, given, refiner=False, denoising_start=cut), "euler")
    assert apart == pytest.approx(0.019 if cut else 0.356, rel=0.3)


@pytest.mark.parametrize("cut", [-0.1, 1.2, float("nan"), np.float32(2)])
def test_a_cut_outside(cut: float, tiny_sdxl: Model) -> None:
    with pytest.raises(BadInput, match=r"training_time = .* is outside what is allowed, 0 to 1"):
        tiny_sdxl.schedule(STEPS).index(training_time=cut)
