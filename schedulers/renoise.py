"""Solvers that go below the next level and come back up with new noise: ancestral, consistency and TCD sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from ..core.errors import BadInput
from ..core.schedule import timestep_of
from ..core.solver import Draw, Evaluate, History, Solver
from .euler import Euler, ancestral_noise, require_eta


class Down(Protocol):
    """``(sigma, sigma_next) -> sigma_down``, at most ``sigma_next``: how far a step goes before noise is added."""

    def __call__(self, sigma: float, sigma_next: float, /) -> float:
        """The level."""
        ...


@dataclass(frozen=True)
class Renoised:
    """``solver`` taken to ``down(sigma, sigma_next)`` and from there to ``sigma_next`` by new noise.

    ``Renoised(Euler(), Ancestral(1))`` is ancestral Euler and DDPM, ``Renoised(Euler(), ToZero())`` consistency sampling.
    """

    solver: Solver
    down: Down

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; the inner solver's history."""
        down = min(self.down(sigma, sigma_next), sigma_next)
        x, history = self.solver(denoise, x, sigma, down, history, noise)
        if down < sigma_next:
            x = x.add(noise(sigma, sigma_next), alpha=math.sqrt(sigma_next**2 - down**2))
        return x, history


@dataclass(frozen=True)
class Ancestral:
    """So far that with eta 1 the noise is the posterior's (Ho et al., arXiv:2006.11239, eq. 7); eta 0 adds none."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        require_eta(self.eta)

    def __call__(self, sigma: float, sigma_next: float, /) -> float:
        """The level."""
        up = ancestral_noise(sigma, sigma_next, self.eta)
        return math.sqrt(sigma_next**2 - up**2)


@dataclass(frozen=True)
class ToZero:
    """All the way to the clean estimate."""

    def __call__(self, sigma: float, sigma_next: float, /) -> float:
        """0."""
        return 0.0


@dataclass(frozen=True)
class Strategic:
    """To the level of ``1 - gamma`` of the next timestep (Zheng et al., arXiv:2402.19159, alg. 4)."""

    gamma: float
    training_sigmas: tuple[float, ...] = field(repr=False)

    def __call__(self, sigma: float, sigma_next: float, /) -> float:
        """The level."""
        timestep = timestep_of(sigma_next, self.training_sigmas)
        # Rounding must not turn a whole timestep into the one below.
        return self.training_sigmas[math.floor((1.0 - self.gamma) * round(timestep, 6) + 1e-6)] if timestep else sigma_next


SolverT = TypeVar("SolverT", bound=Solver)


def ancestral(solver: SolverT, eta: float = 1.0) -> SolverT | Renoised:
    """The solver with ancestral noise, or as it is with ``eta`` 0.

    Raises:
        BadInput: eta is out of range.
    """
    require_eta(eta)
    return Renoised(solver, Ancestral(eta)) if eta else solver


def TCD(gamma: float, training_sigmas: tuple[float, ...]) -> Renoised:  # noqa: N802
    """Trajectory consistency sampling (Zheng et al., arXiv:2402.19159, alg. 4), diffusers' ``TCDScheduler``.

    Args:
        gamma: 0 (deterministic) to 1 (consistency sampling); diffusers' ``eta``, 0.3 by default there.
        training_sigmas: the level of every training timestep.

    Raises:
        BadInput: gamma is out of range.
    """
    if not 0.0 <= gamma <= 1.0:
        raise BadInput(f"TCD's gamma goes from 0 (deterministic) to 1 (new noise in every step), got {gamma:g}.")
    return Renoised(Euler(), Strategic(gamma, training_sigmas))


@dataclass(frozen=True)
class LCM:
    """Latent consistency sampling (Luo et al., arXiv:2310.04378, alg. 3): to the clean estimate, and all noise anew.

    What ``Renoised(Euler(), ToZero())`` does with ``c_out x0 + c_skip x``, which is x itself at timestep 0 (Song et al.,
    arXiv:2303.01469, eq. 5).

    Args:
        training_sigmas: the level of every training timestep.
        timestep_scaling: of the timestep in that boundary condition.
    """

    training_sigmas: tuple[float, ...] = field(repr=False)
    timestep_scaling: float = 10.0

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        prediction = denoise(x, sigma)
        scaled = self.timestep_scaling * timestep_of(sigma, self.training_sigmas)
        total = scaled**2 + 0.5**2
        skip = 0.5**2 / total / math.sqrt(1.0 + sigma**2)  # of the variance-preserving x
        x = (prediction.x0 * (scaled / math.sqrt(total))).add_(prediction.x, alpha=skip)
        return x.add_(noise(sigma, sigma_next), alpha=sigma_next) if sigma_next else x, ()
