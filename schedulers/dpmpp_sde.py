"""DPM-Solver++ SDE: two evaluations and one path of noise in every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.solver import Draw, Evaluate, History
from .euler import ancestral_noise, require_eta


@dataclass(frozen=True)
class DPMppSDE:
    """k-diffusion's ``sample_dpmpp_sde``, by Katherine Crowson: DPM-Solver++(2S) with noise in both halves.

    Two ancestral steps from ``x``: one to the middle of the step in log sigma, whose estimate is all that the other
    one, to its end, takes. Both add noise of one Brownian path (``core.noise.Brownian`` has one for a whole run,
    so that a picture stays what it is when the steps are refined). A step to 0 is Euler's.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        require_eta(self.eta)

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        x0 = denoise(x, sigma).x0
        if not sigma_next:
            return x0, ()
        middle = math.sqrt(sigma * sigma_next)
        first = noise(sigma, middle) if self.eta else x
        x0 = denoise(self._step(x, x0, sigma, middle, first), middle).x0
        second = noise(middle, sigma_next) if self.eta else x
        whole = (first * math.sqrt(sigma - middle)).add_(second, alpha=math.sqrt(middle - sigma_next))
        return self._step(x, x0, sigma, sigma_next, whole.div_(math.sqrt(sigma - sigma_next))), ()

    def _step(self, x: Tensor, x0: Tensor, sigma: float, sigma_next: float, unit: Tensor) -> Tensor:
        up = ancestral_noise(sigma, sigma_next, self.eta)
        x = torch.lerp(x0, x, math.sqrt(sigma_next**2 - up**2) / sigma)
        return x.add_(unit, alpha=up) if up else x
