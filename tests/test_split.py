"""A run stopped anywhere, saved, loaded and continued is bit for bit the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from unrolled.core.denoiser import Denoiser, UNetDenoiser, conditioned
from unrolled.core.latents import Latents, batch
from unrolled.core.loading import Model
from unrolled.core.loop import denoise, steps
from unrolled.core.prediction import Prediction
from unrolled.core.schedule import Schedule
from unrolled.core.solver import Solver
from unrolled.schedulers.config import SOLVERS, read_scheduler
from unrolled.schedulers.faithful import DiffusersPLMS
from unrolled.stages.noise import noise
from unrolled.stages.size import with_size
from unrolled.stages.text import encode_text

STEPS = 12
V = {"prediction_type": "v_prediction"}
TRAILING = {"timestep_spacing": "trailing"}  # 12 does not divide 1000, so that faithful solvers relabel

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ddim", {}, {}),
    ("ddim", {"clip_sample": True}, {}),
    ("ddim", {}, {"eta": 0.7}),
    ("ddim", TRAILING, {"faithful": True}),
    ("ddim", TRAILING | {"clip_sample": True}, {"faithful": True, "eta": 0.5}),
    ("ddpm", {}, {}),
    ("ddpm", {"variance_type": "fixed_large", "clip_sample": True}, {"faithful": True}),
    ("pndm", {}, {}),
    ("pndm", V, {}),
    ("pndm", {"skip_prk_steps": False}, {}),
    ("pndm", TRAILING, {"faithful": True}),
    ("pndm", V, {"faithful": True}),
    ("euler", {"use_karras_sigmas": True}, {}),
    ("euler-ancestral", {}, {}),
    ("heun", {}, {}),
    ("heun", {"clip_sample": True}, {}),
    ("dpm++2m", {}, {}),
    ("dpm++2m", V | {"use_karras_sigmas": True, "solver_type": "heun"}, {}),
    ("dpm++2m", {"solver_order": 1}, {}),
]

Setting = tuple[Denoiser, Latents, Schedule, Solver]


@pytest.fixture
def setting(tiny: Model) -> Callable[..., Setting]:
    def build(
        name: str,
        options: dict[str, Any],
        more: dict[str, Any],
        seeds: tuple[int, ...] = (7,),
        *,
        model: Model = tiny,
        count: int = STEPS,
    ) -> Setting:
        config, cond = read_scheduler(model.scheduler, name, **options), encode_text(model, "a red apple")
        schedule = config.schedule(count)
        cond = with_size(model, cond, 32, 32) if model.system == "sdxl" else cond
        denoiser = conditioned(UNetDenoiser(model.unet, config.kind), cond)
        return denoiser, noise(model, schedule, 32, 32, seeds), schedule, config.solver(count, **more)

    return build


@pytest.mark.parametrize(("name", "options", "more"), CASES)
def test_split_anywhere(
    name: str, options: dict[str, Any], more: dict[str, Any], setting: Callable[..., Setting], tmp_path: Path
) -> None:
    denoiser, start, schedule, solver = setting(name, options, more)
    whole = [start, *(step.latents for step in steps(denoiser, start, schedule, solver))]
    assert len(whole) == STEPS + 1
    for at, stopped in enumerate(whole):
        stopped.save(tmp_path / "latents")
        loaded = Latents.load(tmp_path / "latents")
        assert (loaded.sigma, loaded.seeds) == (schedule.sigmas[at], (7,))
        end = denoise(denoiser, loaded, schedule[at:], solver)
        assert torch.equal(end.x, whole[-1].x), f"split at {at} of {STEPS}"
    before, _ = schedule.split(5)
    assert torch.equal(denoise(denoiser, start, before, solver).x, whole[5].x)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("unclip", "edm-euler")])
def test_one_sdxl_model_as_base_and_refiner(name: str, tiny_sdxl: Model, setting: Callable[..., Setting]) -> None:
    """Handed on at every step by its noise level alone, as ``start = "handoff"`` does.

    That one step gives the same bits and the same memories is enough: the next starts from them.
    """
    denoiser, start, schedule, solver = setting(name, {}, {}, model=tiny_sdxl, count=20)
    whole = [start, *(step.latents for step in steps(denoiser, start, schedule, solver))]
    assert len(whole) == len(schedule) + 1
    for at, (stopped, following) in enumerate(pairwise(whole)):
        after = schedule.starting_at(stopped.sigma)
        assert after == schedule[at:]
        on = denoise(denoiser, stopped, after[:1], solver)
        assert torch.equal(on.x, following.x), f"split at {at} of {len(schedule)}"
        assert len(on.history) == len(following.history)
        for mine, theirs in zip(on.history, following.history, strict=True):
            assert mine.sigma == theirs.sigma
            assert torch.equal(mine.x, theirs.x)
            assert torch.equal(mine.x0, theirs.x0)
    stopped = whole[len(schedule) * 4 // 5]
    assert torch.equal(denoise(denoiser, stopped, schedule.starting_at(stopped.sigma), solver).x, whole[-1].x)


@pytest.mark.parametrize(("name", "options", "more"), [case for case in CASES if case[0] in ("pndm", "dpm++2m")])
def test_history_matters(name: str, options: dict[str, Any], more: dict[str, Any], setting: Callable[..., Setting]) -> None:
    """Without what a multistep solver remembers the continued run is another one, which shows that it is carried."""
    denoiser, start, schedule, solver = setting(name, options, more)
    before, after = schedule.split(6)
    stopped = denoise(denoiser, start, before, solver)
    forgotten = Latents(stopped.x, stopped.space, stopped.sigma, stopped.seeds)
    same = torch.equal(denoise(denoiser, forgotten, after, solver).x, denoise(denoiser, start, schedule, solver).x)
    assert same == (options.get("solver_order") == 1), "only a first-order solver remembers nothing"


@pytest.mark.parametrize("at", range(STEPS))
def test_break_and_go_on(at: int, setting: Callable[..., Setting]) -> None:
    denoiser, start, schedule, solver = setting("dpm++2m", {}, {})
    for step in steps(denoiser, start, schedule, solver):
        if step.index == at:
            break
    whole = denoise(denoiser, start, schedule, solver)
    assert torch.equal(denoise(denoiser, step.latents, schedule[at + 1 :], solver).x, whole.x)


@pytest.mark.parametrize("index", [0, 1, 2, 6])
def test_split_of_diffusers_image_to_image_start(index: int, setting: Callable[..., Setting]) -> None:
    denoiser, start, schedule, solver = setting("pndm", {}, {"faithful": True})
    assert isinstance(solver, DiffusersPLMS)
    schedule, solver = solver.started_at(schedule, index)
    start = Latents(start.x, start.space, schedule.sigmas[0], start.seeds)
    whole = denoise(denoiser, start, schedule, solver)
    for at in range(len(schedule) + 1):
        before, after = schedule.split(at)
        assert torch.equal(denoise(denoiser, denoise(denoiser, start, before, solver), after, solver).x, whole.x)


STOCHASTIC: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ddim", {}, {"eta": 0.7}),
    ("ddpm", {}, {}),
    ("euler-ancestral", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "more"), [*STOCHASTIC, ("pndm", {}, {}), ("dpm++2m", {}, {})])
def test_an_image_does_not_depend_on_its_batch(
    name: str, options: dict[str, Any], more: dict[str, Any], setting: Callable[..., Setting]
) -> None:
    """The noise is bit for bit the same; the UNet's sums may round otherwise in a larger batch."""
    denoiser, three, schedule, solver = setting(name, options, more, (1, 2, 3))
    together = denoise(denoiser, three, schedule, solver)
    for i, seed in enumerate((1, 2, 3)):
        _, alone, _, _ = setting(name, options, more, (seed,))
        assert torch.equal(alone.x, three.x[i : i + 1])
        x = denoise(denoiser, alone, schedule, solver).x
        assert torch.allclose(x, together.x[i : i + 1], rtol=0, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize(("name", "options", "more"), STOCHASTIC)
def test_batch_split_and_joined_in_the_middle(
    name: str, options: dict[str, Any], more: dict[str, Any], setting: Callable[..., Setting]
) -> None:
    """With a denoiser that treats images alone, cutting the batch in the middle of the run changes no bit."""
    _, three, schedule, solver = setting(name, options, more, (1, 2, 3))

    def denoiser(x: torch.Tensor, sigma: float, timestep: float) -> Prediction:
        return Prediction.from_x0(x / (1.0 + sigma**2), x, sigma)

    whole = denoise(denoiser, three, schedule, solver)
    before, after = schedule.split(5)
    stopped = denoise(denoiser, three, before, solver)
    parts = [denoise(denoiser, stopped[part], after, solver) for part in (slice(0, 1), slice(1, 3))]
    assert torch.equal(batch(parts).x, whole.x)


@pytest.mark.parametrize(("name", "options", "more"), STOCHASTIC)
def test_stochastic_solvers_draw_other_noise_at_every_step_and_seed(
    name: str, options: dict[str, Any], more: dict[str, Any], setting: Callable[..., Setting]
) -> None:
    denoiser, start, schedule, solver = setting(name, options, more)
    whole = denoise(denoiser, start, schedule, solver)
    other = Latents(start.x, start.space, start.sigma, (8,))
    assert not torch.equal(denoise(denoiser, other, schedule, solver).x, whole.x)
    # A second half that did not know its place in the run would draw the first half's noise again.
    before, after = schedule.split(6)
    stopped = denoise(denoiser, start, before, solver)
    astray = Schedule(after.sigmas, after.timesteps, after.training_sigmas)
    assert not torch.equal(denoise(denoiser, stopped, astray, solver).x, whole.x)
