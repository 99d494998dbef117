"""The denoising loop: a generator whose yielded step *is* the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import BadInput, NonFinite
from .latents import Latents
from .noise import Noise, NoiseSource
from .prediction import Prediction
from .schedule import Schedule
from .solver import History, Solver


@dataclass(frozen=True)
class Point:
    """Where a run stands between two steps: all that going on from there takes.

    Args:
        latents: with what the solver remembers.
        step: the index of the step that comes next, in the whole run.
    """

    latents: Latents
    step: int

    def to(self, device: torch.device | str) -> Point:
        """Moved to a device."""
        return replace(self, latents=self.latents.to(device))

    def rest(self, schedule: Schedule) -> Schedule:
        """What is left of the schedule that the run is on; of another one, what lies below this noise level."""
        left, sigma = schedule[max(0, self.step - schedule.first) :], self.latents.sigma
        return left if abs(left.sigmas[0] - sigma) <= 1e-4 * sigma else schedule.starting_at(sigma)


@dataclass
class Step:
    """The record of one step, and the only mutable value: edit ``x`` and the run goes on from there.

    Args:
        index: of this step in the whole run; ``total`` steps end it.
        sigma, sigma_next, timestep: noise level before and after, and what the UNet was told.
        before: x at sigma.
        x: x at sigma_next; set it to change the run.
        history: what the solver remembers; set it to () to make the solver start afresh.
        predictions: every call of the denoiser in this step, in order.
        start: the latents the run began with: space, seeds.
        end: the level at which the whole run's latents are finished.
        seconds: how long the step took on the clock.
        stop: set it to end the run cleanly after this step.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    timestep: float
    before: Tensor
    x: Tensor
    history: History
    start: Latents
    end: float = 0.0
    predictions: list[Prediction] = field(default_factory=list)
    seconds: float = 0.0
    stop: bool = False

    def __repr__(self) -> str:
        return (
            f"Step({self.index + 1}/{self.total}, sigma {self.sigma:.4g} -> {self.sigma_next:.4g}, "
            f"timestep {self.timestep:.4g}, {len(self.predictions)} evaluations)"
        )

    @property
    def prediction(self) -> Prediction:
        """The prediction at ``before``."""
        return self.predictions[0]

    @property
    def x0(self) -> Tensor:
        """The estimate of the clean latents at ``before``."""
        return self.prediction.x0

    @property
    def latents(self) -> Latents:
        """Where the run stands, ready to be saved, decoded (at the end) or handed on."""
        return replace(self.start, x=self.x, sigma=self.sigma_next, history=self.history, end=self.end)

    @property
    def point(self) -> Point:
        """Where the run stands now."""
        return Point(self.latents, self.index + 1)

    @property
    def preview(self) -> Latents:
        """The x0 estimate as clean latents, ready to be decoded at any step."""
        return replace(self.start, x=self.x0, sigma=0.0, history=())


def steps(
    denoiser: Denoiser, latents: Latents, schedule: Schedule, solver: Solver, noise: NoiseSource | None = None
) -> Iterator[Step]:
    """Denoise ``latents`` along ``schedule``, yielding every step.

    ``break`` out at any time: ``step.latents`` knows its sigma and goes on later with
    ``steps(denoiser, step.latents, schedule[k:], solver)``, bit for bit as if never stopped.

    Args:
        latents: at the schedule's first sigma.
        noise: for solvers that draw; by default the latents' own seeds.

    Raises:
        BadInput: the latents are at another noise level than the schedule starts from.
        NonFinite: NaN or infinity appeared in x; on the CPU in that step, elsewhere when the run ends,
            because looking at each step would make it wait for the device.
    """
    _require_same_level(latents, schedule)
    source = noise if noise is not None else Noise(latents.seeds, latents.stream)
    x, history, finite = latents.x, latents.history, list[Tensor]()
    for i, (sigma, sigma_next) in enumerate(pairwise(schedule.sigmas)):
        index, predictions, draws, began = schedule.first + i, list[Prediction](), count(), time.perf_counter()

        def denoise(x: Tensor, sigma: float, log: list[Prediction] = predictions) -> Prediction:
            log.append(denoiser(x, sigma, schedule.timestep_at(sigma)))
            return log[-1]

        def draw(high: float, low: float, like: Tensor = x, index: int = index, draws: Iterator[int] = draws) -> Tensor:
            return source(like.shape, "step", index, next(draws), (high, low)).to(like)

        with torch.no_grad():
            x_next, history = solver(denoise, x, sigma, sigma_next, history, draw)
            x_next = x_next.contiguous()  # however x lies in memory: sums over it come out to the bit, saved and read too
        finite.append(torch.isfinite(x_next).all())
        if x.device.type == "cpu":
            _require_finite(finite, schedule)
        step = Step(
            index=index,
            total=schedule.first + len(schedule),
            sigma=sigma,
            sigma_next=sigma_next,
            timestep=schedule.timesteps[i],
            before=x,
            x=x_next,
            history=history,
            start=latents,
            end=schedule.finished_at,
            predictions=predictions,
            seconds=time.perf_counter() - began,
        )
        yield step
        x, history = step.x, step.history
        if step.stop:
            break
    _require_finite(finite, schedule)


def denoise(
    denoiser: Denoiser,
    latents: Latents,
    schedule: Schedule,
    solver: Solver,
    hooks: Iterable[Callable[[Step], object]] = (),
    noise: NoiseSource | None = None,
) -> Latents:
    """Drain :func:`steps`: every hook sees every step and may edit or stop it. Arguments as there."""
    hooks = tuple(hooks)
    for step in steps(denoiser, latents, schedule, solver, noise):
        for hook in hooks:
            hook(step)
        latents = step.latents
    return latents


def _require_same_level(latents: Latents, schedule: Schedule) -> None:
    if schedule and abs(latents.sigma - schedule.sigmas[0]) > 1e-4 * schedule.sigmas[0]:
        raise BadInput(
            f"The latents are at sigma {latents.sigma:.4g} but the schedule starts at {schedule.sigmas[0]:.4g}: "
            "cut the schedule there (schedule.starting_at(latents.sigma)) or add noise to that level."
        )


def _require_finite(flags: list[Tensor], schedule: Schedule) -> None:
    if flags and not all(flags[-1:] if flags[-1].device.type == "cpu" else flags):
        bad = next(i for i, flag in enumerate(flags) if not flag)
        raise NonFinite(
            f"NaN or infinity appeared in step {schedule.first + bad + 1} of {schedule.first + len(schedule)} "
            f"(sigma {schedule.sigmas[bad]:.4g}): run in float32 or bfloat16, or lower the guidance scale."
        )
