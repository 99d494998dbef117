"""What a denoising stage will run: its schedule, cut to the steps it runs, its solver, its guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import BadInput
from ..core.guidance import GuidanceScale, per_step, within
from ..core.schedule import Schedule
from ..core.solver import Solver
from ..schedulers.classes import SchedulerConfig
from ..schedulers.config import read_scheduler
from ..schedulers.faithful import DiffusersPLMS
from ..stages.noise import start_step
from .chain import Cut, Denoising, ImageToImage, Inpaint


@dataclass(frozen=True)
class Run:
    """The schedule and solver of one stage, cut to the steps it runs; ``whole`` is uncut."""

    whole: Schedule
    schedule: Schedule
    solver: Solver
    config: SchedulerConfig


def plan_run(spec: Denoising, scheduler: Mapping[str, object], handed: float | None = None) -> Run:
    """What a stage will run, from its options and the checkpoint's scheduler config alone.

    Args:
        spec: with its defaults filled in.
        handed: the noise level of the latents it is handed, if it goes on from noisy ones.

    Raises:
        BadInput: strength, cuts or steps leave nothing to run; BadModel: options not honoured.
    """
    config = read_scheduler(scheduler, spec.solver, **spec.scheduler)
    whole, solver = config.sampling(
        spec.steps,
        spacing=spec.spacing,
        sigmas=spec.sigmas,
        timesteps=spec.timesteps,
        eta=spec.eta,
        faithful=spec.faithful,
    )
    if handed is not None:
        schedule = _continued(spec, whole, handed)
    else:
        first = first_step(spec, whole)
        schedule = whole[first:]
        if first and spec.faithful and isinstance(solver, DiffusersPLMS):
            schedule, solver = solver.started_at(whole, first)
    if spec.stop is not None:
        end = whole.sigmas[whole.index(**spec.stop.given())]  # type: ignore[arg-type]
        schedule = schedule[: sum(sigma > end for sigma in schedule.sigmas[:-1])]
    if not len(schedule):
        raise BadInput("it has no step to run: it would start where it is to stop, or below.")
    return Run(whole, schedule, solver, config)


def _continued(spec: Denoising, whole: Schedule, handed: float) -> Schedule:
    """What is left of a run whose first part somebody else ran."""
    if not isinstance(spec, ImageToImage) or not isinstance(spec.start, Cut):
        return whole.starting_at(handed)
    index = whole.index(**spec.start.given())  # type: ignore[arg-type]
    sigma = whole.sigmas[index]
    if abs(sigma - handed) > 1e-4 * handed:
        raise BadInput(
            f"it is handed latents at sigma {handed:.4g} but starts at {sigma:.4g}: stop the stage before where this one "
            'starts, or say start = "handoff" to go on from wherever it stopped.'
        )
    return whole[index:]


def first_step(spec: Denoising, whole: Schedule) -> int:
    """The first step a stage runs: by its strength, or its first_step."""
    if not isinstance(spec, ImageToImage | Inpaint):
        return 0
    if spec.first_step is not None:
        if spec.first_step >= len(whole):
            raise BadInput(f"first_step goes from 0 to {len(whole) - 1} here, got {spec.first_step}.")
        return spec.first_step
    return start_step(len(whole), 1.0 if spec.strength is None else spec.strength, faithful=spec.faithful)


def guidance_scale(spec: Denoising, whole: Schedule) -> GuidanceScale:
    """One scale, or one per step of the whole schedule."""
    given = 1.0 if spec.guidance_scale is None else spec.guidance_scale
    if spec.guidance_interval is None and not isinstance(given, list):
        return given
    at = per_step(whole, given if isinstance(given, list) else [given] * len(whole))
    if spec.guidance_interval is None:
        return at
    inside = within(whole, *spec.guidance_interval, guidance_scale=math.inf)
    return lambda sigma: min(at(sigma), inside(sigma))
