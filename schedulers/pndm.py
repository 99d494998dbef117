"""Pseudo-numerical methods: Adams–Bashforth on the noise estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..core.schedule import timestep_of
from ..core.solver import Draw, Evaluate, History, Past
from .adams import ADAMS_BASHFORTH


@dataclass(frozen=True)
class PLMS:
    """Linear multistep of up to fourth order (Liu et al., arXiv:2202.09778, eq. 12; Stable Diffusion's default).

    Started by one step of Heun's method, whose second evaluation lies inside the step: n steps take
    n + 1 evaluations, as diffusers' doubled second timestep does. A first step that is also the last,
    to ``last_sigma``, is Euler's.
    """

    last_sigma: float = 0.0

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; remembers three points."""
        here = denoise(x, sigma)
        if history:
            eps = extrapolated(here.eps, [past.eps for past in history])
        elif sigma_next > self.last_sigma:
            euler = x.add(here.eps, alpha=sigma_next - sigma)
            eps = (here.eps + denoise(euler, sigma_next).eps) / 2
        else:
            eps = here.eps
        return x.add(eps, alpha=sigma_next - sigma), (*history[-2:], Past(sigma, here.x, here.x0))


@dataclass(frozen=True)
class PNDM:
    """PLMS started by three steps of fourth-order Runge–Kutta (Liu et al., alg. 2): 9 more evaluations.

    ``training_sigmas`` tells where half a step of training time lies.
    """

    training_sigmas: tuple[float, ...] = field(repr=False)

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; remembers three points."""
        here = denoise(x, sigma)
        if len(history) >= 3:
            eps = extrapolated(here.eps, [past.eps for past in history])
        else:
            middle = self._halfway(sigma, sigma_next)
            second = denoise(x.add(here.eps, alpha=middle - sigma), middle).eps
            third = denoise(x.add(second, alpha=middle - sigma), middle).eps
            fourth = denoise(x.add(third, alpha=sigma_next - sigma), sigma_next).eps
            eps = (here.eps + 2 * second + 2 * third + fourth) / 6
        return x.add(eps, alpha=sigma_next - sigma), (*history[-2:], Past(sigma, here.x, here.x0))

    def _halfway(self, sigma: float, sigma_next: float) -> float:
        now, then = (round(timestep_of(s, self.training_sigmas)) for s in (sigma, sigma_next))
        return self.training_sigmas[now - (now - then) // 2]


def extrapolated(now: Tensor, before: Sequence[Tensor]) -> Tensor:
    """The Adams–Bashforth combination of this estimate and up to three before it, oldest first."""
    weights = ADAMS_BASHFORTH[min(len(before), 3) + 1]
    total = now * weights[0]
    for weight, past in zip(weights[1:], reversed(before), strict=False):
        total.add_(past, alpha=weight)
    return total
