"""Euler's method and its stochastic sibling, which between them are four of diffusers' schedulers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.prediction import Prediction
from ..core.solver import Draw, Evaluate, History
from .multistep import Row


def require_eta(eta: float) -> None:
    """Raise BadInput unless eta is 0 to 1."""
    if not 0.0 <= eta <= 1.0:
        raise BadInput(f"eta goes from 0 (deterministic) to 1 (ancestral), got {eta:g}.")


def ancestral_noise(sigma: float, sigma_next: float, eta: float = 1.0) -> float:
    """The standard deviation of what an ancestral step adds: the posterior's (Ho et al., arXiv:2006.11239, eq. 7), or a part
    of it by DDIM's eta (Song et al., arXiv:2010.02502, eq. 16).
    """
    return min(sigma_next, eta * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2))


@dataclass(frozen=True)
class Euler:
    """One evaluation per step: along the noise estimate to ``sigma_down``, then ``sigma_up`` of new noise.

    In ``x = x0 + sigma * noise`` a first-order step is ``x0 + sigma_next * eps``, and

    - ``eta = 0`` is Euler's method (Karras et al., arXiv:2206.00364, alg. 1 without lines 6–8), which on
      the same sigmas is DDIM (Song et al., arXiv:2010.02502, eq. 12);
    - ``eta = 1`` is ancestral sampling, i.e. DDPM (Ho et al., arXiv:2006.11239, eq. 6–7);
    - between them DDIM's eta (eq. 16 there).

    Args:
        variance: DDPM's choice of posterior variance: "small" (beta-tilde), "large" (beta), or "learned",
            as the network says between the two (Nichol & Dhariwal, arXiv:2102.09672, eq. 15).
    """

    eta: float = 0.0
    variance: Literal["small", "large", "learned"] = "small"
    predicts: ClassVar[str] = "x0"

    def __post_init__(self) -> None:
        require_eta(self.eta)

    def __call__(
        self, denoise: Evaluate, x: Tensor, sigma: float, sigma_next: float, history: History, noise: Draw, /
    ) -> tuple[Tensor, History]:
        """Next x; keeps no history."""
        prediction = denoise(x, sigma)
        if not sigma_next:
            return prediction.x0.clone(), ()
        if not self.eta:
            return prediction.x0.add(prediction.eps, alpha=sigma_next), ()
        small = ancestral_noise(sigma, sigma_next, self.eta)
        down = (sigma_next**2 - small**2) ** 0.5
        mean = prediction.x0.add(prediction.eps, alpha=down)
        if self.variance == "small":
            return mean.add_(noise(sigma, sigma_next), alpha=small), ()
        large = self.eta * ((sigma**2 - sigma_next**2) * (1 + sigma_next**2) / (1 + sigma**2)) ** 0.5
        if self.variance == "large":
            return mean.add_(noise(sigma, sigma_next), alpha=large), ()
        return mean.addcmul_(noise(sigma, sigma_next), _between(small, large, prediction)), ()

    def row(self, sigma: float, sigma_next: float, history: History) -> tuple[Row, tuple[Tensor, ...]] | None:
        """The step's numbers where it is linear and draws nothing (eta 0); it takes no earlier estimates."""
        part = sigma_next / sigma
        return None if self.eta else (Row(part, (1.0 - part,)), ())

    def remembering(self, history: History, sigma: float, here: Prediction) -> History:
        """Nothing."""
        return ()


def _between(small: float, large: float, prediction: Prediction) -> Tensor:
    """The standard deviation that a network gives by a number from -1 (small) to 1 (large)."""
    if prediction.variance is None:
        raise BadInput("This solver takes the variance from the network, but the network gives none: take another solver.")
    share = (prediction.variance + 1) / 2
    return torch.exp(share * math.log(large) + (1 - share) * math.log(small))


DDIM = Euler
"""DDIM(eta): the same integrator on diffusers' timesteps."""


def EulerAncestral(eta: float = 1.0) -> Euler:  # noqa: N802
    """Ancestral Euler (k-diffusion's ``sample_euler_ancestral``)."""
    return Euler(eta)


def DDPM(variance: Literal["small", "large", "learned"] = "small") -> Euler:  # noqa: N802
    """Ancestral sampling with DDPM's choice of variance."""
    return Euler(1.0, variance)
