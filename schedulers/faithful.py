"""diffusers' DDIM and PNDM as they are, where they depart from their own timesteps.

Both step to ``t - T // steps`` instead of to the next timestep they evaluate at, so that with spacings
whose stride is another the UNet is told a noise level that x is not at. PNDM sliced for image-to-image
loses its doubled timestep and shifts by one, and with v prediction extrapolates v instead of the
noise. The plain solvers do none of this; these exist to measure the difference, and for parity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.prediction import Kind, Prediction
from ..core.schedule import Schedule
from ..core.solver import Draw, Evaluate, History, Past, Solver
from .clip import clip
from .euler import Euler
from .pndm import extrapolated


def _relabel(x: Tensor, at: float, told: float) -> Tensor:
    """``x`` at one sigma as diffusers reads it at another: the variance-preserving state stays as it is."""
    return x if at == told else x * math.sqrt((1 + told**2) / (1 + at**2))


def _landing(timestep: int, ratio: int, training_sigmas: tuple[float, ...], last: float) -> float:
    return training_sigmas[timestep - ratio] if timestep >= ratio else last


@dataclass(frozen=True)
class DiffusersDDIM:
    """DDIM that lands ``ratio`` training timesteps on, whatever the next timestep is."""

    eta: float
    training_sigmas: tuple[float, ...]
    ratio: int
    last_sigma: float
    clip_limit: float | None = None

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        landing = _landing(self.training_sigmas.index(sigma), self.ratio, self.training_sigmas, self.last_sigma)

        def seen(x: Tensor, sigma: float) -> Prediction:
            prediction = denoise(x, sigma)
            return clip(prediction, self.clip_limit, keep_eps=True) if self.clip_limit else prediction

        x, history = Euler(self.eta)(seen, x, sigma, landing, history, noise)
        return _relabel(x, landing, sigma_next), history


@dataclass(frozen=True)
class DiffusersNoiseAtEnd:
    """DDPM with large variance, which adds noise in the step to 0 too unless that starts at timestep 0.

    The paper adds none there (Ho et al., arXiv:2006.11239, alg. 2, line 3).
    """

    solver: Solver
    lowest_sigma: float

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x by the inner solver."""
        x, history = self.solver(denoise, x, sigma, sigma_next, history, noise)
        if not sigma_next and sigma > self.lowest_sigma:
            x = x.add(noise(sigma, sigma_next), alpha=sigma / math.sqrt(1 + sigma**2))
        return x, history


@dataclass(frozen=True)
class DiffusersPLMS:
    """PLMS with diffusers' own timestep arithmetic.

    ``second_sigma`` is what the second evaluation of the first step is told; by default the first
    step's end, which is right for a run from its beginning (see :meth:`started_at`).
    """

    training_sigmas: tuple[float, ...]
    ratio: int
    last_sigma: float
    kind: Kind = "epsilon"
    second_sigma: float | None = None

    def started_at(self, schedule: Schedule, index: int) -> tuple[Schedule, DiffusersPLMS]:
        """diffusers' image-to-image start: the list with the doubled timestep is cut, and its second entry
        is spent in the first step, whether it is the double or not.
        """
        evaluated = [schedule.sigmas[0], *schedule.sigmas[1:2], *schedule.sigmas[1:-1]][index:]
        left = (evaluated[0], *evaluated[2:], schedule.sigmas[-1])
        timesteps = tuple(schedule.timestep_at(sigma) for sigma in left[:-1])
        std = schedule.start_std if index == 0 else None
        cut = replace(schedule, sigmas=left, timesteps=timesteps, first=index, start_std=std)
        return cut, replace(self, second_sigma=evaluated[1])

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; remembers three points."""
        here = denoise(x, sigma)
        history_next = (*history[-2:], Past(sigma, here.x, here.x0))
        timestep = self.training_sigmas.index(sigma)
        landing = _landing(timestep, self.ratio, self.training_sigmas, self.last_sigma)
        if history:
            out = extrapolated(here.out, [self._out(past) for past in history])
            return self._move(out, x, sigma, landing, sigma_next), history_next
        euler = self._move(here.out, x, sigma, landing, landing)
        second = self.second_sigma or sigma_next
        if second == self.last_sigma:
            return _relabel(euler, landing, sigma_next), history_next
        there = denoise(_relabel(euler, landing, second), second)
        start = self.training_sigmas[self.training_sigmas.index(second) + self.ratio]
        return self._move((here.out + there.out) / 2, _relabel(x, sigma, start), start, second, sigma_next), history_next

    def _move(self, out: Tensor, x: Tensor, sigma: float, landing: float, told: float) -> Tensor:
        eps = Prediction(out, x, sigma, self.kind).eps
        return _relabel(x.add(eps, alpha=landing - sigma), landing, told)

    def _out(self, past: Past) -> Tensor:
        if self.kind == "epsilon":
            return past.eps
        return (past.eps - past.sigma * past.x0) / math.sqrt(1 + past.sigma**2)
