"""The planned noise levels of one run: floats on the CPU, no hidden index."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .errors import BadInput


@dataclass(frozen=True, repr=False)
class Schedule:
    """Noise levels ``sigmas[0] > ... > sigmas[n]`` of ``n`` steps.

    Args:
        sigmas: n + 1 levels, falling; the last one may be 0.
        timesteps: n training timesteps, what the UNet is told at each of the first n levels.
        training_sigmas: the level of every training timestep, rising; for levels between the planned. Where the network is
            told noise levels, the lowest and the highest will do.
        start_std: standard deviation of pure noise at the first level. ``sigmas[0]`` adds it to
            nothing; ``sqrt(1 + sigmas[0]^2)`` is what variance-preserving samplers start from.
        first: index of the first step in the run it was cut from, so that a continued run draws
            the noise of its own steps.
        last_timestep: what the UNet is told at the last level, for solvers that evaluate there; known
            where a longer schedule was cut.
        end: the last level of the run it was cut from; latents there are finished.
        inside: ``(sigma, timestep)`` of levels between the planned that a solver evaluates at, where they are not to be
            interpolated.
        continuous: whether the UNet is told ``ln(sigma) / 4`` everywhere, instead of training timesteps.
        origin: where it came from, for people.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    training_sigmas: tuple[float, ...] = ()
    start_std: float | None = None
    first: int = 0
    last_timestep: float | None = None
    end: float | None = None
    inside: tuple[tuple[float, float], ...] = ()
    continuous: bool = False
    origin: str = "custom"

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise BadInput(
                f"A schedule of {len(self.timesteps)} timesteps needs one sigma more than that, got {len(self.sigmas)}."
            )
        if any(not a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)) or self.sigmas[-1] < 0:
            raise BadInput(f"The sigmas of a schedule must fall strictly and end at 0 or above, got {_brief(self.sigmas)}.")

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    def __repr__(self) -> str:
        return (
            f"Schedule({len(self)} steps, sigmas {_brief(self.sigmas)}, timesteps {_brief(self.timesteps)}, {self.origin})"
        )

    def __getitem__(self, part: slice) -> Schedule:
        """Some of the steps; neighbouring parts share their boundary sigma."""
        start, stop, stride = part.indices(len(self))
        if stride != 1 or stop < start:
            raise BadInput(f"A schedule can be cut to a run of steps, not to [{part.start}:{part.stop}:{part.step}].")
        std = self.start_std if start == 0 else None
        return replace(
            self,
            sigmas=self.sigmas[start : stop + 1],
            timesteps=self.timesteps[start:stop],
            start_std=std,
            first=self.first + start,
            last_timestep=self.timesteps[stop] if stop < len(self) else self.last_timestep,
            end=self.finished_at,
        )

    def split(self, index: int) -> tuple[Schedule, Schedule]:
        """Two schedules that share their boundary sigma; :meth:`index` gives other ways to say where."""
        return self[:index], self[index:]

    def index(
        self,
        *,
        step: int | None = None,
        steps_fraction: float | None = None,
        sigma: float | None = None,
        training_time: float | None = None,
    ) -> int:
        """How many steps lie before a cut given in exactly one way.

        Args:
            step: so many steps.
            steps_fraction: that part of the steps, 0 to 1, to the nearest step.
            sigma: the steps that start above this noise level.
            training_time: that part of *training* time, 0 to 1, as diffusers' ``denoising_end``: the
                steps whose timestep is at least ``round(T - training_time * T)``.

        Raises:
            BadInput: none or several ways were given, or the value is out of range.
        """
        given = {
            name: value
            for name, value in [
                ("step", step),
                ("steps_fraction", steps_fraction),
                ("sigma", sigma),
                ("training_time", training_time),
            ]
            if value is not None
        }
        if len(given) != 1:
            ways = "step, steps_fraction, sigma or training_time"
            raise BadInput(f"A cut is given in exactly one way ({ways}), got {sorted(given) or 'none'}.")
        (name, value), high = next(iter(given.items())), len(self)
        if name == "step":
            _within(name, value, 0, high)
            return int(value)
        if name == "sigma":
            _within(name, value, 0.0, math.inf)
            return sum(s > value for s in self.sigmas[:-1])
        _within(name, value, 0.0, 1.0)
        if name == "steps_fraction":
            return round(value * high)
        if len(self.training_sigmas) <= 2:
            raise BadInput("This schedule does not know its training timesteps: cut it by step, steps_fraction or sigma.")
        total = len(self.training_sigmas)
        cutoff = round(total - value * total)
        times = [timestep_of(s, self.training_sigmas) for s in self.sigmas[:-1]] if self.continuous else self.timesteps
        return sum(t >= cutoff for t in times)

    def starting_at(self, sigma: float) -> Schedule:
        """What is left of the run below a noise level, which need not be one of its own.

        A level within 1e-4 of ``sigma`` is taken to be it; else ``sigma`` joins the levels below it.

        Raises:
            BadInput: ``sigma`` is not above the last level.
        """
        if not sigma > self.sigmas[-1]:
            raise BadInput(f"Nothing is left of {self} below sigma {sigma:.4g}.")
        same = (i for i, level in enumerate(self.sigmas[:-1]) if abs(level - sigma) <= 1e-4 * sigma)
        if (index := next(same, None)) is not None:
            return self[index:]
        below = self[sum(level > sigma for level in self.sigmas[:-1]) :]
        timesteps = (self.timestep_at(sigma), *below.timesteps)
        first = max(0, below.first - 1)  # what is left of the step that would have crossed sigma, not one more
        return replace(below, sigmas=(sigma, *below.sigmas), timesteps=timesteps, start_std=None, first=first)

    @property
    def finished_at(self) -> float:
        """Where latents are finished: at the whole run's last level, unless that is above the lowest training noise."""
        end = self.sigmas[-1] if self.end is None else self.end
        return end if self.training_sigmas and end <= self.training_sigmas[0] else 0.0

    @classmethod
    def at(cls, sigmas: Sequence[float], training_sigmas: tuple[float, ...] = ()) -> Schedule:
        """A schedule of your own noise levels; the UNet is told the timesteps of ``training_sigmas`` at each.

        Without them it is for denoisers with a closed form, which look at sigma alone.
        """
        levels = tuple(float(sigma) for sigma in sigmas)
        return cls(levels, tuple(timestep_of(sigma, training_sigmas) for sigma in levels[:-1]), training_sigmas)

    def timestep_at(self, sigma: float) -> float:
        """The training timestep the UNet is told at ``sigma``: the planned one, else by log-sigma between neighbours."""
        planned = self._timestep_of.get(sigma)
        if planned is None and self.continuous:
            return 0.25 * math.log(sigma)
        return timestep_of(sigma, self.training_sigmas) if planned is None else planned

    @cached_property
    def _timestep_of(self) -> dict[float, float]:
        known = dict(self.inside) | dict(zip(self.sigmas, self.timesteps, strict=False))
        return known if self.last_timestep is None else known | {self.sigmas[-1]: self.last_timestep}


def timestep_of(sigma: float, training_sigmas: tuple[float, ...]) -> float:
    """Log-linear interpolation of the training timestep at ``sigma``; clamped to the table; NaN without one."""
    if not training_sigmas:
        return math.nan
    low = bisect_right(training_sigmas, sigma) - 1
    if low < 0:
        return 0.0
    if low >= len(training_sigmas) - 1:
        return float(len(training_sigmas) - 1)
    if training_sigmas[low] == sigma:
        return float(low)
    a, b = math.log(training_sigmas[low]), math.log(training_sigmas[low + 1])
    return low + (math.log(sigma) - a) / (b - a)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"A cut at {name} = {value:g} is outside what is allowed, {low:g} to {high:g}.")


def _brief(values: tuple[float, ...]) -> str:
    shown = [f"{v:.4g}" for v in values]
    return " ".join(shown if len(shown) <= 6 else [*shown[:2], "…", *shown[-2:]])
