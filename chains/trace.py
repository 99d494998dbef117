"""What a chain will evaluate, step by step, found by running its solvers on nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.latents import Latents, LatentSpace
from ..core.loop import Step, steps
from ..core.noise import NoiseSource
from ..core.prediction import Prediction
from ..core.schedule import Schedule
from ..core.solver import History, Solver

if TYPE_CHECKING:
    from .plan import StagePlan

PIXEL = LatentSpace("none", channels=1, downscale=1, scaling=1.0, fingerprint="")
"""The latent space of no model."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of a chain that has not run yet.

    Args:
        index: in the whole chain, from 0.
        stage: its name.
        repetition: how often the stage has run before (``repeat``).
        step: in the stage's own schedule, from 0; strength and handoffs leave out the first ones.
        timestep: what the UNet is told at ``sigma``.
        sigma, sigma_next: the noise level before and after.
        evaluated: the noise level at every evaluation of the UNet, in order: Heun's second lies at ``sigma_next``.
        remembered: how many earlier points the solver has to go by.
        guidance_scale: at ``sigma``; 1 or below is no guidance.
    """

    index: int
    stage: str
    repetition: int
    step: int
    timestep: float
    sigma: float
    sigma_next: float
    evaluated: tuple[float, ...]
    remembered: int
    guidance_scale: float


def trace(schedule: Schedule, solver: Solver, history: History = ()) -> list[Step]:
    """The steps of a run of a solver, anybody's, on a network that says nothing; the loop's own records of them.

    Args:
        history: what the solver remembers of the part before, where this is the rest of a run.
    """
    return _run(schedule, solver, history, lambda shape, *_: torch.zeros(list(shape)))


def draws(schedule: Schedule, solver: Solver) -> bool:
    """Whether a solver asks for noise anywhere along a schedule."""
    drawn = list[int]()

    def zeros(
        shape: Sequence[int], purpose: str, step: int = 0, draw: int = 0, levels: tuple[float, float] | None = None
    ) -> Tensor:
        drawn.append(step)
        return torch.zeros(list(shape))

    _run(schedule, solver, (), zeros)
    return bool(drawn)


def _run(schedule: Schedule, solver: Solver, history: History, noise: NoiseSource) -> list[Step]:
    def nothing(x: Tensor, sigma: float, timestep: float) -> Prediction:
        # Some solvers take the variance from the network too.
        return replace(Prediction.from_x0(torch.zeros_like(x), x, sigma), variance=torch.zeros_like(x))

    start = Latents(torch.zeros(1, 1, 1, 1), PIXEL, schedule.sigmas[0], seeds=(0,), history=history)
    return list(steps(nothing, start, schedule, solver, noise))


def planned_steps(plans: Sequence[StagePlan]) -> list[PlannedStep]:
    """Every step of a chain in order, as :func:`unrolled.chains.plan.plan` planned it."""
    found = list[PlannedStep]()
    for plan in plans:
        for repetition in range(plan.repeats):
            remembered = len(plan.history)
            for step in plan.trace:
                found.append(
                    PlannedStep(
                        index=len(found),
                        stage=plan.stage.name,
                        repetition=repetition,
                        step=step.index,
                        timestep=step.timestep,
                        sigma=step.sigma,
                        sigma_next=step.sigma_next,
                        evaluated=tuple(prediction.sigma for prediction in step.predictions),
                        remembered=remembered,
                        guidance_scale=plan.guidance_at(step.sigma),
                    )
                )
                remembered = len(step.history)
    return found
